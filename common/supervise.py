"""Keeps a few programs running: starts them, restarts what ends, stops all; and says what runs.

One supervisor for a folder (a lock says so). Beside the lock lie a file for each process with its id and the moment of
its start, since a process id alone may by now be another program's. A supervisor that was killed leaves its programs
running; the next one ends them before it starts its own.

    python -m common.supervise FOLDER      what `launch` starts: the programs of FOLDER/plan.json
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from common.durable import write_text
from common.errors import ServiceError
from common.log_lines import json_line
from common.private_files import private_folder

__all__ = ["Program", "State", "User", "launch", "module_command", "running", "states", "stop", "supervise"]

SUPERVISOR = "supervisor"
POLL_SECONDS = 0.1
FIRST_DELAY_SECONDS = 1.0
MOST_DELAY_SECONDS = 60.0

# A program that ran so long was well: its next end is a new one, and its delay begins anew.
WELL_SECONDS = 60.0
GRACE_SECONDS = 20.0
LAUNCH_SECONDS = 30.0
MOST_LOG_BYTES = 32 << 20

# Supervisors outlive their starter; a process object that is dropped while its process runs would warn of it.
_launched: list[subprocess.Popen[bytes]] = []

# The start of a process as psutil computes it may differ in the last digits from one reading to the next.
START_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class User:
    """Who a program runs as: numbers of the system's users and groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program to keep running. `environment` is added to the supervisor's; None as `user` is the supervisor's own."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: User | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a program: its process, since when it runs (seconds since 1970), and how often it ended."""

    name: str
    pid: int
    started: float
    ends: int
    alive: bool


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Run an installed module; the current folder is no place to look for it (-P)."""
    return (sys.executable, "-P", "-m", module, *arguments)


def supervise(
    programs: Sequence[Program],
    folder: Path,
    logs: Path,
    *,
    stopping: threading.Event | None = None,
    log_json: bool = False,
) -> None:
    """Keep the programs running until SIGTERM, SIGINT or `stopping`, then end them; the caller's process is theirs.

    With `log_json` the supervisor's own lines are JSON; what the programs print is theirs (`common/framing.py`).

    Raises:
        ServiceError: another supervisor has the folder.
    """
    private_folder(folder)
    private_folder(logs)
    wanted = stopping or threading.Event()
    with _locked(folder), _signals(wanted):
        _end_leftovers(folder)
        _note(folder, SUPERVISOR, os.getpid(), 0)
        children = [_Child(program, folder, logs, log_json) for program in programs]
        try:
            while not wanted.wait(POLL_SECONDS):
                for child in children:
                    child.look()
        finally:
            for child in children:
                child.ask_to_end()
            deadline = time.monotonic() + GRACE_SECONDS
            for child in children:
                child.end(deadline)
            _path(folder, SUPERVISOR).unlink(missing_ok=True)


def launch(programs: Sequence[Program], folder: Path, logs: Path, *, log_json: bool = False) -> None:
    """Start a supervisor that outlives the caller, and wait until each program was started once.

    Raises:
        ServiceError: one runs already, or it does not come up.
    """
    if running(folder):
        raise ServiceError(f"it runs already (see {folder}); stop it first")
    private_folder(folder)
    private_folder(logs)
    plan = {
        "logs": str(logs.absolute()),
        "log_json": log_json,
        "programs": [asdict(program) for program in programs],
    }
    write_text(folder / "plan.json", json.dumps(plan, indent=2) + "\n")
    for old in [SUPERVISOR, *(program.name for program in programs)]:
        if not _alive(folder, old):
            _path(folder, old).unlink(missing_ok=True)
    with _log(logs / "supervisor.log") as log:
        process = subprocess.Popen(
            module_command("common.supervise", str(folder.absolute())),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=_environment({}),
            start_new_session=True,
        )
    _launched.append(process)
    deadline = time.monotonic() + LAUNCH_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServiceError(f"the supervisor ended at once; {logs / 'supervisor.log'} says why")
        if _alive(folder, SUPERVISOR) and all(_path(folder, program.name).exists() for program in programs):
            return
        time.sleep(POLL_SECONDS)
    process.terminate()
    raise ServiceError(f"the programs did not start within {LAUNCH_SECONDS:.0f} seconds; see {logs}")


def stop(folder: Path, *, seconds: float = GRACE_SECONDS + 10.0) -> bool:
    """End supervisor and programs; whether anything ran.

    Raises:
        ServiceError: they cannot be ended.
    """
    try:
        return _stop(folder, seconds)
    finally:
        _launched[:] = [process for process in _launched if process.poll() is None]


def _stop(folder: Path, seconds: float) -> bool:
    state = _read(folder, SUPERVISOR)
    if state is None or not state.alive:
        return _end_leftovers(folder)
    try:
        process = psutil.Process(state.pid)
        process.terminate()
        process.wait(seconds)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired as error:
        raise ServiceError(f"process {state.pid} does not end; look into the logs, then kill it") from error
    except psutil.AccessDenied as error:
        raise ServiceError(f"process {state.pid} belongs to another user; stop it as that user or as root") from error
    _end_leftovers(folder)
    return True


def running(folder: Path) -> bool:
    """Whether a supervisor has the folder."""
    return _alive(folder, SUPERVISOR)


def states(folder: Path) -> list[State]:
    """What is known of each program, by name; without the supervisor."""
    found = (_read(folder, path.stem) for path in sorted(folder.glob("*.pid")) if path.stem != SUPERVISOR)
    return [state for state in found if state is not None]


class _Child:
    """One program: started when it is looked at, again after a pause when it ended."""

    def __init__(self, program: Program, folder: Path, logs: Path, log_json: bool) -> None:
        self._program, self._folder, self._logs, self._log_json = program, folder, logs, log_json
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._delay = FIRST_DELAY_SECONDS
        self._ends = 0

    def look(self) -> None:
        """Start the program where it is due, and note where it has ended."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            _signal_group(self._process.pid, signal.SIGKILL)  # what it may have left behind
            self._process = None
            self._ends += 1
            if now - self._started >= WELL_SECONDS:
                self._delay = FIRST_DELAY_SECONDS
            self._due = now + self._delay
            self._say(
                "ended",
                f"{self._program.name} ended with {code}; it starts again in {self._delay:.0f} s",
                status=code,
                again_in=self._delay,
            )
            self._delay = min(2 * self._delay, MOST_DELAY_SECONDS)
        if self._process is None and now >= self._due:
            self._start(now)

    def _start(self, now: float) -> None:
        program, user = self._program, self._program.user
        try:
            with _log(self._logs / f"{program.name}.log") as log:
                self._process = subprocess.Popen(
                    program.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/" if user is not None else self._folder,
                    env=_environment(program.environment),
                    start_new_session=True,
                    umask=0o077,
                    user=None if user is None else user.uid,
                    group=None if user is None else user.gid,
                    extra_groups=None if user is None else list(user.groups),
                )
        except OSError as error:
            self._say("not_started", f"{program.name} cannot be started: {error.strerror}", reason=error.strerror)
            self._due = now + self._delay
            self._delay = min(2 * self._delay, MOST_DELAY_SECONDS)
            return
        self._started = now
        _note(self._folder, program.name, self._process.pid, self._ends)

    def ask_to_end(self) -> None:
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGTERM)

    def end(self, deadline: float) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.1, deadline - time.monotonic()))
            _signal_group(self._process.pid, signal.SIGKILL)
            self._process.wait()
        _path(self._folder, self._program.name).unlink(missing_ok=True)

    def _say(self, event: str, text: str, **facts: object) -> None:
        if self._log_json:
            line = json_line(SUPERVISOR, event, program=self._program.name, **facts)
        else:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {text}"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "supervisor.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ServiceError(f"another supervisor has {folder}; stop it first") from error
        yield


