"""Orders of any size over a real socket: each is answered with a signed word and leaves a line in the audit log."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vault_field import Field

from client.home import SiteHome
from client.vault_client import call_vault
from client.vault_service import _listening
from common.config.manifest import Manifest
from common.errors import ServiceError
from common.frames import Answer, open_frame

LIMIT = 1 << 16


@pytest.fixture
def served(manifest_for: Callable[..., Manifest]) -> Iterator[tuple[Field, Path]]:
    with tempfile.TemporaryDirectory(prefix="ov", dir="/tmp") as folder:  # a socket's path is short
        it = Field(Path(folder) / "field", manifest_for(), limits={"message_bytes": LIMIT})
        home = SiteHome(Path(folder))
        server = _listening(home, it.sites[0].session, it.sites[0].policy)
        yield it, home.socket
        server.stop(grace=None).wait()


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + (1 << 20), LIMIT + (1 << 20) + 1, 8 << 20])
def test_an_order_above_the_limit_is_refused_with_a_line(served: tuple[Field, Path], size: int) -> None:
    it, socket = served
    answer, payload = open_frame(Answer, it.keys[0].public, call_vault(socket, bytes(size)))
    assert (answer.kind, answer.code, answer.to, answer.about, payload) == ("refused", "policy", 0, "", b"")
    assert answer.reason == f"limits.message_bytes: asked {size}, allowed {LIMIT}"
    (line,) = it.sites[0].audit()
    assert (line.decision, line.code, line.size, line.reason) == ("refused", "policy", size, answer.reason)


@pytest.mark.parametrize("said", [b"", b"0", b"-5", b"1e9", b"9" * 21, b"\xff", str(LIMIT).encode()])
def test_a_size_that_is_none_or_is_allowed_gets_no_answer_and_no_line(served: tuple[Field, Path], said: bytes) -> None:
    it, _ = served
    assert it.sites[0].session.oversized(said) == b""
    assert it.sites[0].audit() == []


def test_where_size_is_not_the_reason_the_failure_stays_one(tmp_path: Path) -> None:
    """A vault that is too busy refuses too, and says nothing about the size."""
    with tempfile.TemporaryDirectory(prefix="ov", dir="/tmp") as folder:
        home = SiteHome(Path(folder))
        busy: Any = SimpleNamespace(answer=bytes, app_refused=bytes, oversized=lambda data: b"")
        policy = cast(Any, SimpleNamespace(limits=SimpleNamespace(message_bytes=LIMIT)))
        server = _listening(home, busy, policy)
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
            call_vault(home.socket, bytes(4 << 20))
        server.stop(grace=None).wait()
