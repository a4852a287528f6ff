"""Whole runs through the real command, in processes and folders of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
from peft import PeftModel
from safetensors.numpy import load_file

from client.ledger import Account, Charge, Ledger
from common.adapters import get_state
from common.codec.state import AdapterState, state_digest
from common.config.loading import load_manifest
from common.models import find_base, load_task_model
from common.privacy.accounting import Steps
from common.progress import BaselineFinished, Event, RoundFinished, RoundStarted, RunStarted, RunStopped, read_events
from common.randomness import seeded
from simulations.commands import main
from simulations.summary import RunSummary

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SECRET = "Zanzibar"  # stands in every record, and must be in nothing that a run leaves
LONGEST_RUN = 400  # seconds; about 20 on an idle machine, many times that beside other heavy work


@dataclass(frozen=True)
class World:
    """A folder to work in, and one for temporary files. The latter's path is short: Ray puts sockets there."""

    folder: Path
    temporary: Path

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "FLWR_HOME": str(self.temporary / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `coadapt` as the leader of a session of its own, as a shell does."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("coadapt")), *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self, run_id: str) -> list[Event]:
        path = self.folder / "runs" / run_id / "events.jsonl"
        return list(read_events(path)) if path.exists() else []

    def leftovers(self) -> list[str]:
        return [path.name for path in self.temporary.glob("coadapt*")]


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    rc: int
    out: str
    err: str
    run: Path

    @property
    def summary(self) -> RunSummary:
        return RunSummary.model_validate_json((self.run / "summary.json").read_bytes())

    def said_everywhere(self) -> str:
        """All text of the run's folder but the sites' own logs, and what was printed."""
        files = [path for path in self.run.rglob("*") if path.suffix in {".json", ".jsonl", ".html", ".toml"}]
        return "".join([self.out, self.err, *(path.read_text(encoding="utf-8") for path in files)])


def wait_for(process: subprocess.Popen[str], run: Path, seconds: float = LONGEST_RUN) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {seconds} s\n{out}\n{err}")
    return Ended(process.returncode, out, err, run)


def still_there(session: int, seconds: float = 10.0) -> list[str]:
    """Names of the processes of a session that do not end within some seconds."""
    until = time.monotonic() + seconds
    while True:
        names = []
        for process in psutil.process_iter(["pid", "name", "status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    names.append(process.info["name"])
            except ProcessLookupError:
                pass
        if not names or time.monotonic() > until:
            return names
        time.sleep(0.2)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WORDS = {
    "a": ("indemnify", "liability", "damages", "losses", "claims"),
    "b": ("terminate", "notice", "breach", "days", "expiry"),
    "c": ("governing", "law", "court", "state", "courts"),
}
FILL = ("the", "shall", "party", "of", "and", "to", "any", "agreement")
# Nobody sees all three labels, so nobody alone, and no adapter of one site, can tell more than two apart.
SKEW = {"north": "aab", "south": "bbc", "west": "cca"}


def clauses(split: str, count: int, labels: dict[str, str]) -> list[dict[str, Any]]:
    """`count` records of each site, whose label shows in its words."""
    rng, rows = seeded(0, "toy", split), []
    for site, own in labels.items():
        for number in range(count):
            label = own[number % len(own)]
            words = [*rng.choice(WORDS[label], 4), *rng.choice(FILL, 4)]
            text = " ".join([*map(str, rng.permutation(words)), SECRET])
            rows.append({"text": text, "label": label, "unit": f"{SECRET}-{split}-{site}-{number}", "group": site})
    return rows


def write_manifest(folder: Path, base: Path, **tables: Any) -> None:
    values: dict[str, Any] = {
        "version": 1,
        "name": "toy",
        "task": {"kind": "text-classification", "labels": ["a", "b", "c"]},
        "model": {"base": str(base)},
        "data": {"max_length": 16},
        "training": {
            "rounds": 3,
            "local_steps": 4,
            "batch_size": 8,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "precision": "fp32",
        },
        "simulation": {"train": "train.jsonl", "sites": list(SKEW), "partitioner": "natural", "workers": 1},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    (folder / "federation.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def new_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], World]]:
    made: list[Path] = []

    def make() -> World:
        made.append(Path(tempfile.mkdtemp(prefix="ca-", dir="/tmp")))
        return World(tmp_path_factory.mktemp("world"), made[-1])

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def stored_states(run: Path) -> list[AdapterState]:
    """Adapters of all rounds, after a check that PEFT puts the very tensors into a model of the base."""
    manifest = load_manifest(run / "federation.toml")
    base = find_base(manifest.model)
    states = []
    for folder in sorted((run / "rounds").iterdir()):
        state: AdapterState = load_file(folder / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(load_task_model(base, manifest), folder)
        assert state_digest(get_state(model)) == state_digest(state)
        assert json.loads((folder / "round.json").read_text())["adapter_sha256"] == state_digest(state)
        states.append(state)
    return states


# --- a run with all there is ------------------------------------------------------------------------------------------


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


# --- the other tasks, and the same seed twice -------------------------------------------------------------------------


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object that a command prints which ends well."""
    monkeypatch.setattr(sys, "argv", ["coadapt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


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


def sentences(count: int) -> list[dict[str, Any]]:
    rng, rows = seeded(0, "toy sentences"), []
    for number in range(count):
        tokens = [str(word) for word in rng.choice(FILL, 6)]
        tags = ["O"] * 6
        place = int(rng.integers(5))
        tokens[place : place + 2] = [str(rng.choice(WORDS["a"])), "agreement"]
        tags[place : place + 2] = ["B-Harm", "I-Harm"]
        rows.append({"tokens": tokens, "tags": tags, "unit": f"u{number}"})
    return rows


TOKENS = {
    "task": {"kind": "token-classification", "labels": ["Harm"]},
    "simulation": {"sites": ["one", "two", "three"], "partitioner": "iid"},
}


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


# --- with privacy -----------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_a_known_noise_is_said_to_protect_nobody(private: dict[str, Ended]) -> None:
    ended = private["known"]
    assert ended.summary.privacy is not None
    assert not ended.summary.privacy.protects
    assert "The released adapter is not private: privacy.unsafe_seed makes its noise known." in ended.out
    # The same noise is drawn again, and other noise where nobody knows it.
    last = {name: stored_states(run.run)[-1] for name, run in private.items()}
    assert state_digest(last["known"]) != state_digest(last["private"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("privacy.epsilon=0", "privacy.epsilon must be"),
        ("privacy.epsilon=-1", "privacy.epsilon must be"),
        ("privacy.delta=0.5", "privacy.delta must be above 0 and below 1 / 10 privacy units"),
        ("training.batch_size=10", "training.batch_size must be below the 10 privacy units"),
        ("privacy.unit=patient", "no column 'unit'"),
        ("evaluation.select=best", "evaluation.select must be 'last' with privacy"),
    ],
)
def test_bad_privacy_ends_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    encoder: Path,
    setting: str,
    message: str,
) -> None:
    rows = clauses("train", 12, SKEW)
    write_rows(place / "train.jsonl", [{k: v for k, v in row.items() if k != "unit"} for row in rows])
    write_manifest(place, encoder, privacy={"epsilon": 8.0}, evaluation={"holdout": 0.0})
    status, said = refused(monkeypatch, capsys, "simulate", "federation.toml", "--set", setting)
    assert status in {1, 2}
    assert message in said
    assert not (place / "runs").exists()


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


# --- trouble in the middle --------------------------------------------------------------------------------------------

# A metric that counts its calls on records of site west, whose label is c, and fails or sleeps from the second one on.
OWN_METRIC = f"""
import time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def score(predicted, expected):
    if "c" not in expected:
        return 1
    with CALLS.open("a") as calls:
        calls.write("call\\n")
    if len(CALLS.read_text().splitlines()) > 1:
        trouble(expected)
    return 0.5


def fails(expected):
    raise ValueError(f"cannot score {SECRET} of {{expected}}")


def sleeps(expected):
    time.sleep(600)


trouble = """


@pytest.fixture
def troubled(new_world: Callable[[], World], encoder: Path) -> Callable[[str], World]:
    """A world in which site west is in trouble from its second round on."""

    def make(trouble: str) -> World:
        world = new_world()
        labels = {"north": "ab", "south": "ab", "east": "ab", "west": "c"}
        write_rows(world.folder / "train.jsonl", clauses("train", 12, labels))
        write_rows(world.folder / "dev.jsonl", clauses("dev", 4, labels))
        write_rows(world.folder / "test.jsonl", clauses("test", 6, {"north": "ab"}))
        write_manifest(
            world.folder,
            encoder,
            simulation={"dev": "dev.jsonl", "test": "test.jsonl", "sites": list(labels)},
            evaluation={"metrics": ["accuracy", "own_metric_of_test:score"]},
        )
        (world.folder / "own_metric_of_test.py").write_text(OWN_METRIC + trouble + "\n")
        return world

    return make


@pytest.mark.slow
def test_a_site_that_fails_sits_out_and_tells_nobody_why(troubled: Callable[[str], World]) -> None:
    world = troubled("fails")
    ended = wait_for(world.start("simulate", "federation.toml", "--run-id", "odd"), world.folder / "runs" / "odd")
    assert (ended.rc, ended.err) == (0, "")
    summary = ended.summary
    assert [(failure.round, failure.site) for failure in summary.failures] == [(2, "west"), (3, "west")]
    codes = {failure.code for failure in summary.failures}
    assert codes == {"extension"}
    assert [facts.answered for facts in summary.rounds] == [0, 4, 3, 3]
    west = summary.sites[-1]
    assert [loss is None for loss in west.train_loss] == [False, True, True]
    assert "west sat out: extension" in ended.out
    # Where and why stands in the site's own log, and its text nowhere else.
    logs = list((ended.run / "site-logs").iterdir())
    assert len(logs) == 1
    log = logs[0].read_text(encoding="utf-8")
    assert f"ValueError: cannot score {SECRET}" in log
    assert "own_metric_of_test.py" in log
    assert SECRET not in ended.said_everywhere()
    assert "cannot score" not in ended.said_everywhere()
    assert [row.figures["own_metric_of_test:score"] for row in summary.table] == [1.0, 1.0]
    assert world.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
def test_a_wish_to_stop_is_heard_in_the_middle_of_a_long_call(troubled: Callable[[str], World], how: str) -> None:
    world = troubled("sleeps")
    process = world.start("simulate", "federation.toml", "--run-id", "stopped")
    calls, until = world.folder / "calls", time.monotonic() + LONGEST_RUN
    while not (calls.exists() and len(calls.read_text().splitlines()) > 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    rounds = [event.round for event in world.events("stopped") if isinstance(event, RoundStarted)]
    assert rounds == [1, 2]
    pressed = time.monotonic()
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells every process of its group
    else:
        process.terminate()  # as a batch system does before it kills
    ended = wait_for(process, world.folder / "runs" / "stopped", seconds=60)
    assert time.monotonic() - pressed < 40
    assert (ended.rc, ended.err) == (130, "")
    assert "stopped by you; what was finished lies in runs/stopped" in ended.out
    assert "raylet" not in ended.out
    assert still_there(process.pid) == []
    assert world.leftovers() == []
    summary = ended.summary
    assert (summary.status, summary.table) == ("interrupted", [])
    assert [facts.round for facts in summary.rounds] == [0, 1]
    assert len(stored_states(ended.run)) == 2
    assert not (ended.run / "adapter").exists()
    assert (ended.run / "report.html").exists()
    stopped = world.events("stopped")[-1]
    assert isinstance(stopped, RunStopped)
    assert stopped.status == "interrupted"


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD_ROWS = [{"text": f"text {number}", "label": "abc"[number % 3], "group": "g"} for number in range(30)]
THREE_SITES = {"sites": 3, "partitioner": "iid"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", GOOD_ROWS)
    write_manifest(tmp_path, encoder, simulation=THREE_SITES)
    return tmp_path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and the one line of a command that must end in one."""
    monkeypatch.setattr(sys, "argv", ["coadapt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert SECRET not in printed.err + printed.out
    return int(str(ended.value.code)), printed.err.rstrip()


BAD_DATA: dict[str, tuple[list[dict[str, Any]] | None, str]] = {
    "missing file": (None, "simulation.train: no file train.jsonl in"),
    "unknown column": ([{"text": "x", "topic": "a"}], "no column 'label'; columns found: 'text', 'topic'"),
    "label not in list": (
        [*GOOD_ROWS, {"text": "x", "label": SECRET}],
        "row 31, column 'label': not one of task.labels",
    ),
    "no rows": ([], "no records: the file has no rows"),
    "no text": ([{"text": " ", "label": "a"}] * 3, "no records: all 3 rows have an empty text"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_end_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    rows, said = BAD_DATA[case]
    (place / "train.jsonl").unlink()
    if rows is not None:
        write_rows(place / "train.jsonl", rows)
    status, line = refused(monkeypatch, capsys, "simulate", "federation.toml")
    assert status == 1
    assert said in line
    assert not (place / "runs").exists()


def test_tags_that_do_not_fit_the_tokens_end_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: Path
) -> None:
    rows = sentences(20)
    rows[7]["tags"] = rows[7]["tags"][:-1]
    write_rows(place / "train.jsonl", rows)
    write_manifest(place, encoder, **TOKENS)
    status, line = refused(monkeypatch, capsys, "simulate", "federation.toml")
    assert status == 1
    assert "row 8, column 'tags': has 5 tags for 6 tokens" in line
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("tables", "status", "said"),
    [
        ({"task": {"kind": "causal-lm", "labels": []}}, 1, "reads text in both directions and cannot write answers"),
        ({"model": {"weights_sha256": "0" * 64}}, 1, "model.weights_sha256: the files in"),
        ({"model": {"tokenizer_sha256": "0" * 64}}, 1, "model.tokenizer_sha256: the files in"),
        (
            {"training": {"local_step": 3}},
            2,
            "training.local_step is not a known key; did you mean training.local_steps?",
        ),
        ({"training": {"rounds": 0}}, 2, "training.rounds must be an integer from 1 to 10000, found 0"),
        ({"adapter": {"targets": ["nothing"]}}, 1, "adapter.targets: 'nothing' is no linear layer"),
        ({"evaluation": {"metrics": ["own_gone:score"]}}, 1, "metric 'own_gone:score': no module 'own_gone'"),
        ({"simulation": {"sites": 50}}, 1, "50 sites but 27 units"),
    ],
)
def test_a_bad_manifest_ends_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    encoder: Path,
    tables: dict[str, Any],
    status: int,
    said: str,
) -> None:
    write_manifest(place, encoder, **{"simulation": THREE_SITES, **tables})
    if tables.get("task"):
        write_rows(place / "train.jsonl", [{"instruction": "why?", "output": f"so {number}"} for number in range(30)])
    if tables.get("simulation"):
        write_manifest(place, encoder, simulation={**THREE_SITES, **tables["simulation"]})
    found, line = refused(monkeypatch, capsys, "simulate", "federation.toml")
    assert said in line
    assert found == status
    assert not (place / "runs").exists()


def test_an_existing_run_is_never_written_over(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "runs" / "mine").mkdir(parents=True)
    (place / "runs" / "mine" / "summary.json").write_text("{}")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    status, line = refused(monkeypatch, capsys, "simulate", "federation.toml", "--run-id", "mine")
    assert status == 1
    assert "a run never writes over another" in line
    assert [path.name for path in (place / "runs" / "mine").iterdir()] == ["summary.json"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_id_cannot_leave_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = refused(monkeypatch, capsys, "simulate", "federation.toml", "--run-id", "../elsewhere")
    assert status == 1
    assert "a run id is letters" in line
    assert not (place / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "status", "said"),
    [
        ("[trainig]\nrounds = 3\n", 2, "did you mean training?"),
        ("[simulation]\ntrain = 'gone.jsonl'\n", 1, "simulation.train: no file gone.jsonl"),
    ],
)
def test_the_command_itself_ends_in_one_line(
    new_world: Callable[[], World], encoder: Path, table: str, status: int, said: str
) -> None:
    world = new_world()
    head = f"version = 1\nname = 'x'\nmodel.base = '{encoder}'\n"
    task = "[task]\nkind = 'text-classification'\nlabels = ['a', 'b']\n"
    (world.folder / "federation.toml").write_text(head + task + table)
    ended = wait_for(world.start("simulate", "federation.toml"), world.folder / "runs" / "none", seconds=60)
    assert ended.rc == status
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert ended.out == ""
    assert [path.name for path in world.folder.iterdir()] == ["federation.toml"]
    assert world.leftovers() == []
