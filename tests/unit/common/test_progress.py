import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import RunError
from common.progress import (
    BaselineFinished,
    BatchHalved,
    Event,
    EventLog,
    PhaseStarted,
    ResourcesUsed,
    RoundFinished,
    RoundLost,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    RunStarted,
    RunStopped,
    SiteFailed,
    SiteFinished,
    SlotClosed,
    StageFinished,
    SumOpened,
    WorkersPlanned,
    read_events,
)

EVENTS: list[Event] = [
    RunStarted(
        run_id="r-1",
        federation="Größe\n2",
        sites=("a", "b"),
        rounds=2,
        metrics=("accuracy", "m:f"),
        trainable_parameters=7,
    ),
    PhaseStarted(phase="rounds"),
    RoundStarted(round=1, sites=("a",)),
    SiteFinished(round=1, site="a", train_loss=0.1, examples=32, seconds=1.5, bytes_up=10, bytes_down=20),
    SiteFailed(round=1, site="b", code="not_finite_loss"),
    SumOpened(round=1, survivors=("a", "c"), dropped=("b",), threshold=2, transcript="ab" * 32),
    StageFinished(round=1, stage="masked", seconds=0.75, waited={"a": 0.5, "c": 0.75}),
    RoundFinished(round=1, train_loss=0.1, answered=1, failed=1, bytes_up=10, bytes_down=40, seconds=2.0),
    RoundRejected(round=1, setting="max_norm", value=3.5, bound=1.0),
    RoundLost(round=1, reason="too few sites"),
    RoundValidated(round=0, figures={"accuracy": 0.5, "loss": 1 / 3}),
    BaselineFinished(baseline="local:a", figures={}),
    WorkersPlanned(workers=2, plan=("CPU: 2 workers",)),
    ResourcesUsed(processors=0.5, memory=3, gpus=(0.25, 1.0), gpu_memory=(7, 9)),
    BatchHalved(round=1, site="a", before=8, after=4),
    SlotClosed(round=1, site="a", device="GPU 0", left=1),
    RunStopped(status="failed", reason="no space"),
]


def written(path: Path, events: list[Event]) -> Path:
    log = EventLog(path)
    for event in events:
        log(event)
    log.close()
    return path


def test_every_kind_comes_back_equal(tmp_path: Path) -> None:
    mine = {kind for kind in Event.kinds.values() if kind.__module__ == "common.progress"}
    assert {type(event) for event in EVENTS} == mine  # a new kind of event needs a sample here
    path = written(tmp_path / "events.jsonl", EVENTS)
    assert list(read_events(path)) == EVENTS
    written(path, EVENTS[:2])
    assert list(read_events(path)) == [*EVENTS, *EVENTS[:2]]


def test_a_line_says_when_and_what(tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", [dataclasses.replace(EVENTS[4], time=12.5)])
    assert json.loads(path.read_text()) == {
        "time": 12.5,
        "event": "site_failed",
        "round": 1,
        "site": "b",
        "code": "not_finite_loss",
        "reason": "",
    }


def test_no_number_is_a_number_too(tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", [RoundValidated(round=1, figures={"x": math.nan, "y": math.inf})])
    event: Any = next(read_events(path))
    assert math.isnan(event.figures["x"])
    assert event.figures["y"] == math.inf


def test_each_line_is_there_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for number, event in enumerate(EVENTS, start=1):
        log(event)
        assert list(read_events(path)) == EVENTS[:number]
    log.close()


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", EVENTS[:3])
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1  # of the last line
    for length in range(start, len(data)):
        path.write_bytes(data[:length])
        assert list(read_events(path)) == EVENTS[:2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_one_line() -> None:
    log = EventLog(Path("/dev/full"))
    with pytest.raises(RunError) as error:
        log(EVENTS[1])
    assert str(error.value) == "cannot write /dev/full: No space left on device; the lines before are whole"
    log.close()


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVENTS[1].phase = "other"  # type: ignore[attr-defined]
