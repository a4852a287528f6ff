"""Where memory runs out: the physical batch is halved, and the step stays the same step."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from client.protection import Mechanism
from client.resident import Resident, resident
from client.training.loop import train
from client.training.physical import Halving, Room, is_out_of_memory, physical_records, within
from client.training.private import train_private
from common.adapters import first_state, get_state, set_state
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import OutOfMemory
from common.randomness import SystemRandomness
from common.records import TextRecord
from common.tasks.task import Batch, Example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HOW = Mechanism(noise_multiplier=0.8, clip=0.5, sampling_rate=0.6, expected_units=8.0, records_per_unit=1)
STEPS = 4


class SmallMemory:
    """A task that has memory for the losses of `most` records at once."""

    def __init__(self, task: Any, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self._task, self._most, self._error = task, most, error
        self.failed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, output: Any, batch: Batch) -> torch.Tensor:
        if len(batch.targets) > self._most:
            self.failed.append(len(batch.targets))
            raise self._error("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        losses: torch.Tensor = self._task.losses(output, batch)
        return losses


@pytest.fixture
def ready(manifest_for: Callable[..., Manifest]) -> Resident:
    return resident(manifest_for(training={"batch_size": 8, "local_steps": STEPS}))


def examples_of(ready: Resident, number: int = 16) -> list[Example]:
    records = [
        TextRecord(text=f"clause {place} " + "of the term " * (1 + place % 4), label="abc"[place % 3], unit=str(place))
        for place in range(number)
    ]
    return list(ready.task.encode(records).examples)


def batches() -> Iterator[list[int]]:
    for step in count():
        yield [(8 * step + place) % 16 for place in range(8)]


def trained(ready: Resident, manifest: Manifest, task: Any, *, private: bool, seed: int = 5) -> AdapterState:
    set_state(ready.model, first_state(ready.model, 0))
    torch.manual_seed(1)
    section, examples = manifest.training, examples_of(ready)
    how: dict[str, Any] = {"first_step": 0, "steps": STEPS, "total_steps": STEPS, "precision": "fp32"}
    if private:
        units = [[example] for example in examples]
        train_private(ready.model, task, units, section, HOW, SystemRandomness(unsafe_seed=seed), **how)
    else:
        train(ready.model, task, examples, batches(), section, **how)
    return get_state(ready.model)


def differ(one: AdapterState, other: AdapterState) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture
def calm(manifest_for: Callable[..., Manifest]) -> Manifest:
    return manifest_for(training={"batch_size": 8, "local_steps": STEPS}, adapter={"dropout": 0.0})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("private", [False, True])
def test_the_halved_training_is_the_same_training(calm: Manifest, private: bool, error: type[Exception]) -> None:
    """Same sampled batches, same noise, same steps: what is trained agrees to rounding."""
    ready = resident(calm)
    enough = trained(ready, calm, ready.task, private=private)
    scarce, room = SmallMemory(ready.task, 7, error), Room()
    with within(room):
        halved = trained(ready, calm, scarce, private=private)
    assert len(scarce.failed) == 1  # the trainings after it begin with the half
    assert (room.halvings, room.records) == ([Halving(8, 4)], 4)
    # Adam divides by the gradient's size, so rounding of tiny gradients shows in steps of the learning rate, 1e-3.
    assert differ(enough, halved) < 2e-5
    if private:  # the comparison can tell: other noise gives another adapter
        assert differ(enough, trained(ready, calm, ready.task, private=True, seed=6)) > 1e-3


@pytest.mark.parametrize("private", [False, True])
def test_what_was_summed_before_memory_ran_out_is_not_in_the_step(calm: Manifest, private: bool) -> None:
    """Memory runs out in the second part of a step; the first part must not count twice."""
    ready = resident(calm)
    tasks = [ready.task, SecondFails(ready.task)]
    states = []
    for task in tasks:
        with within(Room(4)):
            states.append(trained(ready, calm, task, private=private))
    assert differ(*states) < 2e-5


class SecondFails(SmallMemory):
    """Memory runs out in the second pass alone."""

    def __init__(self, task: Any) -> None:
        super().__init__(task, 10**6)
        self._passes = count(1)

    def losses(self, output: Any, batch: Batch) -> torch.Tensor:
        if next(self._passes) == 2:
            raise torch.OutOfMemoryError("injected")
        return super().losses(output, batch)


@pytest.mark.parametrize("private", [False, True])
def test_a_second_time_ends_the_training(calm: Manifest, private: bool) -> None:
    ready = resident(calm)
    scarce, room = SmallMemory(ready.task, 2), Room()
    with within(room), pytest.raises(OutOfMemory, match=r"4 records at once, half of what was tried before") as raised:
        trained(ready, calm, scarce, private=private)
    assert "\n" not in str(raised.value)
    assert room.records == 4
    with within(room):  # the next training of the process begins with the half, and may halve again
        trained(ready, calm, scarce, private=private)
    assert room.records == 2
    assert not any(hasattr(p, "grad_sample") for p in ready.model.parameters())


def test_one_record_cannot_be_halved(calm: Manifest) -> None:
    ready = resident(calm)
    with within(Room(1)), pytest.raises(OutOfMemory, match="for 1 records at once"):
        trained(ready, calm, SmallMemory(ready.task, 0), private=False)


def test_another_error_is_no_lack_of_memory(calm: Manifest) -> None:
    class Broken(SmallMemory):
        def losses(self, output: Any, batch: Batch) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    ready, room = resident(calm), Room()
    with within(room), pytest.raises(RuntimeError, match="shapes"):
        trained(ready, calm, Broken(ready.task, 1), private=False)
    assert not room.halvings
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError(), MemoryError())))
    assert not any(map(is_out_of_memory, (ValueError("DefaultCPUAllocator"), RuntimeError(3))))


def test_a_room_never_computes_on_more_than_the_manifest_says(calm: Manifest) -> None:
    section = calm.training
    assert physical_records(section) == 8
    assert [physical_records(section, Room(most)) for most in (None, 3, 8, 100)] == [8, 3, 8, 8]
    small = section.model_copy(update={"micro_batch_size": 2})
    assert physical_records(small, Room(4)) == 2
