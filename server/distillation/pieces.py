"""The pieces of a tokenizer: which must stay, what each is made of, and the same tokenizer with fewer of them.

Knows WordPiece, BPE (of bytes or of characters) and Unigram; knows nothing of counts. Ids are those of the tokenizer.
"""

import copy
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import DistillationError

__all__ = ["Pieces", "Text", "encode_all", "rewrapped", "with_new_ids"]

Text = str | Sequence[str]
"""A text, or the words of one where the task cuts words apart (token classification)."""

_SPACE = "\u2581"  # how SentencePiece writes a space
_BATCH = 1000


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> Iterator[list[int]]:
    """The ids of each text in order, whole and without special tokens; all are plain texts, or all are words."""
    for start in range(0, len(texts), _BATCH):
        rows: Any = [text if isinstance(text, str) else list(text) for text in texts[start : start + _BATCH]]
        encoding = tokenizer(
            rows,
            add_special_tokens=False,
            is_split_into_words=not isinstance(rows[0], str),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from encoding["input_ids"]


def rewrapped(backend: Tokenizer, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`backend` with the special tokens' roles, longest input, sides and chat template of `like`.

    The plain class, since the library's classes for one architecture build their own backend when they are read back.
    """
    options: dict[str, Any] = {
        "model_max_length": like.model_max_length,
        "padding_side": like.padding_side,
        "truncation_side": like.truncation_side,
        "model_input_names": like.model_input_names,
        "clean_up_tokenization_spaces": like.clean_up_tokenization_spaces,
        "split_special_tokens": like.split_special_tokens,
    }
    if like.chat_template is not None:
        options["chat_template"] = like.chat_template
    roles = {role: str(token) for role, token in like.special_tokens_map.items() if isinstance(token, str)}
    extra = [str(token) for token in getattr(like, "extra_special_tokens", None) or []]
    if extra:
        options["extra_special_tokens"] = extra
    return cast(PreTrainedTokenizerBase, PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **options))


_FREE = re.compile(r"\[unused\d+\]|<unused\d+>|<0x[0-9A-F]{2}>")


class Pieces:
    """The vocabulary of one tokenizer, taken apart.

    Raises:
        DistillationError: the tokenizer is of a kind that has no pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DistillationError(
                f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json; give a base with a fast tokenizer"
            )
        self._backend = backend
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = self._spec["model"]
        self.kind: str = self._model.get("type") or "none"
        if self.kind not in ("WordPiece", "BPE", "Unigram"):
            raise DistillationError(
                f"a vocabulary is trimmed for WordPiece, BPE and Unigram tokenizers, this one is {self.kind};"
                " set distillation.vocabulary = 'keep'"
            )
        vocab = self._model["vocab"]
        self._ids: dict[str, int] = (
            {piece: index for index, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)
        )
        self._added: dict[str, int] = {token["content"]: token["id"] for token in self._spec["added_tokens"]}
        self.names: dict[int, str] = {index: piece for piece, index in (self._ids | self._added).items()}
        self._steps = self._merge_steps() if self.kind == "BPE" else {}

    def __len__(self) -> int:
        return len(self.names)

    def id_of(self, piece: str) -> int | None:
        """The id of a piece or added token, None where there is none."""
        return self._added.get(piece, self._ids.get(piece))

    def is_word(self, index: int) -> bool:
        """Whether a piece is several characters of text: no single character, added token or place kept free."""
        piece = self.names[index]
        lead = self._model.get("continuing_subword_prefix") or ""
        body = piece.removeprefix(lead) if lead else piece
        return len(body) > 1 and piece not in self._added and not _FREE.fullmatch(piece)

    def required(self, *, characters: bool) -> set[int]:
        """Ids without which some text could not be written as before.

        Added and special tokens, the unknown piece, bytes where the tokenizer has them, and single characters:
        `characters` False asks only for those of ASCII, and text with others that are not kept becomes unknown.
        """
        wanted = set(self._added.values())
        unknown = self._model.get("unk_token")
        if unknown in self._ids:
            wanted.add(self._ids[unknown])
        if self.kind == "Unigram":
            if self._model.get("unk_id") is not None:
                wanted.add(int(self._model["unk_id"]))
            # An unknown character costs 10 less than the worst piece; that piece stays, and with it the cost.
            scores = [score for _, score in self._model["vocab"]]
            wanted.add(min(range(len(scores)), key=scores.__getitem__))
        return wanted | self._alphabet(characters=characters)

    def with_parts(self, index: int) -> set[int]:
        """The id and those of the pieces that it is put together from; for BPE alone these are more than itself.

        A piece is part of an encoding only if BPE applied to the piece alone gives it: no merge crosses the borders of
        a piece that stays, so inside it the merges are the same. What comes up on that way is what it needs.
        """
        piece = self.names[index]
        found = {index}
        if self.kind != "BPE" or piece in self._added:
            return found
        symbols = self._symbols(piece)
        if not all(symbol in self._ids for symbol in symbols):
            return found
        way = {self._ids[symbol] for symbol in symbols}
        while len(symbols) > 1:
            ranked = [self._steps.get(pair, (len(self._steps), "")) for pair in itertools.pairwise(symbols)]
            place = min(range(len(ranked)), key=lambda at: ranked[at][0])
            if not ranked[place][1]:
                return found  # found only by looking a whole word up; no merges lead to it
            symbols[place : place + 2] = [ranked[place][1]]
            way.add(self._ids[symbols[place]])
        return found | way

    def reduced(self, keep: Collection[int]) -> tuple[Tokenizer, tuple[int, ...]]:
        """The tokenizer of the ids `keep` alone, and the old id of each new one, in the old order."""
        kept = tuple(sorted(keep))
        new = {self.names[old]: index for index, old in enumerate(kept)}
        spec = copy.deepcopy(self._spec)
        model = spec["model"]
        if self.kind == "Unigram":
            model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[self._model["vocab"][model["unk_id"]][0]]
        else:
            model["vocab"] = {piece: new[piece] for piece in self._ids if piece in new}
        if self.kind == "BPE":
            vocab = model["vocab"]
            model["merges"] = [
                list(pair) for pair, (_, made) in self._steps.items() if made in vocab and vocab.keys() >= {*pair}
            ]
        with_new_ids(spec, new.__getitem__)
        backend = Tokenizer.from_str(json.dumps(spec))
        if backend.get_vocab(with_added_tokens=True) != new:
            raise DistillationError(
                f"the {self.kind} tokenizer cannot be trimmed: its added tokens have ids that the library does not"
                " give again; set distillation.vocabulary = 'keep'"
            )
        return backend, kept

    def _merge_steps(self) -> dict[tuple[str, str], tuple[int, str]]:
        """Rank and product of each merge, in the order of ranks."""
        lead = len(self._model.get("continuing_subword_prefix") or "")
        steps = {}
        for rank, merge in enumerate(self._model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            steps[left, right] = (rank, left + right[lead:])
        return steps

    def _symbols(self, piece: str) -> list[str]:
        """The characters that BPE starts a piece from, with the marks of its kind."""
        lead = self._model.get("continuing_subword_prefix") or ""
        tail = self._model.get("end_of_word_suffix") or ""
        inner = bool(lead) and piece.startswith(lead)
        ended = bool(tail) and piece.endswith(tail) and piece != tail
        body = piece[len(lead) if inner else 0 : len(piece) - len(tail) if ended else None]
        symbols = [character if at == 0 and not inner else lead + character for at, character in enumerate(body)]
        if ended:
            symbols[-1] += tail
        return symbols

    def _alphabet(self, *, characters: bool) -> set[int]:
        """Bytes or single characters, whichever the tokenizer falls back to in the end."""
        if self.kind == "BPE" and _mentions(self._spec.get("pre_tokenizer"), "ByteLevel"):
            return {self._ids[sign] for sign in pre_tokenizers.ByteLevel.alphabet() if sign in self._ids}
        in_bytes = bool(self._model.get("byte_fallback"))
        spelled = {f"<0x{byte:02X}>" for byte in range(256)} if in_bytes else set()
        lead = self._model.get("continuing_subword_prefix") or ""
        tail = self._model.get("end_of_word_suffix") or ""
        single: set[str] = set()
        for piece in self._ids:
            character = piece.removeprefix(lead).removesuffix(tail) if len(piece) > 1 else piece
            if len(character) == 1 and self._reachable(character, inner=bool(lead) and piece != character):
                single.add(piece)
        if characters and not in_bytes:
            spelled |= single | self._not_spelled_by(single)
        else:
            spelled |= {piece for piece in single if piece.removeprefix(lead)[:1].isascii() or piece == _SPACE}
        return {self._ids[piece] for piece in spelled if piece in self._ids}

    def _reachable(self, character: str, *, inner: bool) -> bool:
        """Whether text can make a character's piece at all: BERT parts CJK and punctuation, so '##!' never comes up."""
        if self.kind != "WordPiece":
            return True
        if not inner:
            return character in self._words(character)
        return any(
            neighbour + character in self._words(neighbour + character) for neighbour in ("a", "1", ".", character)
        )

    def _words(self, text: str) -> list[str]:
        normalizer, splitter = cast(Any, self._backend.normalizer), cast(Any, self._backend.pre_tokenizer)
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]

    def _not_spelled_by(self, single: Collection[str]) -> set[str]:
        """Pieces with a character that has no piece of its own; none in the usual vocabularies."""
        if self.kind == "BPE":
            return set()  # each is merged from single characters
        lead = self._model.get("continuing_subword_prefix") or ""
        plain = {piece.removeprefix(lead) for piece in self._ids if len(piece.removeprefix(lead)) == 1}
        return {
            piece
            for piece in self._ids
            if piece not in self._added and not plain.issuperset(piece.removeprefix(lead) if lead else piece)
        }


def with_new_ids(spec: dict[str, Any], new: Callable[[str], int]) -> None:
    """Put the new ids of added tokens, padding and post-processor into a tokenizer.json, in place."""
    for token in spec["added_tokens"]:
        token["id"] = new(token["content"])
    if spec.get("padding"):
        spec["padding"]["pad_id"] = new(spec["padding"]["pad_token"])
    if spec.get("post_processor"):
        _renumber(spec["post_processor"], new)


def _renumber(processor: dict[str, Any], new: Callable[[str], int]) -> None:
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    for end in ("sep", "cls"):  # BertProcessing and RobertaProcessing
        if isinstance(processor.get(end), list):
            processor[end] = [processor[end][0], new(processor[end][0])]
    tokens: Mapping[str, dict[str, Any]] = processor.get("special_tokens") or {}
    for entry in tokens.values():  # TemplateProcessing
        entry["ids"] = [new(token) for token in entry["tokens"]]


def _mentions(part: Any, kind: str) -> bool:
    """Whether a part of tokenizer.json is of a kind, or is a sequence with one that is."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)
