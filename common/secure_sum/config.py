"""What one round is agreed to be: the configuration that the coordinator sends and every site compares with its own."""

import enum
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import ClassVar

from pydantic import ConfigDict

from common.codec.vector import VectorSpec
from common.errors import MalformedMessage, PolicyRefused
from common.roster import Roster
from common.secure_sum.graph import Degree, choose_degree
from common.secure_sum.primitives import HASH_BYTES, Label, digest
from common.secure_sum.thresholds import least_survivors, threshold

__all__ = ["Agreed", "RoundConfig", "Rounding", "SumPolicy", "Weights", "round_context"]

NO_DP = bytes(HASH_BYTES)


class Weights(enum.IntEnum):
    """How sites weigh in the sum."""

    EQUAL = 0
    PUBLIC = 1  # by factors that the roster's institutions know
    SUMMED = 2  # by private factors, whose sum is one of the extras


class Rounding(enum.IntEnum):
    """How values become levels."""

    STOCHASTIC = 0


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a site itself knows about the round, from the manifest and the adapter that it received."""

    spec: VectorSpec
    """The vector."""
    model_hash: bytes
    """SHA-256 of the adapter that training starts from, computed by the site."""
    manifest_hash: bytes
    """SHA-256 of the manifest."""
    dp_digest: bytes = NO_DP
    """Digest of the privacy mechanism and its parameters; zeros without privacy."""
    weights: Weights = Weights.EQUAL
    """How sites weigh in the sum."""


@dataclass(frozen=True, kw_only=True)
class SumPolicy:
    """What a site insists on, whatever the coordinator says. Defaults are those of a careful site."""

    min_sites: int = 3
    """Fewest sites in a sum that this site is part of."""
    max_colluding: int = 0
    """So many sites may collude with the coordinator; the roster may ask for more."""
    least_honest: int = 2
    """Fewest honest sites in a sum, this one among them."""
    noised_at_site: bool = False
    """The vector is differentially private by itself, so that masking the identical one anew tells nothing more about
    the records. Without it, a round in which the vector left is never run again: a second sum over other survivors
    would give one site's vector by subtraction."""
    unsafe_two_sites: bool = False
    """Allow a sum over two sites, which tells each of them the other's vector."""

    def __post_init__(self) -> None:
        fewest = 2 if self.unsafe_two_sites else 3
        if self.min_sites < fewest or self.least_honest < 2 or self.max_colluding < 0:
            raise PolicyRefused(f"a site's least crowd must be {fewest} or more, with two or more honest sites")


