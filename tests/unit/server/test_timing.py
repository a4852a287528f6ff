"""Times: what is counted, how often, on how many threads, and in whose turn."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from assessed import KINDS, Manifests, records, tiny
from torch import Tensor, nn

from common.errors import AssessmentError
from server.assessment.memory import peak_memory
from server.assessment.timing import WARM_UP, compared_latency, latency, one_thread, texts_of, throughput
from server.distillation.domain_model import DomainModel, save_model

TEXTS = ["notice", "governing law and claims", "party"]


class Busy(nn.Module):
    """Computes for so many milliseconds, sleeps for so many, and notes when it was called by what name."""

    def __init__(self, name: str, log: list[tuple[str, int]], *, work: float, sleep: float = 0.0) -> None:
        super().__init__()
        self.name, self.log, self.work, self.sleep = name, log, work, sleep

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.log.append((self.name, len(input_ids)))
        assert torch.get_num_threads() == 1
        assert torch.is_inference_mode_enabled()
        end = time.process_time() + self.work / 1000
        while time.process_time() < end:
            pass
        time.sleep(self.sleep / 1000)
        return torch.zeros(len(input_ids), 3)


def busy(manifest_for: Manifests, name: str, log: list[tuple[str, int]], **cost: float) -> DomainModel:
    model = tiny(manifest_for("text-classification"))
    return DomainModel(Busy(name, log, **cost), model.tokenizer, model.manifest)


def test_cpu_time_leaves_waiting_out_and_wall_time_does_not(manifest_for: Manifests) -> None:
    log: list[tuple[str, int]] = []
    found = latency(busy(manifest_for, "a", log, work=4, sleep=20), TEXTS, repetitions=2)
    assert found.calls == 6
    assert log == [("a", 1)] * (6 + WARM_UP)  # the first calls do not count
    assert 4 <= found.cpu_median < 12
    assert found.wall_median >= 24
    assert found.cpu_median <= found.cpu_p95
    assert found.tokens == 3  # [CLS] party [SEP]


def test_two_models_take_turns_and_the_ratio_is_how_many_times_faster_b_is(manifest_for: Manifests) -> None:
    log: list[tuple[str, int]] = []
    a, b = (busy(manifest_for, name, log, work=work) for name, work in (("a", 12.0), ("b", 3.0)))
    found = compared_latency(a, b, TEXTS, repetitions=2)
    assert [name for name, _ in log[2 * WARM_UP :]] == ["a", "b"] * 6
    assert found.ratio == pytest.approx(4, rel=0.3)
    assert found.first.cpu_median > found.second.cpu_median


def test_throughput_counts_records_in_batches(manifest_for: Manifests) -> None:
    log: list[tuple[str, int]] = []
    found = throughput(busy(manifest_for, "a", log, work=10), TEXTS * 5, batch_size=4, repetitions=2)
    assert [size for _, size in log] == [3, *[4, 4, 4, 3] * 2]
    assert found.by_cpu == pytest.approx(15 / 0.04, rel=0.3)
    assert found.by_wall <= found.by_cpu * 1.1


def test_threads_and_training_are_given_back(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("text-classification"))
    model.network.train()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        latency(model, TEXTS, repetitions=1)
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert model.network.training


def test_a_session_of_several_threads_is_refused(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("text-classification"))

    class Session:
        def get_session_options(self) -> Any:
            return type("Options", (), {"intra_op_num_threads": 2})

    model.network.session = Session()  # type: ignore[assignment]
    with pytest.raises(AssessmentError, match="opened for 2; open it within one_thread"):
        latency(model, TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_can_be_timed(kind: str, manifest_for: Manifests) -> None:
    texts = texts_of(records(kind, 3))
    assert len(texts) == 3
    assert all(texts)
    assert latency(tiny(manifest_for(kind)), texts, repetitions=1).cpu_median > 0
    with pytest.raises(AssessmentError, match="no texts"):
        throughput(tiny(manifest_for(kind)), [])


@pytest.mark.slow
def test_memory_is_that_of_the_model_beyond_its_libraries(manifest_for: Manifests, tmp_path: Path) -> None:
    model = tiny(manifest_for("causal-lm"))
    config = model.network.config
    config.vocab_size = 200_000  # 64 wide, in float32: 49 MiB
    grown = DomainModel(type(model.network)(config), model.tokenizer, model.manifest)
    save_model(tmp_path / "model", grown, {})
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size / 2**20
    assert weights > 48
    found = peak_memory(tmp_path / "model", TEXTS)
    assert weights < found.model < 4 * weights  # read once, copied once, and the logits of a text
    assert found.process > found.model + 100  # Python with torch


def test_a_process_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AssessmentError, match="ended with status 1"):
        peak_memory(tmp_path, TEXTS)
