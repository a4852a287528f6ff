"""A gate that serves as in the field, on loopback with TLS, before a dummy that notes what reaches it."""

import contextlib
import http.client
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_REUSEADDR, SOL_SOCKET, create_connection, socket
from typing import Any

import uvicorn

from common.tls import new_authority, new_server
from server.gate import Log, make_gate, server_of
from server.home import CoordinatorHome, load_settings
from server.new_coordinator import new_coordinator

PULL = "/v1/fleet/pull-messages"
ANSWER = [
    (b"content-type", b"application/x-protobuf"),
    (b"content-encoding", b"gzip"),  # it is none, so whoever decodes on the way fails
    (b"x-kept", b"\xe9 as it is"),
    (b"connection", b"x-of-the-connection"),
    (b"x-of-the-connection", b"1"),
    (b"x-twice", b"1"),
    (b"x-twice", b"2"),
]


class Place:
    """A port of loopback that is held from now on: between finding a free one and listening another could take it."""

    def __init__(self) -> None:
        self._socket = self._bound(0)
        self.port = int(self._socket.getsockname()[1])

    def socket(self) -> socket:
        """Bound to the port; whoever listened closes it, and then it is taken anew."""
        if self._socket.fileno() < 0:
            self._socket = self._bound(self.port)
        return self._socket

    def _bound(self, port: int) -> socket:
        made = socket()
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        weakref.finalize(self, made.close)
        return made


@dataclass
class Upstream:
    """Answers a body with the body turned round."""

    requests: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.requests.append((scope["raw_path"], list(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 207, "headers": ANSWER})
        await send({"type": "http.response.body", "body": body[::-1]})


@contextlib.contextmanager
def running(server: uvicorn.Server, place: Place) -> Iterator[None]:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place.socket()]})
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Served:
    """Gate and dummy; what is given goes to `make_gate`."""

    def __init__(self, folder: Path, *, log: Log | None = None, rate: float = 50.0, **options: Any) -> None:
        self.upstream, self._places = Upstream(), (Place(), Place())
        self.port, above = (place.port for place in self._places)
        address = f"127.0.0.1:{self.port}"
        self.home: CoordinatorHome = new_coordinator(
            folder / "home",
            address=address,
            listen=address,
            superlink_port=above,
            certificate=None,
            key=None,
            authority=None,
        )
        settings = load_settings(self.home).model_copy(
            update={"most_request_bytes": 1 << 20, "requests_per_second": rate}
        )
        authority = new_authority("dummy")
        pair = new_server(authority, ["127.0.0.1"])
        self.verify, certificate, key = (folder / name for name in ("authority.pem", "dummy.pem", "dummy.key"))
        for path, data in ((self.verify, authority.certificate), (certificate, pair.certificate), (key, pair.key)):
            path.write_bytes(data)
        self._dummy = uvicorn.Server(
            uvicorn.Config(
                self.upstream,
                host="127.0.0.1",
                port=above,
                ssl_certfile=str(certificate),
                ssl_keyfile=str(key),
                log_level="critical",
                date_header=False,
                server_header=False,
                lifespan="off",
            )
        )
        verify = options.pop("verify", self.verify)
        if releases := options.pop("releases", None):  # made of the home, which is only here
            options["releases"] = releases(self.home)
        header_seconds = options.pop("header_seconds", 15.0)
        gate = make_gate(f"https://127.0.0.1:{above}", settings, verify=verify, log=log, **options)
        self._gate = server_of(gate, self.home, settings, header_seconds=header_seconds)
        self.context = ssl.create_default_context(cafile=str(self.home.authority))

    @contextlib.contextmanager
    def up(self, *, upstream: bool = True) -> Iterator["Served"]:
        with contextlib.ExitStack() as stack:
            if upstream:
                stack.enter_context(running(self._dummy, self._places[1]))
            stack.enter_context(running(self._gate, self._places[0]))
            yield self

    def ask(
        self, body: Any = b"", path: str = PULL, *, source: str = "127.0.0.1", **headers: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=20, context=self.context, source_address=(source, 0)
        )
        with contextlib.closing(connection):
            connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def raw(self, *, source: str = "127.0.0.1", timeout: float = 20.0) -> ssl.SSLSocket:
        plain = create_connection(("127.0.0.1", self.port), timeout=timeout, source_address=(source, 0))
        return self.context.wrap_socket(plain, server_hostname="127.0.0.1")

    def said(self, data: bytes, **options: Any) -> bytes:
        """What comes back to these bytes until the connection is closed."""
        with self.raw(**options) as connection:
            connection.sendall(data)
            return everything(connection)


def everything(connection: ssl.SSLSocket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while piece := connection.recv(65_536):
            found += piece
    return found
