"""Checks before a site's first private round: what must hold for the guarantee, tried on the real thing.

They take a few steps' time and run at the start of every run. Opacus and PEFT can go wrong in silence: gradients that
mix records, noise that is not drawn, a parameter that is not trained. A failure stops the site with the check's name.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.protection import Mechanism
from client.training.per_sample import per_sample_gradients
from client.training.private import unit_gradients
from common.errors import PrivacyError
from common.randomness import SystemRandomness
from common.tasks.task import Example, Task

__all__ = ["check_gradients", "check_moved", "check_randomness"]

# Units whose gradients are compared; relative differences that rounding explains, of float32 and of bfloat16.
UNITS = 3
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}

DRAWS = 4096
# Standard errors that a statistic may be off: one false alarm in 1.7 million runs for each.
ERRORS = 5.0


def check_gradients(model: nn.Module, task: Task, units: Sequence[Sequence[Example]], precision: str) -> None:
    """Per-unit gradients of one batch equal those of a backward pass for each record by itself.

    Raises:
        PrivacyError: they do not: a record's gradient would depend on other records, and the clip bound nothing.
    """
    model.eval()  # without dropout, which draws anew for every pass
    units = [unit[:2] for unit in units[:UNITS]]
    with per_sample_gradients(model) as engine:
        unit_gradients(engine, model, task, units, precision)
        found = {n: p.grad_sample.clone() for n, p in model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    for place, unit in enumerate(units):
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for example in unit:
            batch = task.collate([example], device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = model(**batch.inputs())
            loss = task.losses(output, batch).sum()
            own = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for name, gradient in zip(parameters, own, strict=True):
                total[name] += gradient / len(unit)
        scale = math.sqrt(sum(float((g**2).sum()) for g in total.values())) or 1.0
        for name, expected in total.items():
            off = float((found[name][place] - expected).norm()) / scale
            if not off <= TOLERANCE[precision]:
                raise PrivacyError(
                    f"pre-flight check 'gradients' failed: those of {name} differ by {off:.2g} of the gradient's norm"
                    f" from a record's own, at most {TOLERANCE[precision]:g} is rounding; nothing was trained"
                )


def check_randomness(mechanism: Mechanism, randomness: SystemRandomness, units: int) -> None:
    """Noise is drawn, has deviation 1 and does not repeat; the sizes of Poisson samples vary as they should.

    Raises:
        PrivacyError: it is not so.
    """
    first, second = randomness.normal(DRAWS), randomness.normal(DRAWS)
    both = np.concatenate([first, second])
    wrong = abs(both.var() - 1) > ERRORS * math.sqrt(2 / len(both)) or abs(both.mean()) > ERRORS / math.sqrt(len(both))
    if np.array_equal(first, second) or wrong or len(np.unique(both)) < len(both) - 2:
        raise PrivacyError("pre-flight check 'noise' failed: the noise is not what it should be; nothing was trained")
    rate = mechanism.sampling_rate
    sizes = np.array([len(randomness.chosen(units, rate)) for _ in range(256)])
    error = math.sqrt(units * rate * (1 - rate) / len(sizes))
    if abs(sizes.mean() - units * rate) > ERRORS * error or (len(set(sizes.tolist())) == 1 and error > 0.05):
        raise PrivacyError(
            "pre-flight check 'sampling' failed: the sizes of samples are not those of Poisson sampling; nothing was"
            " trained"
        )


def check_moved(before: Mapping[str, npt.NDArray[np.float32]], after: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Every tensor of the adapter has moved: noise alone moves all of them.

    Raises:
        PrivacyError: one has not, so it was not trained, or was trained where nobody looked.
    """
    still = [name for name in before if np.array_equal(before[name], after[name])]
    if still:
        raise PrivacyError(f"pre-flight check 'moved' failed: {still[0]} did not move in training; nothing was sent")
