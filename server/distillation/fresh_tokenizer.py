"""A tokenizer of the domain's own, trained on its text, for a student that starts from scratch.

Any text comes back from its pieces: BPE works on bytes, Unigram falls back to characters and then to bytes, so that a
formula or another script never becomes an unknown piece. Texts are put into Unicode form NFC alone: NFKC would make
"H2SO4" of "H₂SO₄".
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, Literal, cast

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from server.distillation.pieces import Text, rewrapped, with_new_ids
from server.distillation.term_search import has_han
from server.distillation.terms import new_terms, with_terms

__all__ = ["train_tokenizer"]

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MOST = 8000


def train_tokenizer(
    texts: Sequence[Text],
    *,
    kind: Literal["bpe", "unigram"],
    pieces: int | None,
    terms: Sequence[str] = (),
    like: PreTrainedTokenizerBase,
) -> PreTrainedTokenizerBase:
    """A tokenizer of `pieces` pieces, `terms` and the special tokens of `like` among them.

    None: 8,000, or as many as the texts give. Of the terms, those that are a piece already are not added again.

    kind "bpe": byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2). kind "unigram": a unigram
    language model over pieces (Kudo 2018, section 3.2), with a space written as part of the word after it. The special
    tokens, their places around a text, longest input and chat template are those of `like`.

    Raises:
        DistillationError: the texts are too few for so many pieces, or the pieces too few for the alphabet.
    """
    # A task that cuts words apart shows the tokenizer one word at a time, without the space before it.
    rows = [row for text in texts for row in ([text] if isinstance(text, str) else text)]
    if not any(row.strip() for row in rows):
        raise DistillationError("the corpus has no text; a tokenizer is trained on text of the domain: give more")
    room = (MOST if pieces is None else pieces) - len(terms)
    backend = _byte_pairs(rows, room, like) if kind == "bpe" else _unigram(rows, room, like)
    found = backend.get_vocab_size()
    if pieces is not None and found < room:
        raise DistillationError(
            f"the corpus is too small for a tokenizer of {pieces} pieces: its {len(texts)} texts give"
            f" {found + len(terms)}, terms with them; give more text, or set distillation.vocabulary to at most"
            f" {found + len(terms)}"
        )
    _post_process(backend, like)
    made = rewrapped(backend, like)
    return with_terms(made, new_terms(made, terms)) if terms else made


def _special_tokens(like: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens of `like` in the order of their ids; its other added tokens are terms, and not taken over."""
    added: dict[int, Any] = cast(Any, like).added_tokens_decoder
    roles = set(like.all_special_tokens)
    return [str(added[index]) for index in sorted(added) if added[index].special or str(added[index]) in roles]


def _byte_pairs(rows: Sequence[str], pieces: int, like: PreTrainedTokenizerBase) -> Tokenizer:
    special = _special_tokens(like)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _check_room(pieces, len(alphabet) + len(special), "special tokens and bytes")
    backend = Tokenizer(models.BPE())
    made = cast(Any, backend)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=special, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    backend.train_from_iterator(rows, trainer)
    return backend


def _unigram(rows: Sequence[str], pieces: int, like: PreTrainedTokenizerBase) -> Tokenizer:
    unknown = str(like.unk_token or "<unk>")
    head = list(dict.fromkeys([*_special_tokens(like), unknown]))
    _check_room(pieces, len(head) + len(_BYTES) + 1, "special tokens and bytes")
    backend = Tokenizer(models.Unigram())
    made = cast(Any, backend)
    made.normalizer = normalizers.NFC()
    # Where words have spaces the first one is written like the others; Chinese would get a lone sign for nothing.
    first: Literal["first", "never"] = "never" if 2 * sum(map(has_han, rows)) > len(rows) else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=first)])
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces - len(_BYTES),
        special_tokens=head,
        unk_token=unknown,
        max_piece_length=16,
        show_progress=False,
    )
    characters = len({sign for row in rows for sign in row if not sign.isspace()}) + 1
    # The library's trainer ends in an exception of its own where its pieces cannot hold every character.
    _check_room(pieces, len(head) + len(_BYTES) + characters, "special tokens, bytes and the characters of the corpus")
    backend.train_from_iterator(rows, trainer)
    # The trainer knows no bytes: they are put in behind the special tokens, each as unlikely as the rarest piece.
    spec = json.loads(backend.to_str())
    vocab = spec["model"]["vocab"]
    if len(vocab) + len(_BYTES) > pieces:
        _check_room(pieces, len(vocab) + len(_BYTES), "special tokens, bytes and the characters of the corpus")
    worst = min(score for _, score in vocab)
    spec["model"] |= {
        "vocab": [*vocab[: len(head)], *([byte, worst] for byte in _BYTES), *vocab[len(head) :]],
        "unk_id": head.index(unknown),
        "byte_fallback": True,
    }
    return Tokenizer.from_str(json.dumps(spec))


def _check_room(pieces: int, needed: int, what: str) -> None:
    if pieces <= needed:
        raise DistillationError(
            f"distillation.vocabulary must be above {needed}, which {what} take, found {pieces} pieces beside the"
            " terms; ask for more pieces or fewer terms"
        )


def _post_process(backend: Tokenizer, like: PreTrainedTokenizerBase) -> None:
    """Put the special tokens around a text that `like` puts there."""
    theirs = json.loads(cast(Any, like).backend_tokenizer.to_str())["post_processor"]
    if theirs is None:
        return
    spec = json.loads(backend.to_str())
    spec["post_processor"] = copy.deepcopy(theirs)
    ids = backend.get_vocab(with_added_tokens=True)
    with_new_ids(spec, ids.__getitem__)
    cast(Any, backend).post_processor = Tokenizer.from_str(json.dumps(spec)).post_processor
