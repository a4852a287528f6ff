"""The institutions of one federation and their keys, signed by each of them.

The coordinator relays every message, so nothing that it says about who is in can be believed. A roster is accepted only
with a signature of every institution in it over its hash, and only if that hash is the one which a person compared by
phone. What is signed is a canonical binary form; the JSON file is for passing it on.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import PolicyRefused, RosterRefused, SignatureRefused
from common.identity import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, verify
from common.secure_sum.primitives import Label, digest
from common.secure_sum.thresholds import least_survivors, threshold

__all__ = ["FEDERATION_BYTES", "MOST_INSTITUTIONS", "Institution", "Roster", "SignedRoster", "verify_roster"]

FEDERATION_BYTES = 16
MOST_INSTITUTIONS = 2048
LEAST_INSTITUTIONS = 3
MOST_NAME_BYTES = 200
_SIGNED = Label.ROSTER.value.encode()


@dataclass(frozen=True, kw_only=True)
class Institution:
    """One entry: `site` is its number in all messages, `name` what people call it, `public` its Ed25519 key."""

    site: int
    name: str
    public: bytes


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who is in, under which rules. A changed roster has a larger epoch."""

    federation: bytes
    """Random name of the federation, 16 bytes."""
    epoch: int
    """Number of this roster in the federation."""
    coordinator: bytes
    """Ed25519 key of the coordinator."""
    min_sites: int
    """Fewest sites in any sum."""
    max_colluding: int
    """Most sites that may work together with the coordinator."""
    institutions: tuple[Institution, ...]
    """In the order of their numbers."""

    def canonical(self) -> bytes:
        """The bytes that are signed and hashed; fixed order, every length explicit."""
        parts = [
            self.federation,
            struct.pack("<IHHH", self.epoch, self.min_sites, self.max_colluding, len(self.institutions)),
            self.coordinator,
        ]
        for entry in self.institutions:
            name = entry.name.encode()
            parts += [struct.pack("<HH", entry.site, len(name)), name, entry.public]
        return b"".join(parts)

    def digest(self) -> bytes:
        """SHA-256 that institutions sign and people compare, 32 bytes."""
        return digest(Label.ROSTER, self.canonical())

    def public_key_of(self, site: int) -> bytes:
        """The key of a site.

        Raises:
            RosterRefused: there is no such site.
        """
        for entry in self.institutions:
            if entry.site == site:
                return entry.public
        raise RosterRefused(f"there is no site {site} in the roster")

    def site_of(self, public: bytes) -> int:
        """The number of the site with this key.

        Raises:
            RosterRefused: it is in no entry.
        """
        for entry in self.institutions:
            if entry.public == public:
                return entry.site
        raise RosterRefused("this institution's own key is not in the roster")

    def sign(self, identity: Identity) -> bytes:
        """An institution's signature over the roster's hash."""
        return identity.sign(_SIGNED, self.digest())

    def require_signature(self, site: int, signature: bytes) -> None:
        """Raises SignatureRefused unless it is the site's over this roster, RosterRefused if there is no such site."""
        verify(self.public_key_of(site), _SIGNED, self.digest(), signature)