_FIELDS = struct.Struct("<HHHHHHHHQHHBBBI32s32s32s32s")


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """All numbers of a round, in the order of their canonical bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")

    sites: int
    """n, how many are invited."""
    threshold: int
    """t, how many must confirm one list of survivors."""
    max_colluding: int
    """c."""
    least_honest: int
    """h."""
    min_sites: int
    """Least crowd."""
    neighbours: int
    """k; 0 for everybody."""
    share_threshold: int
    """Shares that open a secret; t in a complete graph."""
    most_gone: int
    """See `graph.Degree`."""
    words: int
    """Length of the vector in 64-bit words."""
    bits: int
    """Bits of a value."""
    lane_bits: int
    """Bits of a lane."""
    weights: int
    """See `Weights`."""
    rounding: int
    """See `Rounding`."""
    version: int
    """Of this layout: 1."""
    deadline: int
    """Seconds that a phase may take; the coordinator goes on without those who are late."""
    spec_digest: bytes
    """Digest of the whole vector spec, ranges included."""
    schema_digest: bytes
    """Digest of names and shapes."""
    manifest_hash: bytes
    """SHA-256 of the manifest."""
    dp_digest: bytes
    """See `Agreed`."""

    @classmethod
    def for_round(
        cls,
        roster: Roster,
        invited: Sequence[int],
        agreed: Agreed,
        *,
        least_honest: int = 2,
        min_sites: int = 0,
        deadline: int = 600,
    ) -> "RoundConfig":
        """The configuration that follows from roster, invited sites and what is agreed; `min_sites` may ask for more
        than the roster.

        Raises:
            PolicyRefused: so few sites cannot form a sum under the roster's rules, or the lanes hold fewer.
        """
        count, colluding, least = len(invited), roster.max_colluding, max(roster.min_sites, min_sites)
        required = threshold(count, colluding)
        fewest = least_survivors(required, min_sites=least, least_honest=least_honest, colluding=colluding)
        degree = choose_degree(count, colluding, min(fewest, count))
        config = cls(
            sites=count,
            threshold=required,
            max_colluding=colluding,
            least_honest=least_honest,
            min_sites=least,
            neighbours=degree.neighbours,
            share_threshold=degree.share_threshold,
            most_gone=degree.most_gone,
            words=agreed.spec.words,
            bits=agreed.spec.bits,
            lane_bits=agreed.spec.lanes.lane_bits,
            weights=agreed.weights,
            rounding=Rounding.STOCHASTIC,
            version=1,
            deadline=deadline,
            spec_digest=agreed.spec.digest(),
            schema_digest=agreed.spec.schema_digest(),
            manifest_hash=agreed.manifest_hash,
            dp_digest=agreed.dp_digest,
        )
        config.require(roster, SumPolicy(min_sites=2, unsafe_two_sites=True), agreed)
        return config

    @property
    def least_survivors(self) -> int:
        """Fewest sites in the sum."""
        return least_survivors(
            self.threshold, min_sites=self.min_sites, least_honest=self.least_honest, colluding=self.max_colluding
        )

    @property
    def degree(self) -> Degree:
        """The graph of masks and shares."""
        return Degree(self.neighbours, self.share_threshold, self.most_gone)

    def canonical(self) -> bytes:
        """Fixed-width fields in order, little-endian."""
        return _FIELDS.pack(*astuple(self))

    @classmethod
    def parse(cls, data: bytes) -> "RoundConfig":
        """From `canonical`.

        Raises:
            MalformedMessage: it has another length or version.
        """
        if len(data) != _FIELDS.size:
            raise MalformedMessage(f"a round's configuration has {_FIELDS.size} bytes, not {len(data)}")
        config = cls(**dict(zip((field.name for field in fields(cls)), _FIELDS.unpack(data), strict=True)))
        if config.version != 1:
            raise MalformedMessage(f"a round's configuration is of version {config.version}; both sides need version 1")
        return config

    def digest(self) -> bytes:
        """SHA-256, 32 bytes."""
        return digest(Label.CONFIG, self.canonical())

    def require(self, roster: Roster, policy: SumPolicy, agreed: Agreed) -> None:
        """Refuse whatever is looser than the roster or the site's policy, or not what the site knows to be agreed.

        Raises:
            PolicyRefused: names the first number that is.
        """
        colluding = max(policy.max_colluding, roster.max_colluding)
        lowest = (
            ("max_colluding", self.max_colluding, colluding),
            ("threshold", self.threshold, threshold(self.sites, max(colluding, self.max_colluding))),
            ("least_honest", self.least_honest, policy.least_honest),
            ("min_sites", self.min_sites, max(policy.min_sites, roster.min_sites)),
            ("sites that survive", self.sites, self.least_survivors),
        )
        for name, found, least in lowest:
            if found < least:
                raise PolicyRefused(f"the round's {name} is {found} and must be {least} or more; nothing was sent")
        if self.degree != self._safe_degree():
            raise PolicyRefused(f"{self.sites} sites need another graph of masks than {self.degree}; nothing was sent")
        equal: tuple[tuple[str, int | bytes, int | bytes], ...] = (
            ("words", self.words, agreed.spec.words),
            ("bits", self.bits, agreed.spec.bits),
            ("lane bits", self.lane_bits, agreed.spec.lanes.lane_bits),
            ("weights", self.weights, agreed.weights),
            ("rounding", self.rounding, Rounding.STOCHASTIC),
            ("vector spec", self.spec_digest, agreed.spec.digest()),
            ("schema", self.schema_digest, agreed.spec.schema_digest()),
            ("manifest", self.manifest_hash, agreed.manifest_hash),
            ("privacy mechanism", self.dp_digest, agreed.dp_digest),
        )
        for name, told, known in equal:
            if told != known:
                raise PolicyRefused(f"the round's {name} is not the one that this site knows; nothing was sent")
        if self.sites > agreed.spec.sites:
            raise PolicyRefused(f"{self.sites} sites are invited and the lanes hold sums over {agreed.spec.sites}")

    def _safe_degree(self) -> Degree:
        degree = choose_degree(self.sites, self.max_colluding, self.least_survivors)
        return degree if degree.neighbours else Degree(0, self.threshold, 0)


def round_context(roster: Roster, *, round_number: int, attempt: int, model_hash: bytes, config: RoundConfig) -> bytes:
    """ctx: the hash that every key of the round is derived under, 32 bytes."""
    turn = struct.pack("<IQH", roster.epoch, round_number, attempt)
    return digest(Label.CONTEXT, roster.digest(), turn, model_hash, config.digest())
