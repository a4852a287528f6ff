"""A worker is ready before its first call."""

from collections.abc import Callable
from pathlib import Path

import pytest

import client.resident
from common.config.manifest import Manifest
from simulations.workers import SITES, worker_starts


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
