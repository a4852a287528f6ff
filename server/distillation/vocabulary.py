"""A vocabulary of the domain: the pieces that public text of it uses, and a network with only their rows.

Counts come from public text alone: a count of private text tells its words.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, with_rows
from server.distillation.pieces import Pieces, Text, encode_all, rewrapped

__all__ = ["Coverage", "Trimmed", "apply_vocabulary", "measure_coverage", "trim"]

# Every tenth text is held out to find how many pieces are enough.
_HELD_OUT = 10

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trimmed:
    """A tokenizer of fewer pieces; `kept[new id]` is the old id."""

    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How well a smaller vocabulary does on text that it was not counted on."""

    occurrences: float
    """share of the original tokenizer's tokens whose piece is still there"""
    unknown: float
    """share of the new tokenizer's tokens that are the unknown piece"""
    length_factor: float
    """tokens of the new tokenizer for each token of the original one"""
    identical: float
    """share of the texts that are cut into the same pieces as before"""
    pieces: int
    """size of the new vocabulary, added tokens with it"""


def trim(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    pieces: int | None,
    coverage: float,
    least: int = 5000,
    most: int = 8000,
    fill: int = 0,
    keep: Collection[str] = (),
    characters: Literal["all", "seen"] = "all",
) -> Trimmed:
    """The tokenizer with the `pieces` pieces that occur most in `texts`, those counted that every text needs.

    None: as many as cover the share `coverage` of the tokens of held-out texts, at least `least` of which the texts use
    (or all of them), and at most `most` together; up to `fill` the tokenizer's first pieces join them, which are those
    of text in general, for words of the domain that the corpus is too small to hold. Pieces of the texts `keep` stay.
    Text whose pieces all stay is cut as before; other text is cut into smaller pieces, never into unknown ones where it
    had none. characters="seen" gives the last up for characters beyond ASCII that `texts` lack (BERT's vocabulary has
    over a thousand).

    Two passes: what is left out falls apart into smaller pieces, and these are counted too before the last choice.

    Raises:
        DistillationError: the texts hold too few pieces for the wish, or the wish is below what every text needs.
    """
    if not any(texts):
        raise DistillationError("the corpus has no text; a vocabulary is counted on at least two texts: give more")
    table = Pieces(tokenizer)
    needed = table.required(characters=characters == "all")
    for row in encode_all(tokenizer, list(keep)):
        needed.update(row)
    for index in list(needed):
        needed |= table.with_parts(index)
    if pieces is not None:
        wanted = min(pieces, len(table))
        if wanted < len(needed):
            raise DistillationError(
                f"distillation.vocabulary must be at least {len(needed)}, which special tokens and single characters"
                f" take, found {pieces}; ask for more pieces"
            )
        chosen = _choice(tokenizer, table, texts, _count(tokenizer, texts, table), needed, wanted)
        if len(chosen) < wanted:
            raise DistillationError(
                f"the corpus is too small for a vocabulary of {pieces} pieces: its {len(texts)} texts hold"
                f" {len(chosen)}, with those that every text needs; give more text, or set distillation.vocabulary ="
                f" 'auto' or at most {len(chosen)}"
            )
    else:
        wanted = _enough(tokenizer, table, texts, needed, coverage=coverage, least=least, most=most)
        chosen = _choice(tokenizer, table, texts, _count(tokenizer, texts, table), needed, wanted)
        chosen = _filled(table, chosen, fill)
    backend, kept = table.reduced(chosen)
    return Trimmed(rewrapped(backend, tokenizer), kept)


def apply_vocabulary(model: DomainModel, trimmed: Trimmed) -> DomainModel:
    """The model with the trimmed tokenizer: rows of its embedding and of its output head, tied or not, in that order.

    Where a text's pieces all stayed, it computes the same as before.

    Raises:
        DistillationError: the tokenizer was not trimmed from this model's.
    """
    rows = embedding_of(model.network).num_embeddings
    if max(trimmed.kept) >= rows:
        raise DistillationError(
            f"the vocabulary does not fit the model: it keeps id {max(trimmed.kept)} of {rows} rows; trim the model's"
            " own tokenizer"
        )
    new = {old: index for index, old in enumerate(trimmed.kept)}
    network = with_rows(model.network, lambda tensor: tensor[list(trimmed.kept)], new.get)
    return DomainModel(network.eval(), trimmed.tokenizer, model.manifest)


