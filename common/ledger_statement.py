"""A site's signed word for its ledger's end, which others keep and hand back: a restored copy of the ledger then shows.

    version 1 | federation 16 | site 2 | number 8 | digest 32 | seal 32 | signature 64

Integers are little-endian. Whoever keeps one verifies it first, so nobody can make a site stop by inventing an end. The
seal is a keyed digest that the ledger itself can make and nobody else: it ties the statement to that ledger, and tells
an institution that changed its key, and took its ledger along, that the statement is its own.
"""

import struct
from dataclasses import dataclass
from typing import Self

from common.errors import MalformedMessage, SignatureRefused, WrongContext
from common.identity import SIGNATURE_BYTES, Identity, verify
from common.roster import FEDERATION_BYTES, Roster

__all__ = ["SEAL_BYTES", "STATEMENT_BYTES", "LedgerStatement"]

VERSION = 1
SEAL_BYTES = 32
_LABEL = b"coadapt ledger 1"
_BODY = struct.Struct(f"<B{FEDERATION_BYTES}sHQ32s{SEAL_BYTES}s")
STATEMENT_BYTES = _BODY.size + SIGNATURE_BYTES
_NOTHING = bytes(32)


@dataclass(frozen=True)
class LedgerStatement:
    """The ledger of `site` had `number` entries, the last with this `digest` (hex, empty without entries)."""

    federation: bytes
    site: int
    number: int
    digest: str
    seal: bytes
    raw: bytes

    @classmethod
    def of(cls, identity: Identity, *, federation: bytes, site: int, number: int, digest: str, seal: bytes) -> Self:
        """Signed by the site."""
        body = _BODY.pack(VERSION, federation, site, number, bytes.fromhex(digest) if number else _NOTHING, seal)
        return cls(federation, site, number, digest, seal, body + identity.sign(_LABEL, body))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What stands in it; nothing is verified.

        Raises:
            MalformedMessage: it is none.
        """
        if len(data) != STATEMENT_BYTES:
            raise MalformedMessage(f"a statement of a ledger has {STATEMENT_BYTES} bytes, found {len(data)}")
        version, federation, site, number, digest, seal = _BODY.unpack_from(data)
        if version != VERSION or (not number and digest != _NOTHING):
            raise MalformedMessage("a statement of a ledger is of another version, or of no entries with a digest")
        return cls(federation, site, number, digest.hex() if number else "", seal, bytes(data))

    @classmethod
    def verified(cls, data: bytes, roster: Roster, site: int) -> Self:
        """The statement of a site of the roster.

        Raises:
            MalformedMessage: it is none.
            WrongContext: it is of another federation or site.
            SignatureRefused: that site has not signed it.
        """
        found = cls.parse(data)
        if (found.federation, found.site) != (roster.federation, site):
            raise WrongContext(f"a statement of a ledger of another federation, or of another site than {site}")
        found.require_signed(roster.public_key_of(site))
        return found

    def require_signed(self, public: bytes) -> None:
        """Raises SignatureRefused unless `public` signed it."""
        try:
            verify(public, _LABEL, self.raw[: _BODY.size], self.raw[_BODY.size :])
        except SignatureRefused as error:
            raise SignatureRefused(f"a statement of a ledger that site {self.site} has not signed") from error
