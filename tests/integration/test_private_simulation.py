"""Whole runs with privacy: what is charged, told and kept from the coordinator."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.ledger import Account, Charge, Ledger
from common.codec.state import state_digest
from common.privacy.accounting import Steps
from tests.integration.simulating import (
    SECRET,
    SKEW,
    Ended,
    World,
    clauses,
    stored_states,
    wait_for,
    write_manifest,
    write_rows,
)

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def private(new_world: Callable[[], World], encoder: Path) -> dict[str, Ended]:
    """A run with privacy, and two whose noise is known."""
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 52, SKEW))
    write_rows(world.folder / "test.jsonl", clauses("test", 10, dict.fromkeys(SKEW, "abc")))
    write_manifest(world.folder, encoder, simulation={"test": "test.jsonl"}, evaluation={"holdout": 0.1})
    real = world.folder / "ledger"  # of a real site that lives in the same folder
    charge = Charge("patients", "record", "test", "d" * 64, "real", 1, Steps(1.0, 0.1, 4))
    Ledger(real).charge(Account("patients", 3.0, 1e-5), charge, ["u1", "u2"])
    before = {path.name: path.read_bytes() for path in real.iterdir()}
    ended = {}
    write_rows(world.folder / "public.jsonl", clauses("public", 10, dict.fromkeys(SKEW, "abc")))
    for name, settings in (
        ("private", ["privacy.clip=0.5"]),
        ("known", ["privacy.unsafe_seed=1"]),
        ("watched", ["evaluation.public=public.jsonl", "evaluation.every=2"]),
    ):
        options = [part for setting in ["privacy.epsilon=3", *settings] for part in ("--set", setting)]
        options += ["--run-id", name]
        process = world.start("simulate", "federation.toml", *options)
        ended[name] = wait_for(process, world.folder / "runs" / name)
    assert {path.name: path.read_bytes() for path in real.iterdir()} == before
    return ended


@pytest.mark.slow
def test_simulations_pay_from_ledgers_of_their_own(private: dict[str, Ended]) -> None:
    # The same federation three times over: a real account of epsilon 3 would have been empty after the first.
    assert [ended.rc for ended in private.values()] == [0, 0, 0]
    spent = [site.epsilon for ended in private.values() for site in ended.summary.privacy.sites]  # type: ignore[union-attr]
    assert len(set(spent)) == 1


@pytest.mark.slow
def test_privacy_is_charged_to_every_site_and_told(private: dict[str, Ended]) -> None:
    ended = private["private"]
    assert ended.rc == 0, ended.err
    facts = ended.summary.privacy
    assert facts is not None
    assert (facts.unit, facts.epsilon, facts.protects) == ("record", 3.0, True)
    for number, site in enumerate(facts.sites, start=1):
        assert 2.9 < site.epsilon <= 3.0
        assert 0 < site.epsilon_prv < site.epsilon
        assert (site.units, site.steps, site.sampling_rate) == (45, 3 * 4, 8 / 45)
        entries = Ledger(ended.run / "ledgers" / str(number), simulated=True).entries()
        assert [entry.charge.round for entry in entries] == [1, 2, 3]
        assert all(entry.simulated and entry.charge.run_id == "private" for entry in entries)
    sentence = "The released adapter is private: epsilon at most"
    assert sentence in ended.out
    assert sentence in (ended.run / "report.html").read_text()
    assert SECRET not in ended.said_everywhere()
    assert all(SECRET.encode() not in path.read_bytes() for path in ended.run.rglob("*") if path.is_file())


@pytest.mark.slow
def test_with_privacy_no_exact_figure_leaves_a_site(private: dict[str, Ended]) -> None:
    summary = private["private"].summary
    assert all(facts.train_loss is None and facts.validation == {} for facts in summary.rounds)
    assert all(site.train_loss == [None] * 3 and not any(site.validation) for site in summary.sites)
    assert [row.name for row in summary.table] == ["untuned", "federated"]
    events = private["private"].run / "events.jsonl"
    finished = [json.loads(line) for line in events.read_text().splitlines() if '"site_finished"' in line]
    assert len(finished) == 9
    assert all(event["train_loss"] is None and event["examples"] == 32 for event in finished)


@pytest.mark.slow
def test_public_records_show_how_a_private_run_goes(private: dict[str, Ended]) -> None:
    summary = private["watched"].summary
    measured = [facts.round for facts in summary.rounds if facts.validation]
    assert measured == [0, 2, 3]
    assert all(0 <= facts.validation["accuracy"] <= 1 for facts in summary.rounds if facts.validation)
    assert not any(any(site.validation) for site in summary.sites)
    assert summary.measured_on == "public records"
    assert "and on public records" in (private["watched"].run / "report.html").read_text()


@pytest.mark.slow
def test_a_known_noise_is_said_to_protect_nobody(private: dict[str, Ended]) -> None:
    ended = private["known"]
    assert ended.summary.privacy is not None
    assert not ended.summary.privacy.protects
    assert "The released adapter is not private: privacy.unsafe_seed makes its noise known." in ended.out
    # The same noise is drawn again, and other noise where nobody knows it.
    last = {name: stored_states(run.run)[-1] for name, run in private.items()}
    assert state_digest(last["known"]) != state_digest(last["private"])
