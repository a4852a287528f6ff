"""The messages of `secsum/1` as canonical bytes, and strict parsers. No state; torch, Flower and JSON stay outside.

    version 1 | type 1 | federation 16 | epoch 4 | round 8 | attempt 2 | sender 2 | body | signature 64

Integers are little-endian. The Ed25519 signature is over b"secsum/1", a zero byte and everything before it, so it
covers sender, round, attempt and type. A body has its fields in fixed order; lists carry their length and are in
ascending order of site, each site once. There is one encoding of a message, and nothing may follow it. Site numbers
are those of the roster; the coordinator is 65535.
"""

import abc
import enum
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from common.errors import MalformedMessage
from common.identity import SIGNATURE_BYTES, Identity, verify
from common.ledger_statement import STATEMENT_BYTES
from common.roster import FEDERATION_BYTES
from common.secure_sum.primitives import HASH_BYTES, KEY_BYTES, TAG_BYTES
from common.secure_sum.shamir import SHARE_BYTES
from common.secure_sum.wire import Reader, pack_all, pack_by_site, pack_sites

__all__ = [
    "COORDINATOR",
    "MOST_BYTES",
    "MOST_HANDED_BACK",
    "SEALED_BYTES",
    "Advertise",
    "Body",
    "Complaint",
    "Confirm",
    "ConfirmList",
    "KeyList",
    "Kind",
    "Masked",
    "Message",
    "Refuse",
    "Reveal",
    "Revealed",
    "RoundStart",
    "ShareForward",
    "Shares",
    "Survivors",
    "Turn",
    "encode",
    "read",
]

VERSION = 1
COORDINATOR = 0xFFFF
MOST_WORDS = 1 << 31
MOST_CONFIG_BYTES = 4096
# More than the keys of 2,048 sites take, with statements of their ledgers; only a vector may be longer.
MOST_BYTES = 4 << 20
# So many peers' statements a site hands back at most: with a hundred sites a list of keys is then 160 kB.
MOST_HANDED_BACK = 8
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES

_LABEL = b"secsum/1"
_HEADER = struct.Struct(f"<BB{FEDERATION_BYTES}sIQHH")
_FRAME_BYTES = _HEADER.size + SIGNATURE_BYTES
_STATED_BYTES = 1 + STATEMENT_BYTES
MOST_ADVERTISE_BYTES = _FRAME_BYTES + 4 * KEY_BYTES + _STATED_BYTES + 2 + MOST_HANDED_BACK * (2 + STATEMENT_BYTES)
MOST_CONFIRM_BYTES = _FRAME_BYTES + HASH_BYTES + _STATED_BYTES


@dataclass(frozen=True)
class Turn:
    """Which attempt at which round of which federation a message belongs to."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")

    federation: bytes
    epoch: int
    round: int
    attempt: int


class Kind(enum.IntEnum):
    """Types of messages; 11 is kept for a result."""

    ROUND_START = 1
    ADVERTISE = 2
    KEY_LIST = 3
    SHARES = 4
    SHARE_FORWARD = 5
    MASKED = 6
    SURVIVORS = 7
    CONFIRM = 8
    CONFIRM_LIST = 9
    REVEAL = 10
    REFUSE = 12
    COMPLAINT = 13


class Body(abc.ABC):
    """What stands between header and signature."""

    kind: ClassVar[Kind]

    @abc.abstractmethod
    def encode(self) -> bytes:
        """The canonical bytes."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, reader: Reader) -> Self:
        """From a reader; MalformedMessage if it does not fit."""


@dataclass(frozen=True)
class RoundStart(Body):
    """Coordinator: a round begins on the adapter with this hash, under this configuration, among these sites."""

    kind = Kind.ROUND_START
    model_hash: bytes
    invited: tuple[int, ...]
    config: bytes

    def encode(self) -> bytes:
        """See `Body`."""
        return b"".join(
            [self.model_hash, pack_sites(self.invited), len(self.config).to_bytes(4, "little"), self.config]
        )

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        model_hash, invited, size = reader.take(HASH_BYTES), tuple(reader.by_site(0)), reader.number(4)
        if size > MOST_CONFIG_BYTES:
            raise MalformedMessage(f"a configuration has {size} bytes and may have {MOST_CONFIG_BYTES}")
        return cls(model_hash, invited, reader.take(size))


