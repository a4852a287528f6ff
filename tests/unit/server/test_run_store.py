import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.codec.state import AdapterState, state_digest
from common.errors import RunError
from server.run_store import RunStore

ADAPTER: AdapterState = {"b": np.float32([[1.0, -2.5]]), "a": np.float32([0.1, 3e-8])}


def write_adapter(folder: Path, adapter: AdapterState) -> None:
    save_file(adapter, folder / "adapter_model.safetensors")


def new_store(folder: Path) -> RunStore:
    return RunStore(folder, write_adapter)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return new_store(tmp_path / "runs" / "one")


def test_an_existing_run_is_refused_and_left_as_it_is(store: RunStore) -> None:
    store.save_round(0, ADAPTER)
    before = files(store.folder)
    with pytest.raises(RunError, match=r"exists already; a run never writes over another: choose another --run-id"):
        new_store(store.folder)
    assert files(store.folder) == before


def test_any_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a run")
    with pytest.raises(RunError, match="exists already"):
        new_store(tmp_path)
    assert files(tmp_path) == {"notes.txt"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot make") as error:
        new_store(tmp_path / "runs" / "one")
    assert "\n" not in str(error.value)


def test_a_round_comes_back_bit_for_bit(store: RunStore) -> None:
    store.save_round(3, ADAPTER)
    found = store.load_round(3)
    assert found.keys() == ADAPTER.keys()
    for name, array in ADAPTER.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.float32
    facts = json.loads((store.folder / "rounds" / "0003" / "round.json").read_text())
    assert len(facts.pop("sha256")) == 64
    assert facts == {"round": 3, "adapter_sha256": state_digest(ADAPTER)}


def test_a_round_is_never_written_twice(store: RunStore) -> None:
    store.save_round(1, ADAPTER)
    with pytest.raises(RunError, match="never overwritten"):
        store.save_round(1, {"a": np.float32([9.0])})
    assert state_digest(store.load_round(1)) == state_digest(ADAPTER)


def test_a_changed_round_is_refused(store: RunStore) -> None:
    store.save_round(1, ADAPTER)
    path = store.round_folder(1) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one number
    path.write_bytes(data)
    with pytest.raises(RunError, match="was changed after it was stored"):
        store.load_round(1)


def test_another_rounds_adapter_in_its_place_is_refused(store: RunStore) -> None:
    store.save_round(1, ADAPTER)
    store.save_round(2, {name: 2 * array for name, array in ADAPTER.items()})
    one, two = (store.round_folder(number) / "adapter_model.safetensors" for number in (1, 2))
    one.write_bytes(two.read_bytes())
    with pytest.raises(RunError, match="was changed"):
        store.load_round(1)


@pytest.mark.parametrize("damage", ["cut", "no adapter", "no facts", "no json", "no round"])
def test_a_damaged_round_is_a_run_error(store: RunStore, damage: str) -> None:
    store.save_round(1, ADAPTER)
    folder = store.round_folder(1)
    adapter, facts = folder / "adapter_model.safetensors", folder / "round.json"
    if damage == "cut":
        adapter.write_bytes(adapter.read_bytes()[:-4])
    elif damage == "no adapter":
        adapter.unlink()
    elif damage == "no facts":
        facts.write_text("{}")
    elif damage == "no json":
        facts.write_text("{")
    else:
        folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(RunError, match="cannot be read"):
        store.load_round(1)


def test_the_result_lies_in_its_own_folder(store: RunStore) -> None:
    assert store.save_result(ADAPTER) == store.folder / "adapter"
    assert files(store.folder) == {"adapter/adapter_model.safetensors"}
    store.write("summary.json", "{}\n")
    assert (store.folder / "summary.json").read_text() == "{}\n"


def test_a_full_disk_leaves_what_was_whole_and_nothing_else(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_round(0, ADAPTER)
    store.write("summary.json", "old\n")
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (
        lambda: store.save_round(1, ADAPTER),
        lambda: store.save_result(ADAPTER),
        lambda: store.write("summary.json", "new\n"),
        lambda: store.write("report.html", "new\n"),
    ):
        with pytest.raises(RunError, match="No space left on device") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (store.folder / "rounds").iterdir()) == ["0000"]
    monkeypatch.undo()
    store.save_round(1, ADAPTER)  # once there is room
    assert state_digest(store.load_round(1)) == state_digest(ADAPTER)
