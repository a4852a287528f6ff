"""The wall time of a round in which nothing is trained: Coadapt's federation beside Flower as it comes, in turn.

Three sites on loopback with TLS and node authentication, all as real processes. Ours are those of a deployment:
SuperLink, gate and the coordinator's app, and at each site relay and vault, which go through the five stages of a
secure sum. Flower's are `flower-superlink` and `flower-supernode` as installed, and an app that sends four messages a
round to clients that import torch and answer at once. Turns alternate A B A B; only one side's processes run at a time.
The first round of a turn is not counted on either side: nodes are met and apps fetched in it.

An empty training step is the least that a manifest can ask for: one step on one record of 16 tokens, with a tiny base.
It goes on in the background while keys are exchanged.
"""

import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.manifest import Manifest
from common.flower import quiet
from common.progress import RunStarted, read_events
from simulations.benchmarks.latency_phases import Marks, gate_marks, round_parts, round_seconds, vault_marks
from simulations.benchmarks.loopback import Loopback, short_folder
from simulations.benchmarks.stock_flower import StockFlower
from simulations.tiny_base import make_encoder

__all__ = ["measure_round_latency"]

SITES = ("north", "south", "east")


def measure_round_latency(*, rounds: int, turns: int) -> dict[str, float]:
    """The figures of `coadapt bench round-latency`: of `rounds` counted rounds in each of `turns` turns of each side.

    Raises:
        RunError: a process did not start or a run not end.
    """
    quiet()
    ours: list[list[float]] = []
    stock: list[list[list[float]]] = []
    parts: list[dict[str, float]] = []
    load: list[float] = []
    with short_folder() as folder:
        base = make_encoder(folder / "base")
        (folder / "ours").mkdir()
        federation = _federation(folder / "ours", base, rounds + 1, turns)
        flower = StockFlower(folder / "stock", sites=len(SITES))
        federation.enrol()
        for turn in range(turns):
            load.append(os.getloadavg()[0])
            seconds, named, values = _ours(federation, f"turn{turn}", rounds + 1)
            ours.append(seconds)
            parts += named
            load.append(os.getloadavg()[0])
            with flower.running():
                found = flower.run(rounds + 1, values)
            stock.append([[end - start for start, end in itertools.pairwise(times)] for times in found[1:]])
    return _figures(ours, stock, parts) | {"load_average": round(statistics.fmean(load), 2)}


def _figures(
    ours: Sequence[Sequence[float]], stock: Sequence[Sequence[Sequence[float]]], parts: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Medians over all rounds, means of the parts (so that they add up), and the ratio of each turn."""
    lasted = [[sum(phases) for phases in turn] for turn in stock]
    whole, plain = [each for turn in ours for each in turn], [each for turn in lasted for each in turn]
    ratios = [statistics.median(own) / statistics.median(other) for own, other in zip(ours, lasted, strict=True)]
    figures = {
        "rounds": float(len(whole)),
        "round_seconds": statistics.median(whole),
        "stock_round_seconds": statistics.median(plain),
        "ratio": statistics.median(whole) / statistics.median(plain),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "mean_seconds": statistics.fmean(whole),
    }
    for name in sorted({name for each in parts for name in each}):
        figures[f"{name}_seconds"] = statistics.fmean(each.get(name, 0.0) for each in parts)
    every = [phases for turn in stock for phases in turn]
    for number, phase in enumerate(zip(*every, strict=True), start=1):
        figures[f"stock_phase_{number}_seconds"] = statistics.fmean(phase)
    return {name: round(value, 4) for name, value in figures.items()}


def _federation(folder: Path, base: Path, rounds: int, runs: int) -> Loopback:
    values: Mapping[str, Any] = {
        "version": 1,
        "name": "bench",
        "task": {"kind": "text-classification", "labels": ["a", "b", "c"]},
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "data": {"max_length": 16},
        "training": {
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": 1,
            "warmup_steps": 0,
            "precision": "fp32",
        },
        "evaluation": {"holdout": 0.0},
        "secure_sum": {"enabled": True, "min_sites": len(SITES)},
    }
    return Loopback(
        folder,
        Manifest.model_validate_json(json.dumps(values)),
        sites=SITES,
        settings={"requests_per_second": 500.0},  # all sites have one address here
        policy={"plain_runs": runs},
    )


def _ours(federation: Loopback, run_id: str, rounds: int) -> tuple[list[float], list[dict[str, float]], int]:
    """A run: seconds of each counted round, their parts, and how many values are trained."""
    with federation.running("--log-json"):
        federation.run("--run-id", run_id)
    events = list(read_events(federation.coordinator / "runs" / run_id / "events.jsonl"))
    gate = gate_marks(federation.coordinator / "log" / "gate.log")
    answered = vault_marks(federation.folder / name / "log" / "audit.jsonl" for name in SITES)
    marks = Marks(gate.taken, gate.fetched, answered, gate.brought)
    (values,) = (event.trainable_parameters for event in events if isinstance(event, RunStarted))
    counted = range(2, rounds + 1)
    seconds = [round_seconds(events, number) for number in counted]
    return seconds, [round_parts(events, number, marks) for number in counted], values
