"""What a site remembers: for good, over restarts (`SiteMemory`), and within one attempt, in memory alone
(`SiteState`).
"""

import enum
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.errors import MalformedMessage, OutOfTurn, ReplayRefused, RerunRefused, WrongContext
from common.secure_sum.config import RoundConfig
from common.secure_sum.messages import Turn

__all__ = ["MemoryStore", "PeerKeys", "Phase", "SiteMemory", "SiteState"]

T = TypeVar("T")

_AS_HEX = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex", extra="forbid")


@dataclass(frozen=True)
class SiteMemory:
    """What must be on the disk before an answer leaves: the newest attempt answered and the vector let go last."""

    __pydantic_config__: ClassVar[ConfigDict] = _AS_HEX

    federation: bytes
    newest: tuple[int, int, int] = (-1, -1, -1)
    """(epoch, round, attempt) of the newest RoundStart that was answered."""
    released_in: tuple[int, int] = (-1, -1)
    """(epoch, round) in which a vector left last."""
    released: bytes = b""
    """Digest of that vector before checksum and masks."""

    def started(self, turn: Turn, *, noised_at_site: bool) -> "SiteMemory":
        """With an attempt begun.

        Raises:
            WrongContext: it is of another federation.
            ReplayRefused: it is not newer than the newest.
            RerunRefused: a vector without noise of its own has left in this round already.
        """
        attempt = (turn.epoch, turn.round, turn.attempt)
        if turn.federation != self.federation:
            raise WrongContext("a round of another federation; nothing was sent")
        if attempt <= self.newest:
            raise ReplayRefused(
                f"epoch {turn.epoch}, round {turn.round}, attempt {turn.attempt} is not newer than what was answered"
                f" last, {self.newest}; a coordinator goes on with a higher number"
            )
        if self.released_in == attempt[:2] and not noised_at_site:
            raise RerunRefused(
                f"a vector has left in round {turn.round} already; a second sum in one round would give single sites"
                " by subtraction, so go on with the next round"
            )
        return replace(self, newest=attempt)

    def letting_go(self, turn: Turn, vector: bytes) -> "SiteMemory":
        """With a vector (its digest) let go.

        Raises:
            OutOfTurn: a newer attempt has begun since.
            RerunRefused: another one left in this round already.
        """
        place = (turn.epoch, turn.round)
        if self.newest != (*place, turn.attempt):
            raise OutOfTurn("another attempt has begun since; its vector alone may leave")
        if self.released_in == place and self.released != vector:
            raise RerunRefused(
                f"another vector has left in round {turn.round} already; only the identical one may be masked anew"
            )
        return replace(self, released_in=place, released=vector)

    def to_bytes(self) -> bytes:
        """For the disk, through `common/durable.py`."""
        return TypeAdapter(SiteMemory).dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SiteMemory":
        """From `to_bytes`; MalformedMessage if it is damaged."""
        return _parsed(SiteMemory, data)


class MemoryStore(Protocol):
    """Where a site's memory lies; one for all attempts, so that none works on an older copy."""

    def load(self) -> SiteMemory:
        """What was saved last."""

    def save(self, memory: SiteMemory) -> None:
        """Return when it will survive a crash."""


class Phase(enum.StrEnum):
    """What a site waits for."""

    KEYS = "keys"
    SHARES = "shares"
    VECTOR = "vector"
    SURVIVORS = "survivors"
    CONFIRMATIONS = "confirmations"
    OVER = "over"


@dataclass(frozen=True)
class PeerKeys:
    """A site's one-time keys; its statement of its ledger, and the one that it hands back, where it has them."""

    __pydantic_config__: ClassVar[ConfigDict] = _AS_HEX

    site: int
    sealing: bytes
    masking: bytes
    ledger: bytes = b""
    handed_back: bytes = b""


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """One site in one attempt. It holds one-time keys: never write it to a disk in the field.

    `to_bytes` exists for simulation, where a site moves between processes. A state is used once: whoever feeds two
    messages to one state could have it answer both. `site.SiteRound` sees to that.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _AS_HEX

    phase: Phase
    turn: Turn
    site: int
    context: bytes
    config: RoundConfig
    invited: tuple[int, ...]
    advertised: bytes = b""
    """The own Advertise message."""
    sealing_key: bytes = b""
    masking_key: bytes = b""
    seed: bytes = b""
    keys: tuple[PeerKeys, ...] = ()
    """U1."""
    mask_keys: tuple[tuple[int, bytes], ...] = ()
    """Key of the mask with each neighbour."""
    keys_hash: bytes = b""
    neighbours: tuple[int, ...] = ()
    peers: tuple[int, ...] = ()
    """U2."""
    peers_hash: bytes = b""
    shares: tuple[tuple[int, bytes, bytes], ...] = ()
    """(site, share of its seed, share of its masking key) of each neighbour in U2 and of itself."""
    vector_hash: bytes = b""
    salt: bytes = b""
    """Opens the commitment to the plain vector, to an auditor in a dispute; whoever logs vectors keeps it with them."""
    survivors: tuple[int, ...] = ()
    """U3."""
    list_hash: bytes = b""

    def over(self) -> "SiteState":
        """Without keys, seed and shares."""
        return SiteState(
            phase=Phase.OVER,
            turn=self.turn,
            site=self.site,
            context=self.context,
            config=self.config,
            invited=self.invited,
            keys_hash=self.keys_hash,
            salt=self.salt,
            survivors=self.survivors,
            list_hash=self.list_hash,
        )

    def to_bytes(self) -> bytes:
        """For another process of one simulation."""
        return TypeAdapter(SiteState).dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SiteState":
        """From `to_bytes`; MalformedMessage if it is damaged."""
        return _parsed(SiteState, data)

    def __repr__(self) -> str:
        return f"SiteState(site {self.site}, {self.phase})"


def _parsed(kind: type[T], data: bytes) -> T:
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        raise MalformedMessage(f"a stored {kind.__name__} is damaged") from error
