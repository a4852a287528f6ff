"""Training under differential privacy: DP-SGD (Abadi et al. 2016, algorithm 1) on privacy units.

Every step samples each unit on its own, averages the gradients of the unit's records, bounds the mean's L2 norm by
the clip, adds Gaussian noise to the sum, and divides by the expected number of units. The manifest may bound head and
adapter apart before. Opacus' optimiser clips and steps; sampling, noise and per-example gradients are ours. What the
steps cost is charged before they are taken (`client/ledger.py`); nothing here can add to it, since only the noised
sums reach the adapter.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.protection import Mechanism
from client.training.crew import Crew
from client.training.loop import new_optimizer, set_learning_rates
from client.training.per_sample import Engine, per_sample_gradients
from client.training.physical import physical_records, roomy
from common.adapters import is_head, trained_parameters
from common.config.training import TrainingSection
from common.errors import PrivacyError
from common.randomness import SystemRandomness
from common.tasks.task import Example, Task

if TYPE_CHECKING:  # the audit trains with what is here
    from client.training.audit import Canaries

__all__ = ["Clipper", "NoisedOptimizer", "clipped_sum", "clipper", "train_private", "unit_gradients"]

# Noised sums are rounded to multiples of the noise's deviation times this power of two. The grid is far coarser than
# the spacing of float64 in which sum and noise are added, so the low bits, which can betray the sum, are gone.
GRID = 2.0**-20


class Clipper(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimiser as far as it clips and sums. It has no noise, so it takes no step.

    With `mechanism.head_clip` c_h the parts of a unit's gradient are bounded apart (McMahan et al. 2018, section 2.3,
    "per-layer clipping"): that of `head` to c_h, the rest to sqrt(clip^2 - c_h^2). Otherwise the part with the longer
    gradients takes nearly all of the clip. Opacus' clip of the whole stays, so the sensitivity does not depend on it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, head: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.expected_units,
            loss_reduction="mean",
        )
        of_the_head = {id(parameter) for parameter in head}
        own = [p for p in self.params if id(p) in of_the_head]
        rest = [p for p in self.params if id(p) not in of_the_head]
        self._bounds: list[tuple[list[Any], float]] = []
        if mechanism.head_clip is not None and own and rest:  # a part that trains alone has the whole clip
            left = math.sqrt(mechanism.clip**2 - mechanism.head_clip**2)
            self._bounds = [(own, mechanism.head_clip), (rest, left)]

    def clip_and_accumulate(self) -> None:
        """Bound the parts of every unit's gradient, then the whole, and add it to `p.summed_grad`."""
        for parameters, bound in self._bounds:
            factors = (bound / _norms(parameters).clamp(min=1e-12)).clamp(max=1.0)
            for parameter in parameters:
                parameter.grad_sample *= factors.view(-1, *[1] * parameter.dim())
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Refused.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError("a step was about to be taken without noise; nothing was released")


class NoisedOptimizer(Clipper):
    """The same with noise from the operating system, added in float64 and rounded to a grid."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        randomness: SystemRandomness,
        head: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(optimizer, mechanism, head)
        self._randomness = randomness

    def add_noise(self) -> None:
        """`p.grad` becomes the sum of clipped gradients plus noise of deviation noise_multiplier x clip."""
        deviation = self.noise_multiplier * self.max_grad_norm
        noise = self._randomness.normal(sum(parameter.numel() for parameter in self.params))
        place = 0
        for parameter in self.params:
            part = torch.from_numpy(noise[place : place + parameter.numel()]).view(parameter.shape)
            place += parameter.numel()
            noised = parameter.summed_grad.to("cpu", torch.float64) + deviation * part
            if deviation:
                noised = torch.round(noised / (deviation * GRID)) * (deviation * GRID)
            parameter.grad = noised.to(parameter.device, parameter.dtype)


def clipper(model: nn.Module, section: TrainingSection, mechanism: Mechanism) -> Clipper:
    """What clips and sums the gradients of all that `model` trains now, for a process that adds no noise."""
    return Clipper(new_optimizer(model, section), mechanism, _head(model))


def _head(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in trained_parameters(model).items() if is_head(name)]


def train_private(
    model: nn.Module,
    task: Task,
    units: Sequence[Sequence[Example]],
    section: TrainingSection,
    mechanism: Mechanism,
    randomness: SystemRandomness,
    *,
    first_step: int,
    steps: int,
    total_steps: int,
    precision: str,
    canaries: "Canaries | None" = None,
    crew: Crew | None = None,
) -> float:
    """Take `steps` noised AdamW steps from the model's present adapter, in place; the seconds that they took.

    `units` holds the examples of each privacy unit. Nothing about single steps comes back: their losses and sizes
    are private. A step that samples no unit adds noise alone. `canaries` are further units, of an audit.
    A `crew` of further processes, which has taken the same adapter and the mechanism, clips and sums a part of the
    units that are sampled here; the noise is drawn here, once for the whole sum.

    Raises:
        PrivacyError: a check of the mechanism failed; the model may have been changed and must not be sent.
        OutOfMemory: memory does not suffice (`client/training/physical.py`); the same holds.
        TrainingError: one of the crew failed; the same holds.
    """
    plain = new_optimizer(model, section)
    optimizer = NoisedOptimizer(plain, mechanism, randomness, _head(model))
    parameters = [p for p in trained_parameters(model).values() if p.requires_grad]
    if canaries is not None:
        optimizer.attach_step_hook(canaries.look)
    model.train()
    steps_in_room = roomy(section)
    began = time.perf_counter()
    with per_sample_gradients(model) as engine:

        def own(sampled: Sequence[Sequence[Example]]) -> float:
            leave_sum = partial(clipped_sum, optimizer, engine, model, task, sampled, precision)
            steps_in_room.summed(leave_sum, undo=partial(optimizer.zero_grad, set_to_none=True))
            return 0.0  # nothing of single units but their clipped sum goes on

        for step in range(first_step, first_step + steps):
            set_learning_rates(plain, section, step, total_steps)
            chosen = randomness.chosen(len(units), mechanism.sampling_rate)
            sampled = [_capped(units[index], mechanism.records_per_unit, randomness) for index in chosen]
            # Sampled once, whatever memory allows: the passes after it are a way to compute one and the same sum.
            if crew is None:
                own(sampled)
            else:
                crew.summed(parameters, sampled, own, attribute="summed_grad")
            if canaries is not None:
                for drawn in canaries.batches(randomness, mechanism.sampling_rate, physical_records(section)):
                    canaries.leave_gradients(drawn, mechanism.clip)
                    _add(optimizer)
            # A batch of no unit ends the step: noise is added to the sum once, and nothing after it is tried again.
            unit_gradients(engine, model, task, [], precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def clipped_sum(
    optimizer: Clipper,
    engine: Engine,
    model: nn.Module,
    task: Task,
    units: Sequence[Sequence[Example]],
    precision: str,
    size: int,
) -> None:
    """Leave the sum of the units' clipped gradients in `p.summed_grad`, `size` records at once."""
    for batch in _physical(units, size):
        unit_gradients(engine, model, task, batch, precision)
        _add(optimizer)


