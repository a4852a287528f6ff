"""From events to scalars with a name and a step: what goes to any tracking tool.

Only figures of the whole federation go. A tracking server is others' to read, and a crowd of a thousand curves is
nobody's: names of institutions and what a single one reached stay in the run's own folder.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.progress import (
    BaselineFinished,
    Event,
    PhaseStarted,
    ResourcesUsed,
    RoundFinished,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    RunStopped,
    StageFinished,
)

__all__ = ["Scalar", "Scalars"]

# Baselines of the whole federation; the others are named after a site.
WHOLE = frozenset({"untuned", "federated", "centralised"})


@dataclass(frozen=True)
class Scalar:
    """A figure: `step` is its round, 0 where it belongs to none; `time` is in seconds since 1970."""

    name: str
    value: float
    step: int
    time: float


class Scalars:
    """Turns one run's events into scalars; it remembers when the phase began."""

    def __init__(self) -> None:
        self._phase: PhaseStarted | None = None
        self._round = 0

    def __call__(self, event: Event) -> list[Scalar]:
        """The scalars of the run's next event; values that are no finite numbers are left out."""
        step, values = self._of(event)
        return [
            Scalar(_name(name), float(value), step, event.time)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]

    def _of(self, event: Event) -> tuple[int, Mapping[str, float | None]]:
        step, values = 0, dict[str, float | None]()
        match event:
            case RoundStarted():
                self._round = event.round
            case ResourcesUsed():
                step, values = self._round, {"machine/processors": event.processors, "machine/memory": event.memory}
                for number, (share, size) in enumerate(zip(event.gpus, event.gpu_memory, strict=True)):
                    values |= {f"machine/gpu_{number}": share, f"machine/gpu_{number}_memory": size}
            case RoundFinished():
                step, values = (
                    event.round,
                    {
                        "train/loss": event.train_loss,
                        "round/seconds": event.seconds,
                        "round/bytes_up": event.bytes_up,
                        "round/bytes_down": event.bytes_down,
                        "round/sites_answered": event.answered,
                        "round/sites_failed": event.failed,
                    },
                )
            case RoundValidated():
                step, values = event.round, {f"validation/{name}": value for name, value in event.figures.items()}
            case StageFinished():
                step, values = event.round, {f"secure_sum/{event.stage}_seconds": event.seconds}
            case RoundRejected():
                step, values = event.round, {f"rejected/{event.setting}": event.value}
            case BaselineFinished() if event.baseline in WHOLE:
                values = {f"test/{event.baseline}/{name}": value for name, value in event.figures.items()}
            case PhaseStarted() | RunStopped():
                before, self._phase = self._phase, event if isinstance(event, PhaseStarted) else None
                values = {f"phase/{before.phase}_seconds": event.time - before.time} if before else {}
            case _:
                pass
        return step, values


def _name(name: str) -> str:
    """Letters, digits, and what both tools allow beside them; a metric of one's own is named by its function."""
    head, slash, last = name.rpartition("/")
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", f"{head}{slash}{last.rpartition(':')[2]}")
