"""Which worker computes on which device, how many records at once, and which site starts first. Pure arithmetic.

A slot is room for one worker: one process with one resident base. A device has as many slots as its memory holds
footprints; where not even one fits, the physical batch is halved until one does, which changes no result but by
rounding (`client/training/physical.py`). Slots are dealt to devices in turn, so that all of them get work.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from common.errors import RunError
from simulations.wording import size_text

__all__ = [
    "SAFE",
    "Device",
    "Footprint",
    "Plan",
    "Slot",
    "longest_first",
    "makespan",
    "more_careful",
    "on_cluster",
    "plan_slots",
]

# Share of a device's free memory that is planned with. The rest is for fragments, and for what others may take.
SAFE = 0.9

Count = Literal["auto"] | int


@dataclass(frozen=True)
class Device:
    """Something with memory of its own: a GPU by its `index`, or the machine (None). `memory` is free, in bytes.

    An `emulated` GPU is a name and a number: its workers compute on the CPU. Of a cluster the memory is unknown, 0.
    """

    name: str
    memory: int
    index: int | None = None
    emulated: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether workers compute on a card there; not on the machine, nor where a card is emulated."""
        return self.index is not None and not self.emulated


@dataclass(frozen=True)
class Footprint:
    """Bytes that a worker needs where it computes.

    `process` is what it needs beside the model, `base` the base, `adapter` the adapter with gradient and optimiser,
    `record` activations and, with privacy, gradients of each record in the physical batch. `floor` is the peak of
    what comes before and after training: loading and measuring. `measured` tells from estimates.
    """

    process: int
    base: int
    adapter: int
    record: int
    floor: int = 0
    measured: bool = False

    def at(self, records: int) -> int:
        """Bytes at the peak with `records` at once."""
        return max(self.process + self.base + self.adapter + self.record * records, self.floor)


@dataclass(frozen=True)
class Slot:
    """Room for one worker: the device by its place in the plan's list, the slot's place there, records at once."""

    device: int
    place: int
    records: int


@dataclass(frozen=True)
class Plan:
    """Worker processes, threads in each, and where each computes; `notes` are what a person should know of it."""

    threads: int
    devices: tuple[Device, ...]
    slots: tuple[Slot, ...]
    footprint: Footprint
    notes: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return len(self.slots)

    @property
    def emulated(self) -> bool:
        """Whether its GPUs are emulated."""
        return any(device.emulated for device in self.devices)

    @property
    def gpu_share(self) -> float:
        """GPUs for each worker, where they are told apart by nothing else; 0 without (real) ones."""
        gpus = sum(device.is_gpu for device in self.devices)
        return gpus / self.workers if gpus else 0.0

    def on(self, device: int) -> int:
        """Slots of a device."""
        return sum(slot.device == device for slot in self.slots)

    def planned(self, device: int) -> int:
        """Bytes of a device that its slots need."""
        return sum(self.footprint.at(slot.records) for slot in self.slots if slot.device == device)

    def lines(self) -> list[str]:
        """The plan for a person, a line for each device that gets work and each note."""
        lines = []
        for place, device in enumerate(self.devices):
            if count := self.on(place):
                records = next(slot.records for slot in self.slots if slot.device == place)
                lines.append(
                    f"{device.name}: {count} {'worker' if count == 1 else 'workers'}, {records} records at once"
                    + (f", {size_text(self.planned(place))} of {size_text(device.memory)}" if device.memory else "")
                )
        return [*lines, *self.notes]