def measure_coverage(
    original: PreTrainedTokenizerBase, trimmed_tokenizer: PreTrainedTokenizerBase, held_out_texts: Sequence[Text]
) -> Coverage:
    """What the smaller vocabulary costs on held-out text, by the pieces' names."""
    if not held_out_texts:
        raise DistillationError("coverage is measured on at least one text, found none; hold some text out")
    there, unknown_id = trimmed_tokenizer.get_vocab(), trimmed_tokenizer.unk_token_id
    before = after = found = unknown = same = 0
    olds, news = encode_all(original, held_out_texts), encode_all(trimmed_tokenizer, held_out_texts)
    for old, new in zip(olds, news, strict=True):
        names = original.convert_ids_to_tokens(old)
        before, after = before + len(old), after + len(new)
        found += sum(name in there for name in names)
        unknown += 0 if unknown_id is None else new.count(unknown_id)
        same += names == trimmed_tokenizer.convert_ids_to_tokens(new)
    return Coverage(
        occurrences=found / max(before, 1),
        unknown=unknown / max(after, 1),
        length_factor=after / max(before, 1),
        identical=same / len(held_out_texts),
        pieces=len(trimmed_tokenizer),
    )


def _enough(
    tokenizer: PreTrainedTokenizerBase,
    table: Pieces,
    texts: Sequence[Text],
    needed: set[int],
    *,
    coverage: float,
    least: int,
    most: int,
) -> int:
    """How many pieces cover `coverage` of the tokens of every tenth text when chosen by the others."""
    counted = [text for index, text in enumerate(texts) if index % _HELD_OUT]
    if not counted:
        raise DistillationError(
            f"the corpus is too small for a vocabulary: it needs at least 2 texts, found {len(texts)}; give more text"
        )
    most = max(min(most, len(table)), len(needed))
    counts = _count(tokenizer, counted, table)
    chosen = _choice(tokenizer, table, counted, counts, needed, most)
    held_out = _count(tokenizer, texts[::_HELD_OUT], table)
    covered = np.cumsum(held_out[chosen]) / max(int(held_out.sum()), 1)
    reached = np.flatnonzero(covered >= coverage)
    if len(reached):
        used = int(np.searchsorted(np.cumsum(counts[chosen] > 0), least)) + 1
        enough = max(int(reached[0]) + 1, used, len(needed))
        return enough if enough < len(chosen) else most  # all that there is: those of the held-out texts too
    if len(chosen) < most:
        raise DistillationError(
            f"the corpus is too small for a vocabulary: all pieces of its {len(texts)} texts together cover"
            f" {float(covered[-1]):.1%} of held-out text, distillation.coverage asks for {coverage:.1%}; give more text"
            " or lower the coverage"
        )
    return most


def _choice(
    tokenizer: PreTrainedTokenizerBase,
    table: Pieces,
    texts: Sequence[Text],
    counts: Counts,
    needed: set[int],
    wanted: int,
) -> list[int]:
    """At most `wanted` ids: those needed, then by count with the pieces that they are made of."""
    first = _by_count(table, counts, needed, wanted)
    left_out = {int(index) for index in np.flatnonzero(counts)} - set(first)
    if not left_out:
        return first
    # The second pass: without what was left out, with every smaller piece that may stand in for it.
    stand_ins = set(first)
    if table.kind == "BPE":
        for index in left_out:
            stand_ins |= table.with_parts(index) - {index}
        for index in list(stand_ins):
            stand_ins |= table.with_parts(index)
    else:
        stand_ins = set(table.names) - left_out
    backend, kept = table.reduced(stand_ins)
    again = np.zeros_like(counts)
    again[list(kept)] = _count_ids(rewrapped(backend, tokenizer), texts, len(kept))
    return _by_count(table, np.maximum(counts, again), needed, wanted)


def _by_count(table: Pieces, counts: Counts, needed: set[int], wanted: int) -> list[int]:
    chosen, inside = sorted(needed), set(needed)
    # Of equal counts the lower id, which is the older and more general piece.
    for index in np.argsort(-counts, kind="stable"):
        if not counts[index] or len(chosen) >= wanted:
            break
        more = sorted(table.with_parts(int(index)) - inside)
        if len(chosen) + len(more) <= wanted:
            chosen += more
            inside.update(more)
    return chosen


def _filled(table: Pieces, chosen: list[int], size: int) -> list[int]:
    """With the first words of the vocabulary until there are `size` pieces; its makers put usual ones in front."""
    made, inside = list(chosen), set(chosen)
    for index in sorted(table.names):
        if len(made) >= size:
            break
        if table.is_word(index):
            more = sorted(table.with_parts(index) - inside)
            if len(made) + len(more) <= size:
                made += more
                inside.update(more)
    return made


def _count(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], table: Pieces) -> Counts:
    return _count_ids(tokenizer, texts, max(table.names) + 1)


def _count_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], size: int) -> Counts:
    counts = np.zeros(size, dtype=np.int64)
    for row in encode_all(tokenizer, texts):
        np.add.at(counts, row, 1)
    return counts
