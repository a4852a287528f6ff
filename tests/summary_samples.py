"""Plausible run summaries for tests of the report and the terminal; figures are made up by a seeded generator."""

from typing import Any

import numpy as np

from common.config.manifest import LOWER_IS_BETTER, METRICS
from simulations.summary import (
    BaseModelFacts,
    CleaningFacts,
    DataFacts,
    Failure,
    MachineFacts,
    RoundFacts,
    RunSummary,
    SecureSumFacts,
    SiteFacts,
    TableRow,
    Timing,
)

ROWS = {
    "untuned": 0.02,
    "local only (mean)": 0.70,
    "local only (best site)": 0.78,
    "federated": 0.91,
    "centralised": 0.93,
}


def sample(
    *,
    sites: int = 6,
    labels: int = 12,
    rounds: int = 5,
    task: str = "text-classification",
    baselines: bool = True,
    seed: int = 0,
    **changes: Any,
) -> RunSummary:
    """A finished run; `rounds` -1 is one that ended before round 0. `changes` replace fields of the summary."""
    rng = np.random.default_rng(seed)
    metrics = METRICS[task]
    facts = [round_facts(number, metrics, rng) for number in range(rounds + 1)]
    names = (
        [] if task == "causal-lm" else [f"{'topic' if labels < 20 else 'customer_intent'}_{i}" for i in range(labels)]
    )
    summary = RunSummary(
        run_id="20260301-101500-a1b2",
        federation="city-hospitals",
        description="Triage notes of six hospitals that may not share a record.",
        status="finished",
        manifest_sha256="ab" * 32,
        task=task,
        metrics=list(metrics),
        secure_sum=SecureSumFacts(
            sites=sites,
            least_survivors=max(3, 2 * sites // 3 + 1),
            threshold=max(3, 2 * sites // 3 + 1),
            max_colluding=0,
            bits=16,
            bytes_per_value=8 / 3,
            sums=rounds + 1,
            fewest=sites,
        ),
        model=BaseModelFacts(
            name="sentence-transformers/all-MiniLM-L6-v2",
            revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            weights_sha256="53" * 32,
            parameters=22_713_216,
            trainable_parameters=309_520,
            precision="bf16",
        ),
        data=DataFacts(
            records={"train": 10_012, "dev": 1_204, "test": 3_080},
            units={"train": 9_120, "dev": 1_100, "test": 2_999},
            cleaning=CleaningFacts(normalised=12, control_characters=3, duplicates=41, empty=1),
            truncated={"train": 310, "dev": 22, "test": 0},
            partitioner="dirichlet",
        ),
        sites=[site_facts(f"hospital-{i + 1}", names, metrics, rounds, rng, baselines=baselines) for i in range(sites)],
        rounds=facts,
        selected_round=max(rounds, 0),
        table=[row for row in table(metrics) if baselines or row.name == "federated"],
        failures=[Failure(round=2, site="hospital-3", code="timeout")] if rounds > 1 and sites > 2 else [],
        timing=Timing(
            startup=8.2, rounds=sum(f.seconds for f in facts), validation=2.1, baselines=61, test=9.5, total=160
        ),
        machine=MachineFacts(
            cores=8, memory_gib=31.2, devices=[], workers=4, threads_per_worker=2, python="3.11.9", torch="2.13.0"
        ),
    )
    # Validated again, so that changes are checked as a summary read from a file would be.
    return RunSummary.model_validate({**dict(summary), **changes})


def figures(quality: float, metrics: tuple[str, ...]) -> dict[str, float]:
    """Figures of a model that is right with probability `quality`."""
    return {metric: 2.2 - 2 * quality if metric in LOWER_IS_BETTER else quality for metric in metrics}


def round_facts(number: int, metrics: tuple[str, ...], rng: np.random.Generator) -> RoundFacts:
    quality = 0.92 - 0.85 * 0.5**number
    return RoundFacts(
        round=number,
        train_loss=2.3 * 0.6**number + 0.1 if number else None,
        validation=figures(quality, metrics),
        answered=6,
        failed=0,
        bytes_up=7_440_000 if number else 0,
        bytes_down=7_441_000,
        seconds=float(rng.uniform(12, 16)),
        training_seconds=float(rng.uniform(8, 11)) if number else 0.0,
    )


def site_facts(
    name: str, labels: list[str], metrics: tuple[str, ...], rounds: int, rng: np.random.Generator, *, baselines: bool
) -> SiteFacts:
    records = int(rng.integers(80, 2500))
    shares = rng.dirichlet([0.5] * len(labels)) if labels else []
    skill = float(rng.uniform(-0.05, 0.05))
    return SiteFacts(
        name=name,
        records=records,
        held_out=records // 10,
        units=records - 3,
        labels={label: int(share * records) for label, share in zip(labels, shares, strict=True)},
        train_loss=[2.3 * 0.6**number + float(rng.uniform(0, 0.3)) for number in range(1, rounds + 1)],
        validation=[figures(0.92 + skill - 0.85 * 0.5**number, metrics) for number in range(rounds + 1)],
        seconds=float(rng.uniform(30, 50)),
        bytes_up=6_200_000,
        bytes_down=7_440_000,
        local_only=figures(0.7 + skill, metrics) if baselines else None,
        local_only_held_out=figures(0.8 + skill, metrics) if baselines else None,
    )


def table(metrics: tuple[str, ...]) -> list[TableRow]:
    return [
        TableRow(name=name, figures=figures(quality, metrics), examples_seen=0 if name == "untuned" else 9_600)
        for name, quality in ROWS.items()
    ]
