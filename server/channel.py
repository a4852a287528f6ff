"""How the coordinator reaches the sites: requests out, replies in as they come, over Flower's Grid."""

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from common.errors import MessageError
from common.flower import ConfigRecord, Grid, Message, RecordDict, pack, unpack
from common.messages import Envelope, decode
from common.secure_sum.messages import VERSION

__all__ = ["Channel", "FlowerChannel", "Interrupted", "Reply", "fixed_word"]


# What a code may look like; anything else might be text from a record.
_CODE = re.compile(r"[A-Za-z0-9_:]{1,80}")


class Interrupted(Exception):  # no CoadaptError: a wish of the person, not a fault
    """The person asked the run to stop."""


@dataclass(frozen=True)
class Reply:
    """A site's answer: an envelope, or a message of the secure sum as `data`, or a fixed word why there is neither.

    Sizes are in bytes. `reason` may add to a refusal's word what the site's policy says, settings and numbers alone.
    """

    site: str
    envelope: Envelope | None
    code: str
    bytes_up: int
    bytes_down: int
    data: bytes = b""
    reason: str = ""


class Channel(Protocol):
    """What the round loop knows of the network."""

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """Send every site its request at once; yield each site's reply as it comes, exactly one a site."""


class FlowerChannel:
    """Sites by name over a Flower Grid.

    `nodes` are the Flower nodes of the sites by name, or nodes of which any can play any site. `notes` are values that
    go beside a site's envelope in every message; a simulation says there which site a node plays. `in_flight` limits
    the requests that are out at once: Flower hands out what it has in an order of its own, so where the order matters
    it must not have more.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int] | Sequence[int],
        *,
        stop: threading.Event,
        notes: Mapping[str, Mapping[str, str]] | None = None,
        in_flight: int | None = None,
        poll_seconds: float = 0.05,
        timeout_seconds: float = 86_400.0,
    ) -> None:
        self._grid = grid
        self._nodes = nodes
        self._stop = stop
        self._notes = notes or {}
        self._in_flight = in_flight
        self._poll = poll_seconds
        self._timeout = timeout_seconds

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """Send and collect.

        Raises:
            Interrupted: the person asked to stop; replies that were still out are dropped.
        """
        sizes = {site: len(data) for site, data in requests.items()}
        to_send = list(requests.items())[::-1]
        nodes = (
            self._nodes if isinstance(self._nodes, Mapping) else dict(zip(requests, cycle(self._nodes), strict=False))
        )
        waiting: dict[str, str] = {}
        deadline = time.monotonic() + self._timeout
        while (waiting or to_send) and time.monotonic() < deadline:
            if self._stop.is_set():
                raise Interrupted
            while to_send and len(waiting) < (self._in_flight or len(requests)):
                site, data = to_send.pop()
                message = Message(self._content(site, data), nodes[site], kind)
                waiting |= dict.fromkeys(map(str, self._grid.push_messages([message])), site)
            for message in self._grid.pull_messages(list(waiting)):
                site = waiting.pop(str(message.metadata.reply_to_message_id))
                yield _read(site, message, sizes[site])
            if waiting:
                self._stop.wait(self._poll)
        for site in [*waiting.values(), *(site for site, _ in to_send)]:
            yield Reply(site, None, "timeout", 0, sizes[site])

    def _content(self, site: str, data: bytes) -> RecordDict:
        content = pack(data)
        if site in self._notes:
            content["notes"] = ConfigRecord(dict(self._notes[site]))
        return content


def fixed_word(code: object) -> str:
    """A code as a site's side gave it, or MessageError's where it has not the form of one."""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else MessageError.code


def _read(site: str, message: Message, bytes_down: int) -> Reply:
    if message.has_error():
        # Flower puts the text of the site's exception here; it may hold a record and is not looked at.
        return Reply(site, None, f"flower_{message.error.code}", 0, bytes_down)
    failure = message.content.config_records.get("failure")
    if failure is not None:
        return Reply(site, None, fixed_word(failure.get("code", "")), 0, bytes_down)
    try:
        data = unpack(message.content)
        if data[:1] == bytes([VERSION]):  # an envelope begins with a zero, the high byte of a length
            return Reply(site, None, "", len(data), bytes_down, data)
        envelope = decode(data)
    except MessageError as error:
        return Reply(site, None, error.code, 0, bytes_down)
    return Reply(site, envelope, "", len(data), bytes_down)
