"""The three papers that institutions and the coordinator exchange before a federation: JSON files, each signed.

    enrolment    a site's public keys, from the site to the coordinator
    invitation   roster, manifest, address and certificate, from the coordinator to every site
    consent      a site's signature under the roster, from the site to the coordinator

Nothing in them is secret. That a paper is the other's own is what people compare by phone: the
fingerprint of a key, the digest of a roster.
"""

import hashlib
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import EnrolmentError
from common.identity import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, verify
from common.roster import SignedRoster

__all__ = ["Consent", "Enrolment", "Invitation", "read_paper", "spoken"]

_KEY = rf"^[0-9a-f]{{{2 * PUBLIC_BYTES}}}$"
_SIGNATURE = rf"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}$"
_DIGEST = r"^[0-9a-f]{64}$"
_ENROLMENT = b"coadapt enrolment 1"
_INVITATION = b"coadapt invitation 1"


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2) + "\n"


Paper = TypeVar("Paper", bound=_Paper)


class Enrolment(_Paper):
    """A site's public keys. `node_key` is the OpenSSH line of the key with which Flower knows the site's node."""

    paper: Literal["enrolment"] = "enrolment"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    public_key: str = Field(pattern=_KEY)
    node_key: str = Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{100,300}$")
    signature: str = Field(pattern=_SIGNATURE)

    @classmethod
    def of(cls, identity: Identity, name: str, node_key: str) -> "Enrolment":
        """Signed by the site itself, so that nobody can pair its name with another's node."""
        signature = identity.sign(_ENROLMENT, _said(name, node_key)).hex()
        return cls(name=name, public_key=identity.public.hex(), node_key=node_key, signature=signature)

    def require(self) -> None:
        """Raises SignatureRefused unless the paper is signed by the key that it names."""
        key, signature = bytes.fromhex(self.public_key), bytes.fromhex(self.signature)
        verify(key, _ENROLMENT, _said(self.name, self.node_key), signature)


class Invitation(_Paper):
    """What a site needs to join: `roster` and `manifest` are the files' texts, `address` is HOST:PORT of the gate.

    `certificate` is the authority (PEM) that the gate's certificate must come from; empty where the system's
    authorities know it.
    """

    paper: Literal["invitation"] = "invitation"
    address: str = Field(pattern=r"^[A-Za-z0-9.\-\[\]:]{1,255}:[0-9]{1,5}$")
    certificate: str = Field(max_length=65_536)
    manifest: str = Field(max_length=1_000_000)
    roster: str = Field(max_length=4_000_000)
    signature: str = Field(pattern=_SIGNATURE)

    @classmethod
    def of(cls, identity: Identity, signed: SignedRoster, *, address: str, certificate: str, manifest: str) -> Self:
        """Signed by the coordinator, so that the digest of the roster, which people compare and which holds the
        coordinator's key, stands for manifest, address and certificate too."""
        said = _offered(address, certificate, manifest, signed.roster.digest())
        return cls(
            address=address,
            certificate=certificate,
            manifest=manifest,
            roster=signed.to_json(),
            signature=identity.sign(_INVITATION, said).hex(),
        )

    def require(self, coordinator: bytes, roster_digest: bytes) -> None:
        """Raises SignatureRefused unless the coordinator with this key signed it for the roster with this digest."""
        said = _offered(self.address, self.certificate, self.manifest, roster_digest)
        verify(coordinator, _INVITATION, said, bytes.fromhex(self.signature))


class Consent(_Paper):
    """A site's signature (hex) under the roster with this digest (hex)."""

    paper: Literal["consent"] = "consent"
    site: int = Field(ge=0, lt=2048)
    name: str
    roster_sha256: str = Field(pattern=_DIGEST)
    signature: str = Field(pattern=_SIGNATURE)


def read_paper(kind: type[Paper], text: str | bytes, *, source: str) -> Paper:
    """A paper of this kind; `source` is the file's name for the error.

    Raises:
        EnrolmentError: it is none.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise EnrolmentError(
            f"{source} is no {kind.__name__.lower()} that this version reads: {place}: {first['msg']};"
            " ask whoever sent it for a new one"
        ) from error


def spoken(digest: bytes) -> str:
    """The first 128 bits of a digest as people read them out: eight groups of four hexadecimal digits."""
    text = digest.hex()[:32]
    return " ".join(text[place : place + 4] for place in range(0, 32, 4))


def _offered(address: str, certificate: str, manifest: str, roster_digest: bytes) -> bytes:
    parts = [hashlib.sha256(text.encode()).digest() for text in (address, certificate, manifest)]
    return hashlib.sha256(b"".join([*parts, roster_digest])).digest()


def _said(name: str, node_key: str) -> bytes:
    return hashlib.sha256(f"{name}\n{node_key}".encode()).digest()
