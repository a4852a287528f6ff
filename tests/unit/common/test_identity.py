"""Signatures: one that was verified before says nothing about anything else."""

import pytest

from common.errors import SignatureRefused
from common.identity import MOST_KEPT_BYTES, Identity, verify


@pytest.mark.parametrize("size", [0, 1, MOST_KEPT_BYTES, MOST_KEPT_BYTES + 1])
def test_a_verified_signature_vouches_for_nothing_else(size: int) -> None:
    one, other = Identity.generate(), Identity.generate()
    data = bytes(size)
    signature = one.sign(b"label", data)
    changed = bytes([signature[0] ^ 1]) + signature[1:]
    for _ in range(2):
        verify(one.public, b"label", data, signature)
        for false in (
            (other.public, b"label", data, signature),
            (one.public, b"labels", data, signature),
            (one.public, b"label", data + b"x", signature),
            (one.public, b"label", data, changed),
            (one.public, b"label", data, b""),
            (one.public, b"label", data, other.sign(b"label", data)),
            (b"", b"label", data, signature),
        ):
            with pytest.raises(SignatureRefused):
                verify(*false)


def test_bytes_of_any_kind_are_verified() -> None:
    one = Identity.generate()
    signature = one.sign(b"label", b"data")
    verify(one.public, b"label", bytearray(b"data"), bytearray(signature))
