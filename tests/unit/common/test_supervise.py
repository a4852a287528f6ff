"""Programs are kept running, end together, and never run twice; real processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common import supervise
from common.errors import ServiceError
from common.supervise import Program, State, launch, running, states, stop

SLEEPER = "import time\nwhile True: time.sleep(0.1)"
SECONDS = 20.0


def program(name: str, code: str, **environment: str) -> Program:
    return Program(name=name, command=(sys.executable, "-c", code), environment=environment)


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder; whatever runs there ends with the test."""
    folder = tmp_path / "run"
    yield folder
    if folder.exists():
        stop(folder)


def is_over(pid: int) -> bool:
    """Whether a process ended; nobody may have read its status yet, where init does not."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def state(folder: Path, name: str) -> State | None:
    return next((each for each in states(folder) if each.name == name), None)


def test_programs_run_until_they_are_stopped(place: Path) -> None:
    launch([program("one", SLEEPER), program("two", SLEEPER)], place, place / "log")
    assert running(place)
    pids = [each.pid for each in states(place)]
    assert [each.name for each in states(place)] == ["one", "two"]
    assert all(each.alive for each in states(place))
    with pytest.raises(ServiceError, match="it runs already"):
        launch([program("one", SLEEPER)], place, place / "log")
    assert [each.pid for each in states(place)] == pids
    assert stop(place)
    assert not running(place)
    assert not any(map(psutil.pid_exists, pids))
    assert states(place) == []
    assert not stop(place)


def test_what_ends_is_started_again_and_its_ends_are_counted(place: Path) -> None:
    launch([program("one", SLEEPER)], place, place / "log")
    first = state(place, "one")
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)

    def again() -> bool:
        found = state(place, "one")
        return found is not None and found.pid != first.pid and found.alive and found.ends == 1

    wait_for(again)


def test_pauses_grow_while_a_program_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_SECONDS", 0.2)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.01)
    starts = tmp_path / "starts"
    code = f"import time; open({str(starts)!r}, 'a').write(f'{{time.time()}}\\n')"
    stopping = threading.Event()
    thread = threading.Thread(
        target=supervise.supervise,
        args=([program("one", code)], tmp_path / "run", tmp_path / "log"),
        kwargs={"stopping": stopping},
    )
    thread.start()
    wait_for(lambda: starts.exists() and len(starts.read_text().split()) >= 4)
    stopping.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    times = [float(line) for line in starts.read_text().split()][:4]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for pause, least in zip(pauses, (0.2, 0.4, 0.8), strict=True):
        assert pause >= least - 0.05  # the interpreter's own start is in it, so there is no upper bound


def test_a_killed_supervisors_programs_are_ended_before_new_ones_start(place: Path) -> None:
    launch([program("one", SLEEPER)], place, place / "log")
    orphan = state(place, "one")
    assert orphan is not None
    supervisor = json.loads((place / "supervisor.pid").read_text())["pid"]
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not running(place))
    assert not is_over(orphan.pid)
    launch([program("one", SLEEPER)], place, place / "log")
    assert is_over(orphan.pid)
    found = state(place, "one")
    assert found is not None
    assert found.alive


def test_a_program_that_does_not_want_to_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)
    child = tmp_path / "child"
    stubborn = (
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(inner.pid))\ntime.sleep(600)"
    )
    stopping = threading.Event()
    thread = threading.Thread(
        target=supervise.supervise,
        args=([program("one", stubborn)], tmp_path / "run", tmp_path / "log"),
        kwargs={"stopping": stopping},
    )
    thread.start()
    wait_for(lambda: child.exists() and child.read_text())
    inner = int(child.read_text())
    stopping.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    wait_for(lambda: is_over(inner))


def test_an_id_that_is_another_programs_by_now_is_left_alone(place: Path) -> None:
    place.mkdir()
    bystander = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    try:
        started = psutil.Process(bystander.pid).create_time() - 100.0
        for name in ("one", "supervisor"):
            noted = {"pid": bystander.pid, "started": started, "ends": 0}
            (place / f"{name}.pid").write_text(json.dumps(noted))
        assert not running(place)
        assert not stop(place)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_modules_are_not_looked_for_in_the_current_folder(place: Path, tmp_path: Path) -> None:
    (place / "common").mkdir(parents=True)
    (place / "common" / "__init__.py").write_text("raise SystemExit('a foreign package')")
    told = tmp_path / "told"
    code = f"import common, os; open({str(told)!r}, 'w').write(common.__file__ + ' ' + os.environ['WORD'])"
    one = Program(name="one", command=(sys.executable, "-P", "-c", code), environment={"WORD": "hello"})
    launch([one], place, place / "log")
    wait_for(lambda: told.exists() and told.read_text())
    assert told.read_text() == f"{Path(supervise.__file__).with_name('__init__.py')} hello"


def test_logs_are_the_owners_alone(place: Path) -> None:
    launch([program("one", "print('hello')\n" + SLEEPER)], place, place / "log")
    log = place / "log" / "one.log"
    wait_for(lambda: log.read_text() == "hello\n")
    assert log.stat().st_mode & 0o777 == 0o600
    assert place.stat().st_mode & 0o777 == 0o700
