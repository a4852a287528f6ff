"""The journal of a secure sum that goes on: what the coordinator was told, on the disk before anything follows from it.

A coordinator's round follows from its request and from the messages in their order, so whoever reads them again stands
where the crashed process stood, and sends the very same bytes. What is here of a site are its messages of the secure
sum, masked vectors among them, and nothing else.

The file is a chain of records that only grows, each flushed to the disk:

    length of the body (8 bytes, little-endian), check of the length (8), body, SHA-256 over the chain so far and it

A body is the length of its facts (8 bytes), the facts as JSON, and a message's bytes. A record that was cut when the
process died is cut off; one that was changed is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import RunError

__all__ = ["Entry", "Journal"]

_LENGTH, _CHECK, _DIGEST = 8, 8, 32
_FIRST = hashlib.sha256(b"coadapt journal 1").digest()


@dataclass(frozen=True)
class Entry:
    """One record: `attempt` began, a `message` came, a stage was `ended`, or the sum was `lost`."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    data: bytes = b""


class Journal:
    """One sum's records in `path`; without a path nothing is kept. It is read to its end first, then it grows.

    Raises:
        RunError: the file cannot be read or written, or was changed.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._chain = path, _FIRST
        self._file: BinaryIO | None = None
        self.written = 0  # records that this process added
        if path is not None:
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
                _flush_folder(path.parent)
                _flush_folder(path.parent.parent)
            except OSError as error:
                raise RunError(f"cannot open {path}: {error.strerror}") from error
        self._past = self._read()
        try:
            self._next = next(self._past, None)
        except RunError:
            self.close()
            raise

    def take(self, *kinds: str) -> Entry | None:
        """The next record of the past where it is of one of these kinds; None at any other, and past the end."""
        entry = self._next
        if entry is None or entry.kind not in kinds:
            return None
        self._next = next(self._past, None)
        return entry

    @property
    def live(self) -> bool:
        """Whether all of the past was taken, so that what happens now is new."""
        return self._next is None

    def append(self, kind: str, facts: dict[str, Any] | None = None, data: bytes = b"") -> None:
        """Write a record; it will survive a crash when this returns."""
        if not self.live:
            raise RunError(f"{self._path} goes on otherwise than the run does, with {self._next!r}; {_ADVICE}")
        self.written += 1
        if self._file is None:
            return
        said = json.dumps({"kind": kind, **(facts or {})}).encode()
        body = len(said).to_bytes(_LENGTH, "little") + said + data
        length = len(body).to_bytes(_LENGTH, "little")
        chain = _linked(self._chain, length + body)
        try:
            self._file.write(length + self._check(length) + body + chain)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; the records before are whole") from error
        self._chain = chain

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> Iterator[Entry]:
        """Every whole record; whatever a crash left behind the last one is cut off."""
        if self._file is None:
            return
        while True:
            start = self._file.tell()
            entry = self._record(self._file)
            if entry is None:
                self._file.seek(start)
                self._file.truncate()
                return
            yield entry

    def _record(self, file: BinaryIO) -> Entry | None:
        """The next record; None where the file ends before it does."""
        head = file.read(_LENGTH + _CHECK)
        if len(head) < _LENGTH + _CHECK:
            return None
        length = head[:_LENGTH]
        if head[_LENGTH:] != self._check(length):
            raise self._damaged()
        size = int.from_bytes(length, "little")
        body, chain = file.read(size), file.read(_DIGEST)
        if len(body) + len(chain) < size + _DIGEST:
            return None
        if chain != _linked(self._chain, length + body):
            raise self._damaged()
        self._chain = chain
        said = int.from_bytes(body[:_LENGTH], "little")
        facts = json.loads(body[_LENGTH : _LENGTH + said])
        return Entry(facts.pop("kind"), facts, body[_LENGTH + said :])

    def _check(self, length: bytes) -> bytes:
        return _linked(self._chain, b"length" + length)[:_CHECK]

    def _damaged(self) -> RunError:
        return RunError(f"{self._path} was changed after it was written; {_ADVICE}")


_ADVICE = "restore it from a copy, or begin the run anew"


def _linked(chain: bytes, data: bytes) -> bytes:
    link = hashlib.sha256(chain)
    link.update(data)
    return link.digest()


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
