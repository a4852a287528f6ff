"""A field in one process: sessions of vaults behind a channel that speaks orders and answers.

`Made` stands for a vault: it charges a real ledger and answers with made-up contributions, and no torch is there.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from client.audit_log import AuditLine, AuditLog, read_audit
from client.background import Trains
from client.ledger import Account, Charge, Ledger
from client.policy import SitePolicy
from client.session import Session, SiteParts
from client.state import SiteState
from client.ticks import tick
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.frames import Answer, Order, open_frame, payload_digest, seal_frame
from common.identity import Identity
from common.messages import Envelope, Refused, RoundDone, RoundStart, decode, encode
from common.privacy.accounting import Steps
from common.progress import Event
from common.randomness import system_bytes
from common.roster import FEDERATION_BYTES, Institution, Roster, SignedRoster, verify_roster
from common.secure_sum.messages import VERSION
from server.channel import Reply
from server.secure_collection import SecureCollection

POLICY: dict[str, Any] = {
    "version": 1,
    "name": "north",
    "data": {"train": "train.jsonl"},
    "population": {"name": "people", "unit": "record", "units": 100, "epsilon": 1000.0, "delta": 1e-3},
}
NOON = datetime(2026, 11, 25, 12, 0)  # a Wednesday
STEPS = Steps(1.0, 0.1, 4)


def policy_of(**tables: Any) -> SitePolicy:
    values = {**POLICY, **{name: {**POLICY.get(name, {}), **table} for name, table in tables.items()}}
    return SitePolicy.model_validate(values)


@dataclass
class Made:
    """In place of a vault. `trained` counts trainings; with noise every one gives another change. While `gate` is
    closed training goes on and on; `error` is a word with which it refuses."""

    manifest: Manifest
    ledger: Ledger | None
    change: AdapterState
    trained: int = 0
    error: str = ""
    gate: threading.Event = field(default_factory=threading.Event)

    def charged(self, run_id: str) -> list[int]:
        return self.ledger.rounds_of(self.manifest.digest(), run_id) if self.ledger else []

    def answer(self, data: bytes, state: SiteState, *, unreleased: bool = False) -> tuple[bytes, SiteState]:
        header = decode(data).header
        assert isinstance(header, RoundStart)
        if self.ledger is not None and not unreleased:
            charge = Charge("people", "record", "test", self.manifest.digest(), header.run_id, header.round, STEPS)
            self.ledger.charge(Account("people", 1e6, 1e-3), charge, ["a"])
        self.trained += 1
        tick(0)
        while not self.gate.wait(0.005):
            tick(1)
        if self.error:
            said = {**header.spoken_of(), "code": self.error}
            return encode(Envelope(header=Refused(**said))), state
        scale = np.float32(self.trained if self.ledger is not None else 1)
        done = RoundDone(
            **header.spoken_of(),
            records=24,
            examples=8,
            loss=None if self.ledger is not None else 1.0,
            counts={},
            seconds=1.0,
            noise_multiplier=None,
            sampling_rate=None,
        )
        tensors = {name: array * scale for name, array in self.change.items()}
        return encode(Envelope(header=done, tensors=tensors)), replace(state, last_round=header.round)


class SiteHere:
    """A site whose vault may be killed: `start` makes a new session on the same folder."""

    def __init__(self, folder: Path, number: int, field_: "Field", policy: SitePolicy) -> None:
        self.folder, self.number, self.field, self.policy = folder, number, field_, policy
        self.identity = field_.keys[number]
        self.rounding = system_bytes(32)
        self.now = NOON
        self.ledger = Ledger(folder / "ledger") if field_.manifest.privacy else None
        self.vault: Made
        self.session: Session
        self.start()

    def start(self) -> None:
        self.vault = Made(self.field.manifest, self.ledger, self.field.change_of(self.number))
        self.vault.gate.set()
        self.executor = ThreadPoolExecutor(1)
        self.session = self.opened(self.vault, self.executor)

    def opened(self, vault: Trains, executor: Executor) -> Session:
        parts = SiteParts(
            identity=self.identity,
            roster=self.field.roster,
            manifest=self.field.manifest,
            policy=self.policy,
            rounding_key=self.rounding,
            runs=self.folder / "runs",
            log=self.folder / "log" / "vault.log",
            vault=vault,
            ledger=self.ledger,
            executor=executor,
            now=lambda: self.now,
        )
        return Session(parts, AuditLog(self.folder / "log" / "audit.jsonl"))

    def audit(self) -> list[AuditLine]:
        return list(read_audit(self.folder / "log" / "audit.jsonl"))


class Field:
    """A coordinator, its sites, and a channel between them. `run_id` may be changed, for a second run.

    `make` makes a site that is none of these stand-ins: it needs a `session` with an `answer`, and a `start`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, sites: int = 3, make: Callable[..., Any] | None = None, **tables: Any
    ) -> None:
        self.folder, self.manifest, self.run_id = folder, manifest, "run-1"
        self.coordinator, self.keys = Identity.generate(), [Identity.generate() for _ in range(sites)]
        self.names = tuple(f"s{number}" for number in range(sites))
        self.adapter: AdapterState = {"w": np.zeros(12, np.float32)}
        roster = Roster(
            federation=system_bytes(FEDERATION_BYTES),
            epoch=1,
            coordinator=self.coordinator.public,
            min_sites=3,
            max_colluding=0,
            institutions=tuple(
                Institution(site=number, name=name, public=key.public)
                for number, (name, key) in enumerate(zip(self.names, self.keys, strict=True))
            ),
        )
        signed = SignedRoster(roster=roster, signatures={n: roster.sign(key) for n, key in enumerate(self.keys)})
        self.roster = verify_roster(signed, own_key=self.coordinator.public, pinned=roster.digest())
        self.clock = 0
        self.seen: dict[int, str] = {}
        self.forgets = False  # whether it hides what it was told of ledgers
        self.events: list[Event] = []
        self.frames: list[bytes] = []
        self.heard: list[bytes] = []
        self.signed = signed
        new = make or SiteHere
        self.sites = [new(folder / name, n, self, policy_of(**tables)) for n, name in enumerate(self.names)]

    def change_of(self, number: int) -> AdapterState:
        return {"w": np.full(12, 1e-4 * (number + 1), np.float32)}

    def sums(self) -> SecureCollection:
        return SecureCollection(
            self.manifest,
            identity=self.coordinator,
            roster=self.roster,
            sites=self.names,
            shapes={name: array.shape for name, array in self.adapter.items()},
            channel=self,
            report=self.events.append,
        )

    def header(self, number: int = 1, **values: Any) -> RoundStart:
        said: dict[str, Any] = {
            "manifest_sha256": self.manifest.digest(),
            "run_id": self.run_id,
            "round": number,
            "adapter_sha256": state_digest(self.adapter),
            "evaluate": False,
            "accepted": 0,
        }
        return RoundStart(**{**said, **values})

    def order(self, to: int, kind: Any, payload: bytes = b"", **values: Any) -> bytes:
        """A signed order; `key` signs in the coordinator's place."""
        self.clock += 1
        key = values.pop("key", self.coordinator)
        said: dict[str, Any] = {
            "federation": self.roster.federation.hex(),
            "epoch": self.roster.epoch,
            "manifest_sha256": self.manifest.digest(),
            "run_id": self.run_id,
            "site": to,
            "kind": kind,
            "sequence": self.clock,
            "seen": "" if self.forgets else self.seen.get(to, ""),
        }
        frame = seal_frame(key, Order(**{**said, **values}), payload)
        self.frames.append(frame)
        return frame

    def say(self, to: int, kind: Any, payload: bytes = b"", **values: Any) -> tuple[Answer, bytes]:
        """An order and its verified answer."""
        return self.give(to, self.order(to, kind, payload, **values))

    def give(self, site: int, frame: bytes) -> tuple[Answer, bytes]:
        return self.read(site, self.sites[site].session.answer(frame))

    def read(self, site: int, answer: bytes) -> tuple[Answer, bytes]:
        header, payload = open_frame(Answer, self.keys[site].public, answer)
        self.heard.append(payload)
        if header.ledger and header.kind != "refused":
            self.seen[site] = header.ledger
        return header, payload

    def settled(self, site: int, payload: bytes, *, seconds: float = 20.0) -> tuple[Answer, bytes]:
        """The answer to a payload, asked for until it is there."""
        kind = "message" if payload[:1] == bytes([VERSION]) else "request"
        answer, said = self.say(site, kind, payload)
        deadline = time.monotonic() + seconds
        while answer.kind == "working" and time.monotonic() < deadline:
            time.sleep(0.01)
            answer, said = self.say(site, "poll", about=payload_digest(payload))
        return answer, said

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """See `Channel`."""
        for name, data in requests.items():
            answer, said = self.settled(self.names.index(name), data)
            if answer.kind != "message":
                yield Reply(name, None, answer.code or "timeout", 0, len(data))
            elif said[:1] == bytes([VERSION]):
                yield Reply(name, None, "", len(said), len(data), said)
            else:
                yield Reply(name, decode(said), "", len(said), len(data))
