"""An institution's long-term signing key (Ed25519) and what is done with it: sign, verify, compare by phone."""

import hashlib
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import SignatureRefused
from common.randomness import system_bytes

__all__ = ["PUBLIC_BYTES", "SIGNATURE_BYTES", "Identity", "fingerprint", "verify"]

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64

# Keys, confirmations and other small messages; lists and vectors come once, or are long.
MOST_KEPT_BYTES = 512


class Identity:
    """A private key. What is signed is the label, a zero byte and the data, so no signature serves under two labels."""

    def __init__(self, private: bytes) -> None:
        """From 32 private bytes, which `Identity.generate()` draws."""
        if len(private) != PUBLIC_BYTES:
            raise SignatureRefused(f"a private key has {PUBLIC_BYTES} bytes, not {len(private)}")
        self._key = Ed25519PrivateKey.from_private_bytes(private)

    @classmethod
    def generate(cls) -> "Identity":
        """A new key from the operating system."""
        return cls(system_bytes(PUBLIC_BYTES))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """The private key, 32 bytes, to be kept where no one else reads."""
        return self._key.private_bytes_raw()

    def sign(self, label: bytes, data: bytes) -> bytes:
        """A signature (RFC 8032) of 64 bytes."""
        return self._key.sign(_labelled(label, data))

    def __repr__(self) -> str:
        return f"Identity({fingerprint(self.public)})"


def verify(public: bytes, label: bytes, data: bytes, signature: bytes) -> None:
    """Check a signature of `Identity.sign`.

    Raises:
        SignatureRefused: it is not that key's over this label and these data.
    """
    check = _verified if len(data) <= MOST_KEPT_BYTES else _verified.__wrapped__
    try:
        check(public, label, bytes(data), bytes(signature))
    except (InvalidSignature, ValueError) as error:
        raise SignatureRefused("a signature does not verify") from error


@lru_cache(maxsize=8192)
def _verified(public: bytes, label: bytes, data: bytes, signature: bytes) -> None:
    """Verify, and remember success under everything that went in. Simulated sites share a process and would verify
    each other's small messages anew for every site: a third of a round of a hundred. A failure is not remembered."""
    Ed25519PublicKey.from_public_bytes(public).verify(signature, _labelled(label, data))


def fingerprint(public: bytes) -> str:
    """What two people compare on the phone: 128 bits of SHA-256 in eight groups of four hexadecimal digits."""
    text = hashlib.sha256(b"coadapt identity\0" + public).hexdigest()[:32]
    return " ".join(text[place : place + 4] for place in range(0, 32, 4))


def _labelled(label: bytes, data: bytes) -> bytes:
    if not label or b"\0" in label:
        raise SignatureRefused("a label must not be empty or hold a zero byte")
    return label + b"\0" + data
