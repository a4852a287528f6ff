"""The gate: the only port that sites reach. It passes on Flower's fleet API, and nothing else of the SuperLink.

    python -m server.gate HOME [--log-json]

The control API behind it has no authentication: whoever reaches it starts code at every site. So a request passes only
if its path is, byte for byte, one of those that a node uses; everything else gets the same empty 404. Bodies and rates
are bounded before anything is passed on.
"""

import argparse
import json
import ssl
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

from common.errors import CoadaptError
from common.tls import split_address
from server.enrolment import admitted
from server.home import CoordinatorHome, load_settings
from server.superlink import Control, loopback_certificate, superlink_url

__all__ = ["PATHS", "Buckets", "gate", "let_in", "main"]

# What a SuperNode of Flower 1.41 asks for. Registering is the coordinator's business, on loopback.
PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)

# Of one connection to its neighbour, not of the message (RFC 9110, section 7.6.1); and what the client library sets.
_DROPPED = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "accept-encoding", "expect", "forwarded"),
        *("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"),
    )
)
_UPSTREAM_SECONDS = 60.0
_MOST_HEADERS_BYTES = 16_384
_MOST_CONNECTIONS = 512
_IDLE_SECONDS = 30
_MOST_HOSTS = 10_000
Log = Callable[..., None]


@dataclass
class Buckets:
    """A token bucket for each host: `rate` requests a second, and twice as many at once."""

    rate: float
    clock: Callable[[], float] = time.monotonic
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def takes(self, host: str) -> bool:
        """Whether a request of `host` may pass now."""
        now, most = self.clock(), max(1.0, 2 * self.rate)
        left, then = self._left.pop(host, (most, now))
        left = min(most, left + (now - then) * self.rate)
        passes = left >= 1
        self._left[host] = (left - 1 if passes else left, now)
        while len(self._left) > _MOST_HOSTS:
            self._left.popitem(last=False)
        return passes


def gate(
    *, upstream: str, verify: ssl.SSLContext | bool, most_bytes: int, buckets: Buckets, log: Log | None = None
) -> FastAPI:
    """The application: passes requests of `PATHS` on to `upstream`, whose certificate `verify` must know."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            base_url=upstream,
            verify=verify,
            timeout=_UPSTREAM_SECONDS,
            follow_redirects=False,
            trust_env=False,  # no proxy lies between here and loopback
            limits=httpx.Limits(max_connections=_MOST_CONNECTIONS),
        ) as app.state.client:
            yield

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began, host = time.monotonic(), request.client.host if request.client else ""
        response = await _answered(request, host)
        if log is not None:
            log(
                "request",
                host=host,
                method=request.method[:16],
                path=request.scope["path"][:200],
                status=response.status_code,
                seconds=round(time.monotonic() - began, 4),
            )
        return response

    async def _answered(request: Request, host: str) -> Response:
        # The raw path: no decoding, no dots that lead elsewhere, no other spelling.
        raw = bytes(request.scope.get("raw_path") or b"")
        if request.method != "POST" or raw.decode("latin-1") not in PATHS or request.scope["query_string"]:
            return Response(status_code=404)
        if not buckets.takes(host):
            return Response(status_code=429, headers={"retry-after": "1"})
        length = request.headers.get("content-length", "")
        if length and (not length.isdecimal() or int(length) > most_bytes):
            return Response(status_code=413)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most_bytes:
                return Response(status_code=413)
        headers = [(name, value) for name, value in request.headers.items() if name not in _DROPPED]
        try:
            answer = await request.app.state.client.post(raw.decode("ascii"), content=bytes(body), headers=headers)
        except httpx.HTTPError:
            return Response(status_code=502)
        kept = {name: value for name, value in answer.headers.items() if name not in {*_DROPPED, "content-encoding"}}
        return Response(content=answer.content, status_code=answer.status_code, headers=kept)

    return app


def let_in(home: CoordinatorHome) -> None:
    """Make Flower know the nodes of the admitted institutions, and no others.

    Raises:
        ServiceError: the SuperLink does not come up.
        EnrolmentError: an enrolment is damaged.
    """
    keys = {name: paper.node_key for name, paper in admitted(home).items()}
    with Control(home) as control:
        control.wait_until_ready()
        control.keep(keys)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m server.gate", description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path, help="the coordinator's folder")
    parser.add_argument("--log-json", action="store_true", help="log every request as a JSON line")
    chosen = parser.parse_args(arguments)
    home = CoordinatorHome(chosen.home.absolute())
    try:
        settings = load_settings(home)
        host, port = split_address(settings.listen)
    except CoadaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    authority = loopback_certificate(home)
    while not authority.exists():  # the SuperLink, which makes it, is being started beside
        time.sleep(0.1)
    try:
        let_in(home)
    except CoadaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    app = gate(
        upstream=superlink_url(settings),
        verify=ssl.create_default_context(cafile=str(authority)),
        most_bytes=settings.most_request_bytes,
        buckets=Buckets(settings.requests_per_second),
        log=_log if chosen.log_json else None,
    )
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=str(home.certificate),
        ssl_keyfile=str(home.server_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_SECONDS,
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=_MOST_HEADERS_BYTES,
    )
    return 0


def _log(event: str, **facts: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "process": "gate", "event": event, **facts}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
