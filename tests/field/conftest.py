"""Folders of sites and a coordinator, as the commands make them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from enrolled import Hospitals

from common.config.manifest import Manifest


@pytest.fixture
def hospitals(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Hospitals:
    """Four sites and a coordinator; nothing is made yet but the manifest."""
    manifest = manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={"rounds": 2, "local_steps": 2, "batch_size": 4},
        secure_sum={"enabled": True},
    )
    return Hospitals(tmp_path, manifest)
