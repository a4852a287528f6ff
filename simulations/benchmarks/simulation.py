"""What a client's round costs beside its training steps: Coadapt's simulation and a plain Flower app, in turn.

Both train the same steps of the same sizes on the same records with the same number of workers and threads. The clock
runs from the first client call to the end of the last round. What comes before it is start-up, a figure of its own:
Ray's and Flower's, and in ours the base, which every worker loads once as it starts. Out of workers x clock, the time
in training steps is taken; what is left, for each client and round, is the figure. Runs alternate A B A B; the median
of each is reported. The plain app averages in the clear, and so does ours where the two are compared; ours with secure
sums, its default, stands beside them.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config.manifest import Manifest
from common.flower import ClientApp, Context, Message, quiet
from simulations.app import client
from simulations.benchmarks.plain_flower import plain_client, run_plain
from simulations.contracts import LABELS, records
from simulations.engine import Run, start_flower
from simulations.sites import lay_out

__all__ = ["measure_simulation"]

REPETITIONS = 2


@dataclass(frozen=True)
class Stamped:
    """A client app that notes when each of its calls began and ended, in one file for each call."""

    app: Any
    folder: str

    def __call__(self, message: Message, context: Context) -> Message:
        """Pass the call on; the file holds seconds since 1970."""
        began = time.time()
        reply: Message = self.app(message, context)
        name = f"{os.getpid()}-{time.time_ns()}.json"
        (Path(self.folder) / name).write_text(json.dumps([began, time.time()]), encoding="utf-8")
        return reply


@dataclass(frozen=True)
class Cost:
    """Seconds of one run, for each client and round: outside training steps, in the call, in steps; and start-up."""

    outside: float
    call: float
    training: float
    startup: float


@dataclass(frozen=True)
class Timed:
    """One run: when it was started and its last round ended (since 1970), seconds in training of each call, workers."""

    launched: float
    ended: float
    training: list[float]
    workers: int


def measure_simulation(*, sites: int, rounds: int, repetitions: int = REPETITIONS) -> dict[str, float]:
    """The figures of `coadapt bench simulation`, medians of so many turns of all three."""
    quiet()
    manifest, masked = (_manifest(sites, rounds, secure_sum=on) for on in (False, True))
    ours: list[Cost] = []
    plain: list[Cost] = []
    secure: list[Cost] = []
    for _ in range(repetitions):
        for costs, run, agreed in ((ours, _ours, manifest), (plain, _plain, manifest), (secure, _ours, masked)):
            costs.append(_timed(run, agreed))
    outside, plain_outside, secure_outside = (
        statistics.median(cost.outside for cost in costs) for costs in (ours, plain, secure)
    )
    return {
        "sites": float(sites),
        "rounds": float(rounds),
        "outside_training_seconds": round(outside, 4),
        "plain_outside_training_seconds": round(plain_outside, 4),
        "secure_outside_training_seconds": round(secure_outside, 4),
        "ratio": round(outside / plain_outside, 4),
        "call_seconds": round(statistics.median(cost.call for cost in ours), 4),
        "plain_call_seconds": round(statistics.median(cost.call for cost in plain), 4),
        "training_seconds": round(statistics.median(cost.training for cost in ours), 4),
        "plain_training_seconds": round(statistics.median(cost.training for cost in plain), 4),
        "startup_seconds": round(statistics.median(cost.startup for cost in ours), 4),
        "plain_startup_seconds": round(statistics.median(cost.startup for cost in plain), 4),
    }


def _manifest(sites: int, rounds: int, *, secure_sum: bool) -> Manifest:
    """The default base on the default scenario's clauses, dealt evenly; nothing is held out, so nothing is measured."""
    values: Mapping[str, Any] = {
        "version": 1,
        "name": "bench",
        "task": {"kind": "text-classification", "labels": list(LABELS)},
        "data": {"max_length": 96},
        "training": {"rounds": rounds, "local_steps": 1, "batch_size": 8},
        "evaluation": {"holdout": 0.0},
        "secure_sum": {"enabled": secure_sum},
        "simulation": {"sites": sites, "source": "simulations.benchmarks.simulation:clauses", "test_fraction": 0.0},
    }
    return Manifest.model_validate_json(json.dumps(values))


def clauses(split: str, seed: int) -> Iterator[dict[str, str]]:
    """The default scenario's training clauses; nothing is held out and nothing tested, so that nothing is measured."""
    return records("train", seed) if split == "train" else iter(())


def _timed(run: Callable[[Manifest, Path], Timed], manifest: Manifest) -> Cost:
    with tempfile.TemporaryDirectory(prefix="coadapt-bench-") as folder:
        stamps = Path(folder) / "calls"
        stamps.mkdir()
        timed = run(manifest, Path(folder))
        calls = [json.loads(file.read_text(encoding="utf-8")) for file in stamps.iterdir()]
    # What ours measures after the last round belongs to no round.
    calls = [(start, end) for start, end in calls if start < timed.ended]
    began = min(start for start, _ in calls)
    count, training = len(timed.training), sum(timed.training)
    inside = sum(end - start for start, end in calls)
    return Cost(
        outside=(timed.workers * (timed.ended - began) - training) / count,
        call=(inside - training) / count,
        training=training / count,
        startup=began - timed.launched,
    )


def _ours(manifest: Manifest, folder: Path) -> Timed:
    ends: list[float] = []
    training: list[float] = []

    def watch(event: Any) -> None:
        if event.name() == "round_finished":
            ends.append(event.time)
        if event.name() == "site_finished":
            training.append(event.seconds)

    run = Run.prepare(manifest, [folder], began=time.monotonic(), baselines=False)
    launched = time.time()
    with run.folder(folder / "runs", "bench", watch):
        start_flower(run, cast(ClientApp, Stamped(client, str(folder / "calls"))))
    if run.failure is not None:
        raise run.failure
    return Timed(launched, ends[manifest.training.rounds - 1], training, run.plan.workers)


def _plain(manifest: Manifest, folder: Path) -> Timed:
    """The same of the plain app, which finds the sites' files where ours would."""
    run = Run.prepare(manifest, [folder], began=time.monotonic(), baselines=False)
    launched = time.time()
    sites = folder / "sites"
    sites.mkdir()
    lay_out(sites, run.manifest, run.data)
    app = Stamped(plain_client, str(folder / "calls"))
    ended, training = run_plain(app, run.manifest, sites, run.resident.base.folder, run.plan)
    return Timed(launched, ended, training, run.plan.workers)
