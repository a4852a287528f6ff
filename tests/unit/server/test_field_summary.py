"""The first line of a run's summary says what the coordinator saw, and what protects a record."""

from collections.abc import Callable

import pytest

from common.config.manifest import Manifest
from server.field_summary import first_line


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_the_first_line_says_what_was_seen_and_what_protects(
    manifest_for: Callable[..., Manifest], secure: bool, private: bool
) -> None:
    tables = {"privacy": {"epsilon": 4.0, "delta": 1e-5}} if private else {}
    line = first_line(manifest_for(secure_sum={"enabled": secure}, **tables))
    assert ("nothing of a single one" in line) == secure
    assert ("saw every site's change" in line) == (not secure)
    assert ("epsilon 4, delta 1e-05" in line) == private
    assert ("no differential privacy" in line) == (not private)
    assert "\n" not in line
