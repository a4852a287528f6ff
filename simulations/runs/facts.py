"""What a run's folder tells in one line: who, when, how far, how good, at what cost; read from files alone.

Runs between institutions and simulated ones have different summaries and the same events, so events tell most.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.metrics import better
from server.watching.folder import RunFolder
from server.watching.tail import read_after

__all__ = ["RunFacts", "facts_of", "runs_in", "size_of"]

TEST, HELD_OUT = "test", "held out"


@dataclass
class RunFacts:
    """One run. `name` is its folder's, below the folder that was looked at; times in seconds since 1970.

    `status` is finished, interrupted, failed, running, or stopped: its process ended without a word. `figures` are of
    the result on the test set, or else (`measured` says so) the best of its first metric on held-out records.
    """

    name: str
    run_id: str = ""
    federation: str = ""
    began: float | None = None
    last: float | None = None
    status: str = "stopped"
    reason: str = ""
    rounds: int = 0
    done: int = 0
    sites: int = 0
    metrics: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    measured: str = ""
    failures: int = 0
    bytes: int = 0
    allowed: float | None = None
    epsilon: float | None = None
    simulated: bool = True
    size: int = 0

    def as_json(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


def runs_in(folder: Path) -> list[RunFacts]:
    """The runs in a folder, those of sweeps too, the oldest first; one that cannot be read is among them.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; name the folder that holds the runs")
    found = sorted({path.parent for path in folder.glob("*/events.jsonl")})
    below = {path.parent for path in folder.glob("*/*/events.jsonl")}
    # A sweep's points; what a run holds is its own.
    found += sorted(path for path in below if path.parent not in found and not path.parent.is_symlink())
    facts = [facts_of(path, name=str(path.relative_to(folder))) for path in found]
    return sorted(facts, key=lambda each: (each.began is None, each.began or 0.0, each.name))


def facts_of(path: Path, *, name: str | None = None) -> RunFacts:
    """The facts of the run in a folder; what cannot be read of it is left out."""
    run = RunFolder(path)
    facts = RunFacts(name=name or path.name, size=size_of(path), simulated=run.simulated)
    goes_on = run.goes_on()
    best: dict[str, float] = {}
    for event in _events(run.events):
        try:
            best = _take(facts, event, best)
        except (KeyError, TypeError, AttributeError):
            continue  # written by another version
    if goes_on:
        facts.status, facts.reason = "running", ""
    if not facts.figures and best:
        facts.figures, facts.measured = best, HELD_OUT
    promise, paid = run.promise(), run.paid()
    facts.allowed = promise["epsilon"] if promise else None
    facts.epsilon = max(paid.values(), default=None) if promise else None
    return facts


def size_of(path: Path) -> int:
    """Bytes of all files in a folder, or of one file; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for each in names:
            try:
                total += os.lstat(os.path.join(folder, each)).st_size
            except OSError:
                continue  # a running run renames its files
    return total


def _events(path: Path) -> Iterator[dict[str, Any]]:
    place, more = 0, True
    while more:
        try:
            piece = read_after(path, place)
        except RunError:
            return
        yield from piece.events
        place, more = piece.next, piece.more


def _take(facts: RunFacts, event: dict[str, Any], best: dict[str, float]) -> dict[str, float]:
    """Take an event in; the best figures on held-out records with it."""
    facts.last = event["time"]
    match event["event"]:
        case "run_started":
            facts.began = facts.began or event["time"]
            facts.run_id, facts.federation, facts.rounds = event["run_id"], event["federation"], event["rounds"]
            facts.metrics, facts.sites = event["metrics"], len(event["sites"])
            facts.status, facts.reason = "stopped", ""
        case "round_finished":
            facts.done = max(facts.done, event["round"])
            facts.bytes += event["bytes_up"] + event["bytes_down"]
        case "site_failed":
            facts.failures += 1
        case "round_validated":
            found, metric = _numbers(event["figures"]), facts.metrics[0]
            if metric in found and (metric not in best or better(metric, found[metric], best[metric])):
                return found
        case "baseline_finished" if event["baseline"] == "federated":
            facts.figures, facts.measured = _numbers(event["figures"]), TEST
        case "run_stopped":
            facts.status, facts.reason = event["status"], event["reason"]
    return best


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}
