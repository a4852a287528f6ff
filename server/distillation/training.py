"""Knowledge distillation: a student learns to answer as its teacher does, on public text without labels."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.config.distillation import DistillationSection
from common.errors import DistillationError, NotFiniteLoss
from common.models import precision
from common.randomness import seeded
from common.tasks.task import Batch, Example
from server.distillation.blocks import blocks_of, config_of
from server.distillation.corpus import Corpus
from server.distillation.domain_model import DomainModel
from server.distillation.losses import hidden_distance, soft_cross_entropy
from server.distillation.student import choose_layers

__all__ = ["Progress", "distil"]

WARM_UP = 0.1  # share of the steps in which the learning rate rises
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
    hidden states where teacher and student have the same width and read the same pieces, and `label_weight` times the
    task's own loss on records whose label is known (for causal-lm: on all, the text being its own label).

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
    lesson = _Lesson(teacher, student, corpus, settings)
    network = student.network.train()
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    per_epoch = math.ceil(len(corpus.train) / settings.batch_size)
    steps = settings.epochs * per_epoch
    step = 0
    for epoch in range(settings.epochs):
        total = 0.0
        for rows in lesson.batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _factor(step, steps)
            loss = lesson.loss(rows)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFiniteLoss(
                    f"the loss of distillation became {value} in step {step + 1}; lower distillation.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
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


class _Lesson:
    """The corpus as both read it, and the loss of a batch of it."""

    def __init__(
        self, teacher: DomainModel, student: DomainModel, corpus: Corpus, settings: DistillationSection
    ) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.corpus = corpus
        self.theirs = teacher.task.encode(corpus.train).examples
        self.ours = student.task.encode(corpus.train).examples
        self.half = precision("auto", torch.device("cpu")) == "bf16"
        names = student.tokenizer.convert_ids_to_tokens(list(range(len(student.tokenizer))))
        of_teacher = teacher.tokenizer.get_vocab()
        # Each of the student's pieces in the teacher's numbering; -1 for one that the teacher has not.
        self.numbers = torch.tensor([of_teacher.get(name, -1) for name in names])
        self.same = [self._same(a, b) for a, b in zip(self.ours, self.theirs, strict=True)]
        mapped = _mapped_blocks(teacher.network, student.network) if settings.hidden_weight else None
        self.blocks = mapped

    def _same(self, ours: Example, theirs: Example) -> bool:
        """Whether both read the same pieces."""
        if len(ours.tokens) != len(theirs.tokens):
            return False
        return bool((self.numbers[torch.from_numpy(ours.tokens).long()].numpy() == theirs.tokens).all())

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Rows of the corpus in a seeded order, texts of like length together."""
        rng = seeded(self.settings.seed, "distillation", epoch)
        order, size = rng.permutation(len(self.ours)), self.settings.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), BUCKET * size):
            bucket = sorted(order[start : start + BUCKET * size].tolist(), key=lambda row: len(self.ours[row].tokens))
            batches += [bucket[place : place + size] for place in range(0, len(bucket), size)]
        return iter([batches[place] for place in rng.permutation(len(batches))])

    def loss(self, rows: list[int]) -> Tensor:
        """The mean loss of some rows, with its gradient."""
        device = torch.device("cpu")
        ours = self.student.task.collate([self.ours[row] for row in rows], device)
        theirs = self.teacher.task.collate([self.theirs[row] for row in rows], device)
        same = torch.tensor([self.same[row] for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            with torch.no_grad(), _watched(self.blocks[0] if self.blocks else ()) as their_states:
                said = self.teacher.network(**theirs.inputs())
            with _watched(self.blocks[1] if self.blocks else ()) as our_states:
                output = self.student.network(**ours.inputs())
        loss = self._answers(output, said, ours, theirs, same)
        if self.blocks:
            keep = ours.attention_mask.bool() & same[:, None]
            width = keep.shape[1]
            fitted = [_fitted(state, width) for state in their_states]
            loss = loss + self.settings.hidden_weight * hidden_distance(our_states, fitted, keep)
        return loss + self._labels(output, ours, rows)

    def _answers(self, output: Any, said: Any, ours: Batch, theirs: Batch, same: Tensor) -> Tensor:
        temperature = self.settings.temperature
        match self.student.manifest.task.kind:
            case "text-classification":
                return soft_cross_entropy(output, said, temperature).mean()
            case "token-classification":
                student, teacher = _at_words(output.logits, said.logits, ours.examples, theirs.examples)
            case _:
                student, teacher = self._next_words(output.logits, said.logits, ours, same)
        return soft_cross_entropy(student, teacher, temperature).mean() if len(student) else output.logits.sum() * 0.0

    def _next_words(self, ours: Tensor, theirs: Tensor, batch: Batch, same: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at answers of texts that both cut alike, over the pieces that both have."""
        keep = (batch.targets[:, 1:] != -100) & same[:, None]
        shared = self.numbers >= 0
        width = keep.shape[1]
        teacher = _fitted(theirs, width + 1)[:, :-1][keep][:, self.numbers[shared]]
        return ours[:, :-1][keep][:, shared], teacher

    def _labels(self, output: Any, batch: Batch, rows: list[int]) -> Tensor:
        causal = self.student.manifest.task.kind == "causal-lm"
        known = torch.tensor([causal or row in self.corpus.labelled for row in rows])
        if not self.settings.label_weight or not known.any():
            return torch.zeros(())
        return self.settings.label_weight * self.student.task.losses(output, batch)[known].mean()


def _at_words(
    ours: Tensor, theirs: Tensor, our_examples: Sequence[Example], their_examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Logits [words, tags] at the first piece of every word that neither side cut off."""
    student, teacher = [], []
    for row, (a, b) in enumerate(zip(our_examples, their_examples, strict=True)):
        first, second = torch.from_numpy(cast(Any, a.positions)).long(), torch.from_numpy(cast(Any, b.positions)).long()
        there = (first >= 0) & (second >= 0)
        student.append(ours[row, first[there]])
        teacher.append(theirs[row, second[there]])
    return torch.cat(student), torch.cat(teacher)


def _fitted(state: Tensor, width: int) -> Tensor:
    """[records, tokens, ...] with `width` tokens: padding on the right cut off or added."""
    if state.shape[1] >= width:
        return state[:, :width]
    missing = state.new_zeros((state.shape[0], width - state.shape[1], *state.shape[2:]))
    return torch.cat([state, missing], dim=1)


def _mapped_blocks(teacher: nn.Module, student: nn.Module) -> tuple[Sequence[nn.Module], Sequence[nn.Module]] | None:
    """The teacher's block for each of the student's, evenly; None where their widths differ."""
    theirs, ours = blocks_of(teacher), blocks_of(student)
    widths = {int(config_of(network).hidden_size) for network in (teacher, student)}
    if len(widths) > 1 or len(ours) > len(theirs):
        return None
    return [theirs[layer] for layer in choose_layers(len(theirs), len(ours))], list(ours)


@contextlib.contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The output of each block [records, tokens, width] in one forward pass, in the blocks' order."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
