"""What a site keeps of one run, so that a vault that was killed goes on where it was and releases nothing twice.

    run.json      whose run it is: federation, epoch and manifest (`Claim`)
    memory.json   the newest attempt answered and the vector let go last (`SiteMemory`); never deleted
    sums.json     adapters measured, survivors of the last round, bounds of the adapter (`SumFacts`)
    work.bin      the request that is worked on or was last: begun, done with the reply, or failed; and `SiteState`
    words.bin     the newest body that was let go, before checksum and masks, and of which sum it is

Folder 0700, files 0600; each is replaced whole or not at all. No key of an attempt is ever here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.secure_site import SumFacts
from client.state import SiteState
from common.codec.packing import Words
from common.durable import write_bytes
from common.errors import MalformedMessage, RunError
from common.secure_sum.state import SiteMemory

__all__ = ["Body", "Claim", "RunFolder", "Work"]

_LENGTH = 8
_Digest = Field("", pattern=r"^([0-9a-f]{64})?$")


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Claim(_Stored):
    """Whose run a folder is of: the roster's federation and epoch, and the manifest's digest."""

    federation: str
    epoch: int
    manifest_sha256: str


class Work(_Stored):
    """The request (its `question`: a digest) that the site works on, or worked on last, and what came of it.

    `begun` is on the disk before privacy is charged, `done` before anything that was trained leaves. `state` is what
    the next request starts from: the state before while it is begun, the state after when it is done. `reply` is the
    vault's own envelope.
    """

    stage: Literal["none", "begun", "done", "failed"] = "none"
    question: str = _Digest
    cursor: int = 0
    last_round: int = 0
    checked: int = 0
    kept: bytes = Field(b"", exclude=True)
    reply: bytes = Field(b"", exclude=True)

    @property
    def state(self) -> SiteState:
        """The site's state."""
        return SiteState(self.cursor, self.last_round, self.checked, self.kept)

    @classmethod
    def of(
        cls, stage: Literal["begun", "done", "failed"], question: str, state: SiteState, reply: bytes = b""
    ) -> "Work":
        """A stage of a question."""
        return cls(
            stage=stage,
            question=question,
            cursor=state.cursor,
            last_round=state.last_round,
            checked=state.checked,
            kept=state.kept,
            reply=reply,
        )


class _BodyHead(_Stored):
    number: int
    spec: str = _Digest
    request: str = _Digest


@dataclass(frozen=True)
class Body:
    """The quantised body of sum `number`, before checksum and masks: uint64 [words]. `spec` and `request` are the
    digests of how it is laid out and of what was asked, hex."""

    number: int
    spec: str
    request: str
    words: Words


class RunFolder:
    """The folder of a run, made when something is first kept. It is the `MemoryStore` and `FactsStore` of its sums."""

    def __init__(self, folder: Path, federation: bytes) -> None:
        self._folder, self._federation = folder, federation

    def claim(self) -> Claim | None:
        """Whose run it is; None where nothing was kept of it. A RunError if the file is damaged."""
        data = self._read("run.json")
        try:
            return None if data is None else Claim.model_validate_json(data)
        except ValidationError as error:
            raise self._damaged("run.json") from error

    def take(self, claim: Claim) -> None:
        """Begin the folder."""
        self._write("run.json", claim.model_dump_json().encode())

    def load(self) -> SiteMemory:
        """See `MemoryStore`.

        Raises:
            RunError: the file is damaged. Nothing is answered then: it could be a second time.
        """
        data = self._read("memory.json")
        try:
            return SiteMemory(self._federation) if data is None else SiteMemory.from_bytes(data)
        except MalformedMessage as error:
            raise self._damaged("memory.json") from error

    def save(self, memory: SiteMemory) -> None:
        """See `MemoryStore`."""
        self._write("memory.json", memory.to_bytes())

    def load_facts(self) -> SumFacts:
        """See `FactsStore`; a RunError if the file is damaged."""
        data = self._read("sums.json")
        try:
            return SumFacts() if data is None else SumFacts.from_bytes(data)
        except MalformedMessage as error:
            raise self._damaged("sums.json") from error

    def save_facts(self, facts: SumFacts) -> None:
        """See `FactsStore`."""
        self._write("sums.json", facts.to_bytes())

    def load_work(self) -> Work:
        """What was worked on last; a RunError if the file is damaged."""
        data = self._read("work.bin")
        if data is None:
            return Work()
        try:
            text, rest = _split(data)
            values = json.loads(text)
            kept = values.pop("kept_bytes")
            return Work(**values, kept=rest[:kept], reply=rest[kept:])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged("work.bin") from error

    def save_work(self, work: Work) -> None:
        """Keep what is worked on."""
        text = json.dumps({**work.model_dump(), "kept_bytes": len(work.kept)})
        self._write("work.bin", _joined(text.encode(), work.kept + work.reply))

    def load_body(self) -> Body | None:
        """The newest body that was let go; a RunError if the file is damaged."""
        data = self._read("words.bin")
        if data is None:
            return None
        try:
            text, rest = _split(data)
            head = _BodyHead.model_validate_json(text)
            words = np.frombuffer(rest, "<u8").astype(np.uint64)
        except (ValueError, ValidationError) as error:
            raise self._damaged("words.bin") from error
        return Body(head.number, head.spec, head.request, words)

    def save_body(self, body: Body) -> None:
        """Keep a body in place of the one before: older sums are closed, since numbers only grow."""
        head = _BodyHead(number=body.number, spec=body.spec, request=body.request)
        self._write("words.bin", _joined(head.model_dump_json().encode(), body.words.astype("<u8").tobytes()))

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self._folder / name} cannot be read: {error.strerror}") from error

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise RunError(f"{self._folder} cannot be made: {error.strerror}") from error
        write_bytes(self._folder / name, data, private=True)

    def _damaged(self, name: str) -> RunError:
        return RunError(
            f"{self._folder / name} is damaged, so what left in this run is not known; nothing more is answered in it"
        )


def _joined(head: bytes, rest: bytes) -> bytes:
    return len(head).to_bytes(_LENGTH, "big") + head + rest


def _split(data: bytes) -> tuple[bytes, bytes]:
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    if end > len(data):
        raise ValueError("cut")
    return data[_LENGTH:end], data[end:]
