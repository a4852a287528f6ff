"""Messages: the bytes that the specification says, one encoding each, and nothing else is read."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import MalformedMessage, SecureSumError, SignatureRefused
from common.identity import Identity
from common.ledger_statement import STATEMENT_BYTES
from common.secure_sum.messages import (
    COORDINATOR,
    MOST_BYTES,
    SEALED_BYTES,
    Advertise,
    Body,
    Complaint,
    Confirm,
    ConfirmList,
    KeyList,
    Kind,
    Masked,
    Refuse,
    Reveal,
    Revealed,
    RoundStart,
    ShareForward,
    Shares,
    Survivors,
    Turn,
    encode,
    read,
)

IDENTITY = Identity(b"i" * 32)
TURN = Turn(b"F" * 16, 3, 2**40, 7)
SITES = st.lists(st.integers(0, 2047), max_size=6, unique=True).map(sorted)
HASH = st.binary(min_size=32, max_size=32)


def fixed(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def by_site(values: st.SearchStrategy[object]) -> st.SearchStrategy[dict[int, object]]:
    return SITES.flatmap(lambda sites: st.fixed_dictionaries(dict.fromkeys(sites, values)))


STATED = st.one_of(st.just(b""), fixed(STATEMENT_BYTES))
BODIES: st.SearchStrategy[Body] = st.one_of(
    st.builds(RoundStart, HASH, SITES.map(tuple), st.binary(max_size=300)),
    st.builds(Advertise, HASH, HASH, HASH, HASH, STATED, by_site(fixed(STATEMENT_BYTES))),
    st.builds(KeyList, st.lists(st.binary(max_size=300), max_size=4).map(tuple)),
    st.builds(Shares, HASH, by_site(fixed(SEALED_BYTES))),
    st.builds(ShareForward, SITES.map(tuple), by_site(fixed(SEALED_BYTES))),
    st.builds(Masked, HASH, HASH, HASH, st.binary(max_size=64).map(lambda data: data * 8)),
    st.builds(Survivors, HASH, by_site(HASH)),
    st.builds(Confirm, HASH, STATED),
    st.builds(ConfirmList, st.lists(st.binary(max_size=300), max_size=4).map(tuple)),
    st.builds(Reveal, HASH, by_site(st.tuples(st.sampled_from(list(Revealed)), fixed(33)))),
    st.builds(Refuse, st.from_regex(r"\A[A-Za-z0-9_:]{1,80}\Z")),
    st.builds(Complaint, st.integers(0, 2**16 - 1), HASH),
)


def key_of(sender: int) -> bytes:
    return IDENTITY.public


@given(body=BODIES, sender=st.integers(0, 2**16 - 1))
@settings(deadline=None)
def test_round_trip(body: Body, sender: int) -> None:
    data = encode(IDENTITY, TURN, sender, body)
    message = read(data, key_of)
    found = message.body
    if isinstance(found, Masked):
        found = Masked(found.peers_hash, found.vector_hash, found.commitment, bytes(found.vector))
    assert (message.turn, message.sender, found, message.raw) == (TURN, sender, body, data)
    assert encode(IDENTITY, TURN, sender, message.body) == data


@given(body=BODIES, place=st.integers(0), bit=st.integers(0, 7))
@settings(deadline=None)
def test_every_bit_is_signed(body: Body, place: int, bit: int) -> None:
    data = bytearray(encode(IDENTITY, TURN, 1, body))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises((SignatureRefused, MalformedMessage)):
        read(bytes(data), key_of)


@given(body=BODIES, cut=st.integers(1, 40), more=st.binary(min_size=1, max_size=9))
@settings(deadline=None)
def test_nothing_is_missing_and_nothing_follows(body: Body, cut: int, more: bytes) -> None:
    content = encode(IDENTITY, TURN, 1, body)[:-64]
    for changed in (content[: max(len(content) - cut, 34)], content + more):
        if changed == content:
            continue
        signed = changed + IDENTITY.sign(b"secsum/1", changed)
        try:
            message = read(signed, key_of)
        except SecureSumError:
            continue
        # Only a refusal's code and the like can be cut to another valid message, and then that is its one encoding.
        assert encode(IDENTITY, TURN, 1, message.body) == signed


def test_the_bytes_are_those_of_the_specification() -> None:
    data = encode(IDENTITY, TURN, COORDINATOR, Survivors(b"p" * 32, {2: b"b" * 32, 0: b"a" * 32}))
    head = struct.pack("<BB16sIQHH", 1, 7, b"F" * 16, 3, 2**40, 7, 65535)
    body = b"p" * 32 + b"\x02\x00" + b"\x00\x00" + b"a" * 32 + b"\x02\x00" + b"b" * 32
    assert data[:-64] == head + body
    assert data[-64:] == IDENTITY.sign(b"secsum/1", head + body)
    assert [kind.value for kind in Kind] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13]


def signed(kind: int, body: bytes, version: int = 1) -> bytes:
    content = struct.pack("<BB16sIQHH", version, kind, b"F" * 16, 3, 1, 0, 1) + body
    return content + IDENTITY.sign(b"secsum/1", content)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (7, b"p" * 32 + b"\x02\x00" + b"\x01\x00" + b"a" * 32 + b"\x00\x00" + b"b" * 32),  # out of order
        (7, b"p" * 32 + b"\x02\x00" + b"\x01\x00" + b"a" * 32 + b"\x01\x00" + b"b" * 32),  # twice
        (7, b"p" * 32 + b"\x01\x00" + b"\x00\x08" + b"a" * 32),  # site 2048
        (7, b"p" * 32 + b"\x01\x08"),  # more sites than there can be
        (3, b"\xff\xff"),
        (3, b"\x01\x00" + b"\xe2\x00" + bytes(225)),
        (3, b"\x01\x00" + b"\xff\xff" + bytes(65535)),  # more than an Advertise can have
        (8, bytes(32) + b"\x02" + bytes(2 * STATEMENT_BYTES)),  # two statements of a ledger
        (8, bytes(32) + b"\x01" + bytes(STATEMENT_BYTES - 1)),
        (9, b"\x01\x00" + b"\x00\x02" + bytes(512)),  # more than a Confirm can have
        (2, bytes(129) + b"\x09\x00" + b"".join(bytes([n, 0]) + bytes(STATEMENT_BYTES) for n in range(9))),
        (10, b"p" * 32 + b"\x01\x00\x00\x00\x02" + bytes(33)),  # a third kind of share
        (6, bytes(96) + b"\x01\x00" + bytes(4)),  # a proof
        (6, bytes(96) + b"\x00\x00" + b"\xff\xff\xff\xff"),  # 32 GiB
        (6, bytes(96) + b"\x00\x00" + b"\x01\x00\x00\x00" + bytes(7)),
        (1, bytes(32) + b"\x00\x00" + b"\xff\xff\xff\xff"),
        (1, bytes(32) + b"\x00\x00" + (4097).to_bytes(4, "little") + bytes(4097)),
        (12, b"\x00"),
        (12, b"\x01\n"),
        (12, b"\x51" + b"a" * 81),
        (12, b"\x02\xc3\xa9"),
        (11, b""),
        (0, b""),
        (255, b""),
    ],
)
def test_what_is_not_canonical_is_malformed(kind: int, body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read(signed(kind, body), key_of)


def test_another_version_is_malformed() -> None:
    read(signed(8, bytes(33)), key_of)
    with pytest.raises(MalformedMessage, match="version 2"):
        read(signed(8, bytes(33), version=2), key_of)


def test_a_message_has_a_most_length_which_is_seen_first() -> None:
    with pytest.raises(MalformedMessage, match="may have"):
        read(bytes(MOST_BYTES + 1), key_of)
    data = encode(IDENTITY, TURN, 1, Masked(bytes(32), bytes(32), bytes(32), bytes(MOST_BYTES)))
    with pytest.raises(MalformedMessage, match="may have"):
        read(data, key_of)
    assert len(read(data, key_of, most_bytes=len(data)).body.vector) == MOST_BYTES
    for size in (0, 33, 97):
        with pytest.raises(MalformedMessage, match="cut"):
            read(bytes(size), key_of)


def test_a_signature_under_another_label_does_not_count() -> None:
    content = encode(IDENTITY, TURN, 1, Confirm(bytes(32)))[:-64]
    for label in (b"secsum/2", b"coadapt roster/1"):
        with pytest.raises(SignatureRefused):
            read(content + IDENTITY.sign(label, content), key_of)


def test_a_sender_that_may_not_speak_is_refused_before_all_else() -> None:
    def nobody(sender: int) -> bytes:
        raise SecureSumError(f"no {sender}")

    with pytest.raises(SecureSumError, match="no 1"):
        read(signed(8, b"x"), nobody)
