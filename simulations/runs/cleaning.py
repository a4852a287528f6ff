"""Deletes what runs no longer need: found first, shown, and deleted when a person says so.

A finished run keeps its manifest, events, summary, report, result and whatever else a person put there; what goes is
every round's adapter, the journal of its secure sums, and at a simulated run the sites' logs and pretend ledgers. An
unfinished simulated run cannot be resumed: of its rounds the newest one stays. An unfinished run between
institutions can be, so nothing of it is touched. A run that a process uses never is.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import RunError
from simulations.runs.facts import RunFacts, facts_of, size_of

__all__ = ["Cleaning", "clean", "plan"]

# In the folder of a run; `rounds` itself stays, by which others know a run.
OF_ANY_RUN = ("journal", "measured.json")
OF_A_SIMULATED_RUN = ("site-logs", "ledgers")
COMPARED = "compared"


@dataclass(frozen=True)
class Cleaning:
    """What would be deleted of a run, in bytes too; or `why` nothing is."""

    folder: Path
    facts: RunFacts
    paths: tuple[Path, ...]
    size: int
    why: str = ""


def plan(folder: Path, runs: Sequence[RunFacts], *, everything: bool) -> list[Cleaning]:
    """What can be deleted of the runs that lie in a folder; with `everything` whole runs."""
    return [_plan(folder / facts.name, facts, everything=everything) for facts in runs]


def clean(each: Cleaning) -> int:
    """Delete it, unless a process has taken the run since; return the bytes that are free.

    Raises:
        RunError: it is in use, or something cannot be deleted.
    """
    with _held(each.folder):
        # The run's state may have changed since the person looked.
        if facts_of(each.folder).last != each.facts.last:
            raise RunError(f"{each.folder} has gone on since; nothing of it was deleted")
        freed = 0
        for path in each.paths:
            size = size_of(path)
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"cannot delete {path}: {error.strerror}") from error
            freed += size
    return freed


def _plan(folder: Path, facts: RunFacts, *, everything: bool) -> Cleaning:
    if folder.is_symlink():
        return Cleaning(folder, facts, (), 0, "a link; what it leads to is not touched")
    if facts.status == "running":
        return Cleaning(folder, facts, (), 0, "it runs")
    finished = (folder / "adapter").is_dir()
    if not facts.simulated and not finished:
        return Cleaning(folder, facts, (), 0, "it can be resumed")
    paths = (folder,) if everything else tuple(_needless(folder, simulated=facts.simulated, finished=finished))
    return Cleaning(folder, facts, paths, sum(map(size_of, paths)))


def _needless(folder: Path, *, simulated: bool, finished: bool) -> Iterator[Path]:
    rounds = sorted((path for path in (folder / "rounds").glob("*") if path.name[:1] != "."), key=_number)
    yield from rounds if finished else rounds[:-1]
    yield from folder.glob(".*.part")  # half written when a process was killed
    yield from (folder / "rounds").glob(".*.part")
    if finished:
        names = (*OF_ANY_RUN, *OF_A_SIMULATED_RUN) if simulated else OF_ANY_RUN
        yield from (folder / name for name in names if (folder / name).exists())
    second = folder / COMPARED
    if simulated and (second / "events.jsonl").is_file():
        yield from _needless(second, simulated=True, finished=(second / "adapter").is_dir())


def _number(path: Path) -> int:
    return int(path.name) if re.fullmatch(r"\d+", path.name) else -1


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a run's folder as its own process would, so that none begins to use it meanwhile."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise RunError(f"cannot open {folder}: {error.strerror}; nothing of it was deleted") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RunError(f"{folder} is in use by a process; nothing of it was deleted") from error
    finally:
        os.close(lock)
