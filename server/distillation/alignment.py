"""Places that mean the same where teacher and student cut one text into different pieces."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.tasks.task import IGNORED, Example

__all__ = ["Pairs", "all_pairs", "matched", "shared_pieces"]

Places = npt.NDArray[np.int64]

# The signs by which WordPiece tells the inside of a word, and Unigram and byte-level BPE its start.
_INSIDE, _STARTS = "##", "\u2581\u0120"


@dataclass(frozen=True)
class Pairs:
    """Places of one text, the teacher's and the student's, that mean the same. Both rise.

    `same` says whether both cut the text alike, so that these are all places. `scored` are the places whose answers
    are compared: with token classification the first piece of each word that both have, with causal-lm every place
    whose next piece is of the answer; with text classification, where a text has one answer, there are none.
    """

    teacher: Places
    student: Places
    same: bool
    scored_teacher: Places
    scored_student: Places


def matched(teacher: Sequence[str], student: Sequence[str]) -> tuple[Places, Places]:
    """Places of equal pieces in the two lists: those of the longest common run, and so on before and after it."""
    if list(teacher) == list(student):
        every = np.arange(len(teacher))
        return every, every
    blocks = difflib.SequenceMatcher(None, teacher, student, autojunk=False).get_matching_blocks()
    first = np.concatenate([np.arange(block.a, block.a + block.size) for block in blocks])
    second = np.concatenate([np.arange(block.b, block.b + block.size) for block in blocks])
    return first.astype(np.int64), second.astype(np.int64)


def all_pairs(
    teacher: tuple[Sequence[Example], PreTrainedTokenizerBase],
    student: tuple[Sequence[Example], PreTrainedTokenizerBase],
    *,
    kind: str,
) -> list[Pairs]:
    """The pairs of every text, from the examples that each tokenizer made of it, for a task of `kind`."""
    their_names, our_names = _names(teacher[1]), _names(student[1])
    return [
        _pairs(one, other, [their_names[i] for i in one.tokens], [our_names[i] for i in other.tokens], kind)
        for one, other in zip(teacher[0], student[0], strict=True)
    ]


def shared_pieces(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Ids of the pieces that both have, in the teacher's and in the student's numbering, in the student's order."""
    known = teacher.get_vocab()
    both = sorted((own, known[piece]) for piece, own in student.get_vocab().items() if piece in known)
    ids = torch.tensor(both, dtype=torch.long).view(-1, 2)
    return ids[:, 1], ids[:, 0]


def _names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The piece of each id without the signs that tell starts from insides, which kinds of tokenizers set apart."""
    pieces = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    return [(piece or "").removeprefix(_INSIDE).lstrip(_STARTS) or piece for piece in pieces]


def _pairs(theirs: Example, ours: Example, their_names: list[str], our_names: list[str], kind: str) -> Pairs:
    first, second = matched(their_names, our_names)
    same = their_names == our_names
    none = np.zeros(0, dtype=np.int64)
    if kind == "text-classification":
        return Pairs(first, second, same, none, none)
    if kind == "causal-lm":
        there = (first < len(their_names) - 1) & (second < len(our_names) - 1)
        answered = np.append(ours.target[1:] != IGNORED, False)
        there &= answered[second]
        return Pairs(first, second, same, first[there], second[there])
    words = cast(Places, theirs.positions), cast(Places, ours.positions)
    there = (words[0] >= 0) & (words[1] >= 0)
    starts = words[0][there].astype(np.int64), words[1][there].astype(np.int64)
    # What reads a word's tag is its first piece, even where the two first pieces are not equal.
    return Pairs(first, second, True, *starts) if same else Pairs(*starts, False, *starts)
