import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.config.manifest import METRICS, Manifest
from common.errors import ExtensionError
from common.evaluation import measure
from common.metrics import Counts, add, figures
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.tasks.task import Example, Task, make_task

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]
TAGS = ("O", "B-Disease", "I-Disease")


def ready(manifest: Manifest) -> tuple[nn.Module, Task, list[Example]]:
    """A model with a head that says all labels, its task, and seventeen examples of many lengths."""
    base = find_base(manifest.model)
    task = make_task(manifest, load_tokenizer(base))
    torch.manual_seed(0)
    model = load_task_model(base, manifest)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    rng = seeded(0, "evaluation")
    records: list[Record] = []
    for place in range(17):
        words = rng.choice(["rent", "the", "tenant", "pays", "shall", "indemnify", "12", "§"], place % 11 + 1).tolist()
        tags = tuple(rng.choice(TAGS, len(words)).tolist())
        made: dict[str, Record] = {
            "text-classification": TextRecord(unit="u", text=" ".join(words), label="abc"[place % 3]),
            "token-classification": TokensRecord(unit="u", tokens=tuple(words), tags=tags),
            "causal-lm": InstructionRecord(unit="u", instruction="Say", input="", output=" ".join(words)),
        }
        records.append(made[manifest.task.kind])
    return model, task, task.encode(records).examples


def counted(found: Counts) -> Counts:
    return {key: value for key, value in found.items() if key not in ("loss_sum", "nll")}


@pytest.mark.parametrize("kind", KINDS)
def test_counts_depend_on_neither_batch_size_nor_order_nor_split(manifest_for: Manifests, kind: str) -> None:
    model, task, examples = ready(manifest_for(kind))

    def of(part: list[Example], batch_size: int) -> Counts:
        return measure(model, task, part, batch_size=batch_size, precision="fp32")

    expected = of(examples, 1)
    assert expected["records"] == 17
    for found in (
        of(examples, 4),
        of(examples, 64),
        of(examples[::-1], 5),
        add(of(examples[:6], 4), of(examples[6:], 4)),
    ):
        assert counted(found) == counted(expected)
        assert found == pytest.approx(expected, rel=1e-5)


def test_accuracy_equals_one_by_one(manifest_for: Manifests) -> None:
    model, task, examples = ready(manifest_for())
    model.eval()
    right = 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.from_numpy(example.tokens)[None], torch.ones(1, len(example.tokens)))
        right += int(logits.argmax()) == int(example.target[0])
    counts = measure(model, task, examples, batch_size=4, precision="fp32")
    assert 0 < right < 17
    assert counts["correct"] == right


def test_no_examples_are_no_counts(manifest_for: Manifests) -> None:
    model, task, _ = ready(manifest_for())
    assert measure(model, task, [], batch_size=4, precision="fp32") == {}


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_measured_at_rest_and_left_as_it_was(manifest_for: Manifests, training: bool) -> None:
    model, task, examples = ready(manifest_for())
    modes: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_inference_mode_enabled())))
    model.train(training)
    measure(model, task, examples, batch_size=64, precision="fp32")
    assert modes == [(False, True)]
    assert model.training is training


def test_records_of_like_length_are_measured_together(manifest_for: Manifests) -> None:
    model, task, examples = ready(manifest_for())
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    measure(model, task, examples, batch_size=4, precision="fp32")
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_bf16_is_used_where_it_is_asked_for(manifest_for: Manifests) -> None:
    model, task, examples = ready(manifest_for())
    kinds: list[torch.dtype] = []
    model.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
    for precision in ("bf16", "fp32"):
        measure(model, task, examples, batch_size=64, precision=precision)
    assert kinds == [torch.bfloat16, torch.float32]


SOURCE = """
calls = []

def share_of_a(predicted, expected):
    calls.append((list(predicted), list(expected)))
    return sum(p == "a" for p in predicted) / len(expected)

def broken(predicted, expected):
    return "much"

def raises(predicted, expected):
    raise ValueError("SECRET " + expected[0])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "evaluation_own_metric.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation_own_metric", raising=False)
    import evaluation_own_metric  # type: ignore[import-not-found]  # written above

    return evaluation_own_metric


def test_a_metric_of_ones_own_gets_names_of_all_records_once(manifest_for: Manifests, own: Any) -> None:
    path = "evaluation_own_metric:share_of_a"
    model, task, examples = ready(manifest_for())
    counts = measure(model, task, examples, batch_size=4, precision="fp32", metrics=("accuracy", path))
    assert len(own.calls) == 1
    predicted, expected = own.calls[0]
    assert sorted(expected) == sorted(example.reference for example in examples)
    assert set(predicted) <= set("abc")
    assert sum(p == e for p, e in zip(predicted, expected, strict=True)) == counts["correct"]
    share = predicted.count("a") / 17
    assert counts[f"metric:{path}"] == pytest.approx(share * 17)
    twice = figures("text-classification", add(counts, counts), (path,))
    assert twice[path] == pytest.approx(share)


def test_a_metric_of_ones_own_sees_tags_and_answers(manifest_for: Manifests, own: Any) -> None:
    for kind in KINDS[1:]:
        model, task, examples = ready(manifest_for(kind))
        measure(model, task, examples, batch_size=4, precision="fp32", metrics=("evaluation_own_metric:share_of_a",))
    (tags, true_tags), (texts, true_texts) = own.calls
    assert [len(row) for row in tags] == [len(row) for row in true_tags]
    assert {tag for row in tags for tag in row} <= set(TAGS)
    assert all(isinstance(text, str) for text in [*texts, *true_texts])
    assert all("</s>" not in text for text in true_texts)


def test_a_broken_metric_is_named(manifest_for: Manifests, own: Any) -> None:
    model, task, examples = ready(manifest_for())
    for path, problem in (
        ("evaluation_own_metric:broken", "must return a number"),
        ("evaluation_own_metric:raises", "raised ValueError"),
        ("no_such_module:f", "no module"),
    ):
        with pytest.raises(ExtensionError, match=problem) as error:
            measure(model, task, examples, batch_size=4, precision="fp32", metrics=(path,))
        assert path in str(error.value)
        assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_make_every_metric_of_the_task(manifest_for: Manifests, kind: str) -> None:
    model, task, examples = ready(manifest_for(kind))
    found = figures(kind, measure(model, task, examples, batch_size=4, precision="fp32"), METRICS[kind])
    assert all(value == value for value in found.values())  # noqa: PLR0124  # no nan
