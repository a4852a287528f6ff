"""What the gate gives out beside Flower's calls: pieces of published files, to sites that sign for them.

A request counts only with the signature of an admitted institution; everybody else gets the 404 of a path that is not
there. Then the run must be published, and the institution be in the roster under which the run was made. A path is
looked up in the run's listing and never made from what was asked. No key is needed here, and none is read.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse

from common.errors import CoadaptError
from common.randomness import system_bytes
from common.release import LISTING, PIECE_BYTES, WINDOW_SECONDS, Fetch, Listing, Refusal, open_fetch, open_listing
from common.roster import Roster, SignedRoster
from server.enrolment import admitted
from server.home import CoordinatorHome

__all__ = ["Releases"]

_STEP = 256 << 10
_STATUS = {"gate": 409, "clock": 409, "replay": 409, "roster": 403, "federation": 403}
Code = str


class Releases:
    """The published runs of a home. `clock` gives seconds since 1970."""

    def __init__(self, home: CoordinatorHome, *, clock: Callable[[], float] = time.time) -> None:
        self._home, self._clock = home, clock
        self._gate = system_bytes(16).hex()
        self._last: dict[str, int] = {}  # of each admitted key the time of its newest request
        self._keys: tuple[int, frozenset[str]] = (-1, frozenset())

    def answer(self, body: bytes) -> Response:
        """The response to a request's body."""
        try:
            asked = open_fetch(body)
            if asked.public_key not in self._admitted():
                return Response(status_code=404)
        except CoadaptError:
            return Response(status_code=404)
        if code := self._stale(asked):
            return self._refused(code)
        self._last[asked.public_key] = asked.time
        folder = self._home.published / asked.run_id
        try:
            signed = (folder / LISTING).read_bytes()
            roster = SignedRoster.from_json((folder / "roster.json").read_bytes()).roster
            listing = open_listing(roster.coordinator, signed)
        except (OSError, CoadaptError):
            return self._refused("unpublished")
        if code := _misplaced(asked, roster):
            return self._refused(code)
        return Response(signed, media_type="application/json") if not asked.path else self._piece(asked, listing)

    def _admitted(self) -> frozenset[str]:
        """The keys of all institutions that are admitted now; read again when one was admitted or revoked."""
        try:
            changed = self._home.admitted.stat().st_mtime_ns
        except OSError:
            return frozenset()
        if changed != self._keys[0]:
            self._keys = changed, frozenset(paper.public_key for paper in admitted(self._home).values())
        return self._keys[1]

    def _stale(self, asked: Fetch) -> Code:
        """Why a request is none that was made now, for this gate, for the first time."""
        if asked.gate != self._gate:
            return "gate"
        if abs(asked.time / 1e9 - self._clock()) > WINDOW_SECONDS:
            return "clock"
        return "replay" if asked.time <= self._last.get(asked.public_key, -1) else ""

    def _piece(self, asked: Fetch, listing: Listing) -> Response:
        listed = listing.file(asked.path)
        if listed is None or asked.offset > listed.size:
            return self._refused("file")
        size = min(PIECE_BYTES, listed.size - asked.offset)
        try:
            file = self._home.published.joinpath(asked.run_id, *listed.path.split("/")).open("rb")
            file.seek(asked.offset)
        except OSError:
            return self._refused("file")
        return StreamingResponse(
            _read(file, size), media_type="application/octet-stream", headers={"content-length": str(size)}
        )

    def _refused(self, code: Code) -> Response:
        words = {"code": code, "gate": self._gate, "time": int(self._clock())}
        text = Refusal.model_validate(words).model_dump_json()
        return Response(text, status_code=_STATUS.get(code, 404), media_type="application/json")


def _misplaced(asked: Fetch, roster: Roster) -> Code:
    if asked.federation != roster.federation.hex():
        return "federation"
    keys = {entry.public.hex() for entry in roster.institutions}
    return "" if asked.public_key in keys else "roster"


async def _read(file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """So many bytes; fewer, and so a broken answer, where the file is shorter than it was."""
    with file:
        while size > 0 and (data := await asyncio.to_thread(file.read, min(_STEP, size))):
            size -= len(data)
            yield data
