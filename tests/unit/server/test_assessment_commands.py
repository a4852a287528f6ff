"""`coadapt evaluate` and `coadapt compare` as a person types them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from assessed import Manifests, records, tiny
from typer.testing import CliRunner

from common.config.manifest import METRICS
from common.data_files import write_records
from common.errors import AssessmentError, CoadaptError, DataError
from server.assessment.evaluation import drawn
from server.assessment.memory import PeakMemory
from server.distillation.domain_model import DomainModel, save_model
from simulations.commands import app, main


def typed(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "140"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def stored(manifest_for: Manifests, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The folder of a model of a task, and a data file for it."""

    def make(kind: str, count: int = 40, name: str = "model") -> tuple[Path, Path]:
        model = tiny(manifest_for(kind))
        save_model(tmp_path / name, model, {})
        data = tmp_path / f"{name}.jsonl"
        write_records(data, records(kind, count), model.manifest.data.columns)
        return tmp_path / name, data

    return make


def test_evaluate_prints_a_table(stored: Callable[..., Any]) -> None:
    model, data = stored("text-classification")
    printed = typed("evaluate", model, data, "--no-speed")
    assert f"{model} on 40 records" in printed.replace("\n", "")
    for name in ("accuracy", "macro f1", "loss", "parameters", "weights on disk"):
        assert re.search(rf"^{name} +[\d.,]+", printed, re.MULTILINE), name
    assert re.search(r"accuracy +0\.\d{4} +0\.\d{4} to 0\.\d{4}", printed)


def test_evaluate_gives_one_json_object_with_costs(stored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stored("token-classification")
    asked: list[Any] = []

    def peak(*words: Any, **options: Any) -> PeakMemory:  # a process of its own is tried in test_timing.py
        asked.append((words, options))
        return PeakMemory(process=300.0, model=20.0)

    monkeypatch.setattr("server.assessment.memory.peak_memory", peak)
    found = json.loads(typed("evaluate", model, data, "--json", "--limit", 11))
    assert found["records"] == 11
    assert [figure["metric"] for figure in found["figures"]] == list(METRICS["token-classification"])
    assert found["parameters"] > 0
    assert found["bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert found["cost"]["latency"]["cpu_p95"] >= found["cost"]["latency"]["cpu_median"] > 0
    assert found["cost"]["throughput"]["by_cpu"] > 0
    assert found["peak_memory_mib"] == {"process": 300.0, "model": 20.0}
    (((path, texts), options),) = asked
    assert (path, len(texts), options) == (model, 11, {"base": None, "manifest": None})


def test_evaluate_looks_at_written_answers(stored: Callable[..., Any], tmp_path: Path) -> None:
    model, data = stored("causal-lm", 5)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    options = ("--no-speed", "--max-new-tokens", 3)
    found = json.loads(typed("evaluate", model, data, "--json", *options, "--pattern", ".*"))
    figures = {figure["metric"]: figure for figure in found["figures"]}
    assert figures["format_compliance"]["value"] == 1
    assert {"bits_per_byte", "perplexity", "loss", "rouge_l", "exact_match"} < set(figures)
    both = typed("evaluate", model, data, *options, "--pattern", ".*", "--schema", schema)
    assert re.search(r"format compliance +0\.0000 +0\.0000 to 0\.\d{4}", both)


def test_compare_says_which_is_better(stored: Callable[..., Any], manifest_for: Manifests, tmp_path: Path) -> None:
    a, data = stored("text-classification", 200)
    printed = typed("compare", a, a, data, "--no-speed")
    assert "no difference of accuracy found: A and B count the same on all 200 records" in printed
    assert "McNemar: 0 records right by A alone, 0 by B alone; p = 1.0000 (exact)" in printed
    model = tiny(manifest_for("text-classification"))
    model.network.head.bias.data[0] = 1000  # says "a" of every text
    save_model(tmp_path / "b", DomainModel(model.network, model.tokenizer, model.manifest), {})
    found = json.loads(typed("compare", a, tmp_path / "b", data, "--json", "--no-speed"))
    assert found["records"] == 200
    assert found["verdict"]
    accuracy = found["differences"][0]
    assert accuracy["metric"] == "accuracy"
    assert accuracy["b"]["value"] == pytest.approx(67 / 200)
    assert accuracy["difference"]["difference"] == pytest.approx(accuracy["b"]["value"] - accuracy["a"]["value"])
    assert found["mcnemar"]["only_second"] - found["mcnemar"]["only_first"] == round(
        200 * accuracy["difference"]["difference"]
    )
    timed = typed("compare", a, tmp_path / "b", data, "--limit", 20)
    assert re.search(r"latency, ms CPU .* times as fast", timed)
    assert typed("compare", a, tmp_path / "b", data, "--no-speed") == typed(
        "compare", a, tmp_path / "b", data, "--no-speed"
    )


def test_a_limit_draws_the_same_records_again_and_not_the_first(manifest_for: Manifests) -> None:
    rows = records("text-classification", 50)
    chosen = drawn(rows, 10)
    assert chosen == drawn(rows, 10) != rows[:10]
    assert len(set(chosen)) == 10
    assert [row for row in rows if row in chosen] == chosen
    assert drawn(rows, None) == rows == drawn(rows, 50)


SECRET = "Zanzibar"


def _empty(path: Path) -> None:
    path.write_text("")


def _unknown_label(path: Path) -> None:
    path.write_text(json.dumps({"text": SECRET, "label": f"{SECRET}-label"}) + "\n")


def _no_column(path: Path) -> None:
    path.write_text(json.dumps({"words": SECRET, "label": "a"}) + "\n")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_empty, "no records: the file has no rows"),
        (_unknown_label, "row 1, column 'label': not one of task.labels"),
        (_no_column, "no column 'text'"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_bad_data_is_one_line_without_the_record(
    command: str, make: Callable[[Path], None], words: str, stored: Callable[..., Any], tmp_path: Path
) -> None:
    model, _ = stored("text-classification", 3)
    make(tmp_path / "bad.jsonl")
    models = [model] if command == "evaluate" else [model, model]
    error = refused(DataError, command, *models, tmp_path / "bad.jsonl", "--no-speed")
    assert words in error
    assert SECRET not in error


def refused(kind: type[CoadaptError], *words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, kind), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_models_that_cannot_be_compared_or_asked(stored: Callable[..., Any], tmp_path: Path) -> None:
    text, data = stored("text-classification", 3)
    tokens, other = stored("token-classification", 3, name="tokens")
    for file in (data, other):
        words = refused(AssessmentError, "compare", text, tokens, file)
        assert "different tasks, text-classification and token-classification" in words
    assert "holds no model" in refused(AssessmentError, "evaluate", tmp_path, data)
    words = refused(AssessmentError, "evaluate", text, data, "--pattern", "a", "--no-speed")
    assert "needs answers that a causal-lm model writes" in words
    assert "no metric of this comparison" in refused(AssessmentError, "compare", text, text, data, "--metric", "bleu")


def test_an_error_ends_in_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["coadapt", "evaluate", str(tmp_path / "nothing"), str(tmp_path / "data.jsonl")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines: Sequence[str] = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'nothing'}: no such file or folder")
