"""The gate lets the fleet's calls through and nothing else."""

from pathlib import Path

import pytest
from starlette.types import Message

from server.gate import FLEET, _OnlyFleet
from server.gate_limits import Buckets
from server.home import CoordinatorHome
from server.service import coordinator_programs

BAD = [
    b"/v1/control/start-run",
    b"/v1/runtime/acquire-task",
    b"/docs",
    b"/health",
    b"/v1/fleet/../control/start-run",
    b"/v1/fleet/%2e%2e/control/start-run",
    b"//v1/control/start-run",
    b"//v1/fleet/pull-messages",
    b"/v1/fleet/pull-messages/",
    b"/v1/fleet/pull%2dmessages",
    b"/v1/fleet/register-node",
    b"https://127.0.0.1:9093/v1/control/start-run",
]


async def through(path: bytes, method: str = "POST", query: bytes = b"") -> int:
    """The status with which a request is answered; 299 where it would reach the SuperLink."""

    async def inner(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})  # type: ignore[operator]

    seen: list[Message] = []

    async def send(message: Message) -> None:
        seen.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": method,
        "raw_path": path,
        "path": path.decode(),
        "query_string": query,
        "client": ("192.0.2.1", 1),
        "headers": [],
    }
    await _OnlyFleet(inner, Buckets(50.0), FLEET)(scope, receive, send)  # type: ignore[arg-type]
    return int(seen[0]["status"])


@pytest.mark.parametrize("path", BAD)
def test_other_paths_are_not_there(path: bytes) -> None:
    import asyncio

    assert asyncio.run(through(path)) == 404


@pytest.mark.parametrize("path", sorted(FLEET))
def test_the_fleets_calls_pass_by_post_alone(path: bytes) -> None:
    import asyncio

    assert asyncio.run(through(path)) == 299
    assert asyncio.run(through(path, "GET")) == 404
    assert asyncio.run(through(path, query=b"a=1")) == 404


def test_flowers_own_client_calls_nothing_that_the_gate_refuses() -> None:
    import re

    import flwr.supernode.fleet_http_client as module

    called = set(re.findall(r'path="(/v1/fleet/[a-z-]+)"', Path(module.__file__).read_text(encoding="utf-8")))
    # A node registers itself only without a key; our sites have one, and the coordinator registers it.
    assert {path.encode() for path in called} - FLEET == {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}


def test_a_host_is_slowed_and_another_is_not() -> None:
    buckets = Buckets(10.0)
    passed = sum(buckets.take("a", 0.0) for _ in range(1000))
    assert passed == 40
    assert buckets.take("b", 0.0)
    assert sum(buckets.take("a", 1.0) for _ in range(1000)) == 10


def test_the_gate_logs_requests_where_that_is_asked_for(tmp_path: Path) -> None:
    quiet, talking = (coordinator_programs(CoordinatorHome(tmp_path), log_json=on)[1] for on in (False, True))
    # What it prints is framed, by a process around it.
    assert talking.command[-len(quiet.command) - 1 :] == (*quiet.command, "--log-json")
