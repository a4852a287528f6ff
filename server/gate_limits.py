"""What a stranger may take up at the gate: requests a second, connections, time, and bytes that are held.

Whoever reaches the port gets so far without a key: TLS is the server's alone, and Flower asks for a node's key only
behind the gate. Each limit is one for each host first, so that whoever exceeds it is in his own way.
"""

import asyncio
import ipaddress
import resource
from collections import Counter, OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEADER_SECONDS", "Buckets", "Room", "guarded", "more_files", "network_of", "new_loop"]

MOST_HOSTS = 4096
# A hospital may send all its traffic from one address, and a site needs a handful of connections.
MOST_CONNECTIONS = 128
HEADER_SECONDS = 15.0
HANDSHAKE_SECONDS = 10.0


def network_of(host: str) -> str:
    """What counts as one host: an IPv4 address, or the /64 of an IPv6 address, since whoever has one has all of it."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


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


class Room:
    """How much is held for all hosts together and for one, in bytes or in pieces."""

    def __init__(self, *, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._held: Counter[str] = Counter()
        self._all = 0

    def take(self, host: str, size: int) -> bool:
        """Hold `size` more for a host; False, and nothing is held, where that is too much."""
        if self._all + size > self._most or self._held[host] + size > self._each:
            if not self._held[host]:
                del self._held[host]
            return False
        self._all += size
        self._held[host] += size
        return True

    def give(self, host: str, size: int) -> None:
        """Hold `size` less."""
        self._all -= size
        self._held[host] -= size
        if self._held[host] <= 0:
            del self._held[host]


def guarded(
    *, most: int, each: int = MOST_CONNECTIONS, header_seconds: float = HEADER_SECONDS
) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, with at most `most` connections, `each` for one host, which must say what they want.

    uvicorn itself waits without end for a request's header, so a few hundred connections that say nothing would keep
    everybody out. Its h11 protocol and not the faster one, which collects headers of any size.
    """
    room = Room(most=most, each=each)

    class Guarded(H11Protocol):
        _host = ""
        _timer: asyncio.TimerHandle | None = None
        _entered = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._host = network_of(self.client[0]) if self.client else ""
            self._entered = room.take(self._host, 1)
            if self._entered:
                self._watch()
            else:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._entered:
                room.give(self._host, 1)
                self._entered = False
            self._unwatch()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._idle():  # a request that came in behind the one that is answered
                self._unwatch()

        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            """Give it so long to finish a header, however slowly the letters come."""
            if not self._idle():
                self._unwatch()
            elif self._timer is None and self._entered:
                self._timer = self.loop.call_later(header_seconds, self.transport.abort)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Guarded


class _Loop(asyncio.SelectorEventLoop):
    async def create_server(self, *args: Any, **options: Any) -> Any:
        """See asyncio. Whoever connects and never shakes hands is let go after seconds instead of a minute."""
        if options.get("ssl"):
            options.setdefault("ssl_handshake_timeout", HANDSHAKE_SECONDS)
            options.setdefault("ssl_shutdown_timeout", HANDSHAKE_SECONDS)
        return await super().create_server(*args, **options)


def new_loop() -> asyncio.AbstractEventLoop:
    """The gate's event loop."""
    return _Loop()


def more_files() -> None:
    """Let the process have as many files, and so connections, as the system allows it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
