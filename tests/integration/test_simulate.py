"""Whole runs through the real command: what a federation learns, and what it leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from common.codec.state import state_digest
from common.config.loading import load_manifest
from common.progress import BaselineFinished, RoundFinished, RunStarted, RunStopped
from tests.integration.simulating import (
    SECRET,
    SKEW,
    TOKENS,
    WORDS,
    Ended,
    World,
    clauses,
    printed,
    refused,
    sentences,
    stored_states,
    wait_for,
    write_manifest,
    write_rows,
)

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def full(new_world: Callable[[], World], encoder: Path) -> tuple[World, Ended]:
    """Text classification with baselines, in a folder with packages that are named like ours."""
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 40, SKEW))
    write_rows(world.folder / "test.jsonl", clauses("test", 20, dict.fromkeys(SKEW, "abc")))
    write_manifest(
        world.folder,
        encoder,
        training={"rounds": 8, "local_steps": 5, "batch_size": 12},
        simulation={"test": "test.jsonl", "baselines": True},
        evaluation={"select": "best"},
    )
    for room in ("client", "common"):
        (world.folder / room).mkdir()
        (world.folder / room / "__init__.py").write_text('raise RuntimeError("shadowed")\n')
    (world.folder / "random.py").write_text('raise RuntimeError("shadowed")\n')
    process = world.start("simulate", "federation.toml", "--run-id", "full")
    return world, wait_for(process, world.folder / "runs" / "full")


@pytest.mark.slow
def test_a_run_ends_well_among_foreign_packages(full: tuple[World, Ended]) -> None:
    world, ended = full
    assert (ended.rc, ended.err) == (0, "")
    assert "report: runs/full/report.html" in ended.out
    names = sorted(path.name for path in ended.run.iterdir())
    parts = ["adapter", "events.jsonl", "federation.toml", "measured.json", "report.html", "rounds", "summary.json"]
    assert names == parts
    assert (ended.run / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert world.leftovers() == []


@pytest.mark.slow
def test_the_federation_learns_what_no_site_can(full: tuple[World, Ended]) -> None:
    # A site knows two of the three labels, which stand in the test records alike: 2/3 of those is all that its adapter
    # can tell (0.75 with much luck among 60). Sites differ, so one site's adapter in place of the mean stays there too.
    rows = {row.name: row for row in full[1].summary.table}
    accuracy = {name: row.figures["accuracy"] for name, row in rows.items()}
    assert list(rows) == ["untuned", "local only (mean)", "local only (best site)", "federated", "centralised"]
    assert accuracy["local only (best site)"] <= 0.75
    assert accuracy["federated"] >= 0.85
    assert accuracy["federated"] >= accuracy["local only (mean)"] + 0.15
    assert accuracy["centralised"] >= 0.85
    seen = {name: row.examples_seen for name, row in rows.items()}
    own = 8 * 5 * 12
    assert list(seen.values()) == [0, own, own, 3 * own, 3 * own]


@pytest.mark.slow
def test_the_summary_holds_what_happened(full: tuple[World, Ended]) -> None:
    summary = full[1].summary
    assert (summary.status, summary.reason, summary.failures) == ("finished", "", [])
    assert [facts.round for facts in summary.rounds] == list(range(9))
    assert [facts.answered for facts in summary.rounds] == [0, *[3] * 8]
    assert summary.data.records == {"train": 108, "dev": 12, "test": 60}
    assert [site.name for site in summary.sites] == list(SKEW)
    assert all(site.local_only is not None and None not in site.validation for site in summary.sites)
    assert [len(site.labels) for site in summary.sites] == [2, 2, 2]
    losses = [facts.train_loss for facts in summary.rounds[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0] / 3
    best = max(summary.rounds, key=lambda facts: facts.validation["accuracy"])
    assert summary.selected_round == best.round
    assert summary.machine.workers == 1
    timing = summary.timing
    parts = timing.startup + timing.rounds + timing.validation + timing.baselines + timing.test
    assert 0 < parts <= timing.total


@pytest.mark.slow
def test_every_round_loads_in_peft_and_the_result_is_the_selected_one(full: tuple[World, Ended]) -> None:
    run = full[1].run
    states = stored_states(run)
    assert len(states) == 9
    assert len({state_digest(state) for state in states}) == 9
    # The head travels with the adapter, and is trained.
    heads = [name for name in states[0] if "lora" not in name]
    assert len(heads) == 2
    assert all((states[0][name] != states[-1][name]).any() for name in states[0])
    result = load_file(run / "adapter" / "adapter_model.safetensors")
    assert state_digest(result) == state_digest(states[full[1].summary.selected_round])
    trained = sum(array.size for array in states[0].values())
    assert full[1].summary.model.trainable_parameters == trained


@pytest.mark.slow
def test_the_events_can_be_read_back(full: tuple[World, Ended]) -> None:
    events = full[0].events("full")
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunStopped)
    assert events[-1].status == "finished"
    assert [event.round for event in events if isinstance(event, RoundFinished)] == list(range(1, 9))
    measured = {event.baseline for event in events if isinstance(event, BaselineFinished)}
    assert measured == {"untuned", "federated", "centralised", *(f"local:{site}" for site in SKEW)}
    assert [event.time for event in events] == sorted(event.time for event in events)


@pytest.mark.slow
def test_no_text_and_no_unit_of_a_record_is_left_behind(full: tuple[World, Ended]) -> None:
    assert SECRET not in full[1].said_everywhere()
    assert "indemnify" not in full[1].said_everywhere()


@pytest.mark.slow
def test_the_runs_own_manifest_repeats_it(full: tuple[World, Ended]) -> None:
    manifest = load_manifest(full[1].run / "federation.toml")
    assert manifest.digest() == full[1].summary.manifest_sha256
    assert manifest.model.weights_sha256 == full[1].summary.model.weights_sha256


@pytest.mark.slow
def test_the_run_becomes_a_compact_model(
    full: tuple[World, Ended], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, ended = full
    monkeypatch.chdir(world.folder)
    public = [row["text"] for row in clauses("public", 60, dict.fromkeys(SKEW, "abc"))]
    (world.folder / "public.txt").write_text("\n".join(public), encoding="utf-8")
    settings = ["distillation.size=1/4", "distillation.epochs=8", "distillation.max_loss=0.2"]
    settings += ["distillation.batch_size=8", "distillation.learning_rate=3e-3", "distillation.exports=['safetensors']"]
    command = ["distill", "runs/full", "--corpus", "public.txt", "--out", "compact", "--json"]
    said = printed(monkeypatch, capsys, *command, *(word for each in settings for word in ("--set", each)))
    assert [line["step"] for line in said["steps"]] == ["teacher", "vocabulary", "student", "train", "safetensors"]
    federated = next(row for row in ended.summary.table if row.name == "federated")
    # The run was measured in the adapter's own arithmetic, the teacher merged; both read the same test records.
    assert said["steps"][0]["test"]["accuracy"] == pytest.approx(federated.figures["accuracy"], abs=0.02)
    assert said["met"], said["verdict"]
    assert said["steps"][3]["parameters"] <= said["steps"][0]["parameters"] / 4
    card = (world.folder / "compact" / "README.md").read_text(encoding="utf-8")
    assert "simulation" in card
    assert SECRET not in card  # neither text nor unit of a private record
    figures = printed(monkeypatch, capsys, "evaluate", "compact", "test.jsonl", "--json", "--no-speed")
    assert said["steps"][3]["test"]["accuracy"] == pytest.approx(
        next(figure["value"] for figure in figures["figures"] if figure["metric"] == "accuracy"), abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/full"], "name files with --corpus FILE"),
        (["runs/full", "--corpus", "gone.txt"], "gone.txt"),
        (["runs/full", "--corpus", "few.txt"], "at least 50 different texts, found 2"),
        (["runs/full", "--only", "quantise"], "found 'quantise'"),
        (["runs/full", "--set", "training.rounds=3"], "takes settings of [distillation] here"),
        (["runs/full", "--set", "distillation.size=0.1"], "distillation.size must be"),
        (["runs/none"], "no such file or folder"),
        (["runs/full/rounds"], "a model is"),
    ],
)
def test_what_cannot_be_distilled_ends_in_one_line(
    full: tuple[World, Ended],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    world, _ = full
    monkeypatch.chdir(world.folder)
    (world.folder / "few.txt").write_text("one\ntwo\n", encoding="utf-8")
    _, said = refused(monkeypatch, capsys, "distill", *arguments, "--out", "never")
    assert words in said
    assert not (world.folder / "never").exists()


@pytest.fixture(scope="module")
def twice(new_world: Callable[[], World], encoder: Path) -> list[Ended]:
    """Two runs of one manifest with token classification."""
    world = new_world()
    write_rows(world.folder / "train.jsonl", sentences(60))
    write_manifest(world.folder, encoder, adapter={"dropout": 0.1}, **TOKENS)
    ended = []
    for name in ("first", "second"):
        process = world.start("simulate", "federation.toml", "--run-id", name)
        ended.append(wait_for(process, world.folder / "runs" / name))
    return ended


@pytest.mark.slow
def test_entities_are_learnt(twice: list[Ended]) -> None:
    ended = twice[0]
    assert (ended.rc, ended.err) == (0, "")
    losses = [facts.train_loss for facts in ended.summary.rounds[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]
    assert ended.summary.rounds[-1].validation["loss"] < ended.summary.rounds[0].validation["loss"]
    before, after = ended.summary.table  # no baselines were asked for
    assert (before.name, after.name) == ("untuned", "federated")
    assert set(after.figures) == {"entity_f1", "entity_precision", "entity_recall", "loss"}
    assert after.figures["loss"] < before.figures["loss"]
    assert len(stored_states(ended.run)) == 4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapters(twice: list[Ended]) -> None:
    digests = [
        [json.loads(path.read_text())["adapter_sha256"] for path in sorted(ended.run.glob("rounds/*/round.json"))]
        for ended in twice
    ]
    assert len(set(digests[0])) == 4
    assert digests[0] == digests[1]
    first, second = (ended.summary for ended in twice)
    assert [facts.validation for facts in first.rounds] == [facts.validation for facts in second.rounds]
    assert first.table == second.table


@pytest.mark.slow
def test_answers_are_learnt(new_world: Callable[[], World], causal: Path) -> None:
    world = new_world()
    rows = [
        {"instruction": f"What is the rule of {word}?", "output": f"The rule of {word} is notice of {SECRET}."}
        for word in [*WORDS["a"], *WORDS["b"], *WORDS["c"]] * 2
    ]
    write_rows(world.folder / "train.jsonl", [row | {"unit": f"u{place}"} for place, row in enumerate(rows)])
    write_manifest(
        world.folder,
        causal,
        task={"kind": "causal-lm", "labels": []},
        data={"max_length": 64},
        simulation={"sites": ["one", "two"], "partitioner": "iid"},
        secure_sum={"enabled": False},
    )
    ended = wait_for(world.start("simulate", "federation.toml", "--run-id", "causal"), world.folder / "runs" / "causal")
    assert (ended.rc, ended.err) == (0, "")
    summary = ended.summary
    assert summary.rounds[-1].validation["bits_per_byte"] < 0.9 * summary.rounds[0].validation["bits_per_byte"]
    losses = [facts.train_loss for facts in summary.rounds[1:]]
    assert losses == sorted(losses, reverse=True)
    assert len(stored_states(ended.run)) == 4
    assert SECRET not in ended.said_everywhere()