@contextlib.contextmanager
def _signals(wanted: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event; in another thread than the main one, where Python allows none, nothing does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop_all(number: int, frame: FrameType | None) -> None:
        wanted.set()

    before = {number: signal.signal(number, stop_all) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_leftovers(folder: Path) -> bool:
    """End what a killed supervisor left; whether there was anything."""
    left = [state for state in states(folder) if state.alive]
    for state in left:
        _signal_group(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for state in left:
        while _alive(folder, state.name) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        _signal_group(state.pid, signal.SIGKILL)
        while _alive(folder, state.name) and time.monotonic() < deadline + GRACE_SECONDS:
            time.sleep(POLL_SECONDS)
        if _alive(folder, state.name):
            raise ServiceError(f"{state.name} (process {state.pid}) cannot be ended; stop it as its user or as root")
    for path in folder.glob("*.pid"):
        path.unlink(missing_ok=True)
    return bool(left)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """To the process group of a program, which it leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.pid"


def _note(folder: Path, name: str, pid: int, ends: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended already; the next look sees it
        started = psutil.Process(pid).create_time()
        write_text(_path(folder, name), json.dumps({"pid": pid, "started": started, "ends": ends}) + "\n")


def _read(folder: Path, name: str) -> State | None:
    try:
        noted: dict[str, Any] = json.loads(_path(folder, name).read_text(encoding="utf-8"))
        pid, started, ends = int(noted["pid"]), float(noted["started"]), int(noted["ends"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return State(name=name, pid=pid, started=started, ends=ends, alive=_is(pid, started))


def _alive(folder: Path, name: str) -> bool:
    state = _read(folder, name)
    return state is not None and state.alive


def _is(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < START_TOLERANCE_SECONDS
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """The own environment; modules are found where this one was, and Flower reports nothing to anybody."""
    root = str(Path(__file__).resolve().parents[1])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1", **quiet, **added}


@contextlib.contextmanager
def _log(path: Path) -> Iterator[IO[bytes]]:
    """A log to append to, 0600; one that has grown large is put aside, and the one before it is lost."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > MOST_LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        yield file


def _main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    programs = [
        Program(
            name=each["name"],
            command=tuple(each["command"]),
            environment=each["environment"],
            user=None if each["user"] is None else User(**{**each["user"], "groups": tuple(each["user"]["groups"])}),
        )
        for each in plan["programs"]
    ]
    supervise(programs, folder, Path(plan["logs"]), log_json=plan["log_json"])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