def plan_slots(
    devices: Sequence[Device],
    footprint: Footprint,
    *,
    sites: int,
    cores: int,
    batch: int,
    workers: Count = "auto",
    slots_per_gpu: Count = "auto",
    would: Mapping[str, Footprint] | None = None,
) -> Plan:
    """Fit workers to devices: all GPUs, or the machine alone.

    There are at most as many as sites, as `workers` says, and, on auto, as cores, but one for each device.

    Args:
        devices: where to compute.
        footprint: what a worker needs there.
        sites: how many train.
        cores: of the machine.
        batch: records at once as the manifest says.
        workers: a number is a person's own word, and on a machine without GPUs memory is then only warned of.
        slots_per_gpu: workers on each GPU.
        would: footprints with other settings, by these, for saying what would fit where nothing does.

    Raises:
        RunError: no device has room for a worker with one record at once, or not for as many as were asked for.
    """
    fixed = None if slots_per_gpu == "auto" else int(slots_per_gpu)
    room = [_room(device, footprint, batch, fixed) for device in devices]
    notes = []
    for device, (count, _) in zip(devices, room, strict=True):
        if fixed is not None and device.index is not None and count < fixed:
            fits = _fitting(device, footprint, 1)
            raise RunError(
                f"simulation.slots_per_gpu = {fixed} needs {size_text(fixed * footprint.at(1))} on {device.name} even"
                f" with one record at once, which has {size_text(device.memory)} free; at most {fits} would fit"
            )
        if not count:
            notes.append(f"{device.name} is left out: {size_text(device.memory)} are too little for a worker")
    if not any(count for count, _ in room):
        if workers == "auto" or any(device.index is not None for device in devices):
            raise RunError(_too_little(devices, footprint, would or {}))
        room = [(1, 1)]
    if isinstance(workers, int):
        most = min(workers, sites)
        if all(device.index is None for device in devices) and room[0][0] < most:
            records = room[0][1]
            notes = [
                f"simulation.workers = {workers} need about {size_text(most * footprint.at(records))},"
                f" {size_text(devices[0].memory)} are free: memory may run out"
            ]
            room = [(most, records)]
    else:
        most = min(sites, max(cores, sum(count > 0 for count, _ in room)))
    slots = list(islice(_dealt(room), max(1, most)))
    if any(slot.records < batch for slot in slots):
        notes.append(f"fewer than the manifest's {batch} records at once: memory is short, results stay the same")
    return Plan(max(1, cores // len(slots)), tuple(devices), tuple(slots), footprint, tuple(notes))


def _room(device: Device, footprint: Footprint, batch: int, fixed: int | None) -> tuple[int, int]:
    """Slots of a device and records at once: the largest half of a half of the batch with which one fits."""
    fixed = fixed if device.index is not None else None
    records = batch
    while (fits := _fitting(device, footprint, records)) < (fixed or 1):
        if records == 1:
            return 0, 1
        records //= 2
    return fixed or fits, records


def _fitting(device: Device, footprint: Footprint, records: int) -> int:
    return int(SAFE * device.memory) // max(1, footprint.at(records))


def _dealt(room: Sequence[tuple[int, int]]) -> Iterator[Slot]:
    """Every device's first slot, then every second one, and so on."""
    for place in range(max(count for count, _ in room)):
        for device, (count, records) in enumerate(room):
            if place < count:
                yield Slot(device, place, records)


def _too_little(devices: Sequence[Device], footprint: Footprint, would: Mapping[str, Footprint]) -> str:
    largest = max(devices, key=lambda device: device.memory)
    fits = [
        f"{settings} ({size_text(other.at(1))})"
        for settings, other in would.items()
        if _fitting(largest, other, 1) and other.at(1) < footprint.at(1)
    ]
    return (
        f"no device has memory for a worker: with one record at once it needs {size_text(footprint.at(1))}"
        f" ({'measured' if footprint.measured else 'estimated'}: process {size_text(footprint.process)}, base"
        f" {size_text(footprint.base)}, adapter {size_text(footprint.adapter)}, record {size_text(footprint.record)}),"
        f" the largest is {largest.name} with {size_text(largest.memory)} free, of which {SAFE:.0%} are planned with;"
        f" what would fit: {', or '.join(fits) or 'a smaller base or a shorter data.max_length'}"
    )


def on_cluster(address: str, footprint: Footprint, *, records: int, workers: int = 1) -> Plan:
    """The plan for a Ray cluster, which places its workers itself, a processor for each; `workers` are known later."""
    slots = tuple(Slot(0, place, records) for place in range(workers))
    return Plan(1, (Device(f"Ray cluster at {address}", 0),), slots, footprint)


def more_careful(one: Plan, other: Plan) -> Plan:
    """That of two plans which also does for the other's federation."""
    return min(one, other, key=lambda plan: (plan.workers, plan.slots[0].records, -plan.footprint.at(1)))


def longest_first(work: Mapping[str, float]) -> list[str]:
    """The sites, those with the most work first; equals keep their order.

    Taken in this order by whichever worker is free, all are done after at most 4/3 - 1/(3 workers) of the shortest
    possible time (Graham 1969, theorem 2).
    """
    return sorted(work, key=lambda site: -work[site])


def makespan(work: Mapping[str, float], order: Sequence[str], workers: int) -> float:
    """When all is done if free workers take sites in `order`, in the unit of `work`."""
    busy = [0.0] * workers
    for site in order:
        first = busy.index(min(busy))
        busy[first] += work[site]
    return max(busy)
