"""What a model did on every single record: a row of additive counts each, whose sum is what `measure` counts.

Figures such as F1 are no means over records, so what is drawn again in a bootstrap are the records' counts
(`significance.py`), and the figure is computed from their sum. This file knows no statistics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import AssessmentError
from common.metrics import figures
from common.records import Record
from common.tasks.task import Batch
from server.distillation.domain_model import DomainModel

__all__ = ["GENERATED", "Outcomes", "count_records", "figure_of"]

# Figures of answers that a model wrote itself: means over records, so their counts are the records' own values.
GENERATED = ("rouge_l", "exact_match", "format_compliance")

# The counts that a figure is computed from (`common/metrics.py`); a slash at the end stands for all labels.
_COUNTS: dict[str, tuple[str, ...]] = {
    "accuracy": ("records", "correct"),
    "macro_f1": ("tp/", "fp/", "fn/"),
    "entity_precision": ("tp", "fp"),
    "entity_recall": ("tp", "fn"),
    "entity_f1": ("tp", "fp", "fn"),
    "perplexity": ("nll", "tokens"),
    "bits_per_byte": ("nll", "bytes"),
    "loss": ("records", "loss_sum"),
    **{metric: ("records", metric) for metric in GENERATED},
}


@dataclass(frozen=True)
class Outcomes:
    """Counts of each record: `rows` is [records, counts], float64, in the records' order, `keys` name its columns."""

    kind: str
    keys: tuple[str, ...]
    rows: npt.NDArray[np.float64]
    truncated: int = 0
    """records that were cut to the longest input"""

    @property
    def total(self) -> dict[str, float]:
        """The counts of all records together."""
        return {key: math.fsum(column) for key, column in zip(self.keys, self.rows.T, strict=True)}

    @property
    def right(self) -> npt.NDArray[np.bool_] | None:
        """Whether each record is right as a whole [records]; None where a record is neither right nor wrong."""
        if self.kind == "text-classification":
            return np.asarray(self._column("correct") > 0)
        if self.kind == "token-classification":
            return np.asarray((self._column("fp") == 0) & (self._column("fn") == 0))
        return None

    def needed(self, metric: str) -> "Outcomes":
        """The same with the columns alone that `metric` is computed from."""
        wanted = _COUNTS[metric]
        places = [
            place
            for place, key in enumerate(self.keys)
            if key in wanted or any(name.endswith("/") and key.startswith(name) for name in wanted)
        ]
        return Outcomes(self.kind, tuple(self.keys[place] for place in places), self.rows[:, places])

    def with_column(self, key: str, values: Sequence[float]) -> "Outcomes":
        """The same with one more count of each record."""
        rows = np.column_stack([self.rows, np.asarray(values, dtype=np.float64)])
        return Outcomes(self.kind, (*self.keys, key), rows, self.truncated)

    def _column(self, key: str) -> npt.NDArray[np.float64]:
        return self.rows[:, self.keys.index(key)]


def count_records(
    model: DomainModel, records: Sequence[Record], *, batch_size: int = 64, precision: str = "fp32"
) -> Outcomes:
    """The counts of every record, in the records' order, by the model's own tokenizer.

    Their sum equals what `common.evaluation.measure` counts with the same `precision`: the network runs on whole
    batches, and each record's part of its output is then counted alone.

    Raises:
        AssessmentError: there are no records.
    """
    if not records:
        raise AssessmentError("no records to measure on; give at least one")
    task = model.task
    encoded = task.encode(records)
    examples = encoded.examples
    parameter = next(model.network.parameters(), None)  # a network of another runtime has none
    device = torch.device("cpu") if parameter is None else parameter.device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    found: dict[int, Mapping[str, float]] = {}
    was_training = model.network.training
    model.network.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = task.collate([examples[place] for place in places], device)
            output = model.network(**batch.inputs())
            for row, place in enumerate(places):
                found[place] = task.counts(_row_of_output(output, row), _row_of_batch(batch, row))
    model.network.train(was_training)
    keys = tuple(found[0])
    rows = np.array([[found[place][key] for key in keys] for place in range(len(examples))], dtype=np.float64)
    return Outcomes(model.manifest.task.kind, keys, rows, encoded.truncated)


def figure_of(kind: str, counts: Mapping[str, float], metric: str) -> float:
    """One figure from summed counts: a metric of the task, or one of `GENERATED`."""
    if metric in GENERATED:
        return counts[metric] / counts["records"] if counts["records"] else math.nan
    return figures(kind, counts, [metric])[metric]


def _row_of_output(output: Any, row: int) -> Any:
    """One record's part of what a network gives: [1, labels], or an object with logits [1, tokens, classes]."""
    if isinstance(output, Tensor):
        return output[row : row + 1]
    return SimpleNamespace(logits=output.logits[row : row + 1])


def _row_of_batch(batch: Batch, row: int) -> Batch:
    part = slice(row, row + 1)
    return Batch(batch.input_ids[part], batch.attention_mask[part], batch.targets[part], batch.examples[part])
