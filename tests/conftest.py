"""What many tests need: tiny base models, made once for a test session, and manifests on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from common.config.manifest import Manifest
from simulations.tiny_base import make_causal, make_encoder

torch.set_num_threads(1)

# How long an example takes says nothing here: two processes share two cores.
settings.register_profile("coadapt", deadline=None)
settings.load_profile("coadapt")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny BERT."""
    return make_encoder(tmp_path_factory.mktemp("bases") / "encoder")


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny untrained Llama."""
    return make_causal(tmp_path_factory.mktemp("bases") / "causal", width=64, layers=2)


@pytest.fixture(scope="session")
def manifest_for(encoder: Path, causal: Path) -> Callable[..., Manifest]:
    """A valid manifest on a tiny base: `manifest_for("causal-lm", training={"rounds": 2})`.

    Its secure sum is off unless a test turns it on: most look at what one site sends.
    """

    def make(kind: str = "text-classification", **tables: Any) -> Manifest:
        labels = {"text-classification": ["a", "b", "c"], "token-classification": ["Disease"], "causal-lm": []}[kind]
        values: dict[str, Any] = {
            "version": 1,
            "name": "test",
            "task": {"kind": kind, "labels": labels},
            "model": {"base": str(causal if kind == "causal-lm" else encoder)},
            "data": {"max_length": 64},
            "training": {"precision": "fp32", "warmup_steps": 0},
            "secure_sum": {"enabled": False},
        }
        for name, table in tables.items():
            values[name] = {**values.get(name, {}), **table} if isinstance(table, dict) else table
        return Manifest.model_validate_json(json.dumps(values))

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what is broken shows before the whole processes start."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
