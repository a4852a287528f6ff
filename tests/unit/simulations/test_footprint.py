"""What a worker needs of memory: the formula against sums by hand, and the measurement against another process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.resident import resident
from common.config.manifest import Manifest
from common.errors import RunError
from simulations import footprint
from simulations.footprint import closed_form, estimated, footprint_for, measured, shape_of, training_bytes
from simulations.planning import would_need
from simulations.slots import Device, Footprint
from simulations.tiny_base import make_encoder

GB = 10**9

Manifests = Callable[..., Manifest]


def test_the_shape_is_counted_by_hand(manifest_for: Manifests) -> None:
    shape = shape_of(manifest := manifest_for(adapter={"rank": 3}), model := resident(manifest))
    # The tiny BERT: two layers of width 64 and 128; rank 3 on query, key, value, output and both feed-forward layers.
    assert (shape.layers, shape.hidden, shape.heads, shape.vocabulary) == (2, 64, 4, 0)
    assert shape.trained == 2 * (4 * 3 * (64 + 64) + 2 * 3 * (64 + 128)) + 3 * 64 + 3
    in_layers = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert in_layers <= shape.linear <= in_layers + 64 * 64  # and the pooler, where the base has one
    assert shape.linear + shape.rest + shape.trained == sum(each.numel() for each in model.model.parameters())


def test_the_formula_by_hand(manifest_for: Manifests) -> None:
    shape = footprint.Shape(linear=1000, rest=100, trained=10, layers=2, hidden=8, heads=4)
    plain = closed_form(shape, length=16, half=False, private=False)
    assert plain.base == 4 * 1000 + 4 * 100
    assert plain.adapter == 16 * 10
    assert plain.record == 2 * 2 * 16 * (34 * 8 + 5 * 4 * 16)  # 2 x layers x s x (34 h + 5 a s)
    assert plain.floor == plain.process + 2 * plain.base
    assert closed_form(shape, length=16, half=True, private=False).record == plain.record // 2
    assert closed_form(shape, length=16, half=False, private=True).record == plain.record + 4 * 10
    assert closed_form(shape, length=16, half=False, private=False, four_bit=True).base == int(1000 * 4.127 / 8) + 400
    checkpointed = closed_form(shape, length=16, half=False, private=False, checkpointing=True)
    assert checkpointed.record == pytest.approx(plain.record / 5, abs=1)
    words = closed_form(
        footprint.Shape(linear=1000, rest=100, trained=10, layers=2, hidden=8, heads=4, vocabulary=50),
        length=16,
        half=False,
        private=False,
    )
    assert words.record == plain.record + 8 * 16 * 50


def test_seven_billion_values_fit_a_card_of_eight_gigabytes_in_four_bits_alone() -> None:
    """Llama-2 7B with r=16 on all linear layers, sequence 512, privacy: by formula, what the reference card holds."""
    shape = footprint.Shape(
        linear=6_476_005_376, rest=262_410_240, trained=39_976_960, layers=32, hidden=4096, heads=32, vocabulary=32000
    )
    how: dict[str, Any] = {"length": 512, "half": True, "private": True, "on_gpu": True}
    card = 8 * 2**30
    assert closed_form(shape, **how).at(1) > 3 * card
    assert closed_form(shape, **how, four_bit=True, checkpointing=True).at(1) < card


def test_what_would_save_memory_is_named_and_does(manifest_for: Manifests) -> None:
    manifest = manifest_for()
    model = resident(manifest)
    would = would_need(manifest, model, on_gpu=False)
    plain = estimated(manifest, model, on_gpu=False)
    assert list(would) == [
        'adapter.method = "qlora" (a base in 4 bit)',
        "training.gradient_checkpointing = true",
        "both",
    ]
    assert all(each.at(8) < plain.at(8) for each in would.values())
    checkpointed = manifest_for(training={"gradient_checkpointing": True})
    assert list(would_need(checkpointed, resident(checkpointed), on_gpu=False)) == [
        'adapter.method = "qlora" (a base in 4 bit)'
    ]
    assert training_bytes(manifest, model) == plain.base + plain.adapter + 16 * plain.record


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[Manifest]:
    """The manifests that would have been measured."""
    asked: list[Manifest] = []

    def ask(manifest: Manifest) -> Footprint:
        asked.append(manifest)
        return Footprint(1, 2, 3, 4, measured=True)

    monkeypatch.setattr(footprint, "measured", ask)
    return asked


def test_it_is_measured_where_it_may_be_tight_and_not_where_memory_is_plenty(
    manifest_for: Manifests, unmeasured: list[Manifest]
) -> None:
    manifest = manifest_for()
    model = resident(manifest)
    assert not footprint_for(manifest, model, [Device("CPU", 100 * GB)], workers=2).measured
    assert footprint_for(manifest, model, [Device("CPU", 2 * GB)], workers=2).measured
    assert footprint_for(manifest, model, [Device("GPU 0", 80 * GB, 0)], workers=1).measured
    emulated = [Device("emulated GPU 0", 80 * GB, 0, emulated=True)]
    assert not footprint_for(manifest, model, emulated, workers=1).measured
    assert unmeasured == [manifest, manifest]


def test_a_measurement_that_fails_is_one_line(manifest_for: Manifests) -> None:
    with pytest.raises(RunError, match=r"measuring memory failed: .+; set simulation.workers") as found:
        measured(manifest_for(model={"base": "/nowhere/to/be/found"}))
    assert "\n" not in str(found.value)


TRAIN = """
import json, sys
import torch
from client.resident import resident
from common.config.manifest import Manifest
from simulations.footprint import _examples, _train
torch.set_num_threads(1)
manifest = Manifest.model_validate_json(sys.stdin.read())
model = resident(manifest)
_train(manifest, model, _examples(manifest, model, manifest.training.batch_size))
status = open("/proc/self/status").read()
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not footprint.STATUS.exists(), reason="only Linux tells a process its own peak")
@pytest.mark.parametrize("private", [False, True])
def test_the_footprint_says_what_a_training_with_all_records_at_once_takes(
    manifest_for: Manifests, tmp_path: Path, private: bool
) -> None:
    """Measured in one process, used in another: within 15 %."""
    base = make_encoder(tmp_path / "wide", width=256, layers=4)
    manifest = manifest_for(
        model={"base": str(base)},
        data={"max_length": 128},
        training={"batch_size": 64, "precision": "fp32"},
        **({"privacy": {"epsilon": 8.0, "delta": 1e-3}} if private else {}),
    )
    found = measured(manifest)
    assert found.measured
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN], input=manifest.model_dump_json(), capture_output=True, text=True, check=True
    )
    used = json.loads(ended.stdout.strip().splitlines()[-1])
    assert found.record * 64 > 0.3 * used  # else the records would hardly matter
    assert found.at(64) == pytest.approx(used, rel=0.15)
