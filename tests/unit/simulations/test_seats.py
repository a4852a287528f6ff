"""Seats and turns between real processes: one to a slot, as many at once as are open, and back when one dies."""

import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import ServiceError
from simulations import seats
from simulations.seats import Halved, Seats, at_work, take_seat
from simulations.slots import Device, Footprint, Plan, Slot
from simulations.workers import SLOTS

GB = 10**9

SITTING = """
import sys, time
from simulations.seats import _taken, at_work, take_seat
take_seat()
print(_taken[0].number, flush=True)
for line in sys.stdin:
    with at_work(line.strip()):
        print("at work", flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


def plan_of(*per_device: int, records: int = 8) -> Plan:
    devices = tuple(Device(f"emulated GPU {place}", 8 * GB, place, emulated=True) for place in range(len(per_device)))
    slots = [Slot(device, place, records) for device, count in enumerate(per_device) for place in range(count)]
    return Plan(1, devices, tuple(slots), Footprint(GB, GB, 0, 0))


class Worker:
    """A process that takes a seat, and works when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SITTING)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(filter(None, sys.path)), SLOTS: str(folder)},
        )

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def speaks(self, *, within: float) -> bool:
        """Whether it says something in so many seconds."""
        return bool(select.select([self.process.stdout], [], [], within)[0])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_every_worker_has_a_slot_of_its_own_until_it_dies(tmp_path: Path) -> None:
    there = Seats(tmp_path / "slots", plan_of(1, 1))
    first, second = Worker(there.folder), Worker(there.folder)
    try:
        assert {first.hear(), second.hear()} == {"0", "1"}
        first.end()
        third = Worker(there.folder)
        try:
            assert third.hear() in {"0", "1"}
        finally:
            third.end()
    finally:
        for worker in (first, second):
            if worker.process.returncode is None:
                worker.end()


def test_a_closed_slot_takes_a_turn_away_and_no_base(tmp_path: Path) -> None:
    there = Seats(tmp_path / "slots", plan_of(2))
    workers = [Worker(there.folder), Worker(there.folder)]
    try:
        for worker in workers:
            worker.hear()
        for worker, site in zip(workers, ("north", "south"), strict=True):
            worker.say(site)
            assert worker.hear() == "at work"  # both at once
        for worker in workers:
            worker.say("")
            assert worker.hear() == "done"
        assert there.close_slot("north") == (0, 1)
        assert there.close_slot("south") is None  # the last one stays open
        assert there.close_slot("nobody") is None
        one, other = workers
        one.say("north")
        assert one.hear() == "at work"
        other.say("south")
        assert not other.speaks(within=4 * seats.POLL)
        one.say("")
        assert one.hear() == "done"
        assert other.hear() == "at work"  # its turn came when the other's was over
        other.say("")
        assert other.hear() == "done"
        assert there.peaks()[0] > 10**8
    finally:
        for worker in workers:
            worker.end()


@pytest.fixture
def seated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seats:
    """This process, on the one slot of a plan."""
    monkeypatch.setattr(seats, "_taken", [])
    there = Seats(tmp_path / "slots", plan_of(1, records=8))
    monkeypatch.setenv(SLOTS, str(there.folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    take_seat()
    take_seat()  # once in a process
    return there


def test_what_a_worker_halved_is_told_once_and_kept_by_it(seated: Seats) -> None:
    from client.training.physical import Halving, physical_records
    from common.config.training import TrainingSection

    section = TrainingSection.model_validate({"batch_size": 16})
    with at_work("north"):
        assert physical_records(section) == 8  # as the plan says
        seats._taken[0].room.halvings.append(Halving(8, 4))
        seats._taken[0].room.records = 4
    assert seated.new_halvings() == [Halved("north", 8, 4)]
    assert seated.new_halvings() == []
    with at_work("south"):
        assert physical_records(section) == 4
    assert seated.new_halvings() == []
    assert physical_records(section) == 16  # outside of its work nothing holds


def test_work_that_fails_gives_its_turn_back(seated: Seats) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"), at_work("north"):
            raise ValueError("broken")
    assert seated.close_slot("north") is None
    with at_work("north"):
        pass


def test_more_workers_than_slots_are_refused(seated: Seats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_taken", [])
    monkeypatch.setattr(seats, "PATIENCE", 0.2)
    with pytest.raises(ServiceError, match="all 1 slots of the plan are taken"):
        take_seat()


@pytest.mark.parametrize("counted", [1, 3])
def test_a_worker_keeps_to_its_card_and_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: int
) -> None:
    """Torch's functions are replaced here; where cards were counted before the environment was set, they stay seen."""
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(seats, "_taken", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: counted, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2 if counted > 1 else 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=16 * GB))
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: asked.append(("card", card)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part: asked.append(("part", part)))
    card = Device("GPU 2", 8 * GB, 2)
    plan = Plan(1, (card,), (Slot(0, 0, 8), Slot(0, 1, 8)), Footprint(GB, GB, 0, 0))
    monkeypatch.setenv(SLOTS, str(Seats(tmp_path / "slots", plan).folder))
    take_seat()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert asked == [("card", 2), ("part", 0.9 / 4)][counted == 1 :]


def test_a_process_that_nobody_gave_a_slot_computes_as_it_always_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_taken", [])
    monkeypatch.delenv(SLOTS, raising=False)
    take_seat()
    with at_work("north"):
        pass
    assert seats._taken == []
