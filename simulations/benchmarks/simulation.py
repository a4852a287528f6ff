"""What a client's round costs beside its training steps: Coadapt's simulation and a plain Flower app, in turn.

Both train the same steps of the same sizes on the same records with the same number of workers and threads. The clock
runs from the first client call to the end of the last round. What comes before it is start-up, a figure of its own:
Ray's and Flower's, and in ours the base, which every worker loads once as it starts. Out of workers x clock, the time
in training steps is taken; what is left, for each client and round, is the figure. Runs alternate A B A B; the median
of each is reported. The plain app averages in the clear, and so does ours where the two are compared; ours with secure
sums, its default, stands beside them, and its peak of memory; with many sites also beside that of a run with fewer.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from common.config.manifest import Manifest
from common.flower import ClientApp, Context, Message, quiet
from simulations.app import client
from simulations.benchmarks.memory import PeakMemory
from simulations.benchmarks.plain_flower import plain_client, run_plain
from simulations.contracts import LABELS, records
from simulations.engine import Run
from simulations.sites import lay_out
from simulations.starting import start_flower
from simulations.tiny_base import make_encoder

__all__ = ["Size", "measure_simulation"]

REPETITIONS = 2

# Sites of the run whose memory that of more sites is compared with; both take clauses apart (`single_clauses`).
FEW_SITES = 100

# Seeds of the generator, each with about 1,500 clauses.
SEEDS = 6


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
    """Seconds of one run, for each client and round: outside training steps, in the call, in steps; and start-up.

    `rate` is client calls of rounds in a minute, after start-up."""

    outside: float
    call: float
    training: float
    startup: float
    rate: float

    @property
    def share(self) -> float:
        """The share of the workers' time that went into training steps, after start-up."""
        return self.training / (self.training + self.outside)


@dataclass(frozen=True)
class Timed:
    """One run: when it was started and its last round ended (since 1970), seconds in training of each call, workers."""

    launched: float
    ended: float
    training: list[float]
    workers: int


@dataclass(frozen=True)
class Size:
    """What is measured: `participants` of `sites` train so many steps in each round; None: all do. `tiny` takes an
    untrained base of two layers in place of the default base."""

    sites: int
    rounds: int
    participants: int | None = None
    local_steps: int = 1
    tiny: bool = False


def measure_simulation(size: Size, *, repetitions: int = REPETITIONS) -> dict[str, float]:
    """The figures of `coadapt bench simulation`, medians of so many turns of all three.

    Raises:
        ManifestError: so many participants cannot be.
    """
    quiet()
    with tempfile.TemporaryDirectory(prefix="coadapt-bench-") as folder:
        base = str(make_encoder(Path(folder) / "base")) if size.tiny else None
        return _measured(size, base, repetitions)


def _measured(size: Size, base: str | None, repetitions: int) -> dict[str, float]:
    crowd = size.sites > FEW_SITES
    manifest, masked = (_manifest(size, base, secure_sum=on, crowd=crowd) for on in (False, True))
    few = 0.0
    if crowd:  # before the others: what a process keeps of its runs would flatter a later one
        fewer = replace(size, sites=FEW_SITES)
        with PeakMemory() as peak:
            _timed(_ours, _manifest(fewer, base, secure_sum=True, crowd=crowd))
        few = float(peak.bytes)
    ours: list[Cost] = []
    plain: list[Cost] = []
    secure: list[Cost] = []
    memory = 0.0
    for turn in range(repetitions):
        with PeakMemory() as peak:
            secure.append(_timed(_ours, masked))
        memory = memory if turn else float(peak.bytes)
        ours.append(_timed(_ours, manifest))
        plain.append(_timed(_plain, manifest))
    outside, plain_outside, secure_outside = (
        statistics.median(cost.outside for cost in costs) for costs in (ours, plain, secure)
    )
    return {
        "sites": float(size.sites),
        "rounds": float(size.rounds),
        "participants": float(manifest.training.invited(size.sites)),
        "local_steps": float(size.local_steps),
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
        "training_share": round(statistics.median(cost.share for cost in ours), 4),
        "plain_training_share": round(statistics.median(cost.share for cost in plain), 4),
        "secure_training_share": round(statistics.median(cost.share for cost in secure), 4),
        "client_rounds_per_minute": round(statistics.median(cost.rate for cost in ours), 2),
        "plain_client_rounds_per_minute": round(statistics.median(cost.rate for cost in plain), 2),
        "secure_client_rounds_per_minute": round(statistics.median(cost.rate for cost in secure), 2),
        "peak_memory_bytes": memory,
        **({"peak_memory_times_100_sites": round(memory / few, 4)} if few else {}),
    }


def _manifest(size: Size, base: str | None, *, secure_sum: bool, crowd: bool) -> Manifest:
    """A base (None: the default one) on the default scenario's clauses, dealt evenly; nothing is held out, so nothing
    is measured."""
    values: Mapping[str, Any] = {
        "version": 1,
        "name": "bench",
        "task": {"kind": "text-classification", "labels": list(LABELS)},
        "data": {"max_length": 96},
        "model": {"base": base} if base else {},
        "training": {
            "rounds": size.rounds,
            "local_steps": size.local_steps,
            "batch_size": 8,
            "participants": size.participants or "all",
        },
        "evaluation": {"holdout": 0.0},
        "secure_sum": {"enabled": secure_sum},
        "simulation": {
            "sites": size.sites,
            "source": f"simulations.benchmarks.simulation:{'single_clauses' if crowd else 'clauses'}",
            "test_fraction": 0.0,
        },
    }
    return Manifest.model_validate_json(json.dumps(values))


def clauses(split: str, seed: int) -> Iterator[dict[str, str]]:
    """The default scenario's training clauses; nothing is held out and nothing tested, so that nothing is measured."""
    return records("train", seed) if split == "train" else iter(())


def single_clauses(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Clauses enough for thousands of sites, each its own unit: contracts of many seeds, taken apart."""
    for number in range(SEEDS if split == "train" else 0):
        for place, row in enumerate(records("train", seed + number)):
            yield {**row, "unit": f"{row['unit']}-{number}-{place}"}


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
        rate=60 * count / (timed.ended - began),
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
