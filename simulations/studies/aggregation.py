"""How separate, alternate and ffa compare on a fixed subset of CUAD, with and without privacy, three seeds each.

    python -m simulations.studies.aggregation --data DIR --hours 1 --out FILE

DIR holds cuad_clauses.{train,dev}.jsonl.gz. FILE gets one JSON object for each cell as soon as it is finished; call
again to go on. Figures are of the dev clauses, so nothing here looks at the test set. The methods share all settings:
none was tuned for one of them, which may do the others wrong (the learning rate is that of `separate` in
docs/lab-notes.md).
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import CoadaptError
from simulations.engine import simulate
from simulations.studies.cells import Cell, Row, finished, run_cells

__all__ = ["cells_of_the_study", "main", "markdown"]

SCENARIO = Path(__file__).parents[1] / "scenarios" / "cuad.toml"
METHODS = ("separate", "alternate", "ffa")
SEEDS = (0, 1, 2)

Tables = dict[str, dict[str, Any]]

# What is set otherwise than in cuad.toml: 2,000 training clauses, shorter inputs, and measuring once, on dev.
SUBSET: Tables = {
    "data": {"max_length": 64},
    "adapter": {"rank": 8, "alpha": 16.0},
    "evaluation": {"holdout": 0.0, "every": 1000},
    # The sums are the same but for rounding; without them a cell's bytes are those of the method alone.
    "secure_sum": {"enabled": False},
    "simulation": {
        "max_records": 2000,
        "dev": None,
        "test": "cuad_clauses.dev.jsonl.gz",
        "baselines": False,
    },
}
# As the proxy of docs/lab-notes.md, a fifth shorter (6,144 examples); each factor gets as many rounds.
PLAIN: Tables = {
    "training": {
        "rounds": 16,
        "local_steps": 8,
        "batch_size": 8,
        "learning_rate": 6e-3,
        "adam_epsilon": 1e-3,
        "warmup_steps": 10,
    },
    "aggregation": {"server_learning_rate": 1.2, "server_momentum": 0.6},
}
# As cuad.toml with privacy, in so far as 330 clauses a firm allow it: the head first, one large step a round, steps in
# proportion to the noised gradient (9,216 examples).
PRIVATE: Tables = {
    "training": {
        "rounds": 16,
        "head_rounds": 6,
        "local_steps": 1,
        "batch_size": 96,
        "micro_batch_size": 32,
        "learning_rate": 0.1,
        "head_learning_rate": 1.0,
        "adam_epsilon": 0.1,
        "weight_decay": 0.0,
        "warmup_steps": 0,
    },
    "aggregation": {"weighting": "uniform", "server_learning_rate": 3.0, "server_momentum": 0.5},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "unit": "record", "clip": 1.0},
}


def settings_of(method: str, private: bool, seed: int) -> list[Tables]:
    """What a cell sets otherwise than the scenario, the later over the earlier."""
    return [SUBSET, PRIVATE if private else PLAIN, {"aggregation": {"method": method}, "training": {"seed": seed}}]


def manifest_of(method: str, private: bool, seed: int, *, workers: int | None = None) -> Manifest:
    """The manifest of a cell."""
    values = load_manifest(SCENARIO).model_dump(mode="json")
    engine: list[Tables] = [{"simulation": {"workers": workers}}] if workers else []
    for change in [*settings_of(method, private, seed), *engine]:
        for table, settings in change.items():
            values[table] = {**(values[table] or {}), **settings}
    return Manifest.model_validate(values, strict=False)


def cells_of_the_study() -> dict[Cell, tuple[str, bool, int]]:
    """Every cell and its method, privacy and seed; seeds are the slowest to change, so that all methods begin early."""
    points = [(method, private, seed) for seed in SEEDS for private in (False, True) for method in METHODS]
    return {Cell(name_of(*point), "private" if point[1] else "plain", digest_of(*point)): point for point in points}


def name_of(method: str, private: bool, seed: int) -> str:
    """A cell's name."""
    return f"{method} {'private' if private else 'plain'} seed {seed}"


def digest_of(method: str, private: bool, seed: int) -> str:
    """SHA-256 in hex of the scenario and of what the cell sets; a manifest's own leaves the choice of records out."""
    settings = json.dumps(settings_of(method, private, seed), sort_keys=True)
    return hashlib.sha256(SCENARIO.read_bytes() + settings.encode()).hexdigest()


def train(manifest: Manifest, data: Path) -> Mapping[str, Any]:
    """Run one cell in a folder that goes away; its figures."""
    with tempfile.TemporaryDirectory(prefix="coadapt-study-") as runs:
        summary = simulate(manifest, data=data, runs=Path(runs), run_id="cell")
    result = next((row for row in summary.table if row.name == "federated"), None)
    return {
        "status": summary.status if result or summary.status == "interrupted" else "failed",
        "reason": summary.reason,
        **(result.figures if result else {}),
        "bytes_up": sum(facts.bytes_up for facts in summary.rounds),
        "bytes_down": sum(facts.bytes_down for facts in summary.rounds),
        "examples": result.examples_seen if result else 0,
        "epsilon": max(site.epsilon for site in summary.privacy.sites) if summary.privacy else None,
    }


def markdown(done: Mapping[str, Row]) -> str:
    """The table so far: means over the seeds that are finished, with their number, and the cells that are not."""
    lines = [
        "| method | privacy | dev accuracy | macro-F1 | loss | MB up | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for private in (False, True):
        for method in METHODS:
            names = [name_of(method, private, seed) for seed in SEEDS]
            rows = [done[name] for name in names if name in done]
            cells = [_mean([row[key] for row in rows]) for key in ("accuracy", "macro_f1", "loss")]
            up = f"{statistics.mean(row['bytes_up'] for row in rows) / 1e6:.1f}" if rows else "-"
            epsilon = max((row["epsilon"] for row in rows if row["epsilon"] is not None), default=None)
            how = "none" if not private else "epsilon 8" if epsilon is None else f"epsilon {epsilon:.3f}"
            lines.append(f"| {method} | {how} | {' | '.join(cells)} | {up} | {len(rows)} of {len(SEEDS)} |")
    missing = [cell.name for cell in cells_of_the_study() if cell.name not in done]
    lines += ["", f"Unfinished: {', '.join(missing)}." if missing else "All cells are finished."]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.studies.aggregation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with the clauses")
    parser.add_argument("--hours", type=float, default=1.0, help="begin no cell that would end later than this")
    parser.add_argument("--out", type=Path, required=True, help="results, a JSON Lines file that grows")
    parser.add_argument("--workers", type=int, help="processes that train; default: as the engine plans")
    parser.add_argument("--only", default="", help="cells whose name contains this; default: all")
    given = parser.parse_args(arguments)
    cells = {cell: point for cell, point in cells_of_the_study().items() if given.only in cell.name}

    def work(cell: Cell) -> Mapping[str, Any]:
        method, private, seed = cells[cell]
        return train(manifest_of(method, private, seed, workers=given.workers), given.data)

    try:
        run_cells(list(cells), given.out, work, seconds=3600 * given.hours, tell=lambda line: print(line, flush=True))
        done = finished(given.out, list(cells_of_the_study()))
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{markdown(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
