"""The events of a stream from a place on, as plain JSON: so that whoever follows a run reads no line twice.

A place is a number of bytes at which a line begins. Lines are only ever added, and what a crash leaves of a line is
cut away before the next one, so a place stays one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RunError

__all__ = ["Piece", "read_after"]

# Bytes of a stream in one answer: some thousand events.
MOST_BYTES = 1 << 19


@dataclass(frozen=True)
class Piece:
    """Some events of a stream, and the place after the last of them.

    `more` says that others are there already. `anew` says that the place asked for is none of this stream, which was
    therefore read from its beginning. `damaged` counts lines that are no events.
    """

    events: list[dict[str, Any]]
    next: int
    more: bool
    anew: bool
    damaged: int


def read_after(path: Path, place: int, *, most_bytes: int = MOST_BYTES) -> Piece:
    """What stands in a stream after `place`; nothing where it does not exist yet. A torn last line is left for later.

    Raises:
        RunError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            anew = not _is_place(file, place)
            file.seek(0 if anew else place)
            start = file.tell()
            data = file.read(most_bytes)
            if b"\n" not in data:
                data += file.readline()  # one line longer than all that
            whole = data[: data.rfind(b"\n") + 1]
            more = b"\n" in (data[len(whole) :] + file.readline())
    except FileNotFoundError:
        return Piece([], 0, more=False, anew=place != 0, damaged=0)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    lines = whole.splitlines()
    events = [event for line in lines if (event := _event(line)) is not None]
    return Piece(events, start + len(whole), more=more, anew=anew, damaged=len(lines) - len(events))


def _is_place(file: Any, place: int) -> bool:
    if place <= 0:
        return place == 0
    file.seek(place - 1)
    return bool(file.read(1) == b"\n")


def _event(line: bytes) -> dict[str, Any] | None:
    """The line's event. JSON knows no NaN and no infinity, and a browser refuses them: they become text."""
    try:
        event = json.loads(line, parse_constant=str)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
