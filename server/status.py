"""`coadapt coordinator status`: what runs, who is in, and how far the newest run is; read from files alone."""

from dataclasses import dataclass, field
from pathlib import Path

from common.errors import CoadaptError, RunError
from common.progress import (
    Event,
    PhaseStarted,
    RoundFinished,
    RoundStarted,
    RunStarted,
    RunStopped,
    SiteFailed,
    SiteFinished,
    SumOpened,
    read_events,
)
from common.supervise import State, states
from common.tls import expiry
from server.enrolment import admitted, read_roster
from server.home import CoordinatorHome

__all__ = ["RunStatus", "SiteStatus", "Status", "newest_run", "status_of"]


@dataclass
class RunStatus:
    """The newest run as its events tell. `failures` counts each fixed word by site."""

    run_id: str
    rounds: int = 0
    round: int = 0
    phase: str = ""
    status: str = "running"
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    last_event: float = 0.0
    answered: dict[str, float] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteStatus:
    """One admitted institution; `last_seen` in seconds since 1970, None: never in this run."""

    name: str
    number: int | None
    signed: bool
    last_seen: float | None
    failures: dict[str, int]


@dataclass(frozen=True)
class Status:
    """Everything that the command shows."""

    processes: list[State]
    certificate: tuple[str, str]
    epoch: int | None
    sites: list[SiteStatus]
    run: RunStatus | None


def status_of(home: CoordinatorHome) -> Status:
    """Read it.

    Raises:
        EnrolmentError: an admitted enrolment or the roster is damaged.
        RunError: the events of the newest run are damaged.
    """
    run = newest_run(home.runs)
    signed = read_roster(home) if home.roster.exists() else None
    numbers = {} if signed is None else {entry.name: entry.site for entry in signed.roster.institutions}
    sites = [
        SiteStatus(
            name=name,
            number=numbers.get(name),
            signed=signed is not None and numbers.get(name, -1) in signed.signatures,
            last_seen=None if run is None else run.answered.get(name),
            failures={} if run is None else run.failures.get(name, {}),
        )
        for name in admitted(home)
    ]
    try:
        certificate = expiry(home.certificate.read_bytes())
    except (OSError, CoadaptError):
        certificate = ("problem", "cannot be read; `coadapt coordinator renew` makes one")
    epoch = None if signed is None else signed.roster.epoch
    return Status(states(home.processes), certificate, epoch, sites, run)


def newest_run(runs: Path) -> RunStatus | None:
    """The run whose events were written last; None where there is none."""
    streams = sorted(runs.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    if not streams:
        return None
    run = RunStatus(run_id=streams[-1].parent.name)
    try:
        for event in read_events(streams[-1]):
            _apply(run, event)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{streams[-1]} cannot be read ({type(error).__name__}); the run itself is untouched") from error
    return run


def _apply(run: RunStatus, event: Event) -> None:
    run.last_event = event.time
    match event:
        case RunStarted(rounds=rounds):
            run.rounds, run.status, run.reason = rounds, "running", ""
        case PhaseStarted(phase=phase):
            run.phase = phase
        case RoundStarted(round=number):
            run.round, run.phase = number, "round"
        case SiteFinished(site=site):
            run.answered[site] = event.time
        case SumOpened(survivors=survivors):
            run.answered |= dict.fromkeys(survivors, event.time)
        case SiteFailed(site=site, code=code):
            words = run.failures.setdefault(site, {})
            words[code] = words.get(code, 0) + 1
        case RoundFinished(bytes_up=up, bytes_down=down):
            run.bytes_up += up
            run.bytes_down += down
        case RunStopped(status=status, reason=reason):
            run.status, run.reason = status, reason
        case _:
            pass
