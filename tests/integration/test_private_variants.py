"""Whole runs with privacy and something beside it: a second federation, four bits, a kill, a sweep."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.ledger import Ledger
from simulations.summary import RunSummary
from tests.integration.simulating import (
    LONGEST_RUN,
    SKEW,
    WORDS,
    World,
    clauses,
    still_there,
    stored_states,
    wait_for,
    write_manifest,
    write_rows,
)

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
def test_a_second_federation_is_compared_with(new_world: Callable[[], World], encoder: Path) -> None:
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 30, SKEW))
    write_rows(world.folder / "test.jsonl", clauses("test", 10, dict.fromkeys(SKEW, "abc")))
    write_manifest(world.folder, encoder, simulation={"test": "test.jsonl"}, evaluation={"holdout": 0.0})
    command = ["simulate", "federation.toml", "--compare", "privacy.epsilon=3", "--compare", "adapter.method=head"]
    ended = wait_for(world.start(*command, "--run-id", "both"), world.folder / "runs" / "both")
    assert ended.rc == 0, ended.err
    summary = ended.summary
    assert [row.name for row in summary.table] == ["untuned", "federated", "federated, private"]
    assert summary.privacy is None
    assert summary.compared is not None
    assert summary.compared.settings == ["privacy.epsilon=3", "adapter.method=head"]
    assert summary.compared.privacy is not None
    assert all(2.9 < site.epsilon <= 3.0 for site in summary.compared.privacy.sites)
    assert summary.timing.comparison > 0
    sentence = "The same federation with privacy (epsilon 3 for each record and site) reached accuracy"
    assert sentence in ended.out
    assert sentence in (ended.run / "report.html").read_text()
    other = RunSummary.model_validate_json((ended.run / summary.compared.run / "summary.json").read_bytes())
    assert other.rounds[-1].round == summary.rounds[-1].round == 3
    assert other.model.trainable_parameters < summary.model.trainable_parameters
    assert (ended.run / summary.compared.run / "report.html").exists()
    assert not (ended.run / "ledgers").exists()


@pytest.mark.slow
def test_a_four_bit_base_is_tuned_privately_on_a_cpu(new_world: Callable[[], World], causal: Path) -> None:
    world = new_world()
    words = [*WORDS["a"], *WORDS["b"], *WORDS["c"]]
    rows = [{"instruction": f"What of {w} {n}?", "output": f"The {w} is notice."} for n in range(4) for w in words]
    write_rows(world.folder / "train.jsonl", [row | {"unit": f"u{place}"} for place, row in enumerate(rows)])
    write_manifest(
        world.folder,
        causal,
        task={"kind": "causal-lm", "labels": []},
        adapter={"method": "qlora"},
        data={"max_length": 64},
        privacy={"epsilon": 8.0, "delta": 1e-3},
        simulation={"sites": ["one", "two", "three"], "partitioner": "iid"},
    )
    ended = wait_for(world.start("simulate", "federation.toml", "--run-id", "four"), world.folder / "runs" / "four")
    assert (ended.rc, ended.err) == (0, "")
    assert ended.summary.privacy is not None
    assert all(7.8 < site.epsilon <= 8.0 for site in ended.summary.privacy.sites)
    first, *_, last = stored_states(ended.run)
    assert all(not np.array_equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_a_private_run_that_is_killed_has_paid_for_what_it_stored(
    new_world: Callable[[], World], encoder: Path
) -> None:
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 30, SKEW))
    training = {"rounds": 200, "local_steps": 1}
    write_manifest(world.folder, encoder, training=training, evaluation={"holdout": 0.0}, privacy={"epsilon": 8.0})
    process = world.start("simulate", "federation.toml", "--run-id", "killed")
    run = world.folder / "runs" / "killed"
    until = time.monotonic() + LONGEST_RUN
    while len(list(run.glob("rounds/*/round.json"))) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert still_there(process.pid) == []
    stored = len(list(run.glob("rounds/*/round.json"))) - 1  # round 0 is the first adapter
    assert stored >= 4
    ledgers = sorted((run / "ledgers").iterdir())
    assert len(ledgers) == len(SKEW)
    for folder in ledgers:
        rounds = [entry.charge.round for entry in Ledger(folder, simulated=True).entries()]
        assert rounds == list(range(1, len(rounds) + 1))
        assert len(rounds) >= stored


@pytest.mark.slow
def test_a_sweep_draws_the_price_of_privacy(new_world: Callable[[], World], encoder: Path) -> None:
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 30, SKEW))
    write_manifest(world.folder, encoder, training={"rounds": 1}, evaluation={"holdout": 0.0})
    command = ["simulate", "federation.toml", "--sweep", "privacy.epsilon=2,inf", "--run-id", "swept"]
    ended = wait_for(world.start(*command), world.folder / "runs" / "swept")
    assert ended.rc == 0, ended.err
    points = json.loads((ended.run / "sweep.json").read_text())["points"]
    assert [point["value"] for point in points] == ["2", "inf"]
    assert 1.9 < points[0]["epsilon"] <= 2.0
    assert points[1]["epsilon"] is None
    assert all(0 <= point["figures"]["accuracy"] <= 1 for point in points)
    assert (ended.run / points[0]["run"] / "ledgers" / "1" / "ledger.sqlite").exists()
    assert not (ended.run / points[1]["run"] / "ledgers").exists()
    assert "<svg" in (ended.run / "sweep.html").read_text()