@dataclass(frozen=True)
class Advertise(Body):
    """Site: its context, two one-time X25519 keys, and the commitment to the seed of its own mask.

    `ledger` is its statement of its ledger's end, empty where it has none; `seen` hands back those of its peers.
    """

    kind = Kind.ADVERTISE
    context: bytes
    sealing_key: bytes
    masking_key: bytes
    seed_commitment: bytes
    ledger: bytes = b""
    seen: Mapping[int, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """See `Body`."""
        keys = (self.context, self.sealing_key, self.masking_key, self.seed_commitment)
        return b"".join([*keys, _stated(self.ledger), pack_by_site(self.seen)])

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        context, sealing, masking, commitment = (reader.take(KEY_BYTES) for _ in range(4))
        ledger, seen = _statement(reader), reader.by_site(STATEMENT_BYTES)
        if len(seen) > MOST_HANDED_BACK:
            raise MalformedMessage(f"a site hands back {len(seen)} statements and may hand back {MOST_HANDED_BACK}")
        return cls(context, sealing, masking, commitment, ledger, seen)


@dataclass(frozen=True)
class KeyList(Body):
    """Coordinator: the sites' signed Advertise messages."""

    kind = Kind.KEY_LIST
    advertised: tuple[bytes, ...]

    def encode(self) -> bytes:
        """See `Body`."""
        return pack_all(self.advertised)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.packets(MOST_ADVERTISE_BYTES))


@dataclass(frozen=True)
class Shares(Body):
    """Site: under the hash of the list of keys, a sealed pair of shares for each neighbour."""

    kind = Kind.SHARES
    keys_hash: bytes
    sealed: Mapping[int, bytes]

    def encode(self) -> bytes:
        """See `Body`."""
        return self.keys_hash + pack_by_site(self.sealed)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.take(HASH_BYTES), reader.by_site(SEALED_BYTES))


@dataclass(frozen=True)
class ShareForward(Body):
    """Coordinator: all sites that sent shares, and the sealed pairs for this one."""

    kind = Kind.SHARE_FORWARD
    peers: tuple[int, ...]
    sealed: Mapping[int, bytes]

    def encode(self) -> bytes:
        """See `Body`."""
        return pack_sites(self.peers) + pack_by_site(self.sealed)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(tuple(reader.by_site(0)), reader.by_site(SEALED_BYTES))


@dataclass(frozen=True)
class Masked(Body):
    """Site: its masked vector, the vector's hash, and a salted commitment to the plain one. The proof is empty."""

    kind = Kind.MASKED
    peers_hash: bytes
    vector_hash: bytes
    commitment: bytes
    vector: bytes | memoryview

    def encode(self) -> bytes:
        """See `Body`."""
        size = len(self.vector) // 8
        head = (self.peers_hash, self.vector_hash, self.commitment, bytes(2), size.to_bytes(4, "little"))
        return b"".join([*head, self.vector])

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        hashes = [reader.take(HASH_BYTES) for _ in range(3)]
        if reader.number(2):
            raise MalformedMessage("a masked vector carries a proof, which this version does not know")
        size = reader.number(4)
        if size > MOST_WORDS:
            raise MalformedMessage(f"a masked vector has {size} words and may have {MOST_WORDS}")
        return cls(hashes[0], hashes[1], hashes[2], reader.view(8 * size))


@dataclass(frozen=True)
class Survivors(Body):
    """Coordinator: the sites whose vectors are in the sum, with the vectors' hashes."""

    kind = Kind.SURVIVORS
    peers_hash: bytes
    vector_hashes: Mapping[int, bytes]

    def encode(self) -> bytes:
        """See `Body`."""
        return self.peers_hash + pack_by_site(self.vector_hashes)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.take(HASH_BYTES), reader.by_site(HASH_BYTES))


@dataclass(frozen=True)
class Confirm(Body):
    """Site: the one list of survivors that it has seen; `ledger` is its statement after the round's charge."""

    kind = Kind.CONFIRM
    list_hash: bytes
    ledger: bytes = b""

    def encode(self) -> bytes:
        """See `Body`."""
        return self.list_hash + _stated(self.ledger)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.take(HASH_BYTES), _statement(reader))


@dataclass(frozen=True)
class ConfirmList(Body):
    """Coordinator: the sites' signed Confirm messages."""

    kind = Kind.CONFIRM_LIST
    confirmed: tuple[bytes, ...]

    def encode(self) -> bytes:
        """See `Body`."""
        return pack_all(self.confirmed)

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.packets(MOST_CONFIRM_BYTES))


class Revealed(enum.IntEnum):
    """Which secret of a peer a share belongs to: a survivor's seed or a lost site's masking key."""

    SEED = 0
    KEY = 1


