"""The audit log: every order that reached the vault, and whether it was answered or refused and why. Append-only.

What was fetched of finished runs stands in it too.

A line is a JSON object; `before` is the SHA-256 of the line before it, so a line that is changed or taken out shows.
What does not show is a log that lost its last lines: send a copy elsewhere, such as to syslog. No text
of a record, message or error is ever in it: kinds, numbers, digests and fixed words alone, and reasons that a policy
made of settings and numbers.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import RunError

__all__ = ["AuditLine", "AuditLog", "read_audit"]

Decision = Literal["answered", "working", "refused", "note"]


class AuditLine(BaseModel):
    """One line. `size` is that of the order in bytes, `payload` the digest of what it carried or asked about."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int = Field(ge=1)
    time: str
    decision: Decision
    kind: str = ""
    run_id: str = ""
    round: int | None = None
    payload: str = ""
    size: int = 0
    code: str = ""
    reason: str = ""
    before: str


@dataclass(frozen=True)
class _End:
    """The end of the log: how many lines there are, the digest of the last, and the bytes of all."""

    number: int = 0
    digest: str = ""
    size: int = 0


class AuditLog:
    """The log at a path, opened for appending. Several processes may write: the vault, and a command beside it.

    A last line that a power cut tore is cut off, and a note says so. `add` returns when the line is on the disk.

    Raises:
        RunError: the file cannot be used, or a line in it does not follow from the one before.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with self._alone():
                torn = _cut(path)
                self._end = _end(path)
        except OSError as error:
            raise RunError(f"the audit log {path} cannot be opened: {error.strerror}") from error
        if torn:
            self.add("note", code="torn_line", size=torn)

    def add(
        self,
        decision: Decision,
        *,
        kind: str = "",
        run_id: str = "",
        round_number: int | None = None,
        payload: str = "",
        size: int = 0,
        code: str = "",
        reason: str = "",
    ) -> None:
        """Append a line.

        Raises:
            RunError: it cannot be written.
        """
        with self._lock, self._alone():
            self._catch_up()
            line = AuditLine(
                number=self._end.number + 1,
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                decision=decision,
                kind=kind,
                run_id=run_id,
                round=round_number,
                payload=payload,
                size=size,
                code=code,
                reason=reason,
                before=self._end.digest,
            )
            data = line.model_dump_json().encode() + b"\n"
            try:
                before = os.fstat(self._file).st_size
                whole = os.write(self._file, data) == len(data)
                if not whole:  # half a line would make the next one seem forged
                    os.ftruncate(self._file, before)
                os.fsync(self._file)
            except OSError as error:
                raise RunError(f"the audit log {self._path} cannot be written: {error.strerror}") from error
            if not whole:
                raise RunError(f"the audit log {self._path} cannot be written: the disk is full")
            self._end = _End(line.number, _digest(data), before + len(data))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise RunError(f"the audit log {self._path} cannot be locked: {error.strerror}") from error
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Read the lines that another process added; half of one that it died at is cut off."""
        try:
            if os.fstat(self._file).st_size != self._end.size:
                _cut(self._path)
                self._end = _end(self._path, self._end)
        except OSError as error:
            raise RunError(f"the audit log {self._path} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_audit(path: Path) -> Iterator[AuditLine]:
    """The lines in their order, each checked against the one before; a torn last line is left out.

    Raises:
        RunError: there is no log, or a line does not follow from the one before.
    """
    try:
        for line, _ in _lines(path):
            yield line
    except OSError as error:
        raise RunError(f"the audit log {path} cannot be read: {error.strerror}") from error


def _end(path: Path, known: _End | None = None) -> _End:
    """The end of the log, from a known line on; every line after it is verified."""
    end = known or _End()
    for line, digest in _lines(path, end):
        end = _End(line.number, digest)
    return _End(end.number, end.digest, path.stat().st_size)


def _lines(path: Path, known: _End | None = None) -> Iterator[tuple[AuditLine, str]]:
    """Each whole line after the known ones and its digest, the chain verified."""
    if not path.exists():
        return
    known = known or _End()
    before = known.digest
    with path.open("rb") as file:
        file.seek(known.size)
        for place, data in enumerate(file, start=known.number + 1):
            if not data.endswith(b"\n"):
                return
            try:
                line = AuditLine.model_validate_json(data)
            except ValidationError as error:
                raise RunError(f"the audit log {path} was changed: line {place} cannot be read") from error
            if (line.number, line.before) != (place, before):
                raise RunError(f"the audit log {path} was changed: line {place} does not follow from the one before")
            before = _digest(data)
            yield line, before


def _cut(path: Path) -> int:
    """Cut a last line without its end off; how many bytes that were."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        keep = data.rfind(b"\n") + 1
        if keep < len(data):
            file.truncate(keep)
            os.fsync(file.fileno())
    return len(data) - keep


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
