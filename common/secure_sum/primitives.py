"""The cryptographic primitives of the secure sum, each one call into `cryptography`. No protocol here.

Every key and digest is made under a label of its own (`Label`) and from parts that carry their lengths, so that no two
uses can meet. Failures say what failed and nothing more.
"""

import enum
import hashlib
from collections.abc import Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import KeyRefused, ShareRefused
from common.randomness import system_bytes

__all__ = [
    "HASH_BYTES",
    "KEY_BYTES",
    "NONCE_BYTES",
    "TAG_BYTES",
    "Keystream",
    "Label",
    "PrivateKey",
    "derive",
    "digest",
    "hkdf_sha256",
    "loaded",
    "new_private_key",
    "public_key",
    "seal",
    "shared_secret",
    "unseal",
]

PrivateKey = X25519PrivateKey

KEY_BYTES = 32
HASH_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16

_ZEROS = memoryview(bytes(1 << 18))


@enum.unique
class Label(enum.StrEnum):
    """What a key or a digest is for; distinct by construction."""

    ROSTER = "coadapt roster/1"
    SPEC = "secsum/1 vector spec"
    CONFIG = "secsum/1 config"
    CONTEXT = "secsum/1 ctx"
    KEYS = "secsum/1 keys"
    PEERS = "secsum/1 peers"
    SURVIVORS = "secsum/1 survivors"
    VECTOR = "secsum/1 vector"
    BODY = "secsum/1 body"
    COMMITMENT = "secsum/1 vector commitment"
    SEED_COMMITMENT = "secsum/1 seed commitment"
    GRAPH = "secsum/1 graph"
    SHARE_KEY = "secsum/1 share key"
    PAIR_MASK = "secsum/1 pair mask"
    SELF_MASK = "secsum/1 self mask"
    CHECKSUM_ODD = "secsum/1 checksum odd"
    CHECKSUM_ANY = "secsum/1 checksum any"
    ROUNDING = "coadapt rounding/1"
    RUN_ROUNDING = "coadapt rounding of a run/1"


def _framed(label: Label, parts: tuple[bytes | memoryview, ...]) -> Iterator[bytes | memoryview]:
    """Label and parts, each after its length in 8 bytes: two different inputs never give the same bytes."""
    for part in (label.value.encode(), *parts):
        yield len(part).to_bytes(8, "little")
        yield part


def digest(label: Label, *parts: bytes | memoryview) -> bytes:
    """SHA-256 over the label and the parts, 32 bytes."""
    state = hashlib.sha256()
    for piece in _framed(label, parts):
        state.update(piece)
    return state.digest()


def hkdf_sha256(secret: bytes, *, salt: bytes | None, info: bytes, length: int) -> bytes:
    """HKDF with SHA-256 (RFC 5869)."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret)


def derive(secret: bytes, label: Label, *context: bytes) -> bytes:
    """A 32-byte key from a secret for one use alone: HKDF-SHA256 whose info is the label and the context."""
    return hkdf_sha256(secret, salt=None, info=b"".join(_framed(label, context)), length=KEY_BYTES)


def new_private_key() -> bytes:
    """A fresh X25519 private key, 32 bytes from the operating system."""
    return system_bytes(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """The X25519 public key (RFC 7748) of a private key, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def loaded(private: bytes) -> PrivateKey:
    """A private key for many shared secrets; loading it takes as long as one of them."""
    return X25519PrivateKey.from_private_bytes(private)


def shared_secret(private: bytes | PrivateKey, public: bytes) -> bytes:
    """X25519 (RFC 7748, section 6.1), 32 bytes.

    Raises:
        KeyRefused: the public key has low order, so that the shared secret would be zero.
    """
    try:
        key = loaded(private) if isinstance(private, bytes) else private
        shared = key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise KeyRefused("a one-time key gives no shared secret; the site that sent it is left out") from error
    if not any(shared):
        raise KeyRefused("a one-time key gives no shared secret; the site that sent it is left out")
    return shared


def seal(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439, section 2.8): ciphertext and 16 bytes of tag. A pair (key, nonce) serves once."""
    return ChaCha20Poly1305(key).encrypt(nonce, plaintext, associated)


def unseal(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What was sealed.

    Raises:
        ShareRefused: it does not authenticate.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, associated)
    except InvalidTag as error:
        raise ShareRefused("a sealed share does not authenticate") from error


class Keystream:
    """The AES-256-CTR keystream of a key (NIST SP 800-38A, section 6.5). A key serves once, from counter block zero."""

    def __init__(self, key: bytes, counter: bytes = bytes(16)) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def into(self, buffer: memoryview) -> None:
        """Fill a buffer of at most 262,144 bytes with the next of them."""
        self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        pieces = []
        while count:
            size = min(count, len(_ZEROS))
            pieces.append(self._encryptor.update(_ZEROS[:size]))
            count -= size
        return b"".join(pieces)
