"""What a further process of a vault computes: the sum of gradients over its part of each step.

It has no optimiser of its own that steps and no randomness for noise. Each step it gets the parameters as they are,
which with privacy are noised, and nothing that it summed is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import nn

from client.resident import Resident, resident
from client.training.loop import batch_gradient
from client.training.orders import Begin, Part, SetUp
from client.training.per_sample import per_sample_gradients
from client.training.physical import roomy
from client.training.private import clipped_sum, clipper
from client.training.together import flat, join, unflat
from common.adapters import train_only, trained_parameters
from common.config.manifest import Manifest
from common.config.training import TrainingSection
from common.errors import TrainingError
from common.randomness import seed_dropout
from common.tasks.task import Example

__all__ = ["serve"]

Sums = Callable[[Sequence[Sequence[Example]], int], float]


def serve(connection: Connection, set_up: SetUp) -> None:
    """Load the base, join the others, and answer orders until the vault ends this process."""
    if set_up.device.startswith("cuda"):
        torch.cuda.set_device(set_up.device)  # "cuda" means this card from here on
        if set_up.gpu_memory < 1:
            torch.cuda.set_per_process_memory_fraction(set_up.gpu_memory)
    manifest = Manifest.model_validate_json(set_up.manifest)
    ready = resident(manifest, set_up.rank)
    connection.send("loaded")
    connection.recv()  # all others are loaded too, so nobody waits long for anybody
    join(set_up.device, set_up.store, set_up.number, set_up.processes)
    connection.send("joined")
    begin = connection.recv()
    while True:
        begin = _training(connection, ready, manifest.training, begin)


def _training(connection: Connection, ready: Resident, section: TrainingSection, begin: Begin) -> Begin:
    """Every step of one training; returns how the next one begins."""
    model = ready.model
    ready.take(begin.adapter)
    train_only(model, begin.trained)
    seed_dropout(begin.seed, *begin.labels)
    model.train()
    steps = roomy(section)
    optimizer = None if begin.mechanism is None else clipper(model, section, begin.mechanism)
    if optimizer is None:
        undo = partial(model.zero_grad, set_to_none=True)

        def mean(units: Sequence[Sequence[Example]], of: int) -> float:
            examples = [example for unit in units for example in unit]
            gradient = partial(batch_gradient, model, ready.task, examples, of, ready.precision)
            return steps.summed(gradient, undo=undo) if examples else 0.0

        return _parts(connection, model, mean, undo, "grad")
    undo = partial(optimizer.zero_grad, set_to_none=True)
    with per_sample_gradients(model) as engine:

        def clipped(units: Sequence[Sequence[Example]], of: int) -> float:
            del of  # the sum is divided where the noise is added
            summed = partial(clipped_sum, optimizer, engine, model, ready.task, units, ready.precision)
            steps.summed(summed, undo=undo)
            return 0.0

        return _parts(connection, model, clipped, undo, "summed_grad")


def _parts(connection: Connection, model: nn.Module, own: Sums, undo: Callable[[], None], name: str) -> Begin:
    """Answer each step's part: take the parameters, leave the gradients' sum in their attribute `name`, send it."""
    parameters = [p for p in trained_parameters(model).values() if p.requires_grad]
    while True:
        order = connection.recv()
        if isinstance(order, Begin):
            return order
        if not isinstance(order, Part):
            raise TrainingError(f"the vault asked for {type(order).__name__}, which a further process does not know")
        given = flat(parameters)
        dist.broadcast(given, 0)
        with torch.no_grad():
            for parameter, value in zip(parameters, unflat(given, parameters), strict=True):
                parameter.copy_(value)
        loss = own(order.units, order.of)
        found = [getattr(parameter, name, None) for parameter in parameters]
        sums = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, found, strict=True)]
        buffer = flat([*sums, sums[0].new_tensor([loss])])
        dist.reduce(buffer, 0)
        # With privacy nothing without noise may stay here; the reduction may also have left others' sums.
        buffer.zero_()
        undo()
        if buffer.is_cuda:
            torch.cuda.synchronize()
        connection.send("summed")
        del order, found, sums
