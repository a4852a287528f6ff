"""A worker is ready before its first call."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import client.resident
from common.config.manifest import Manifest
from common.config.simulation import SimulationSection
from common.errors import RunError
from simulations.workers import SITES, require_cluster, worker_starts


def test_a_worker_loads_the_base_of_its_sites_when_it_starts(
    manifest_for: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_for(name="preloaded")
    (tmp_path / "federation.json").write_text(manifest.model_dump_json())
    monkeypatch.setenv(SITES, str(tmp_path))
    worker_starts()
    monkeypatch.setattr(client.resident, "_load", None)  # the first call has nothing left to load
    assert client.resident.resident(manifest).base.name == manifest.model.base


@pytest.mark.parametrize("sites", [None, "nowhere"])
def test_a_worker_without_sites_starts_all_the_same(
    sites: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SITES, raising=False)
    if sites:
        monkeypatch.setenv(SITES, str(tmp_path / sites))
    worker_starts()


def test_a_cluster_that_is_not_there_is_one_line_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        require_cluster(address)
    for wrong in (address, "127.0.0.1:99999"):
        with pytest.raises(RunError, match=f"no Ray cluster answers at {wrong}; `ray start --head`") as found:
            require_cluster(wrong)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("address", ["here", "ray://here:1", "here:port", "a b:1", ""])
def test_an_address_that_is_none_is_refused_with_the_manifest(address: str) -> None:
    with pytest.raises(ValueError, match="ray_address"):
        SimulationSection(train="train.jsonl", ray_address=address)
    assert SimulationSection(train="train.jsonl", ray_address="[::1]:6379").ray_address == "[::1]:6379"
