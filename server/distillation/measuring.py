"""What a step of distillation made: its size, its figures, its agreement with the teacher and its speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.evaluation import measure
from common.metrics import figures
from common.models import precision
from common.records import Record
from server.distillation.domain_model import DomainModel

__all__ = ["Measured", "agreement", "figures_of", "predictions_of"]

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A line of the table of steps.

    Attributes:
        step: name of the step.
        parameters: different parameters; None for an export, which has those of its source.
        bytes: of the stored weights.
        dev: figures by metric on the dev records, which choices are made on; empty without such records.
        test: the same on the test records.
        agreement: share of the held-out public texts on which the teacher says the same.
        latency_ms: CPU time of one text alone, in milliseconds, one thread, median.
        seconds: wall time that the step took, without measuring.
        note: what was done, in a few words.
    """

    step: str
    parameters: int | None
    bytes: int
    dev: dict[str, float]
    test: dict[str, float]
    agreement: float | None
    latency_ms: float
    seconds: float
    note: str = ""


def figures_of(model: DomainModel, records: Sequence[Record]) -> dict[str, float]:
    """The manifest's figures of `model` on `records`; none without records."""
    if not records:
        return {}
    counts = measure(
        model.network,
        model.task,
        model.task.encode(records).examples,
        batch_size=BATCH,
        precision="fp32",
        metrics=model.manifest.metrics,
    )
    return figures(model.manifest.task.kind, counts, model.manifest.metrics)


def predictions_of(model: DomainModel, records: Sequence[Record]) -> list[Any]:
    """What the model says of each record, in the words of the task and the records' order."""
    task = model.task
    examples = task.encode(records).examples
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    said: list[Any] = [None] * len(examples)
    half = precision("auto", torch.device("cpu")) == "bf16"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = task.collate([examples[row] for row in rows], torch.device("cpu"))
            predicted = task.predictions(model.network(**batch.inputs()), batch).predicted
            for row, value in zip(rows, predicted, strict=True):
                said[row] = value
    return said


def agreement(said: Sequence[Any], teacher_said: Sequence[Any]) -> float | None:
    """Share of records on which both say the same; of tagged words where predictions are lists of tags."""
    pairs = list(zip(said, teacher_said, strict=True))
    if pairs and isinstance(pairs[0][0], list):
        pairs = [pair for ours, theirs in pairs for pair in zip(ours, theirs, strict=True)]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else None
