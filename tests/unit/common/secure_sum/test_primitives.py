"""Every primitive on vectors that its standard publishes."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import KeyRefused, ShareRefused, SignatureRefused
from common.identity import Identity, fingerprint, verify
from common.randomness import system_bytes
from common.secure_sum.primitives import (
    Keystream,
    Label,
    derive,
    digest,
    hkdf_sha256,
    new_private_key,
    public_key,
    seal,
    shared_secret,
    unseal,
)

H = bytes.fromhex


def test_x25519_rfc_7748_section_5_2() -> None:
    scalar = H("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = H("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert shared_secret(scalar, point) == H("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")


def test_x25519_rfc_7748_section_6_1() -> None:
    alice = H("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = H("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_key(alice) == H("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert public_key(bob) == H("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    both = H("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert shared_secret(alice, public_key(bob)) == shared_secret(bob, public_key(alice)) == both


# The points of low order of RFC 7748, section 6.1, as Bernstein lists them (https://cr.yp.to/ecdh.html#validate).
LOW_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point: str) -> None:
    with pytest.raises(KeyRefused):
        shared_secret(new_private_key(), H(point))


def test_a_point_of_another_length_is_refused() -> None:
    with pytest.raises(KeyRefused):
        shared_secret(new_private_key(), bytes(31))


def test_hkdf_rfc_5869_appendix_a_1_and_a_3() -> None:
    secret = b"\x0b" * 22
    found = hkdf_sha256(secret, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert found == H("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    found = hkdf_sha256(secret, salt=None, info=b"", length=42)
    assert found == H("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8")


def test_chacha20_poly1305_rfc_8439_section_2_8_2() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would"
        b" be it."
    )
    key, nonce = bytes(range(0x80, 0xA0)), H("070000004041424344454647")
    sealed = seal(key, nonce, text, H("50515253c0c1c2c3c4c5c6c7"))
    assert sealed == H(
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
        "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b6116"
        "1ae10b594f09e26a7e902ecbd0600691"
    )
    assert unseal(key, nonce, sealed, H("50515253c0c1c2c3c4c5c6c7")) == text
    for place in range(len(sealed)):
        wrong = bytearray(sealed)
        wrong[place] ^= 1
        with pytest.raises(ShareRefused):
            unseal(key, nonce, bytes(wrong), H("50515253c0c1c2c3c4c5c6c7"))
    with pytest.raises(ShareRefused):
        unseal(key, nonce, sealed, H("50515253c0c1c2c3c4c5c6c8"))


def test_ed25519_rfc_8032_section_7_1_test_1() -> None:
    secret = H("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    identity = Identity(secret)
    assert identity.public == H("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    library = Ed25519PrivateKey.from_private_bytes(secret)
    assert library.sign(b"") == H(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert identity.sign(b"label", b"data") == library.sign(b"label\0data")
    assert identity.private_bytes() == secret


def test_aes_256_ctr_nist_sp_800_38a_section_f_5_5() -> None:
    key = H("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = H(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    sealed = H(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = Keystream(key, H("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")).bytes(64)
    assert bytes(one ^ other for one, other in zip(plain, stream, strict=True)) == sealed


def test_the_keystream_begins_at_counter_zero_and_goes_on() -> None:
    # AES-256 of the zero block under the zero key: NIST AESAVS, appendix B (KAT with all zeros).
    assert Keystream(bytes(32)).bytes(16) == H("dc95c078a2408989ad48a21492842087")
    whole, parts = Keystream(bytes(32)).bytes(1 << 19), Keystream(bytes(32))
    assert parts.bytes(10) + parts.bytes((1 << 18) + 3) + parts.bytes((1 << 18) - 13) == whole
    room = bytearray(100)
    Keystream(bytes(32)).into(memoryview(room))
    assert bytes(room) == whole[:100]


def test_a_signature_holds_for_its_key_label_and_data_alone() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"label", b"data")
    verify(one.public, b"label", b"data", signature)
    for key, label, data in (
        (other.public, b"label", b"data"),
        (one.public, b"labe", b"l\0data"),
        (one.public, b"label", b"dat"),
        (bytes(32), b"label", b"data"),
        (bytes(5), b"label", b"data"),
    ):
        with pytest.raises(SignatureRefused):
            verify(key, label, data, signature)
    for bad in (b"", signature[:-1], signature + b"\0"):
        with pytest.raises(SignatureRefused):
            verify(one.public, b"label", b"data", bad)
    for label in (b"", b"a\0b"):
        with pytest.raises(SignatureRefused, match="label"):
            one.sign(label, b"data")


def test_a_fingerprint_is_short_and_its_own() -> None:
    one, other = Identity.generate(), Identity.generate()
    assert fingerprint(one.public) != fingerprint(other.public)
    assert len(fingerprint(one.public).split()) == 8
    assert fingerprint(one.public) in repr(one)
    assert one.private_bytes().hex() not in repr(one)
    with pytest.raises(SignatureRefused):
        Identity(bytes(31))


def test_labels_and_parts_are_kept_apart() -> None:
    secret = bytes(32)
    keys = [
        derive(secret, label, *parts) for label in Label for parts in ((), (b"",), (b"a", b"b"), (b"ab",), (b"ab", b""))
    ]
    hashes = [digest(label, *parts) for label in Label for parts in ((), (b"",), (b"a", b"b"), (b"ab",), (b"ab", b""))]
    assert len(set(keys + hashes)) == len(keys) + len(hashes)
    assert len({label.value for label in Label}) == len(Label)


def test_bytes_of_the_system_are_as_many_as_asked_for_and_new() -> None:
    assert [len(system_bytes(count)) for count in (0, 1, 32)] == [0, 1, 32]
    assert len({system_bytes(32) for _ in range(100)}) == 100
