"""How many records a training computes on at once, and what happens where memory does not suffice for them.

The manifest's batch is the logical one: a step's gradient is over all of it, and privacy rests on it. The physical
batch is the part that goes through the model at once. It changes nothing but rounding, so a process may take a
smaller one than the manifest names: where memory runs out in the middle of a step it is halved, and what was summed
of the step is thrown away and summed again, over the same records. Nothing has left by then, and no noise was drawn.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from common.config.training import TrainingSection
from common.errors import OutOfMemory

__all__ = ["Halving", "Room", "is_out_of_memory", "physical_records", "release", "roomy", "within"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Halving:
    """The physical batch was halved: records at once before and after."""

    before: int
    after: int


@dataclass
class Room:
    """What a process has memory for: at most `records` at once; None: what the manifest says.

    It keeps what halving found out, for the trainings that follow in the process. `halvings` are those of the
    training that goes on, of which one is allowed.
    """

    records: int | None = None
    halvings: list[Halving] = field(default_factory=list)


_ROOM: ContextVar[Room | None] = ContextVar("room", default=None)


@contextlib.contextmanager
def within(room: Room) -> Iterator[None]:
    """Trainings in the block go by `room`, which is told of halvings; it counts them from here."""
    room.halvings = []
    token = _ROOM.set(room)
    try:
        yield
    finally:
        _ROOM.reset(token)


def physical_records(section: TrainingSection, room: Room | None = None) -> int:
    """Records in one forward pass: the manifest's, or fewer where the process has room for fewer."""
    agreed = section.micro_batch_size or section.batch_size
    room = room or _ROOM.get()
    return agreed if room is None or room.records is None else max(1, min(agreed, room.records))


@dataclass
class _OneTraining:
    """Steps of one training: its room, which is its own where nobody gave it one."""

    section: TrainingSection
    room: Room

    def summed(self, gradient: Callable[[int], Result], *, undo: Callable[[], None]) -> Result:
        """`gradient(records)`, which sums a step's gradient over parts of so many records.

        Where memory runs out, `undo` throws away what was summed, and the half of so many is tried, once in a
        training.

        Raises:
            OutOfMemory: the half was too much too, or one record is.
        """
        while True:
            size = physical_records(self.section, self.room)
            try:
                return gradient(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                halved = "half of what was tried before, " if self.room.halvings else ""
                if size == 1 or halved:
                    raise OutOfMemory(
                        f"memory does not suffice for {size} records at once, {halved}and no less is tried; take a"
                        " smaller training.micro_batch_size, fewer workers, or training.gradient_checkpointing = true"
                    ) from None
            # Outside of the except block: what it held of the failed pass is free by now.
            undo()
            release()
            self.room.halvings.append(Halving(size, size // 2))
            self.room.records = size // 2


def roomy(section: TrainingSection) -> _OneTraining:
    """The steps of a training that begins now, in the room that `within` gave, or else in one of its own."""
    return _OneTraining(section, _ROOM.get() or Room())


def release() -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the machine did not suffice. Torch has a class for devices alone."""
    said: Any = error.args[0] if error.args else ""
    allocator = isinstance(error, RuntimeError) and isinstance(said, str) and "DefaultCPUAllocator" in said
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or allocator
