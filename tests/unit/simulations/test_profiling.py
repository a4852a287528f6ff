"""`--profile`: steps of a real training are traced, the costliest operators named, and nothing else is disturbed."""

import json
from pathlib import Path

import pytest
import torch
from summary_samples import sample

from client.ticks import tick
from common.errors import RunError, TrainingError
from simulations import profiling
from simulations.profiling import WORDS, profiled, read_profile
from simulations.report import profile_result, render
from simulations.summary import OperatorFacts, ProfileFacts


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(profiling.PROFILE, "1")
    (tmp_path / "one" / "site-logs").mkdir(parents=True)
    return tmp_path / "one"


def train(run: Path, *, steps: int, site: str = "1", fails: bool = False) -> None:
    """Steps of which one huge product is nearly all the work."""
    large = torch.ones(600, 600)
    with profiled("Klinik Süd", run.parent / "sites" / site, run / "site-logs" / f"{site}.log"):
        for step in range(steps):
            tick(step)
            torch.mm(large, large)
            torch.relu(large[:8])
        if fails:
            raise TrainingError("no")


def test_the_costliest_operator_of_the_first_steps_is_named(run: Path) -> None:
    train(run, steps=profiling.MOST_STEPS + 3)
    facts = read_profile(run)
    assert facts is not None
    assert (facts.site, facts.steps) == ("Klinik Süd", profiling.MOST_STEPS)
    assert len(facts.operators) == 3
    first = facts.operators[0]
    assert (first.name, first.words, first.calls) == ("aten::mm", "matrix multiplication", profiling.MOST_STEPS)
    assert 0.5 < first.share <= 1
    assert [each.share for each in facts.operators] == sorted((each.share for each in facts.operators), reverse=True)
    trace = json.loads((run / "profile" / "trace.json").read_text())
    calls = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(calls) == profiling.MOST_STEPS


def test_only_the_first_training_of_the_first_site_is_traced(run: Path) -> None:
    train(run, steps=2, site="2")
    train(run, steps=0)  # it measured only
    assert not (run / "profile").exists()
    train(run, steps=1)
    before = (run / "profile" / "trace.json").read_bytes()
    train(run, steps=2)
    assert (run / "profile" / "trace.json").read_bytes() == before
    (run / "events.jsonl").touch()
    second = run / "compared"
    (second / "site-logs").mkdir(parents=True)
    train(second, steps=1)
    assert not (second / "profile").exists()


def test_without_the_option_nothing_is_traced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(profiling.PROFILE)
    train(run, steps=1)
    assert not (run / "profile").exists()
    assert read_profile(run) is None


def test_the_workers_are_told_while_the_block_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(profiling.PROFILE, raising=False)
    with profiling.profiling(False):
        assert profiling.PROFILE not in profiling.os.environ
    with profiling.profiling(True):
        assert profiling.os.environ[profiling.PROFILE] == "1"
    assert profiling.PROFILE not in profiling.os.environ


def test_a_profile_that_cannot_be_written_is_noted_and_stops_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path) -> None:
        raise RunError("cannot write: No space left on device")

    monkeypatch.setattr(profiling, "new_folder", full)
    train(run, steps=1)
    assert "RunError" in (run / "site-logs" / "1.log").read_text(encoding="utf-8")


def test_an_error_of_training_passes_and_what_was_traced_stays(run: Path) -> None:
    with pytest.raises(TrainingError):
        train(run, steps=2, fails=True)
    facts = read_profile(run)
    assert facts is not None
    assert facts.steps == 2


def test_what_costs_most_is_told_in_one_sentence() -> None:
    facts = ProfileFacts(
        site="<b>mercy</b>",
        steps=1,
        seconds=2.5,
        device="cpu",
        operators=[
            OperatorFacts(name="aten::mm", words=WORDS["aten::mm"], share=0.5, calls=3),
            OperatorFacts(name="aten::odd", words="the operator odd", share=0.125, calls=1),
        ],
    )
    summary = sample(profile=facts)
    assert profile_result(summary) == (
        "The first step of <b>mercy</b> took 2.5 s on cpu. Costliest: matrix multiplication (aten::mm) 50%, the"
        " operator odd (aten::odd) 12%. Trace: profile/trace.json, for ui.perfetto.dev or chrome://tracing."
    )
    page = render(summary)
    assert "matrix multiplication (aten::mm) 50%" in page
    assert "<b>mercy" not in page
    assert "No profile was written" in profile_result(sample())
    assert "profile/trace.json" not in render(sample())