@dataclass(frozen=True, kw_only=True)
class SignedRoster:
    """A roster and the signatures by site number; not to be trusted before `verify_roster`."""

    roster: Roster
    signatures: Mapping[int, bytes] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file form."""
        roster = self.roster
        entries = [
            _Entry(
                site=entry.site,
                name=entry.name,
                public_key=entry.public.hex(),
                signature=self.signatures.get(entry.site, b"").hex(),
            )
            for entry in roster.institutions
        ]
        return _File(
            version=1,
            federation=roster.federation.hex(),
            epoch=roster.epoch,
            coordinator=roster.coordinator.hex(),
            min_sites=roster.min_sites,
            max_colluding=roster.max_colluding,
            institutions=entries,
        ).model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "SignedRoster":
        """From the file form; signatures are not looked at.

        Raises:
            RosterRefused: it is no such file.
        """
        try:
            file = _File.model_validate_json(text)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole"
            raise RosterRefused(f"the roster file cannot be read at {place}: {error.errors()[0]['msg']}") from error
        entries = tuple(
            Institution(site=entry.site, name=entry.name, public=bytes.fromhex(entry.public_key))
            for entry in file.institutions
        )
        roster = Roster(
            federation=bytes.fromhex(file.federation),
            epoch=file.epoch,
            coordinator=bytes.fromhex(file.coordinator),
            min_sites=file.min_sites,
            max_colluding=file.max_colluding,
            institutions=entries,
        )
        signatures = {entry.site: bytes.fromhex(entry.signature) for entry in file.institutions if entry.signature}
        return cls(roster=roster, signatures=signatures)


def verify_roster(signed: SignedRoster, *, own_key: bytes, pinned: bytes, unsafe_two_sites: bool = False) -> Roster:
    """The roster, if it may be used. `own_key` is the verifier's (the coordinator's or an institution's).

    `unsafe_two_sites` allows a federation of two, in which the sum tells each site the other's vector.

    Raises:
        RosterRefused: its hash is not the pinned one, an entry is repeated, missing or malformed, a signature is
            missing, foreign or wrong, the own key is absent, or its rules leave no threshold.
    """
    roster = signed.roster
    _require_form(roster, LEAST_INSTITUTIONS - 1 if unsafe_two_sites else LEAST_INSTITUTIONS)
    if roster.digest() != pinned:
        raise RosterRefused("the roster is not the one whose hash was compared; compare it again with the others")
    if own_key != roster.coordinator:
        roster.site_of(own_key)
    sites = {entry.site for entry in roster.institutions}
    if foreign := sorted(signed.signatures.keys() - sites):
        raise RosterRefused(f"the roster has a signature of site {foreign[0]}, which is not in it")
    for entry in roster.institutions:
        if entry.site not in signed.signatures:
            raise RosterRefused(f"site {entry.site} ({entry.name}) has not signed the roster; every one must")
        try:
            verify(entry.public, _SIGNED, pinned, signed.signatures[entry.site])
        except SignatureRefused as error:
            raise RosterRefused(f"the roster's signature of site {entry.site} ({entry.name}) is not its own") from error
    return roster


def _require_form(roster: Roster, fewest: int) -> None:
    entries, count = roster.institutions, len(roster.institutions)
    if not fewest <= count <= MOST_INSTITUTIONS:
        raise RosterRefused(f"a roster has {fewest} to {MOST_INSTITUTIONS} institutions, not {count}")
    if len(roster.federation) != FEDERATION_BYTES or not 0 <= roster.epoch < 2**32:
        raise RosterRefused("the roster's federation must have 16 bytes and its epoch 32 bits")
    keys = [roster.coordinator, *(entry.public for entry in entries)]
    if any(len(key) != PUBLIC_BYTES for key in keys) or len(set(keys)) != len(keys):
        raise RosterRefused("every key of the roster must have 32 bytes and be there once, the coordinator's too")
    sites = [entry.site for entry in entries]
    if sites != sorted(set(sites)) or not 0 <= sites[0] <= sites[-1] < MOST_INSTITUTIONS:
        raise RosterRefused(f"the roster's sites must be in order, each once, from 0 to {MOST_INSTITUTIONS - 1}")
    names = [entry.name for entry in entries]
    if len(set(names)) != count or not all(_is_name(name) for name in names):
        raise RosterRefused("every institution of the roster needs a printable name of its own, of 200 bytes at most")
    try:
        required = threshold(count, roster.max_colluding)
    except PolicyRefused as error:
        raise RosterRefused(f"the roster's rules do not fit: {error}") from error
    fewest_in_sum = least_survivors(
        required, min_sites=roster.min_sites, least_honest=2, colluding=roster.max_colluding
    )
    if not fewest <= roster.min_sites or fewest_in_sum > count:
        raise RosterRefused(
            f"the roster's least crowd must be {fewest} to {count} sites, not {roster.min_sites},"
            f" and {fewest_in_sum} would have to survive"
        )


def _is_name(name: str) -> bool:
    return name.isprintable() and name.strip() == name and 0 < len(name.encode()) <= MOST_NAME_BYTES


_HEX_KEY = rf"^[0-9a-f]{{{2 * PUBLIC_BYTES}}}$"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: int = Field(ge=0, lt=MOST_INSTITUTIONS)
    name: str
    public_key: str = Field(pattern=_HEX_KEY)
    signature: str = Field(pattern=rf"^([0-9a-f]{{{2 * SIGNATURE_BYTES}}})?$")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = Field(ge=1, le=1)
    federation: str = Field(pattern=rf"^[0-9a-f]{{{2 * FEDERATION_BYTES}}}$")
    epoch: int = Field(ge=0, lt=2**32)
    coordinator: str = Field(pattern=_HEX_KEY)
    min_sites: int = Field(ge=0, lt=2**16)
    max_colluding: int = Field(ge=0, lt=2**16)
    institutions: list[_Entry] = Field(max_length=MOST_INSTITUTIONS)
