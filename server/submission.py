"""A run as whoever started it sees it: submitted to Flower, followed by its events, stopped, and told how it ended."""

import contextlib
import datetime
import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from common.durable import write_text
from common.errors import RunError, ServiceError
from common.progress import Event, RunStarted, RunStopped, read_events
from server.field_summary import FieldSummary
from server.home import CoordinatorHome
from server.run_store import is_used
from server.superlink import Control

__all__ = ["Submission", "end", "follow", "new_run_id", "require_free", "require_run_id", "submit", "summary_of"]

_LOOK_SECONDS = 0.5
_READY_SECONDS = 30.0
_START_SECONDS = 60.0
_ENDING_SECONDS = 10.0
# What an order may carry (`common/frames.py`).
_MOST_RUN_ID = 100
_RUN_ID = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_MOST_RUN_ID - 1}}}"
_SUBMISSION = "submission.json"  # Flower's number of the run's newest app


def require_run_id(name: str) -> str:
    """A run's name, which is its folder's name too and stands in every order.

    Raises:
        RunError: it is none.
    """
    if not re.fullmatch(_RUN_ID, name):
        raise RunError(
            f"a run's name is 1 to {_MOST_RUN_ID} letters, digits, '.', '_' or '-', of which the first is a letter or a"
            f" digit; found {name[:200]!r}"
        )
    return name


def require_free(home: CoordinatorHome, control: Control) -> None:
    """Refuse a second run beside one that goes on.

    Flower takes up to a minute to miss an app that was killed. Whether one lives shows at once: it holds its run's
    folder. Of one that does not, Flower's own record is closed here. Where Flower's database was lost the folder alone
    tells.

    Raises:
        RunError: there is one.
    """
    for path in sorted(home.processes.glob(f"*.{_SUBMISSION}")):
        number = json.loads(path.read_bytes())["flower_run"]
        found = control.run(number)
        if found.over and found.known:
            continue
        name = path.name.removesuffix(f".{_SUBMISSION}")
        starts = found.known and time.time() - path.stat().st_mtime < _START_SECONDS and not (home.runs / name).exists()
        if starts or _stays_used(home.runs / name):
            raise RunError(f"run {name} goes on; wait for it, or end it with `coadapt run --stop {name}`")
        if found.known:
            with contextlib.suppress(ServiceError):  # Flower has just noticed it itself
                control.stop(number)


def _stays_used(folder: Path) -> bool:
    """Whether a process goes on using a run; one whose SuperLink was killed ends within seconds."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while is_used(folder):
        if time.monotonic() > deadline:
            return True
        time.sleep(_LOOK_SECONDS)
    return False


@dataclass(frozen=True)
class Submission:
    """A run, Flower's number of its app, and how many events lay there before."""

    run_id: str
    number: int
    seen: int


def submit(home: CoordinatorHome, run_id: str, *, resume: bool) -> Submission:
    """Have Flower start the run's app.

    Raises:
        RunError: there is (or, to resume, is not) such a run, or it has finished.
        ServiceError: the SuperLink does not answer.
    """
    folder = home.runs / require_run_id(run_id)
    if resume and not (folder / "rounds").is_dir():
        raise RunError(f"there is no run {run_id} in {home.runs} to resume; without --resume a new one begins")
    if not resume and folder.exists():
        raise RunError(f"{folder} exists already; go on with --resume {run_id}, or choose another --run-id")
    if resume and (folder / "adapter").exists():
        raise RunError(f"run {run_id} has finished; its adapter is {folder / 'adapter'}")
    home.runs.mkdir(parents=True, exist_ok=True)
    seen = sum(1 for _ in _from(folder / "events.jsonl", 0))
    with Control(home) as control:
        control.wait_until_ready(seconds=_READY_SECONDS)
        require_free(home, control)
        submitted = Submission(run_id, control.submit(run_id), seen)
    write_text(home.processes / f"{run_id}.{_SUBMISSION}", json.dumps({"flower_run": submitted.number}) + "\n")
    return submitted


def end(home: CoordinatorHome, run_id: str) -> None:
    """Have Flower end a run's app; what is stored stays, and the run can be resumed.

    Raises:
        RunError: no such run was submitted.
        ServiceError: the SuperLink does not answer.
    """
    path = home.processes / f"{require_run_id(run_id)}.{_SUBMISSION}"
    if not path.exists():
        raise RunError(f"no run {run_id} was submitted here")
    with Control(home) as control:
        control.stop(json.loads(path.read_bytes())["flower_run"])


def new_run_id(name: str) -> str:
    """The federation's name and the time."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def follow(home: CoordinatorHome, submission: Submission) -> Iterator[Event]:
    """The run's events as they come, until its app has ended.

    An app that was killed lets go of its run's folder at once, and Flower misses it a minute later.

    Raises:
        RunError: the app ended before the run did, with what Flower says of it if Flower has noticed.
    """
    run_id, number, seen = submission.run_id, submission.number, submission.seen
    path = home.runs / run_id / "events.jsonl"
    begun = False
    with Control(home) as control:
        while True:
            over = control.run(number).over
            gone = begun and not is_used(home.runs / run_id)  # before the events are read, so that none is missed
            for event in _from(path, seen):
                seen += 1
                begun = begun or isinstance(event, RunStarted)
                yield event
                if begun and isinstance(event, RunStopped):
                    return
            if over or gone:
                break
            time.sleep(_LOOK_SECONDS)
        details = "" if gone else control.run(number).details
    raise RunError(
        f"the coordinator's app of run {run_id} ended before the run did: {details or 'it was killed, or failed'};"
        f" resume it"
        f" with coadapt run --resume {run_id}"
    )


def summary_of(folder: Path) -> FieldSummary | None:
    """A run's summary; None where it has none yet.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "summary.json"
    try:
        return FieldSummary.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}); restore it from a backup") from error


def _from(path: Path, seen: int) -> Iterator[Event]:
    if path.exists():
        for place, event in enumerate(read_events(path)):
            if place >= seen:
                yield event
