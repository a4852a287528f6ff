"""Which devices a simulation computes on, and what a worker sees of them."""

import json
from typing import Any

import pytest

from common.config.simulation import SimulationSection
from common.errors import RunError
from simulations import devices
from simulations.devices import EMULATED, VISIBLE, find_devices, visible
from simulations.slots import Device


def section(**settings: Any) -> SimulationSection:
    return SimulationSection.model_validate_json(json.dumps({"sites": 3, "train": "train.jsonl", **settings}))


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMULATED, raising=False)
    monkeypatch.setattr(devices, "_gpus", list)


def test_without_gpus_it_is_the_machine() -> None:
    for gpus in ("auto", 0):
        (found,) = find_devices(section(gpus=gpus))
        assert (found.name, found.index) == ("CPU", None)
        assert found.memory > 0
        assert visible(found) == ""


def test_emulated_ones_are_named_so_and_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMULATED, "8, 8,11.5")
    found = find_devices(section())
    assert [device.name for device in found] == [
        "emulated GPU 0 (8 GiB)",
        "emulated GPU 1 (8 GiB)",
        "emulated GPU 2 (11.5 GiB)",
    ]
    assert found[2].memory == int(11.5 * 2**30)
    assert [visible(device) for device in found] == ["", "", ""]
    assert find_devices(section(gpus=2)) == found[:2]
    assert find_devices(section(gpus=[2, 0])) == [found[2], found[0]]
    assert find_devices(section(gpus=0))[0].name == "CPU"


def test_a_worker_sees_its_own_card_by_the_number_that_this_process_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device("GPU 1", 8, 1)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible(card) == "1"
    monkeypatch.setenv(VISIBLE, "4,GPU-5d0c,6")
    assert visible(card) == "GPU-5d0c"


@pytest.mark.parametrize(
    ("there", "gpus", "words"),
    [
        ("", 3, "simulation.gpus = 3, and this machine has none; set it to 'auto' or less"),
        ("8,8", 3, "this machine has 2 (emulated GPU 0 (8 GiB), emulated GPU 1 (8 GiB))"),
        ("8,8", [0, 2], "simulation.gpus names GPU 2, and this machine has 2 (emulated"),
        ("8,lots", "auto", "COADAPT_EMULATED_GPUS must be sizes in GiB such as 8,8,8, found '8,lots'"),
        ("0", "auto", "must be sizes in GiB"),
    ],
)
def test_what_is_not_there_is_one_line(there: str, gpus: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if there:
        monkeypatch.setenv(EMULATED, there)
    with pytest.raises(RunError) as found:
        find_devices(section(gpus=gpus))
    assert words in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("gpus", [[], [1, 1], [-1], -1, "all"])
def test_a_list_of_gpus_must_be_one(gpus: Any) -> None:
    with pytest.raises(ValueError, match="gpus"):
        section(gpus=gpus)
