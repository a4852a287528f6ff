"""Bad input of a simulation: each ends in one line and writes nothing."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.simulating import (
    GOOD_ROWS,
    SECRET,
    SKEW,
    THREE_SITES,
    TOKENS,
    World,
    clauses,
    refused,
    sentences,
    wait_for,
    write_manifest,
    write_rows,
)

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
    ended = wait_for(world.start("simulate", "federation.toml"), world.folder / "runs" / "none")
    assert ended.rc == status
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert ended.out == ""
    assert [path.name for path in world.folder.iterdir()] == ["federation.toml"]
    assert world.leftovers() == []