@dataclass(frozen=True)
class Reveal(Body):
    """Site: of every neighbour, itself among them, one share of one secret."""

    kind = Kind.REVEAL
    list_hash: bytes
    shares: Mapping[int, tuple[Revealed, bytes]]

    def encode(self) -> bytes:
        """See `Body`."""
        return self.list_hash + pack_by_site(
            {site: bytes([which]) + share for site, (which, share) in self.shares.items()}
        )

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        list_hash, shares = reader.take(HASH_BYTES), reader.by_site(1 + SHARE_BYTES)
        if any(share[0] > Revealed.KEY for share in shares.values()):
            raise MalformedMessage("a revealed share is of no kind")
        return cls(list_hash, {site: (Revealed(share[0]), share[1:]) for site, share in shares.items()})


@dataclass(frozen=True)
class Refuse(Body):
    """Site: it sits this attempt out; `code` is a fixed word of `common/errors.py`."""

    kind = Kind.REFUSE
    code: str

    def encode(self) -> bytes:
        """See `Body`."""
        code = self.code.encode()
        return bytes([len(code)]) + code

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        code = reader.take(reader.number(1))
        if not 1 <= len(code) <= 80 or not all(byte in _CODE for byte in code):
            raise MalformedMessage("a refusal's code is no fixed word")
        return cls(code.decode())


_CODE = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_:"


@dataclass(frozen=True)
class Complaint(Body):
    """Site: the sealed shares of another site did not authenticate."""

    kind = Kind.COMPLAINT
    about: int
    keys_hash: bytes

    def encode(self) -> bytes:
        """See `Body`."""
        return self.about.to_bytes(2, "little") + self.keys_hash

    @classmethod
    def parse(cls, reader: Reader) -> Self:
        """See `Body`."""
        return cls(reader.number(2), reader.take(HASH_BYTES))


def _stated(ledger: bytes) -> bytes:
    """A statement of a ledger, or none."""
    return bytes([bool(ledger)]) + ledger


def _statement(reader: Reader) -> bytes:
    """What `_stated` wrote."""
    there = reader.number(1)
    if there > 1:
        raise MalformedMessage("a message holds neither a statement of a ledger nor none")
    return reader.take(STATEMENT_BYTES * there)


_BODIES: dict[int, type[Body]] = {
    kind.kind: kind
    for kind in (
        RoundStart,
        Advertise,
        KeyList,
        Shares,
        ShareForward,
        Masked,
        Survivors,
        Confirm,
        ConfirmList,
        Reveal,
        Refuse,
        Complaint,
    )
}


@dataclass(frozen=True)
class Message:
    """A message whose signature holds; `raw` is all of it."""

    turn: Turn
    sender: int
    body: Any
    raw: bytes

    @property
    def signature(self) -> bytes:
        """The last 64 bytes, which stand for the whole message in a transcript."""
        return self.raw[-SIGNATURE_BYTES:]


def encode(identity: Identity, turn: Turn, sender: int, body: Body) -> bytes:
    """A signed message."""
    head = _HEADER.pack(VERSION, body.kind, turn.federation, turn.epoch, turn.round, turn.attempt, sender)
    content = head + body.encode()
    return content + identity.sign(_LABEL, content)


def read(data: bytes, key_of: Callable[[int], bytes], *, most_bytes: int = MOST_BYTES) -> Message:
    """The message in `data`; `key_of` gives a sender's Ed25519 key or raises.

    The length is checked before the signature, and the signature before the body is looked at.

    Raises:
        MalformedMessage: it is cut, too long, of another version or not canonical.
        SignatureRefused: it is not signed by its sender.
        SecureSumError: what `key_of` raises for a sender that may not speak.
    """
    if len(data) < _HEADER.size + SIGNATURE_BYTES:
        raise MalformedMessage("a message is cut")
    if len(data) > most_bytes:
        raise MalformedMessage(f"a message has {len(data)} bytes and may have {most_bytes}")
    version, kind, federation, epoch, number, attempt, sender = _HEADER.unpack_from(data)
    if version != VERSION or kind not in _BODIES:
        raise MalformedMessage(f"a message is of version {version} and type {kind}; both sides need one version")
    content, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    verify(key_of(sender), _LABEL, content, signature)
    reader = Reader(memoryview(data)[_HEADER.size : -SIGNATURE_BYTES])
    body = _BODIES[kind].parse(reader)
    reader.end()
    return Message(Turn(federation, epoch, number, attempt), sender, body, data)
