"""`--log-to`: where a run's scalars go, and an event sink that never stops a run because a tracking tool went away."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from common.errors import RunError
from common.progress import Event, EventSink, RoundFinished, RunStarted, RunStopped
from server.tracking.mlflow import Mlflow
from server.tracking.scalars import Scalar, Scalars
from server.tracking.tensorboard import TensorBoard

__all__ = ["Tracker", "Tracking", "open_tracker", "to_all"]

# The settings of a run, by its name.
Settings = Callable[[str], Mapping[str, str]]


class Tracker(Protocol):
    """A tracking tool; every method raises RunError where it cannot be reached or written."""

    def start(self, run_id: str, settings: Mapping[str, str], time: float, /) -> None:
        """A run begins or goes on."""

    def log(self, scalars: Sequence[Scalar], /) -> None:
        """Keep scalars of it."""

    def stop(self, status: str, time: float, /) -> None:
        """The run ended: finished, interrupted, or anything else."""


def open_tracker(target: str) -> Tracker:
    """The tool that `tensorboard:DIR` or `mlflow:URI` names.

    Raises:
        RunError: it is neither, a package is missing, or nobody answers.
    """
    kind, colon, place = target.partition(":")
    if kind == "tensorboard" and place:
        return TensorBoard(Path(place))
    if kind == "mlflow" and place:
        return Mlflow(place)
    raise RunError(f"--log-to {target}: must be tensorboard:DIR or mlflow:URI" + ("" if colon else ", with a colon"))


class Tracking:
    """An EventSink before a tracking tool. Scalars are handed over when a round ends.

    What the tool cannot take is said in `trouble`, in one line, and it is left alone from then on: a federation of
    institutions does not stop for a drawing of it.
    """

    def __init__(self, tracker: Tracker, settings: Settings) -> None:
        self.trouble = ""
        self._tracker, self._settings = tracker, settings
        self._lock = threading.Lock()
        self._scalars, self._waiting = Scalars(), list[Scalar]()

    def __call__(self, event: Event) -> None:
        """Take the event in."""
        with self._lock:
            if self.trouble:
                return
            try:
                self._take(event)
            except RunError as error:
                self.trouble = str(error)

    def _take(self, event: Event) -> None:
        if isinstance(event, RunStarted):  # a sweep has several runs
            self._scalars, self._waiting = Scalars(), []
            self._tracker.start(event.run_id, self._settings(event.run_id), event.time)
            return
        self._waiting += self._scalars(event)
        if isinstance(event, RoundFinished | RunStopped):
            self._tracker.log(self._waiting)
            self._waiting = []
        if isinstance(event, RunStopped):
            self._tracker.stop(event.status, event.time)


def to_all(*sinks: EventSink) -> EventSink:
    """One sink for several, in their order."""

    def sink(event: Event) -> None:
        for each in sinks:
            each(event)

    return sink
