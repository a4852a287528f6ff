"""The gate: the only port that sites reach. It lets Flower's fleet calls through to the SuperLink, and nothing else.

Beside them it answers one path itself: published files, for sites that sign for them (`server/releases.py`).

    python -P -m server.gate FOLDER [--log-json]      of the coordinator

Flower's control API has no authentication: whoever reaches it may run code at every site. So a request passes only if
its raw path is, byte for byte, one of the fleet's; everything else is answered 404 without a hint. The SuperLink's
certificate is verified. Sizes, rates, connections and waits are limited (`server/gate_limits.py`). On request a line
of JSON says of each request who asked for what, and never what is in it.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import CoadaptError
from common.log_lines import json_line
from common.release import MOST_FETCH_BYTES, RELEASE_PATH
from server.access_log import AccessLog
from server.enrolment import admitted
from server.gate_limits import HEADER_SECONDS, Buckets, Room, guarded, more_files, network_of
from server.home import CoordinatorHome, CoordinatorSettings, load_settings
from server.releases import Releases
from server.superlink import READY_SECONDS, Control, loopback_certificate, superlink_url

__all__ = ["FLEET", "let_in", "make_gate", "server_of"]

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

# Of one connection and not of the message (RFC 9110, section 7.6.1); Host is the SuperLink's own, and so is the length,
# which is that of the body that came and not what was said of it.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    b" transfer-encoding upgrade host forwarded x-forwarded-for x-forwarded-host x-forwarded-proto".split()
)
UPSTREAM_SECONDS = 60.0
BODY_SECONDS = 60.0
# From the header to the last byte of the answer, for whoever reads it slowly.
REQUEST_SECONDS = 300.0
MOST_CONNECTIONS = 1024
MOST_PATH = 200

Log = Callable[[Mapping[str, object]], None]


class _OnlyFleet:
    """Outermost: looks at the raw path, before anything decodes or normalises it."""

    def __init__(self, app: ASGIApp, buckets: Buckets, paths: frozenset[bytes]) -> None:
        self._app, self._buckets, self._paths = app, buckets, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or scope.get("raw_path") not in self._paths or scope["query_string"]:
            await Response(status_code=404)(scope, receive, send)
        elif not self._buckets.take(_host(scope), time.monotonic()):
            await Response(status_code=429, headers={"retry-after": "1"})(scope, receive, send)
        else:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._app(scope, receive, send)


class _Logged:
    """Around everything: a line for each request when it is over."""

    def __init__(self, app: ASGIApp, log: Log) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, came, went = time.monotonic(), 0, 0, 0

        async def receives() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            return message

        async def sends(message: Message) -> None:
            nonlocal status, went
            status = message.get("status", status)
            went += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receives, sends)
        finally:
            path = scope.get("raw_path", b"").decode("latin-1")[:MOST_PATH]
            self._log(
                {
                    "host": scope["client"][0] if scope.get("client") else "",
                    "method": scope["method"][:16],
                    "path": path,
                    "status": status,
                    "bytes_in": came,
                    "bytes_out": went,
                    "seconds": round(time.monotonic() - began, 4),
                }
            )


def _host(scope: Scope) -> str:
    return network_of(scope["client"][0]) if scope.get("client") else ""


class _TooLarge(Exception):
    pass


class _Full(Exception):
    pass


def make_gate(
    upstream: str,
    settings: CoordinatorSettings,
    *,
    verify: Path,
    log: Log | None = None,
    body_seconds: float = BODY_SECONDS,
    releases: Releases | None = None,
) -> ASGIApp:
    """The gate before the SuperLink at `upstream` (https://127.0.0.1:PORT), whose certificate is in `verify`.

    `log` gets the facts of each request; `body_seconds` is how long a request's body may take. Without `releases`
    nothing is given out.
    """
    most = settings.most_request_bytes
    room = Room(most=8 * most, each=2 * most)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(
            verify=httpx.create_ssl_context(verify=str(verify)),
            limits=limits,
            follow_redirects=False,
            trust_env=False,
        ) as client:
            app.state.client = client
            yield

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.post("/v1/fleet/{name}")
    async def forward(name: str, request: Request) -> Response:
        stated = request.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > most:
            return Response(status_code=413)
        held = _Held(room, _host(request.scope))
        try:
            async with asyncio.timeout(body_seconds):
                body = await _body(request, most, held)
            # No header of httpx's own: a client that takes no compressed answer must not get one.
            asked = httpx.Request(
                "POST",
                upstream + request.scope["raw_path"].decode(),
                headers=_passed(request.headers.raw),
                content=body,
                extensions={"timeout": httpx.Timeout(UPSTREAM_SECONDS).as_dict()},
            )
            answer = await app.state.client.send(asked, stream=True)
        except (_TooLarge, _Full, TimeoutError, ClientDisconnect, httpx.HTTPError) as error:
            return _refusal(error)
        finally:
            held.give()
        reply = StreamingResponse(_streamed(answer), status_code=answer.status_code)
        reply.raw_headers = _passed(answer.headers.raw, length=True)
        return reply

    paths = FLEET
    if releases is not None:
        paths |= {RELEASE_PATH.encode()}

        @app.post(RELEASE_PATH)
        async def release(request: Request) -> Response:
            held = _Held(room, _host(request.scope))
            try:
                async with asyncio.timeout(body_seconds):
                    return releases.answer(await _body(request, MOST_FETCH_BYTES, held))
            except (_TooLarge, _Full, TimeoutError, ClientDisconnect) as error:
                return _refusal(error)
            finally:
                held.give()

    guard = _OnlyFleet(app, Buckets(settings.requests_per_second), paths)
    return guard if log is None else _Logged(guard, log)


def _refusal(error: Exception) -> Response:
    if isinstance(error, _Full):
        return Response(status_code=503, headers={"retry-after": "1"})
    if isinstance(error, TimeoutError):
        return Response(status_code=408, headers={"connection": "close"})
    # To a client that has gone, what is said does not matter.
    return Response(status_code=502 if isinstance(error, httpx.HTTPError) else 413)


class _Held:
    """What is held of one request's body."""

    def __init__(self, room: Room, host: str) -> None:
        self._room, self._host, self._size = room, host, 0

    def take(self, size: int) -> None:
        if not self._room.take(self._host, size):
            raise _Full
        self._size += size

    def give(self) -> None:
        self._room.give(self._host, self._size)
        self._size = 0


async def _body(request: Request, most: int, held: _Held) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        held.take(len(piece))
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


def _passed(headers: list[tuple[bytes, bytes]], *, length: bool = False) -> list[tuple[bytes, bytes]]:
    named = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    dropped = HOP_BY_HOP | named | (set() if length else {b"content-length"})
    return [(name.lower(), value) for name, value in headers if name.lower() not in dropped]


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


def server_of(
    app: ASGIApp,
    home: CoordinatorHome,
    settings: CoordinatorSettings,
    *,
    header_seconds: float = HEADER_SECONDS,
) -> uvicorn.Server:
    """The gate's server; `run` serves until SIGTERM or SIGINT. `header_seconds` is how long a header may take."""
    host, _, port = settings.listen.rpartition(":")
    config = uvicorn.Config(
        app,
        host=host.strip("[]"),
        port=int(port),
        http=guarded(most=MOST_CONNECTIONS, header_seconds=header_seconds),
        ws="none",
        loop="server.gate_limits:new_loop",
        ssl_certfile=str(home.certificate),
        ssl_keyfile=str(home.server_key),
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        log_level="error",  # a warning for each request that is none would let strangers fill the disk
    )
    return uvicorn.Server(config)


def main(arguments: list[str]) -> int:
    """Serve the gate until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m server.gate")
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("--log-json", action="store_true", help="log a JSON line for each request")
    chosen = parser.parse_args(arguments)
    home = CoordinatorHome(chosen.folder.absolute())
    try:
        settings = load_settings(home)
        let_in(home)
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 78
    more_files()
    if chosen.log_json:
        print(json_line("gate", "starting", listen=settings.listen), flush=True)
    gate = make_gate(
        superlink_url(settings),
        settings,
        verify=loopback_certificate(home),
        log=AccessLog() if chosen.log_json else None,
        releases=Releases(home),
    )
    server_of(gate, home, settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
