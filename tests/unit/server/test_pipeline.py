"""The steps of distillation: each changes what it says, all of it is measured, and nothing is left of a failure."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.records import TextRecord
from server.assessment.opening import open_model
from server.distillation.corpus import corpus_of
from server.distillation.domain_model import DomainModel
from server.distillation.measuring import Measured
from server.distillation.pipeline import Data, Distilled, distil_to
from server.distillation.planning import FEWEST_PIECES, MOST_PIECES, most_pieces
from server.distillation.term_trial import Trial, try_terms
from server.distillation.terms import add_terms
from server.distillation.training import distil
from server.distillation.verdict import judge
from tests.unit.server.test_distillation import public, teacher_of, texts


def records(count: int) -> list[TextRecord]:
    """Labels that a model can learn: whether a word is in the text."""
    return [TextRecord(unit=str(n), text=t, label="ab"["audit" in t.split()]) for n, t in enumerate(texts(count))]


@pytest.fixture(scope="module")
def taught(manifest_for: Callable[..., Manifest]) -> DomainModel:
    """A teacher that knows the task."""
    manifest = manifest_for(
        distillation={"epochs": 8, "batch_size": 8, "learning_rate": 4e-3, "label_weight": 9.0, "hidden_weight": 0.0}
    )
    teacher = teacher_of(manifest)
    corpus = corpus_of(records(100), manifest, labelled=[True] * 100)
    return distil(teacher, teacher_of(manifest), corpus, manifest.distillation)


def wish(model: DomainModel, **settings: Any) -> DomainModel:
    """The model with other settings of [distillation]."""
    values = {"size": "1/3", "epochs": 3, "batch_size": 8, "learning_rate": 3e-3, "exports": ("safetensors",)}
    section = model.manifest.distillation.model_copy(update={**values, **settings})
    manifest = model.manifest.model_copy(update={"distillation": section})
    return DomainModel(model.network, model.tokenizer, manifest)


def data(model: DomainModel) -> Data:
    corpus = corpus_of(public("text-classification", 400), model.manifest)
    return Data(corpus=corpus, dev=records(160)[100:130], test=records(160)[130:])


@pytest.fixture(scope="module")
def whole(taught: DomainModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distilled, list[Measured]]:
    """All steps at once."""
    told: list[Measured] = []
    folder = tmp_path_factory.mktemp("distilled") / "compact"
    model = wish(taught, terms=3, exports=("safetensors", "onnx-int8"), max_loss=0.5)
    origin = {"license": "cc-by-4.0"}
    return folder, distil_to(folder, model, data(model), origin=origin, listen=told.append), told


def test_every_step_is_measured_on_the_same_records(whole: tuple[Path, Distilled, list[Measured]]) -> None:
    _, done, told = whole
    assert [line.step for line in done.steps] == [
        "teacher",
        "vocabulary",
        "terms",
        "student",
        "terms tried",
        "train",
        "safetensors",
        "onnx-int8",
    ]
    assert list(done.steps) == told
    for line in done.steps:
        assert set(line.dev) == set(line.test) == {"accuracy", "macro_f1", "loss"}
        assert line.agreement is not None
        assert 0 <= line.agreement <= 1
        assert line.latency_ms > 0
        assert line.bytes > 0
    assert done.steps[0].agreement == 1
    assert done.steps[0].dev["accuracy"] > 0.9


def test_each_step_makes_it_smaller_and_training_makes_it_good(whole: tuple[Path, Distilled, list[Measured]]) -> None:
    _, done, _ = whole
    by_name = {line.step: line for line in done.steps}
    sizes = [by_name[name].parameters or 0 for name in ("teacher", "vocabulary", "terms tried", "train")]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]
    assert sizes[3] <= sizes[0] / 3
    assert by_name["safetensors"].bytes < by_name["teacher"].bytes / 2.9
    # 40 held-out texts, 30 dev records: a guess reaches a half of each; these bounds are three standard errors above.
    assert (by_name["train"].agreement or 0) >= 0.75
    assert by_name["train"].dev["accuracy"] >= 0.85
    assert done.met, done.verdict


def test_the_folder_is_a_model_with_a_card_of_all_steps(whole: tuple[Path, Distilled, list[Measured]]) -> None:
    folder, done, _ = whole
    model = open_model(folder)
    assert model.parameters == next(line.parameters for line in done.steps if line.step == "train")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for line in done.steps:
        assert f"| {line.step} |" in card
    assert 'license: "cc-by-4.0"' in card or "license: cc-by-4.0" in card
    assert "counted on public text" in card
    facts = json.loads((folder / "coadapt.json").read_text())["facts"]
    assert [step["name"] for step in facts["steps"]] == [line.step for line in done.steps]
    assert 0.9 < facts["vocabulary"]["coverage"] <= 1


@pytest.mark.parametrize(
    ("step", "changed"),
    [("vocabulary", {"parameters"}), ("student", {"parameters"}), ("train", set()), ("terms", {"parameters"})],
)
def test_a_step_alone(step: str, changed: set[str], taught: DomainModel, tmp_path: Path) -> None:
    model = wish(taught, terms=3, epochs=1, size="1/1", layers=1)
    done = distil_to(tmp_path / "made", model, data(model), only=[step])
    assert [line.step for line in done.steps] == ["teacher", step, "safetensors"]
    before, after = done.steps[:2]
    assert ({"parameters"} if before.parameters != after.parameters else set()) == changed


def line(parameters: int | None, *, agreement: float = 1.0, **dev: float) -> Measured:
    return Measured(
        step="", parameters=parameters, bytes=1, dev=dev, test={}, agreement=agreement, latency_ms=1.0, seconds=1.0
    )


@pytest.mark.parametrize(
    ("lines", "metric", "met", "words"),
    [
        (
            [line(100, accuracy=0.9), line(20, accuracy=0.88)],
            "accuracy",
            True,
            "0.200 of the teacher's; accuracy 0.900",
        ),
        ([line(100, accuracy=0.9), line(20, accuracy=0.87)], "accuracy", False, "loses 0.030 where"),
        ([line(100, accuracy=0.9), line(21, accuracy=0.95)], "accuracy", False, "The size 1/5 was not reached"),
        ([line(100, loss=0.5), line(20, loss=0.51)], "loss", True, "loss 0.500 to 0.510"),
        ([line(100, loss=0.5), line(20, loss=0.6)], "loss", False, "loses 0.100 where"),
        ([line(100), line(20, agreement=0.99)], "accuracy", True, "answer on 99.0% of held-out"),
        ([line(100), line(20, agreement=0.9), line(None)], "accuracy", False, "loses 0.100 where"),
    ],
)
def test_the_verdict_says_what_was_met_and_what_to_do(
    lines: list[Measured], metric: str, met: bool, words: str, taught: DomainModel
) -> None:
    settings = wish(taught, size="1/5", max_loss=0.0201).manifest.distillation
    verdict, found = judge(lines, settings, metric, ratio=Fraction(1, 5))
    assert (found, words in verdict) == (met, True), verdict


def test_a_size_that_no_step_makes_is_told(taught: DomainModel, tmp_path: Path) -> None:
    whole = distil_to(tmp_path / "vocabulary", wish(taught, size="1/9"), data(taught), only=["vocabulary"])
    assert not whole.met
    assert "The size 1/9 was not reached: take the step 'student' too" in whole.verdict
    assert (tmp_path / "vocabulary" / "README.md").is_file()


def test_without_labels_agreement_decides(taught: DomainModel, tmp_path: Path) -> None:
    model = wish(taught, max_loss=0.9)
    corpus = corpus_of(public("text-classification", 80), model.manifest)
    done = distil_to(tmp_path / "made", model, Data(corpus=corpus))
    assert "of held-out public text" in done.verdict
    assert done.met
    assert all(line.dev == line.test == {} for line in done.steps)


def test_a_student_from_scratch(taught: DomainModel, tmp_path: Path) -> None:
    model = wish(taught, from_scratch=True, epochs=4, max_loss=0.9)
    done = distil_to(tmp_path / "made", model, data(model))
    assert [line.step for line in done.steps] == ["teacher", "student", "train", "safetensors"]
    assert (done.steps[2].parameters or 0) <= model.parameters / 3
    assert done.steps[2].test["loss"] < done.steps[1].test["loss"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": "1/900"}, "can be met"),
        ({"vocabulary": 1990}, "too small for a vocabulary"),
        ({"terms": "gone.txt"}, "gone.txt"),
        ({"exports": ("gguf",)}, "causal"),
    ],
)
def test_bad_wishes_end_in_one_line_and_leave_nothing(
    settings: dict[str, Any], words: str, taught: DomainModel, tmp_path: Path
) -> None:
    model = wish(taught, **settings)
    with pytest.raises(DistillationError, match=words) as caught:
        distil_to(tmp_path / "made", model, data(model), only=["vocabulary", "terms", "student"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_never_written_over(taught: DomainModel, tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="exists already"):
        distil_to(tmp_path, taught, data(taught))


def test_the_smallest_size_that_is_good_enough(
    taught: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wish(taught, size="auto", max_loss=0.9)
    done = distil_to(tmp_path / "loose", model, data(model))
    assert done.met, done.verdict
    trained = [line.step for line in done.steps if line.step.startswith("train")]
    assert trained == ["train at 1/10"], "a twentieth of this tiny teacher cannot be made"
    assert done.steps[-1].step == "safetensors"
    monkeypatch.setattr("server.distillation.pipeline.judge", lambda *given, **more: ("never good enough", False))
    strict = wish(taught, size="auto", epochs=1)
    done = distil_to(tmp_path / "strict", strict, data(strict))
    trained = [line.step for line in done.steps if line.step.startswith("train")]
    assert trained == ["train at 1/10", "train at 1/5", "train at 1/3"]
    assert open_model(tmp_path / "strict").parameters == done.steps[-2].parameters
    with pytest.raises(DistillationError, match="needs the steps student and train"):
        distil_to(tmp_path / "alone", strict, data(strict), only=["vocabulary"])


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_terms_that_do_not_pay_go(
    pays: bool, fresh: bool, taught: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Trial] = []

    def tried(*given: Any) -> Trial:
        trial = try_terms(*given)
        found.append(replace(trial, with_terms=0.1, without=0.2 if pays else 0.05))
        return found[0]

    monkeypatch.setattr("server.distillation.pipeline.try_terms", tried)
    (tmp_path / "terms.txt").write_text(f"{' '.join(texts(1)[0].split()[:2])}\n", encoding="utf-8")
    model = wish(taught, terms=str(tmp_path / "terms.txt"), epochs=2, max_loss=0.9, from_scratch=fresh)
    done = distil_to(tmp_path / "made", model, data(model))
    assert found[0].passes == 1
    assert found[0].shorter > 0
    pieces = len(open_model(tmp_path / "made").tokenizer)
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert ("terms stayed" in card, "terms were dropped" in card) == (pays, not pays)
    sizes = {line.step: line.parameters or 0 for line in done.steps}
    assert (sizes["terms tried"] == sizes["student"]) == pays
    assert sizes["train"] == sizes["terms tried"]
    assert pieces > 0


@pytest.mark.parametrize("labelled", [True, False])
def test_a_trial_measures_both_and_changes_neither(labelled: bool, taught: DomainModel) -> None:
    model = wish(taught, epochs=5)
    found = data(model)
    longer = add_terms(model, [" ".join(texts(1)[0].split()[:2])])
    before = [tensor.clone() for tensor in longer.network.state_dict().values()]
    trial = try_terms(model, longer, model, found.corpus, found.dev if labelled else ())
    assert all(map(torch.equal, before, longer.network.state_dict().values()))
    assert trial.passes == 1
    assert trial.measure == ("dev loss" if labelled else "share of other answers than the teacher's")
    assert 0 < trial.shorter < 0.5
    assert trial.pays == (trial.with_terms <= trial.without)
    assert not replace(trial, with_terms=0.0, shorter=0.0).pays


def test_words_get_two_fifths_of_the_wanted_size(manifest_for: Callable[..., Manifest]) -> None:
    taught = teacher_of(manifest_for("causal-lm"))
    width = taught.network.config.hidden_size
    assert most_pieces(taught, Fraction(1, 500)) == FEWEST_PIECES
    huge = Fraction(10 * MOST_PIECES * width, taught.parameters)
    assert most_pieces(taught, huge) == MOST_PIECES
    middle = Fraction(5000 * width, taught.parameters)
    assert most_pieces(taught, middle) == 2000
