"""How a run is begun, resumed and followed, with a stand-in for Flower's control API."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import RunError, ServiceError
from common.frames import Order
from common.progress import EventLog, PhaseStarted, RunStarted, RunStopped
from server import submission
from server.home import CoordinatorHome
from server.run_store import RunStore
from server.superlink import Control, FlowerRun

STARTED = RunStarted(run_id="one", federation="f", sites=(), rounds=1, metrics=(), trainable_parameters=1)


class FakeControl:
    status: ClassVar[str] = "running"
    submitted: ClassVar[list[str]] = []
    stopped: ClassVar[list[int]] = []

    def __init__(self, home: CoordinatorHome) -> None:
        self.home = home

    def __enter__(self) -> "FakeControl":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self, *, seconds: float) -> None:
        assert seconds > 0

    def submit(self, run_id: str) -> int:
        self.submitted.append(run_id)
        return 40 + len(self.submitted)

    def run(self, number: int) -> FlowerRun:
        return FlowerRun(number, self.status, "out of memory")

    def stop(self, number: int) -> None:
        self.stopped.append(number)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CoordinatorHome:
    for name, value in {"status": "running", "submitted": [], "stopped": []}.items():
        monkeypatch.setattr(FakeControl, name, value)
    monkeypatch.setattr(submission, "Control", FakeControl)
    monkeypatch.setattr(submission, "_LOOK_SECONDS", 0.001)
    made = CoordinatorHome(tmp_path)
    made.processes.mkdir()
    return made


def summary(status: str) -> str:
    values: dict[str, Any] = {
        "first_line": "", "run_id": "one", "federation": "f", "status": status, "reason": "", "manifest_sha256": "",
        "roster_sha256": "", "sites": [], "refusals": {}, "rounds": [], "selected_round": 0,
    }  # fmt: skip
    return json.dumps(values)


def test_one_run_at_a_time(home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submission.submit(home, "one", resume=False).number == 41
    with pytest.raises(RunError, match="run one goes on"):
        submission.submit(home, "two", resume=False)
    monkeypatch.setattr(FakeControl, "status", "finished:failed")
    assert submission.submit(home, "two", resume=False).number == 42
    assert FakeControl.submitted == ["one", "two"]


def test_only_what_was_begun_is_resumed_and_only_what_was_not_is_begun(home: CoordinatorHome) -> None:
    with pytest.raises(RunError, match="no run one"):
        submission.submit(home, "one", resume=True)
    (home.runs / "one" / "rounds").mkdir(parents=True)
    with pytest.raises(RunError, match="exists already"):
        submission.submit(home, "one", resume=False)
    (home.runs / "one" / "adapter").mkdir()
    with pytest.raises(RunError, match="has finished"):
        submission.submit(home, "one", resume=True)
    (home.runs / "one" / "adapter").rmdir()
    assert submission.submit(home, "one", resume=True).number == 41
    assert FakeControl.submitted == ["one"]


def test_the_newest_app_of_a_run_is_ended(home: CoordinatorHome) -> None:
    with pytest.raises(RunError, match="no run one"):
        submission.end(home, "one")
    submission.submit(home, "one", resume=False)
    submission.end(home, "one")
    assert FakeControl.stopped == [41]


def test_events_of_an_earlier_app_are_passed_over(home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home.runs / "one"
    folder.mkdir(parents=True)
    looks: list[int] = []
    with contextlib.closing(EventLog(folder / "events.jsonl")) as log:
        for event in (STARTED, RunStopped(status="interrupted", reason="killed")):
            log(event)

        def run(_: FakeControl, number: int) -> FlowerRun:
            looks.append(number)
            if len(looks) == 3:
                for event in (STARTED, PhaseStarted(phase="rounds"), RunStopped(status="finished", reason="")):
                    log(event)
            return FlowerRun(number, "running", "")

        monkeypatch.setattr(FakeControl, "run", run)
        found = [event.name() for event in submission.follow(home, submission.Submission("one", 41, 2))]
    assert found == ["run_started", "phase_started", "run_stopped"]
    assert looks == [41] * 3


def test_an_app_that_dies_first_is_told_with_flowers_words(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeControl, "status", "finished:failed")
    with pytest.raises(RunError, match=r"ended before the run did: out of memory; resume it .* --resume one"):
        list(submission.follow(home, submission.Submission("one", 41, 0)))


def test_a_summary_is_read_or_missing_or_damaged(home: CoordinatorHome) -> None:
    folder = home.runs / "one"
    folder.mkdir(parents=True)
    assert submission.summary_of(folder) is None
    (folder / "summary.json").write_text(summary("interrupted"))
    found = submission.summary_of(folder)
    assert found is not None
    assert found.status == "interrupted"
    (folder / "summary.json").write_text(summary("finished")[:-20])
    with pytest.raises(RunError, match="damaged"):
        submission.summary_of(folder)


def test_a_run_whose_app_was_killed_is_no_hindrance(home: CoordinatorHome) -> None:
    submission.submit(home, "one", resume=False)
    (home.runs / "one" / "rounds").mkdir(parents=True)  # the app had begun, and holds the folder no more
    assert submission.submit(home, "one", resume=True).number == 42
    assert FakeControl.stopped == [41]


def test_a_run_that_flower_forgot_is_no_hindrance_unless_its_app_lives(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission.submit(home, "one", resume=False)
    monkeypatch.setattr(FakeControl, "status", "finished:unknown")
    monkeypatch.setattr(submission, "_ENDING_SECONDS", 0.01)
    store = RunStore(home.runs / "one", lambda folder, adapter: None)
    with pytest.raises(RunError, match="run one goes on"):
        submission.submit(home, "two", resume=False)
    store.close()
    assert submission.submit(home, "two", resume=False).number == 42
    assert FakeControl.stopped == []


def test_what_flower_says_of_a_run_that_it_does_not_hold() -> None:
    def control(status: int, text: str) -> Control:
        def refuses(request: object) -> None:
            answer = httpx.Response(status, text=text, request=httpx.Request("POST", "http://h"))
            answer.raise_for_status()

        made = Control.__new__(Control)
        made._client = SimpleNamespace(ListRuns=refuses)
        return made

    found = control(404, '{"message": "Run ID not found."}').run(5)
    assert (found.over, found.known) == (True, False)
    for status, text in ((404, "no such path"), (500, "Run ID not found.")):
        with pytest.raises(ServiceError, match=f"refuses .{status}"):
            control(status, text).run(5)


def test_an_app_that_is_killed_is_told_at_once(home: CoordinatorHome) -> None:
    """Flower still says that it runs; its lock on the folder is gone."""
    store = RunStore(home.runs / "one", lambda folder, adapter: None)
    with contextlib.closing(EventLog(home.runs / "one" / "events.jsonl")) as log:
        log(STARTED)
        events = submission.follow(home, submission.Submission("one", 41, 0))
        assert next(events).name() == "run_started"
        log(PhaseStarted(phase="rounds"))
        assert next(events).name() == "phase_started"
        store.close()
        with pytest.raises(RunError, match=r"ended before the run did: it was killed, or failed; resume it"):
            next(events)


def test_names_of_runs_are_new_each_time() -> None:
    names = {submission.new_run_id("wards") for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("wards-") for name in names)


@pytest.mark.parametrize("name", ["", "a b", "../elsewhere", "a/b", ".hidden", "-x", "ä", "a" * 101, "a\n"])
def test_a_name_that_no_run_can_have_is_refused_before_anything_is_asked(home: CoordinatorHome, name: str) -> None:
    for act in (
        lambda: submission.submit(home, name, resume=False),
        lambda: submission.submit(home, name, resume=True),
        lambda: submission.end(home, name),
    ):
        with pytest.raises(RunError, match=r"a run's name is 1 to 100 letters, digits, .*; found '") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert FakeControl.submitted == []


@given(st.text(max_size=8) | st.from_regex(r"[A-Za-z0-9._-]{0,104}", fullmatch=True))
def test_a_runs_name_is_one_that_an_order_may_carry(name: str) -> None:
    answer = {
        "federation": "0" * 32, "epoch": 0, "manifest_sha256": "0" * 64, "run_id": name, "site": 0, "kind": "hello",
        "sequence": 0,
    }  # fmt: skip
    try:
        Order.model_validate(answer)
        allowed = True
    except ValidationError:
        allowed = False
    with contextlib.nullcontext() if allowed else pytest.raises(RunError):
        submission.require_run_id(name)


def test_a_new_runs_name_is_a_runs_name() -> None:
    submission.require_run_id(submission.new_run_id("f" * 64))
