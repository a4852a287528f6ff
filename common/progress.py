"""What happens in a run, as events: dataclasses, and their JSON Lines stream. Drawing is elsewhere.

A stream is a file of one JSON object a line: `{"time": <seconds since 1970>, "event": <name>, ...fields}`.
Each line is flushed to the disk when it is written, so a run that dies leaves every event that happened.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from common.errors import RunError

__all__ = [
    "BaselineFinished",
    "BatchHalved",
    "Event",
    "EventLog",
    "EventSink",
    "PhaseStarted",
    "ResourcesUsed",
    "RoundFinished",
    "RoundLost",
    "RoundRejected",
    "RoundStarted",
    "RoundValidated",
    "RunStarted",
    "RunStopped",
    "SiteFailed",
    "SiteFinished",
    "SlotClosed",
    "StageFinished",
    "SumOpened",
    "WorkersPlanned",
    "read_events",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Anything that happened; `time` is in seconds since 1970."""

    time: float = field(default_factory=time.time)

    # Filled by __init_subclass__ with the events by name, for reading a stream back.
    kinds: ClassVar[dict[str, type["Event"]]] = {}

    def __init_subclass__(cls) -> None:
        Event.kinds[cls.name()] = cls

    @classmethod
    def name(cls) -> str:
        """Name in the stream: the class's name in snake_case."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins: its name, its sites in order, its rounds, and the metrics it reports (first one chooses)."""

    run_id: str
    federation: str
    sites: tuple[str, ...]
    rounds: int
    metrics: tuple[str, ...]
    trainable_parameters: int


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A part of the run begins: start-up, rounds, validation, baselines, test or report."""

    phase: str


@dataclass(frozen=True, kw_only=True)
class RoundStarted(Event):
    """Round `round` (from 1) begins with `sites` invited."""

    round: int
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SiteFinished(Event):
    """A site answered. `train_loss` is its mean over the round's steps; `seconds` its time in training steps."""

    round: int
    site: str
    train_loss: float | None
    examples: int
    seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class SiteFailed(Event):
    """A site did not answer or refused; `code` is the fixed word it gave, never text from its records.

    `reason` may add what its policy says: settings and numbers alone.
    """

    round: int
    site: str
    code: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SumOpened(Event):
    """A secure sum over `survivors` was opened; `threshold` of them had to agree, `dropped` were invited too.

    `transcript` is the SHA-256 in hex over the signatures of all its messages.
    """

    round: int
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    threshold: int
    transcript: str


@dataclass(frozen=True, kw_only=True)
class StageFinished(Event):
    """A stage of a secure sum is over: every site that was asked has answered, or failed, or its time was up.

    `stage` is one of `common.secure_sum.coordinator.Stage`. `seconds` is wall time from when the messages were handed
    out; `waited` is how much of it passed until each site's answer had come.
    """

    round: int
    stage: str
    seconds: float
    waited: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class WorkersPlanned(Event):
    """Where a simulation's workers compute: how many, and the plan in lines for a person."""

    workers: int
    plan: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ResourcesUsed(Event):
    """What a simulation's processes use of the machine: the busy share of all its processors since the last such event,
    and resident memory in bytes, in which shared pages count for each process. `gpus` are the busy shares of the
    machine's GPUs and `gpu_memory` their used bytes, whoever uses them; empty without any."""

    processors: float
    memory: int
    gpus: tuple[float, ...] = ()
    gpu_memory: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchHalved(Event):
    """Memory ran out while a worker trained for `site`: from now on it computes on `after` records at once, instead of
    `before`. The step was summed again over the same records, so what it gives, and its privacy, stay."""

    round: int
    site: str
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class SlotClosed(Event):
    """Memory ran out for `site` with the halved batch too: on `device` no more than `left` workers compute at once."""

    round: int
    site: str
    device: str
    left: int


@dataclass(frozen=True, kw_only=True)
class RoundFinished(Event):
    """Round `round` (from 1) is aggregated and stored.

    `train_loss` is the mean of the answering sites. `seconds` is wall time.
    """

    round: int
    train_loss: float | None
    answered: int
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundRejected(Event):
    """A guard rejected what the sites of round `round` sent together; the adapter stays as it was.

    `setting` is the guard, max_norm or accept_drop; `value` was found, `bound` is the most it allows.
    """

    round: int
    setting: str
    value: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class RoundLost(Event):
    """The secure sum of round `round` failed after vectors left, so it is not asked for again: the adapter stays as it
    was, and the next round begins."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class RoundValidated(Event):
    """The adapter of round `round` (0: the first one) was measured on the sites' held-out records.

    The sites measure an adapter when they receive it, so this comes with the answers of the next round.
    """

    round: int
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class BaselineFinished(Event):
    """One row of the comparison was measured on the test set: untuned, local:<site>, federated or centralised."""

    baseline: str
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RunStopped(Event):
    """The run ended: `status` is finished, interrupted or failed; `reason` says why it was not finished."""

    status: str
    reason: str = ""


EventSink = Callable[[Event], None]


class EventLog:
    """Appends events to a JSON Lines file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            _cut_torn_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    def __call__(self, event: Event) -> None:
        """Write `event` as one line and flush it to the disk; a RunError says what the disk refused."""
        line = {"time": event.time, "event": event.name(), **dataclasses.asdict(event)}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; the lines before are whole") from error

    def close(self) -> None:
        """Close the file; what was written stays."""
        with contextlib.suppress(OSError):  # a full disk was reported when the line was written
            self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Take away what a crash left of a line, so that the next one is whole."""
    if path.is_file():  # and no device
        data = path.read_bytes()
        if (whole := data.rfind(b"\n") + 1) != len(data):
            os.truncate(path, whole)


def read_events(path: Path) -> Iterator[Event]:
    """Events of a stream in order; a last line that was cut by a crash is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            values: dict[str, Any] = json.loads(line)
            kind: Any = Event.kinds[values.pop("event")]
            yield kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
