"""Knowledge distillation: a student learns what its teacher says about public text."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.config.distillation import DistillationSection
from common.errors import DistillationError, NotFiniteLoss
from common.models import precision
from common.randomness import seed_dropout, seeded
from common.tasks.task import Batch, Example
from server.distillation.blocks import block_list, config_of
from server.distillation.corpus import Corpus, encode
from server.distillation.domain_model import DomainModel
from server.distillation.lessons import Lesson, Lessons
from server.distillation.losses import (
    HiddenStates,
    Pairs,
    aligned,
    hidden_loss,
    names_of,
    places,
    pooled,
    shared_pieces,
    softened_loss,
)
from server.distillation.student import choose_layers

__all__ = ["Progress", "distil"]

_WARMUP = 0.1
_WEIGHT_DECAY = 0.01
_MAX_NORM = 1.0
# Most logits of a causal model in one forward pass; a batch with more is taken in parts.
_MOST_LOGITS = 2**25


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimiser steps done and to do, and the last step's loss."""

    step: int
    steps: int
    loss: float


def distil(
    teacher: DomainModel,
    student: DomainModel,
    corpus: Corpus,
    settings: DistillationSection,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> DomainModel:
    """A trained copy of the student.

    The loss of a text is T^2 KL(teacher || student) at temperature T (Hinton et al. 2015), plus `hidden_weight` times
    the distance of hidden states (Jiao et al. 2020), plus, where the text has a label, `label_weight` times the task's
    loss. Blocks of the student are compared with evenly spaced ones of the teacher, through a linear map that is
    trained along and thrown away where widths differ. AdamW, linear warm-up over a tenth of the steps, then linear to
    zero. Equal seeds give equal students on the same machine.

    Raises:
        DistillationError: teacher and student do different tasks.
        NotFiniteLoss: the loss became NaN or infinite.
    """
    if teacher.manifest.task != student.manifest.task:
        raise DistillationError(
            f"the teacher does {teacher.manifest.task.kind} and the student {student.manifest.task.kind}, or their"
            " labels differ; a student learns its teacher's own task"
        )
    return _Course(teacher, student, corpus, settings).run(on_progress)


class _Course:
    """One training: student, lessons and optimiser."""

    def __init__(
        self, teacher: DomainModel, student: DomainModel, corpus: Corpus, settings: DistillationSection
    ) -> None:
        self.settings, self.corpus = settings, corpus
        self.device = next(teacher.network.parameters()).device
        self.half = precision(teacher.manifest.training.precision, self.device) == "bf16"
        network = copy.deepcopy(student.network).to(self.device).requires_grad_(True)
        for module in network.modules():  # few steps on few texts: dropout slows them down
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                cast(Any, module).attention_dropout = 0.0
        self.student = DomainModel(network.train(), student.tokenizer, student.manifest)
        self.task, self.kind = self.student.task, student.manifest.task.kind
        self.examples = encode(student, corpus.records)
        theirs = encode(teacher, corpus.records)
        self.pairs = _all_pairs(theirs, self.examples, teacher.tokenizer, student.tokenizer)
        self.scored = (
            None
            if self.kind == "text-classification"
            else [
                _scored(*two, causal=self.kind == "causal-lm")
                for two in zip(theirs, self.examples, self.pairs, strict=True)
            ]
        )
        mine, depth = len(block_list(network)), len(block_list(teacher.network))
        taught = min(mine, depth)
        self.own_layers = choose_layers(mine, taught)
        columns = None
        self.columns = None
        if self.kind == "causal-lm":
            columns, self.columns = (ids.to(self.device) for ids in shared_pieces(teacher.tokenizer, student.tokenizer))
        self.lessons = Lessons(
            teacher,
            theirs,
            self.pairs,
            None if self.scored is None else [said for said, _ in self.scored],
            layers=choose_layers(depth, taught),
            columns=columns,
            half=self.half,
        )
        widths = int(config_of(network).hidden_size), int(config_of(teacher.network).hidden_size)
        seed_dropout(settings.seed, "distillation")  # torch draws the maps' first weights
        maps: list[nn.Module] = [
            nn.Linear(*widths, bias=False) if widths[0] != widths[1] else nn.Identity() for _ in range(taught + 1)
        ]
        self.maps = nn.ModuleList(maps).to(self.device)
        self.trained = [*network.parameters(), *self.maps.parameters()]

    def run(self, on_progress: Callable[[Progress], None] | None) -> DomainModel:
        size = self.settings.batch_size
        steps = self.settings.epochs * math.ceil(len(self.examples) / size)
        optimizer = torch.optim.AdamW(self.trained, lr=self.settings.learning_rate, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        caught = HiddenStates(self.student.network, self.own_layers)
        try:
            for step, texts in enumerate(self._batches(), start=1):
                optimizer.zero_grad(set_to_none=True)
                loss = 0.0
                for part in self._parts(texts):
                    partial = self._loss(part, caught) * (len(part) / len(texts))
                    cast(Any, partial).backward()
                    loss += float(partial.detach())
                if not math.isfinite(loss):
                    raise NotFiniteLoss(
                        f"the distillation loss is {loss} in step {step} of {steps}; lower distillation.learning_rate,"
                        f" now {self.settings.learning_rate:g}"
                    )
                nn.utils.clip_grad_norm_(self.trained, _MAX_NORM)
                optimizer.step()
                schedule.step()
                if on_progress is not None:
                    on_progress(Progress(step, steps, loss))
        finally:
            caught.close()
        self.student.network.eval()
        return self.student

    def _batches(self) -> Iterator[list[int]]:
        """Batches of every epoch: texts in a seeded order, near ones sorted by length so that little is padded."""
        size = self.settings.batch_size
        for epoch in range(self.settings.epochs):
            generator = seeded(self.settings.seed, "distillation", "order", epoch)
            order = generator.permutation(len(self.examples))
            batches = []
            for start in range(0, len(order), 16 * size):
                near = sorted(
                    order[start : start + 16 * size].tolist(), key=lambda text: len(self.examples[text].tokens)
                )
                batches += [near[place : place + size] for place in range(0, len(near), size)]
            for index in generator.permutation(len(batches)):
                yield batches[index]

    def _parts(self, texts: list[int]) -> Iterator[list[int]]:
        size = len(texts)
        if self.kind == "causal-lm":
            longest = max(len(self.examples[text].tokens) for text in texts)
            size = max(1, _MOST_LOGITS // (longest * int(config_of(self.student.network).vocab_size)))
        yield from (texts[start : start + size] for start in range(0, len(texts), size))

    def _loss(self, texts: Sequence[int], caught: HiddenStates) -> Tensor:
        """Mean loss of these texts."""
        lessons = self.lessons.of(texts)
        batch = self.task.collate([self.examples[text] for text in texts], self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            output: Any = self.student.network(**batch.inputs())
            states = [cast(Tensor, one(state)) for one, state in zip(self.maps, caught.taken(), strict=True)]
        loss = softened_loss(
            torch.cat([lesson.logits for lesson in lessons]), self._logits(output, texts), self.settings.temperature
        ).mean()
        if self.settings.hidden_weight:
            loss = loss + self.settings.hidden_weight * self._hidden(states, lessons, texts, batch)
        own = torch.tensor([self.corpus.labelled[text] for text in texts], device=self.device)
        if self.settings.label_weight and bool(own.any()):
            loss = loss + self.settings.label_weight * (self.task.losses(output, batch) * own).mean()
        return loss

    def _logits(self, output: Any, texts: Sequence[int]) -> Tensor:
        """The student's logits [rows, classes] in the order of the lessons'."""
        if self.scored is None:
            return cast(Tensor, output)
        at = [self.scored[text][1] for text in texts]
        rows = torch.repeat_interleave(torch.arange(len(at)), torch.tensor([len(one) for one in at]))
        said = output.logits[rows.to(self.device), torch.from_numpy(np.concatenate(at)).to(self.device)]
        return cast(Tensor, said if self.columns is None else said[:, self.columns])

    def _hidden(self, states: list[Tensor], lessons: list[Lesson], texts: Sequence[int], batch: Batch) -> Tensor:
        rows, _, mine = places([self.pairs[text] for text in texts], self.device)
        wanted = torch.cat([lesson.hidden for lesson in lessons], dim=1)
        loss = torch.zeros((), device=self.device)
        if len(rows):
            loss = hidden_loss(list(wanted), [state[rows, mine] for state in states])
        apart = [row for row, lesson in enumerate(lessons) if lesson.pooled is not None]
        if apart:
            vectors = torch.stack([cast(Tensor, lessons[row].pooled) for row in apart])
            said = pooled(self.student.network, states[-1], batch)[apart]
            loss = loss + hidden_loss([vectors], [said]) * (len(apart) / len(texts))
        return loss


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first tenth, then down to zero."""
    warm = max(1, round(_WARMUP * steps))
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))


def _all_pairs(
    theirs: Sequence[Example],
    own: Sequence[Example],
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
) -> list[Pairs]:
    their_names, own_names = names_of(teacher), names_of(student)
    return [
        aligned(
            one,
            other,
            ([their_names[index] for index in one.tokens], [own_names[index] for index in other.tokens]),
        )
        for one, other in zip(theirs, own, strict=True)
    ]


def _scored(theirs: Example, own: Example, pairs: Pairs, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's and the student's places whose logits are compared: first pieces of words, or what has a next."""
    if causal:
        last = (pairs.teacher < len(theirs.tokens) - 1) & (pairs.student < len(own.tokens) - 1)
        return pairs.teacher[last], pairs.student[last]
    first, second = cast(np.ndarray, theirs.positions), cast(np.ndarray, own.positions)
    both = (first >= 0) & (second >= 0)
    return first[both].astype(np.int64), second[both].astype(np.int64)
