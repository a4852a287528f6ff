"""Knowledge distillation: a student learns to answer as its teacher does, on public text without labels."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.config.distillation import DistillationSection
from common.errors import DistillationError, NotFiniteLoss
from common.models import precision
from common.randomness import seed_dropout, seeded
from common.tasks.task import Batch
from server.distillation.alignment import all_pairs, shared_pieces
from server.distillation.blocks import blocks_of, config_of
from server.distillation.corpus import Corpus
from server.distillation.domain_model import DomainModel
from server.distillation.lessons import Lesson, Lessons, in_parts, pooled, watched
from server.distillation.losses import hidden_distance, soft_cross_entropy
from server.distillation.student import choose_layers

__all__ = ["Progress", "distil"]

WARM_UP = 0.1  # share of the steps in which the learning rate rises
# Below this many parameters a student trains faster in float32: casting narrow weights to bfloat16 and back in every
# step costs more than the matrices save (230 against 170 ms a step for 2.2 million, docs/lab-notes.md).
SMALL = 20_000_000
BUCKET = 16  # batches whose texts are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Progress:
    """After each pass over the corpus: its number from 1, of how many, and its mean loss."""

    epoch: int
    epochs: int
    loss: float


def distil(
    teacher: DomainModel,
    student: DomainModel,
    corpus: Corpus,
    settings: DistillationSection,
    *,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> DomainModel:
    """The student after training on the corpus; the one given is changed too, the teacher is not.

    The loss of a batch is the softened cross-entropy to the teacher's answers, `hidden_weight` times the distance of
    hidden states where both read the same pieces (of text classification, where they do not, also that of the vectors
    that the heads read), and `label_weight` times the task's own loss on records whose label is known (for causal-lm:
    on all, the text being its own label). Where the networks' widths differ, states are compared through a linear map
    for each block, which is trained along and thrown away.

    Raises:
        DistillationError: teacher and student do different tasks.
        NotFiniteLoss: the loss became NaN or infinite.
    """
    if (teacher.manifest.task.kind, teacher.manifest.task.labels) != (
        student.manifest.task.kind,
        student.manifest.task.labels,
    ):
        raise DistillationError(
            f"the teacher's task is {teacher.manifest.task.kind} with {len(teacher.manifest.task.labels)} labels, the"
            f" student's {student.manifest.task.kind} with {len(student.manifest.task.labels)}; both must do the same"
        )
    course = _Course(teacher, student, corpus, settings)
    network = student.network.train()
    network.requires_grad_(True)
    trained = [*network.parameters(), *course.maps.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    per_epoch = math.ceil(len(corpus.train) / settings.batch_size)
    steps = settings.epochs * per_epoch
    step = 0
    for epoch in range(settings.epochs):
        total = 0.0
        for rows in course.batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _factor(step, steps)
            value = 0.0
            for part in in_parts(rows, course.ours, student):
                loss = course.loss(part) * (len(part) / len(rows))
                loss.backward()  # type: ignore[no-untyped-call]
                value += float(loss.detach())
            if not math.isfinite(value):
                raise NotFiniteLoss(
                    f"the loss of distillation became {value} in step {step + 1}; lower distillation.learning_rate"
                )
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, step = total + value, step + 1
        listen(Progress(epoch + 1, settings.epochs, total / per_epoch))
    network.requires_grad_(False)
    return DomainModel(network.eval(), student.tokenizer, student.manifest)


def _factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear to zero."""
    rise = max(1, round(WARM_UP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


class _Course:
    """The corpus as both read it, the teacher's lessons, and the loss of a batch."""

    def __init__(
        self, teacher: DomainModel, student: DomainModel, corpus: Corpus, settings: DistillationSection
    ) -> None:
        self.student, self.settings, self.corpus = student, settings, corpus
        self.kind = student.manifest.task.kind
        half = precision(teacher.manifest.training.precision, torch.device("cpu")) == "bf16"
        self.half = half and student.parameters > SMALL
        theirs = teacher.task.encode(corpus.train).examples
        self.ours = student.task.encode(corpus.train).examples
        self.pairs = all_pairs((theirs, teacher.tokenizer), (self.ours, student.tokenizer), kind=self.kind)
        columns, self.columns = None, None
        if self.kind == "causal-lm":
            columns, self.columns = shared_pieces(teacher.tokenizer, student.tokenizer)
        taught, self.blocks = _mapped_blocks(teacher.network, student.network) if settings.hidden_weight else ([], [])
        self.lessons = Lessons(teacher, theirs, self.pairs, blocks=taught, columns=columns, half=half)
        ours, wanted = (int(config_of(model.network).hidden_size) for model in (student, teacher))
        seed_dropout(settings.seed, "distillation")  # torch draws the maps' first values
        self.maps = nn.ModuleList(
            nn.Identity() if ours == wanted else nn.Linear(ours, wanted, bias=False) for _ in self.blocks
        )

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Rows of the corpus in a seeded order, texts of like length together."""
        rng = seeded(self.settings.seed, "distillation", epoch)
        order, size = rng.permutation(len(self.ours)), self.settings.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), BUCKET * size):
            bucket = sorted(order[start : start + BUCKET * size].tolist(), key=lambda row: len(self.ours[row].tokens))
            batches += [bucket[place : place + size] for place in range(0, len(bucket), size)]
        return iter([batches[place] for place in rng.permutation(len(batches))])

    def loss(self, rows: Sequence[int]) -> Tensor:
        """The mean loss of some rows, with its gradient."""
        lessons = self.lessons.of(rows)
        batch = self.student.task.collate([self.ours[row] for row in rows], torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half), watched(self.blocks) as states:
            output: Any = self.student.network(**batch.inputs())
        said = self._answers(output, rows)
        loss = said.sum() * 0.0
        if len(said):
            wanted = torch.cat([lesson.answers for lesson in lessons])
            loss = soft_cross_entropy(said, wanted, self.settings.temperature).mean()
        if self.blocks:
            loss = loss + self.settings.hidden_weight * self._states(states, lessons, rows, batch)
        return loss + self._labels(output, batch, rows)

    def _answers(self, output: Any, rows: Sequence[int]) -> Tensor:
        """The student's answers [scored places, classes] in the lessons' order."""
        if self.kind == "text-classification":
            return cast(Tensor, output)
        record, place = _flat([self.pairs[row].scored_student for row in rows])
        answers = output.logits[record, place]
        return cast(Tensor, answers if self.columns is None else answers[:, self.columns])

    def _states(self, states: list[Tensor], lessons: list[Lesson], rows: Sequence[int], batch: Batch) -> Tensor:
        record, place = _flat([self.pairs[row].student for row in rows])
        wanted = torch.cat([lesson.states for lesson in lessons], dim=1)
        ours = [one(state[record, place].float()) for one, state in zip(self.maps, states, strict=True)]
        distance = hidden_distance(ours, list(wanted))
        apart = [row for row, lesson in enumerate(lessons) if lesson.whole is not None]
        if apart:
            vectors = torch.stack([cast(Tensor, lessons[row].whole) for row in apart])
            mine = self.maps[-1](pooled(self.student.network, states[-1], batch)[apart].float())
            distance = distance + hidden_distance([mine], [vectors]) * (len(apart) / len(rows))
        return distance

    def _labels(self, output: Any, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Summed over the known and divided by all: a text counts the same whatever batch it falls in."""
        known = torch.tensor([self.kind == "causal-lm" or row in self.corpus.labelled for row in rows])
        if not self.settings.label_weight or not known.any():
            return torch.zeros(())
        return self.settings.label_weight * self.student.task.losses(output, batch)[known].sum() / len(rows)


def _flat(places: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Record and place of every place of a batch, each [places]."""
    records = np.repeat(np.arange(len(places)), [len(one) for one in places])
    return torch.from_numpy(records), torch.from_numpy(np.concatenate(places).astype(np.int64))


def _mapped_blocks(teacher: nn.Module, student: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Blocks of the teacher and of the student that are compared, evenly chosen in the deeper of the two."""
    theirs, ours = blocks_of(teacher), blocks_of(student)
    depth = min(len(theirs), len(ours))
    chosen = [[blocks[layer] for layer in choose_layers(len(blocks), depth)] for blocks in (theirs, ours)]
    return chosen[0], chosen[1]