def _add(optimizer: Clipper) -> None:
    """Clip the gradients in `p.grad_sample`, add them to `p.summed_grad`, and let them go."""
    optimizer.clip_and_accumulate()
    for parameter in optimizer.params:
        parameter.grad_sample = None


def unit_gradients(
    engine: Engine, model: nn.Module, task: Task, units: Sequence[Sequence[Example]], precision: str
) -> None:
    """Leave the mean gradient of every unit's records in `grad_sample`, float32 (units, *shape).

    A unit whose gradient is not finite counts as zero: to stop would tell about it.

    Raises:
        PrivacyError: a parameter has no gradient for each record.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not units:
        for parameter in parameters.values():
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        return
    device = next(model.parameters()).device
    owner = [place for place, unit in enumerate(units) for _ in unit]
    examples = [example for unit in units for example in unit]
    engine(task, examples, precision)
    for name, parameter in parameters.items():
        found = getattr(parameter, "grad_sample", None)
        if found is None or found.shape != (len(examples), *parameter.shape) or parameter.grad is not None:
            shape = "none" if found is None else tuple(found.shape)
            raise PrivacyError(
                f"per-record gradients of {name} have shape {shape}, needed {(len(examples), *parameter.shape)};"
                " nothing was released"
            )
    if len(units) < len(examples):
        index = torch.tensor(owner, device=device)
        share = torch.tensor([1 / len(units[place]) for place in owner], device=device)
        for parameter in parameters.values():
            grouped = parameter.new_zeros((len(units), *parameter.shape), dtype=torch.float32)
            weighted = parameter.grad_sample * share.view(-1, *[1] * parameter.dim())  # type: ignore[attr-defined]
            parameter.grad_sample = grouped.index_add_(0, index, weighted)  # type: ignore[attr-defined]
    _drop_not_finite(list(parameters.values()))


def _norms(parameters: Sequence[Any]) -> Tensor:
    """L2 norm of every unit's gradient [units] over these parameters."""
    return cast(Tensor, torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0))


def _drop_not_finite(parameters: Sequence[Any]) -> None:
    broken = ~torch.isfinite(_norms(parameters))
    if bool(broken.any()):
        for parameter in parameters:
            parameter.grad_sample[broken] = 0.0


def _capped(unit: Sequence[Example], most: int, randomness: SystemRandomness) -> list[Example]:
    return [unit[index] for index in randomness.some_of(len(unit), most)]


def _physical(units: Sequence[Sequence[Example]], records: int) -> Iterator[list[Sequence[Example]]]:
    """Whole units in batches of at most `records` records, or of one unit; like lengths together, to pad little."""
    batch: list[Sequence[Example]] = []
    count = 0
    for unit in sorted(units, key=lambda unit: max(len(example.tokens) for example in unit)):
        if batch and count + len(unit) > records:
            yield batch
            batch, count = [], 0
        batch.append(unit)
        count += len(unit)
    if batch:
        yield batch
