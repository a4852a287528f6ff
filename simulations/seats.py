"""Where each worker computes: it takes a slot of the plan in its first call, and a turn on the device for each job.

Workers and the process that plans know each other through files in one folder, `<sites>/slots`:

    plan.json         the slots: device, what of it a worker sees, its share of memory, records at once
    slot-N.lock       locked by the worker that sits there, for as long as it lives
    slot-N.json       the sites that it last worked for, and its largest memory so far
    turn-D-K.lock     locked while a worker computes on device D
    open-D            how many may do so at once; no file: as many as the device has slots
    halved.jsonl      a line for each time that a worker halved its physical batch

A slot that is closed takes a turn away. Its worker keeps its base and takes turns with the others.
"""

import contextlib
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from client.training.physical import Room, release, within
from common.durable import write_text
from common.errors import ServiceError
from simulations.devices import VISIBLE, visible
from simulations.footprint import peak_bytes
from simulations.slots import SAFE, Plan
from simulations.workers import SLOTS

__all__ = ["Halved", "Seats", "at_work", "take_seat"]

# A worker that starts while another holds its slot waits: Ray may replace one before it is gone.
PATIENCE = 30.0
POLL = 0.05

# Sites that a worker remembers: it may have gone on to others when it is asked where a site was.
LATELY = 32


@dataclass(frozen=True)
class Halved:
    """A worker halved its physical batch while it worked for a site."""

    site: str
    before: int
    after: int


class Seats:
    """The folder as the planning process sees it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self._plan, self._read = folder, plan, 0
        folder.mkdir(mode=0o700)
        slots = []
        for slot in plan.slots:
            device = plan.devices[slot.device]
            share = SAFE * device.memory / plan.on(slot.device)
            slots.append(
                {
                    **asdict(slot),
                    "visible": visible(device),
                    "card": device.index if device.is_gpu else None,
                    "bytes": share,
                }
            )
        write_text(folder / "plan.json", json.dumps(slots))

    def new_halvings(self) -> list[Halved]:
        """What workers have written since the last call."""
        try:
            text = (self.folder / "halved.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        whole = text[self._read : text.rfind("\n") + 1]
        self._read += len(whole)
        return [Halved(**json.loads(line)) for line in whole.splitlines()]

    def peaks(self) -> dict[int, int]:
        """Largest memory in bytes of a worker on each device by its place in the plan, as far as they told."""
        peaks: dict[int, int] = {}
        for number, slot in enumerate(self._plan.slots):
            if told := _told(self.folder, number):
                peaks[slot.device] = max(peaks.get(slot.device, 0), told["peak"])
        return peaks

    def close_slot(self, site: str) -> tuple[int, int] | None:
        """Close a slot of the device whose worker worked for `site` lately: the device, and how many are left.

        None where that was the last one, or no worker says that it did.
        """
        for number, slot in enumerate(self._plan.slots):
            told = _told(self.folder, number)
            if told and site in told["sites"]:
                left = _open(self.folder, slot.device, self._plan.on(slot.device)) - 1
                if left < 1:
                    return None
                write_text(self.folder / f"open-{slot.device}", str(left))
                return slot.device, left
        return None


def _told(folder: Path, number: int) -> dict[str, Any] | None:
    try:
        told: dict[str, Any] = json.loads((folder / f"slot-{number}.json").read_bytes())
    except FileNotFoundError:
        return None
    return told


def _open(folder: Path, device: int, slots: int) -> int:
    try:
        return int((folder / f"open-{device}").read_text(encoding="ascii"))
    except FileNotFoundError:
        return slots


@dataclass
class _Seat:
    """The slot that this process sits on."""

    folder: Path
    number: int
    lock: int
    device: int
    beside: int
    room: Room
    sites: deque[str] = field(default_factory=lambda: deque(maxlen=LATELY))


# The seat of this process, once it has one.
_taken: list[_Seat] = []

# Room of a process that has no slot, as where Flower started it itself.
_own_room = Room()


def take_seat() -> None:
    """Sit down on a free slot, once in a process; afterwards it sees the slot's device alone, up to its share.

    Raises:
        ServiceError: all slots are taken.
    """
    where = os.environ.get(SLOTS)
    if where is None or _taken:
        return
    folder = Path(where)
    slots = json.loads((folder / "plan.json").read_bytes())
    until = time.monotonic() + PATIENCE
    while True:
        for number, slot in enumerate(slots):
            lock = _locked(folder / f"slot-{number}.lock")
            if lock is None:
                continue
            beside = sum(other["device"] == slot["device"] for other in slots)
            os.environ[VISIBLE] = slot["visible"]
            if slot["card"] is not None and torch.cuda.is_available():
                _keep_to_card(slot["card"], slot["bytes"])
            _taken.append(_Seat(folder, number, lock, slot["device"], beside, Room(slot["records"])))
            return
        if time.monotonic() > until:
            raise ServiceError(f"all {len(slots)} slots of the plan are taken; end workers of other runs")
        time.sleep(POLL)


def _keep_to_card(card: int, most: float) -> None:
    """Compute on this card alone and take no more of it than `most` bytes."""
    # An import may have counted the cards already, and then the environment is not looked at any more.
    if torch._C._cuda_getDeviceCount() > 1:
        torch.cuda.set_device(card)
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total))


@contextlib.contextmanager
def at_work(site: str) -> Iterator[None]:
    """Compute for a site: in the slot's room, when it is its turn; what happened to memory is told afterwards.

    The first call in a process takes its slot.

    Raises:
        ServiceError: all slots are taken.
    """
    take_seat()
    if not _taken:
        with within(_own_room):
            yield
        return
    (seat,) = _taken
    turn = _turn(seat)
    try:
        with within(seat.room):
            yield
        for halving in seat.room.halvings:
            line = json.dumps(asdict(Halved(site, halving.before, halving.after))) + "\n"
            with (seat.folder / "halved.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(line)
        if site in seat.sites:
            seat.sites.remove(site)
        seat.sites.append(site)
        told = json.dumps({"sites": list(seat.sites), "peak": peak_bytes()})
        beside = seat.folder / f"slot-{seat.number}.new"
        beside.write_text(told)
        beside.replace(seat.folder / f"slot-{seat.number}.json")
        if _open(seat.folder, seat.device, seat.beside) < seat.beside:
            release()  # others take turns with it
    finally:
        os.close(turn)


def _turn(seat: _Seat) -> int:
    while True:
        for place in range(_open(seat.folder, seat.device, seat.beside)):
            lock = _locked(seat.folder / f"turn-{seat.device}-{place}.lock")
            if lock is not None:
                return lock
        time.sleep(POLL)


def _locked(path: Path) -> int | None:
    """The file, locked until it is closed or the process ends; None where another has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
