"""Measuring a model on examples: one pass, additive counts out."""

from collections.abc import Sequence

import torch
from torch import nn

from common.errors import ExtensionError
from common.extensions import load
from common.metrics import Counts, add, own_counts
from common.tasks.task import Example, Predictions, Task

__all__ = ["measure"]


def measure(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int,
    precision: str,
    metrics: Sequence[str] = (),
) -> Counts:
    """Counts of `model` over `examples`, from which `common.metrics.figures` makes figures.

    Examples are taken in order of length, so that little is padded; counts do not depend on order. Own metrics among
    `metrics` ('module:function') are called once with all predictions and stored times the number of records.
    """
    parameter = next(model.parameters(), None)  # a network of another runtime has none
    device = torch.device("cpu") if parameter is None else parameter.device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    own = [metric for metric in metrics if ":" in metric]
    total: Counts = {}
    said = Predictions([], [])
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(order), batch_size):
            batch = task.collate([examples[index] for index in order[start : start + batch_size]], device)
            output = model(**batch.inputs())
            total = add(total, task.counts(output, batch))
            if own:
                part = task.predictions(output, batch)
                said.predicted.extend(part.predicted)
                said.expected.extend(part.expected)
    model.train(was_training)
    for metric in own:
        function = load(metric, "metric")
        try:
            value = function(said.predicted, said.expected)
        except Exception as error:  # its text may hold a record, so only its kind is told
            raise ExtensionError(f"metric {metric!r}: raised {type(error).__name__}; it must give a number") from error
        total = add(total, own_counts(metric, value, len(examples)))
    return total
