import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config.loading import load_manifest
from common.errors import CoadaptError, DataError, ManifestError, ModelError, RunError
from common.models import find_base
from simulations.commands import app
from simulations.new_manifest import write_manifest


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def write(tmp_path: Path, encoder: Path) -> Callable[..., Path]:
    def make(path: Path = tmp_path / "federation.toml", **choices: Any) -> Path:
        usual: dict[str, Any] = {
            "name": "clinics",
            "task": "text-classification",
            "labels": "urgent, routine",
            "labels_from": None,
            "base": str(encoder),
            "revision": None,
            "train": None,
            "sites": 6,
        }
        write_manifest(path, **{**usual, **choices})
        return path

    return make


def test_it_loads_and_pins_what_is_used(write: Callable[..., Path], encoder: Path) -> None:
    manifest = load_manifest(write())
    assert (manifest.name, manifest.task.kind, manifest.task.labels) == (
        "clinics",
        "text-classification",
        ("urgent", "routine"),
    )
    base = find_base(manifest.model)
    assert manifest.model.weights_sha256 == base.weights_sha256
    assert manifest.model.tokenizer_sha256 == base.tokenizer_sha256
    assert Path(manifest.model.base) == encoder
    assert manifest.simulation is None


def test_it_explains_every_key(write: Callable[..., Path]) -> None:
    text = write().read_text(encoding="utf-8")
    for words in ("[training]", "rounds of the run", "rounds = 5", "an integer from 1 to 10000", "min_sites"):
        assert words in text


def test_a_causal_base_pins_its_prompt_and_needs_no_labels(write: Callable[..., Path], causal: Path) -> None:
    manifest = load_manifest(write(task="causal-lm", labels=None, base=str(causal)))
    assert manifest.task.labels == ()
    assert manifest.task.prompt_sha256 is not None
    other = load_manifest(write(causal.parent / "other.toml", task="causal-lm", labels=None, base=str(causal)))
    assert manifest.digest() == load_manifest(causal.parent / "other.toml").digest() == other.digest()


def test_a_data_file_makes_it_a_simulation(write: Callable[..., Path]) -> None:
    section = load_manifest(write(train="notes.jsonl", sites=3)).simulation
    assert section is not None
    assert (section.train, section.site_names) == ("notes.jsonl", ("site-1", "site-2", "site-3"))


def test_a_name_comes_from_the_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "clinics-2026").mkdir()
    path = write(tmp_path / "clinics-2026" / "federation.toml", name=None)
    assert load_manifest(path).name == "clinics-2026"


def test_an_existing_file_is_never_written_over(write: Callable[..., Path]) -> None:
    path = write()
    before = path.read_bytes()
    with pytest.raises(RunError, match="exists already; remove it or name another file"):
        write(name="other")
    assert path.read_bytes() == before


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_missing_labels_are_refused_where_nobody_can_be_asked(
    write: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    with pytest.raises(RunError, match="needs labels: give --labels a,b,c or --labels-from FILE"):
        write(task=task, labels=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("choices", "error", "said"),
    [
        ({"task": "summarisation"}, ManifestError, "task.kind must be .*found 'summarisation'"),
        ({"labels": "only-one"}, ManifestError, "at least 2"),
        ({"labels": "a,b,a"}, ManifestError, "'a' twice"),
        ({"name": "a name with spaces"}, ManifestError, "name must be text of 1 to 64 letters"),
        ({"base": "/no/such/folder"}, ModelError, "neither a directory here nor a hub id"),
        ({"task": "token-classification", "labels": "B-Drug"}, ManifestError, "must be entity types"),
        ({"train": "x.jsonl", "sites": 0}, ManifestError, "sites must be at least 1"),
    ],
)
def test_choices_that_make_no_manifest_write_nothing(
    write: Callable[..., Path], tmp_path: Path, choices: dict[str, Any], error: type[CoadaptError], said: str
) -> None:
    with pytest.raises(error) as found:
        write(**choices)
    assert re.search(said, str(found.value))
    assert list(tmp_path.iterdir()) == []


def labels_of(path: Path) -> tuple[str, ...]:
    return load_manifest(path).task.labels


def test_labels_from_a_list_keep_their_order(write: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "labels.txt"
    source.write_text("routine\n\n  urgent \nzoster\n", encoding="utf-8")
    assert labels_of(write(labels=None, labels_from=source)) == ("routine", "urgent", "zoster")


def test_labels_from_a_data_file_are_sorted(write: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "public.jsonl"
    rows = [{"text": "x", "label": label} for label in ("urgent", "routine", "urgent", "Ärger")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert labels_of(write(labels=None, labels_from=source)) == ("routine", "urgent", "Ärger")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_entity_types_come_from_bio_tags(write: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    tags = [["O", "B-Drug", "I-Drug"], ["B-Dose", "O"], []]
    source = tmp_path / f"public.{kind}"
    if kind == "jsonl":
        text = "".join(json.dumps({"tokens": ["x"] * len(row), "tags": row}) + "\n" for row in tags)
    else:
        text = "tokens,tags\n" + "".join(f'"[]","{json.dumps(row).replace(chr(34), chr(34) * 2)}"\n' for row in tags)
    source.write_text(text, encoding="utf-8")
    assert labels_of(write(task="token-classification", labels=None, labels_from=source)) == ("Dose", "Drug")


@pytest.mark.parametrize(
    ("name", "content", "task", "said"),
    [
        (
            "public.jsonl",
            '{"text": "x", "topic": "a"}\n',
            "text-classification",
            "no column 'label'; found text, topic",
        ),
        ("public.jsonl", '{"label": "a"}\n', "token-classification", "no column 'tags'"),
        ("gone.txt", None, "text-classification", "No such file"),
        ("gone.jsonl", None, "text-classification", "no such file"),
        ("labels.docx", "x", "text-classification", "unknown kind of data file"),
        ("public.jsonl", '{"tags": "not json"}\n', "token-classification", "tags"),
        ("public.jsonl", '{"tags": 7}\n', "token-classification", "tags"),
        ("labels.txt", b"\xff\xfe", "text-classification", "UTF-8"),
    ],
)
def test_a_file_without_labels_is_one_line(
    write: Callable[..., Path], tmp_path: Path, name: str, content: str | bytes | None, task: str, said: str
) -> None:
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        write(task=task, labels=None, labels_from=source)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_on_a_terminal_what_is_missing_is_asked_for(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Path
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    # Name (its default), task, base, labels: in this order.
    monkeypatch.setattr(sys, "stdin", Terminal(f"\ntext-classification\n{encoder}\nyes,no\n"))
    manifest = load_manifest(write(name=None, task=None, base=None, labels=None))
    assert manifest.task.labels == ("yes", "no")
    assert manifest.model.base == str(encoder)


def test_the_command_writes_and_says_what_comes_next(tmp_path: Path, encoder: Path) -> None:
    path = tmp_path / "made.toml"
    choices = ["--task", "text-classification", "--labels", "a,b", "--base", str(encoder), "--name", "x"]
    result = CliRunner().invoke(app, ["init", str(path), *choices])
    assert result.exit_code == 0
    assert result.output == f"wrote {path}; next: coadapt check {path}\n"
    assert load_manifest(path).task.labels == ("a", "b")
    again = CliRunner().invoke(app, ["init", str(path), *choices])
    assert isinstance(again.exception, RunError)
