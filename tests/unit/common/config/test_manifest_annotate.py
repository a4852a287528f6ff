import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel

from common.config.annotate import annotated, known_keys, shown
from common.config.loading import load_manifest
from common.config.manifest import DEFAULT_BASE, METRICS, Manifest, PrivacySection

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
DIGEST = st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
FRACTION = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
SEED = st.integers(0, 2**31 - 1)
LABELS = {"text-classification": 2, "token-classification": 1, "causal-lm": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("manifests")


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any choice of `fields`, the rest left to their defaults."""
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(LABELS)))
    label = TEXT.filter(lambda text: text.strip() and not re.match(r"^(O$|[BI]-)", text))
    most = 0 if kind == "causal-lm" else 30
    labels = draw(st.lists(label, min_size=LABELS[kind], max_size=most, unique=True))
    prompt = draw(st.just("auto") | st.builds("{}{{instruction}}{}".format, TEXT, TEXT))
    return {"kind": kind, "labels": tuple(labels), "prompt": prompt, "prompt_sha256": draw(DIGEST)}


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    task = draw(tasks())
    # A text that happens to name a directory, such as "/", would be found and resolved.
    base = TEXT.filter(lambda text: text and not os.path.isdir(text))
    batch, parts = draw(st.tuples(st.integers(1, 1000), st.integers(1, 60)))
    sections = {
        "description": TEXT,
        "model": some(
            base=st.just(DEFAULT_BASE) | base,
            revision=st.none() | st.text("0123456789abcdef", min_size=40, max_size=40),
            weights_sha256=DIGEST,
            tokenizer_sha256=DIGEST,
            pooling=st.sampled_from(["auto", "mean", "cls", "last"]),
        ),
        "data": some(columns=some(text=TEXT, unit=TEXT, group=TEXT), max_length=st.integers(8, 131072)),
        "adapter": some(
            rank=st.integers(1, 1024),
            alpha=POSITIVE,
            dropout=FRACTION,
            targets=st.just("auto") | st.lists(TEXT, min_size=1).map(tuple),
        ),
        "training": some(
            micro_batch_size=st.none() | st.just(batch),
            learning_rate=st.floats(0, 1, exclude_min=True),
            max_grad_norm=POSITIVE,
            gradient_checkpointing=st.booleans(),
            seed=SEED,
        ).map(lambda fields: fields | {"batch_size": batch * parts}),
        "privacy": st.none()
        | some(delta=FRACTION.filter(bool), clip=POSITIVE, unit=TEXT.filter(bool)).map(
            lambda fields: fields | {"epsilon": 3.0}
        ),
        "evaluation": some(
            metrics=st.lists(st.sampled_from([*METRICS[task["kind"]], "own.module:metric"])).map(tuple),
            holdout=FRACTION,
        ),
        "simulation": some(
            sites=st.integers(1, 10**6) | st.lists(NAME, min_size=1, unique=True).map(tuple),
            concentration=POSITIVE,
            workers=st.just("auto") | st.integers(1),
            max_records=st.none() | st.integers(1),
            dev=st.none() | TEXT.filter(bool),
            baselines=st.booleans(),
        ).map(lambda fields: fields | {"train": "train.jsonl"})
        | some(seed=SEED).map(lambda fields: fields | {"source": "own.module:records"}),
    }
    return Manifest(version=1, name=draw(NAME), task=task, **draw(some(**sections)))


@given(manifest=manifests())
def test_what_is_written_reads_as_the_same_manifest(folder: Path, manifest: Manifest) -> None:
    assume(not os.path.isdir(folder / manifest.model.base))
    path = folder / "federation.toml"
    path.write_bytes(annotated(manifest).encode())
    again = load_manifest(path)
    assert again == manifest
    assert again.digest() == manifest.digest()
    assert annotated(again) == annotated(manifest)


@given(manifest=manifests())
def test_no_comment_is_wider_than_a_hundred_columns(manifest: Manifest) -> None:
    strings_gone = re.sub(r'"""(?:\\.|[^\\])*?"{3,5}', "", annotated(manifest))
    assert max(len(line) for line in strings_gone.split("\n") if line.startswith("#")) <= 100


def example(**sections: Any) -> Manifest:
    task = {"kind": "text-classification", "labels": ("yes", "no")}
    return Manifest(**{"version": 1, "name": "notes", "task": task} | sections)


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The fields of `model` by dotted name, found by its own `model_fields` and not by its schema."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= {prefix + name: field} | (fields_of(inner[0], f"{prefix}{name}.") if inner else {})
    return found


def test_a_table_that_is_not_there_stands_behind_marks_and_can_be_taken_out_of_them(tmp_path: Path) -> None:
    text = annotated(example())
    assert load_private(tmp_path, text) is None
    head, mark, block = text.partition("# [privacy]\n")
    block, end, tail = block.partition("\n\n\n")
    block = re.sub(r"^# (\w+ = )", r"\1", mark.removeprefix("# ") + block, flags=re.MULTILINE)
    block = re.sub(r"^(unsafe_seed|head_clip) = .*$", "", block, flags=re.MULTILINE)
    block = block.replace("epsilon = 0", "epsilon = 8")
    assert load_private(tmp_path, head + block + end + tail) == PrivacySection(epsilon=8.0)


def load_private(folder: Path, text: str) -> PrivacySection | None:
    (folder / "federation.toml").write_text(text)
    return load_manifest(folder / "federation.toml").privacy


def test_every_field_is_known_and_explained_right_above_it() -> None:
    manifest = example(simulation={"train": "a.jsonl"}, privacy={"epsilon": 8.0})
    text = annotated(manifest)
    fields = fields_of(Manifest)
    assert set(known_keys()) == set(fields)
    for dotted, field in fields.items():
        table, _, name = dotted.rpartition(".")
        key = known_keys()[dotted]
        assert key.required == (field.is_required())
        within = text.partition(f"[{table}]\n")[2] if table else text
        line = f"[{dotted}]" if key.is_table else f"{name} = "
        comment = re.search(rf"((?:# .*\n)*)(?:# )?{re.escape(line)}", within)
        assert comment, dotted
        said = re.sub(r"\n?#\s+", " ", comment[1])
        assert " ".join(key.description.split()) in " ".join(said.split())
        assert key.is_table or key.rule in said
        for limit in field.metadata:
            match limit:
                case Ge(ge=bound) | Gt(gt=bound) | Le(le=bound) | Lt(lt=bound):
                    assert f" {bound:.12g}" in key.rule, dotted


@pytest.mark.parametrize(
    ("dotted", "rule"),
    [
        ("version", "1"),
        ("name", "text of 1 to 64 letters, digits, '.', '_' or '-' that begins with a letter or digit"),
        ("model", "a table"),
        ("model.base", "text that is not empty"),
        ("model.weights_sha256", "text of 64 hex digits in lower case"),
        ("task.kind", "'text-classification', 'token-classification' or 'causal-lm'"),
        ("task.labels", "a list of texts"),
        ("adapter.targets", "'auto' or a list of texts"),
        ("adapter.alpha", "a finite number above 0"),
        ("adapter.dropout", "a number of at least 0 and below 1"),
        ("training.rounds", "an integer from 1 to 10000"),
        ("training.micro_batch_size", "an integer of at least 1"),
        ("training.seed", "an integer from 0 to 2147483647"),
        ("training.gradient_checkpointing", "true or false"),
        ("simulation", "a table"),
        ("simulation.source", "text 'module:function', an import path"),
        ("simulation.workers", "'auto' or an integer of at least 1"),
    ],
)
def test_rules_are_in_plain_words(dotted: str, rule: str) -> None:
    assert known_keys()[dotted].rule == rule


def test_every_pattern_has_its_words() -> None:
    assert not [dotted for dotted, key in known_keys().items() if "of the pattern" in key.rule]


def test_a_key_without_value_can_be_uncommented() -> None:
    text = annotated(example(model={"base": "org/name"}, simulation={"train": "a.jsonl"}))
    uncommented = re.sub(r'^# (\w+ = (?:"\.\.\."|\d+))$', r"\1", text, flags=re.MULTILINE)
    added = tomllib.loads(uncommented)
    assert added["model"].keys() == {"base", "revision", "weights_sha256", "tokenizer_sha256", "pooling"}
    assert added["training"]["micro_batch_size"] == 1
    assert added["simulation"]["source"] == "..."
    assert "source" not in tomllib.loads(text)["simulation"]


def test_a_manifest_without_simulation_has_no_such_table() -> None:
    assert "[simulation]" not in annotated(example())


def test_it_is_pleasant_to_read() -> None:
    text = annotated(example(task={"kind": "causal-lm", "prompt": "Do:\n{instruction}\n"}))
    assert text.startswith("# What all sides of this federation agree on")
    assert 'prompt = """\nDo:\n{instruction}\n"""\n' in text
    assert (
        "\n\n# rounds of the run\n#   an integer from 1 to 10000; default 5\nrounds = 5\n"
        "\n# optimiser steps of each site in a round\n#   an integer from 1 to 100000; default 20\nlocal_steps = 20\n"
    ) in text
    assert text.endswith("\n")
    assert "\n\n\n\n" not in text


def test_long_lists_take_a_line_for_each_item() -> None:
    labels = tuple(f"label number {number}" for number in range(10))
    text = annotated(example(task={"kind": "text-classification", "labels": labels}))
    assert 'labels = [\n    "label number 0",\n' in text
    assert 'labels = ["yes", "no"]\n' in annotated(example())


def test_values_are_shown_on_one_short_line() -> None:
    assert [shown(value) for value in (True, 0, "a\nb", [1.5])] == ["true", "0", "'a\\nb'", "[1.5]"]
    assert len(shown("x" * 1000)) == 60
