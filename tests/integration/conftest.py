"""Worlds for whole runs of `coadapt simulate`."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.simulating import GOOD_ROWS, THREE_SITES, World, write_manifest, write_rows


@pytest.fixture(scope="module")
def new_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], World]]:
    made: list[Path] = []

    def make() -> World:
        made.append(Path(tempfile.mkdtemp(prefix="ca-", dir="/tmp")))
        return World(tmp_path_factory.mktemp("world"), made[-1])

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", GOOD_ROWS)
    write_manifest(tmp_path, encoder, simulation=THREE_SITES)
    return tmp_path
