"""The gate: the only port that sites reach. It lets Flower's fleet calls through to the SuperLink, and nothing else.

    python -P -m server.gate FOLDER      of the coordinator

Flower's control API has no authentication: whoever reaches it may run code at every site. So a request passes only if
its raw path is, byte for byte, one of the fleet's; everything else is answered 404 without a hint. The SuperLink's
certificate is verified. Sizes, rates and waits are limited.
"""

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import CoadaptError
from server.enrolment import admitted
from server.home import CoordinatorHome, CoordinatorSettings, load_settings
from server.superlink import READY_SECONDS, Control, loopback_certificate, superlink_url

__all__ = ["FLEET", "Buckets", "let_in", "make_gate"]

FLEET = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)

# Of one connection and not of the message (RFC 9110, section 7.6.1); Host is the SuperLink's own.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    b" transfer-encoding upgrade host forwarded x-forwarded-for x-forwarded-host x-forwarded-proto".split()
)
UPSTREAM_SECONDS = 60.0
BODY_SECONDS = 60.0
MOST_HOSTS = 4096


class Buckets:
    """A token bucket for each host: `rate` requests a second, and four seconds' worth at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._most = rate, max(1.0, 4 * rate)
        self._hosts: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, host: str, now: float) -> bool:
        """Whether a request of `host` may pass at `now` (seconds of a clock that only grows)."""
        left, then = self._hosts.pop(host, (self._most, now))
        left = min(self._most, left + (now - then) * self._rate)
        self._hosts[host] = (max(0.0, left - 1) if left >= 1 else left, now)
        if len(self._hosts) > MOST_HOSTS:
            self._hosts.popitem(last=False)
        return left >= 1


class _OnlyFleet:
    """Outermost: looks at the raw path, before anything decodes or normalises it."""

    def __init__(self, app: ASGIApp, buckets: Buckets) -> None:
        self._app, self._buckets = app, buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        host = scope["client"][0] if scope.get("client") else ""
        if scope["method"] != "POST" or scope.get("raw_path") not in FLEET or scope["query_string"]:
            await Response(status_code=404)(scope, receive, send)
        elif not self._buckets.take(host, time.monotonic()):
            await Response(status_code=429, headers={"retry-after": "1"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _TooLarge(Exception):
    pass


def make_gate(upstream: str, settings: CoordinatorSettings, *, verify: Path) -> FastAPI:
    """The gate before the SuperLink at `upstream` (https://127.0.0.1:PORT), whose certificate is in `verify`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(
            base_url=upstream,
            verify=httpx.create_ssl_context(verify=str(verify)),
            timeout=UPSTREAM_SECONDS,
            limits=limits,
            follow_redirects=False,
            trust_env=False,
        ) as client:
            app.state.client = client
            yield

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.post("/v1/fleet/{name}")
    async def forward(name: str, request: Request) -> Response:
        most = settings.most_request_bytes
        stated = request.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > most:
            return Response(status_code=413)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(request, most)
            asked = app.state.client.build_request(
                "POST", request.scope["raw_path"].decode(), headers=_passed(request.headers.raw), content=body
            )
            answer = await app.state.client.send(asked, stream=True)
        except _TooLarge:
            return Response(status_code=413)
        except TimeoutError:
            return Response(status_code=408)
        except httpx.HTTPError:
            return Response(status_code=502)
        reply = StreamingResponse(_streamed(answer), status_code=answer.status_code)
        reply.raw_headers = _passed(answer.headers.raw)
        return reply

    app.add_middleware(_OnlyFleet, buckets=Buckets(settings.requests_per_second))
    return app


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise _TooLarge
    return bytes(body)


async def _streamed(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def _passed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    return [(name.lower(), value) for name, value in headers if name.lower() not in HOP_BY_HOP | named]


def let_in(home: CoordinatorHome) -> None:
    """Make Flower know the nodes of the admitted institutions, and no others.

    Raises:
        ServiceError: the SuperLink, which is started beside, does not come up.
        EnrolmentError: an enrolment is damaged.
    """
    keys = {name: paper.node_key for name, paper in admitted(home).items()}
    deadline = time.monotonic() + READY_SECONDS
    while not loopback_certificate(home).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with Control(home) as control:
        control.wait_until_ready(seconds=READY_SECONDS)
        control.keep(keys)


def main(arguments: list[str]) -> int:
    """Serve the gate until SIGTERM or SIGINT."""
    if len(arguments) != 1:
        print("the coordinator's folder is wanted", file=sys.stderr)
        return 64
    home = CoordinatorHome(Path(arguments[0]).absolute())
    try:
        settings = load_settings(home)
        let_in(home)
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 78
    host, _, port = settings.listen.rpartition(":")
    uvicorn.run(
        make_gate(superlink_url(settings), settings, verify=loopback_certificate(home)),
        host=host.strip("[]"),
        port=int(port),
        ssl_certfile=str(home.certificate),
        ssl_keyfile=str(home.server_key),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        limit_concurrency=512,
        log_level="warning",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
