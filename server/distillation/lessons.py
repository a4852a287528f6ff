"""What the teacher says about each text of a corpus: computed once and kept where memory allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.tasks.task import Example
from server.distillation.blocks import config_of
from server.distillation.domain_model import DomainModel
from server.distillation.losses import HiddenStates, Pairs, pooled

__all__ = ["Lesson", "Lessons"]

# Largest memory for what the teacher says, bytes; beyond it everything is computed anew in each epoch.
_MOST_BYTES = 2**30
_HALF = 2


@dataclass(frozen=True)
class Lesson:
    """Of one text: `logits` [rows, classes], `hidden` [layers + 1, places, width], `pooled` [width] or None.

    Rows are one for text classification, the scored places of token classification, and of causal-lm all aligned
    places but the last. Places are the aligned ones.
    """

    logits: Tensor
    hidden: Tensor
    pooled: Tensor | None


class Lessons:
    """The teacher's lessons by index of the text, in half precision.

    `layers` are the teacher's blocks whose states are taught, `columns` the logits that are (None: all), and
    `scored[i]` the teacher's places of text i whose logits are (None: the text's own, in text classification).
    """

    def __init__(
        self,
        teacher: DomainModel,
        examples: Sequence[Example],
        pairs: Sequence[Pairs],
        scored: Sequence[np.ndarray] | None,
        *,
        layers: Sequence[int],
        columns: Tensor | None,
        half: bool,
    ) -> None:
        self._teacher, self._examples, self._pairs, self._scored = teacher, examples, pairs, scored
        self._layers, self._columns, self._half = layers, columns, half
        self._device = next(teacher.network.parameters()).device
        self._task = teacher.task
        self._kept: dict[int, Lesson] | None = {} if self._size() <= _MOST_BYTES else None

    def _size(self) -> int:
        """Bytes of all lessons."""
        config = config_of(self._teacher.network)
        classes = int(config.vocab_size) if self._columns is None else len(self._columns)
        if self._teacher.manifest.task.kind != "causal-lm":
            classes = max(len(self._teacher.manifest.task.tags), len(self._teacher.manifest.task.labels))
        places = sum(len(pair.teacher) for pair in self._pairs)
        rows = len(self._pairs) if self._scored is None else sum(map(len, self._scored))
        return _HALF * (places * int(config.hidden_size) * (len(self._layers) + 1) + rows * classes)

    def of(self, texts: Sequence[int]) -> list[Lesson]:
        """The lessons of these texts."""
        if self._kept is None:
            return self._said(texts)
        fresh = [text for text in texts if text not in self._kept]
        if fresh:
            self._kept |= dict(zip(fresh, self._said(fresh), strict=True))
        return [self._kept[text] for text in texts]

    def _said(self, texts: Sequence[int]) -> list[Lesson]:
        network = self._teacher.network
        batch = self._task.collate([self._examples[text] for text in texts], self._device)
        caught = HiddenStates(network, self._layers)
        try:
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                output: Any = network(**batch.inputs())
        finally:
            caught.close()
        states = caught.taken()
        whole = pooled(network, states[-1], batch) if self._scored is None else None
        logits = output if self._scored is None else output.logits
        lessons = []
        for row, text in enumerate(texts):
            said = logits[row : row + 1] if self._scored is None else logits[row, self._scored[text]]
            said = said if self._columns is None else said[:, self._columns]
            hidden = torch.stack([state[row, self._pairs[text].teacher] for state in states])
            vector = None if whole is None or self._pairs[text].same else whole[row].half()
            lessons.append(Lesson(said.half(), hidden.half(), vector))
        return lessons
