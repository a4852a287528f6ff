"""What the teacher says of each text: computed once and kept, where memory allows."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.models import PooledClassifier, pool
from common.tasks.task import Batch, Example
from server.distillation.alignment import Pairs
from server.distillation.blocks import config_of
from server.distillation.domain_model import DomainModel

__all__ = ["Lesson", "Lessons", "in_parts", "pooled", "watched"]

# Lessons beyond this many bytes are computed anew in each pass.
MOST_BYTES = 2**30
HALF = 2
# Logits of one forward pass, 4 bytes each.
MOST_LOGITS = 2**26


@dataclass(frozen=True)
class Lesson:
    """Of one text, in 16 bits: `answers` [scored places, classes] (of text classification one row), `states`
    [blocks, aligned places, width], and `whole` [width], what a text classifier's head reads, where the two cut the
    text differently."""

    answers: Tensor
    states: Tensor
    whole: Tensor | None


class Lessons:
    """The teacher's lessons by number of the text.

    `blocks` are those whose states are taught, `columns` the answers that are (None: all of them).
    """

    def __init__(
        self,
        teacher: DomainModel,
        examples: Sequence[Example],
        pairs: Sequence[Pairs],
        *,
        blocks: Sequence[nn.Module],
        columns: Tensor | None,
        half: bool,
    ) -> None:
        self._teacher, self._examples, self._pairs = teacher, examples, pairs
        self._blocks, self._columns, self._half = blocks, columns, half
        self._task = teacher.task
        self._one_answer = teacher.manifest.task.kind == "text-classification"
        self._kept: dict[int, Lesson] | None = {} if self._bytes() <= MOST_BYTES else None

    def _bytes(self) -> int:
        task = self._teacher.manifest.task
        classes = {"text-classification": len(task.labels), "token-classification": len(task.tags)}.get(task.kind)
        if classes is None:
            classes = int(config_of(self._teacher.network).vocab_size) if self._columns is None else len(self._columns)
        states = sum(len(pairs.teacher) for pairs in self._pairs) * int(config_of(self._teacher.network).hidden_size)
        rows = sum(1 if self._one_answer else len(pairs.scored_teacher) for pairs in self._pairs)
        return HALF * (states * len(self._blocks) + rows * classes)

    def of(self, texts: Sequence[int]) -> list[Lesson]:
        """The lessons of these texts."""
        if self._kept is None:
            return self._said(texts)
        fresh = [text for text in texts if text not in self._kept]
        if fresh:
            self._kept |= dict(zip(fresh, self._said(fresh), strict=True))
        return [self._kept[text] for text in texts]

    def _said(self, texts: Sequence[int]) -> list[Lesson]:
        return [
            lesson for part in in_parts(texts, self._examples, self._teacher) for lesson in self._said_of_part(part)
        ]

    def _said_of_part(self, texts: Sequence[int]) -> list[Lesson]:
        batch = self._task.collate([self._examples[text] for text in texts], torch.device("cpu"))
        half = torch.autocast("cpu", torch.bfloat16, enabled=self._half)
        with torch.no_grad(), half, watched(self._blocks) as states:
            output: Any = self._teacher.network(**batch.inputs())
        whole = pooled(self._teacher.network, states[-1], batch) if self._one_answer and states else None
        lessons = []
        for row, text in enumerate(texts):
            pairs = self._pairs[text]
            answers = output[row : row + 1] if self._one_answer else output.logits[row, pairs.scored_teacher]
            answers = answers if self._columns is None else answers[:, self._columns]
            kept = [state[row, pairs.teacher].bfloat16() for state in states]  # some bases' states are above 65504
            vector = None if whole is None or pairs.same else whole[row].bfloat16()
            lessons.append(Lesson(answers.half(), torch.stack(kept) if kept else torch.zeros(0), vector))
        return lessons


def in_parts(texts: Sequence[int], examples: Sequence[Example], model: DomainModel) -> Iterator[Sequence[int]]:
    """The texts in as few parts as their logits fit in; only those of a causal model, one a piece, are that many."""
    size = len(texts)
    if model.manifest.task.kind == "causal-lm" and size:
        longest = max(len(examples[text].tokens) for text in texts)
        size = max(1, MOST_LOGITS // (longest * int(config_of(model.network).vocab_size)))
    yield from (texts[start : start + size] for start in range(0, len(texts), max(1, size)))


def pooled(network: nn.Module, last: Tensor, batch: Batch) -> Tensor:
    """The vectors [records, width] that a text classifier's head reads, from its last block's states."""
    return pool(last, batch.attention_mask, cast(PooledClassifier, network).pooling)


@contextlib.contextmanager
def watched(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The output of each block [records, tokens, width] in one forward pass, in the blocks' order.

    The library's own `output_hidden_states` leaves a function behind in the model that cannot be copied.
    """
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
