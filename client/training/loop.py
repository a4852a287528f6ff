"""The local training loop: a number of optimiser steps on one site's examples."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from client.ticks import tick
from client.training.crew import Crew
from client.training.physical import roomy
from common.adapters import is_head, trained_parameters
from common.config.training import TrainingSection
from common.errors import NotFiniteLoss
from common.schedule import learning_rate
from common.tasks.task import Example, Task

__all__ = ["Outcome", "batch_gradient", "new_optimizer", "set_learning_rates", "train"]


@dataclass(frozen=True)
class Outcome:
    """What training did: mean loss over the steps, examples seen (repetitions counted), seconds in the steps."""

    loss: float
    examples: int
    seconds: float


def new_optimizer(model: nn.Module, section: TrainingSection) -> torch.optim.AdamW:
    """AdamW for what the model trains now; the head has a rate of its own where the manifest gives it one.

    Fresh at every round, AdamW with a tiny epsilon takes steps of one size everywhere, like a vote of the sites' signs:
    labels that few of them have are voted down. A larger one (Reddi et al. 2021, section 4) prevents that.
    """
    own = section.head_learning_rate
    of_the_head = {id(parameter) for name, parameter in trained_parameters(model).items() if is_head(name)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = [parameter for parameter in trained if own is not None and id(parameter) in of_the_head]
    rest = [parameter for parameter in trained if own is None or id(parameter) not in of_the_head]
    peaks = ((rest, section.learning_rate), (head, own))
    return torch.optim.AdamW(
        [{"params": parameters, "lr": peak, "peak": peak} for parameters, peak in peaks if parameters],
        weight_decay=section.weight_decay,
        eps=section.adam_epsilon,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, section: TrainingSection, step: int, total_steps: int) -> None:
    """Set each group's rate for step `step` (from 0) of a whole run: its peak times the schedule's factor.

    Every step of every training begins here, so whoever listens (`client/ticks.py`) is told.
    """
    tick(step)
    factor = learning_rate(section, step, total_steps) / section.learning_rate
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def train(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    batches: Iterator[list[int]],
    section: TrainingSection,
    *,
    first_step: int,
    steps: int,
    total_steps: int,
    precision: str,
    crew: Crew | None = None,
) -> Outcome:
    """Take `steps` AdamW steps from the model's present adapter, in place.

    The optimiser starts afresh, as it must where the adapter came from the coordinator. A step's gradient is the mean
    over its batch, whatever the size of the micro-batches. With `proximal_mu` the FedProx term (Li et al. 2020,
    equation 2) pulls towards the adapter that training started from. A `crew` of further processes, which has taken the
    same adapter, computes a part of every batch.

    Raises:
        NotFiniteLoss: the loss became NaN or infinite; the model is left as it is.
        OutOfMemory: memory does not suffice (`client/training/physical.py`); the model is left as it is.
        TrainingError: one of the crew failed; the model is left as it is.
    """
    parameters = [p for p in trained_parameters(model).values() if p.requires_grad]
    anchor = [parameter.detach().clone() for parameter in parameters] if section.proximal_mu else []
    optimizer = new_optimizer(model, section)
    optimizer.zero_grad(set_to_none=True)  # of a training that failed midway; they would go into the first step
    if not model.training:  # asking every module takes as long as a step of a small one
        model.train()
    losses: list[float] = []
    steps_in_room = roomy(section)
    undo = partial(optimizer.zero_grad, set_to_none=True)

    def mean(units: Sequence[Sequence[Example]], of: int) -> float:
        gradient = partial(batch_gradient, model, task, [example for unit in units for example in unit], of, precision)
        return steps_in_room.summed(gradient, undo=undo)

    started = time.perf_counter()
    for step, batch in enumerate(islice(batches, steps), start=first_step):
        set_learning_rates(optimizer, section, step, total_steps)
        own = partial(mean, of=len(batch))
        units = [[examples[index]] for index in batch]
        loss = own(units) if crew is None else crew.summed(parameters, units, own)
        if not math.isfinite(loss):
            raise NotFiniteLoss(f"the loss became {loss} in step {step - first_step + 1}; try a lower learning rate")
        for parameter, start in zip(parameters, anchor, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=section.proximal_mu)
        nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
    return Outcome(sum(losses) / len(losses), steps * section.batch_size, time.perf_counter() - started)


def batch_gradient(
    model: nn.Module, task: Task, examples: Sequence[Example], of: int, precision: str, size: int
) -> float:
    """Leave the examples' part of the gradient of a batch's mean loss in the parameters, `size` records at once.

    The batch has `of` examples. Returns the examples' part of that loss.
    """
    device = next(model.parameters()).device
    # Micro-batches of like lengths need little padding; the gradient is a mean, so their order does not matter.
    examples = sorted(examples, key=lambda example: len(example.tokens))
    total = torch.zeros((), device=device)
    for start in range(0, len(examples), size):
        batch = task.collate(examples[start : start + size], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(**batch.inputs())
        loss: Tensor = task.losses(output, batch).sum() / of
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return float(total)
