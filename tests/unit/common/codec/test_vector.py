"""The whole vector: sums decode to sums, extras do not overflow, and what is no sum of encodings is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec.fixed_point import step_of
from common.codec.layout import Layout
from common.codec.packing import MOST_SITES, Words
from common.codec.vector import (
    CHECKSUM_WORDS,
    EXTRA_MOST,
    VectorSpec,
    decode_words,
    encode,
    encode_body,
    with_checksum,
)
from common.errors import ChecksumMismatch, NotFiniteValue, VectorRefused
from common.randomness import seeded
from common.secure_sum.primitives import Keystream, Label, digest

LAYOUT = Layout((("a", (3, 5)), ("b", (8,))))
CONTEXT = b"c" * 32
EXTRAS = ("count", "loss")


def spec_for(sites: int) -> VectorSpec:
    return VectorSpec.of(LAYOUT, {"a": 1.0, "b": 0.01}, sites, extras=EXTRAS)


def state_of(seed: int) -> dict[str, np.ndarray]:
    draws = seeded(seed)
    return {
        "a": draws.uniform(-1, 1, (3, 5)).astype(np.float32),
        "b": draws.uniform(-0.01, 0.01, 8).astype(np.float32),
    }


@given(sites=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_sum_of_vectors_is_the_vector_of_sums(sites: int, seed: int) -> None:
    spec = spec_for(sites)
    states = [state_of(seed + site) for site in range(sites)]
    numbers = [{"count": 10.0 * site, "loss": -site / 8} for site in range(sites)]
    total = sum(
        (encode(state, extras, spec, CONTEXT) for state, extras in zip(states, numbers, strict=True)),
        np.zeros(spec.words, np.uint64),
    )
    found = decode_words(total, sites, spec, CONTEXT)
    for name, limit in (("a", 1.0), ("b", 0.01)):
        exact = np.sum([state[name].astype(np.float64) for state in states], axis=0)
        assert found.state[name].shape == exact.shape
        assert np.abs(found.state[name] - exact).max() <= sites * step_of(limit, spec.bits) * (1 + 1e-6)
    assert found.extras == {name: sum(extras[name] for extras in numbers) for name in EXTRAS}


def test_extras_are_limited_and_do_not_overflow() -> None:
    spec = spec_for(MOST_SITES)
    for value, sign in ((1e300, 1), (-1e300, -1)):
        body = encode_body(state_of(0), {"count": value, "loss": 0.5}, spec)
        total = np.zeros(spec.words, np.uint64)
        for _ in range(MOST_SITES):
            total += with_checksum(body, CONTEXT)
        found = decode_words(total, MOST_SITES, spec, CONTEXT).extras
        assert found["count"] == pytest.approx(sign * MOST_SITES * EXTRA_MOST * 2.0**-20, rel=1e-12)
        assert found["loss"] == 0.5 * MOST_SITES


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_is_refused(bad: float) -> None:
    with pytest.raises(NotFiniteValue, match="'loss'"):
        encode_body(state_of(0), {"count": 1, "loss": bad}, spec_for(3))
    state = state_of(0)
    state["b"][3] = bad
    with pytest.raises(NotFiniteValue):
        encode_body(state, {"count": 1, "loss": 0}, spec_for(3))


def test_other_extras_are_refused() -> None:
    for extras in ({"count": 1.0}, {"count": 1.0, "loss": 0.0, "more": 0.0}):
        with pytest.raises(VectorRefused, match="extras"):
            encode_body(state_of(0), extras, spec_for(3))


def checked(words: Words) -> None:
    decode_words(words, 3, spec_for(3), CONTEXT)


def a_sum() -> Words:
    return sum(
        (encode(state_of(seed), {"count": 1, "loss": 2}, spec_for(3), CONTEXT) for seed in range(3)),
        np.zeros(spec_for(3).words, np.uint64),
    )


def test_every_single_wrong_bit_is_found() -> None:
    words = a_sum()
    checked(words)
    for word in range(len(words)):
        for bit in range(64):
            wrong = words.copy()
            wrong[word] ^= np.uint64(1 << bit)
            with pytest.raises(ChecksumMismatch):
                checked(wrong)


def test_top_bits_of_two_words_pass_the_odd_checksum_and_mostly_not_the_other() -> None:
    words, found = a_sum(), 0
    pairs = [(one, other) for one in range(len(words) - 2) for other in range(one)]
    for pair in pairs:
        wrong = words.copy()
        wrong[list(pair)] ^= np.uint64(1 << 63)
        try:
            checked(wrong)
        except ChecksumMismatch:
            found += 1
    # The second checksum sees a pair where the lowest bits of its two numbers differ.
    stream = np.frombuffer(Keystream(digest(Label.CHECKSUM_ANY, CONTEXT)).bytes(8 * len(words)), "<u8") & np.uint64(1)
    assert found == sum(int(stream[one] != stream[other]) for one, other in pairs)
    assert found > len(pairs) / 4


def test_another_context_length_or_crowd_is_refused() -> None:
    words = a_sum()
    with pytest.raises(ChecksumMismatch):
        decode_words(words, 3, spec_for(3), b"d" * 32)
    for other in (words[:-1], np.append(words, np.uint64(0))):
        with pytest.raises(VectorRefused, match="words"):
            checked(other)
    for count in (0, 4):
        with pytest.raises(VectorRefused, match="1 to 3"):
            decode_words(words, count, spec_for(3), CONTEXT)


def test_the_checksum_is_the_slow_one() -> None:
    body = encode_body(state_of(1), {"count": 1, "loss": 2}, spec_for(3))
    for place, (label, odd) in enumerate(((Label.CHECKSUM_ODD, 1), (Label.CHECKSUM_ANY, 0))):
        stream = Keystream(digest(label, CONTEXT)).bytes(8 * len(body))
        rho = [int.from_bytes(stream[8 * j : 8 * j + 8], "little") | odd for j in range(len(body))]
        slow = sum(factor * word for factor, word in zip(rho, body.tolist(), strict=True)) % 2**64
        assert int(with_checksum(body, CONTEXT)[len(body) + place]) == slow
    assert len(with_checksum(body, CONTEXT)) == len(body) + CHECKSUM_WORDS


def test_a_spec_is_told_apart_by_everything_in_it() -> None:
    values = {"layout": LAYOUT, "ranges": (1.0, 0.01), "bits": 8, "sites": 10, "extras": EXTRAS}
    changes = [
        {},
        {"ranges": (1.0, 0.02)},
        {"bits": 9},
        {"sites": 9},
        {"extras": ("count",)},
        {"extras": ("coun", "tloss")},
        {"layout": Layout((("a", (5, 3)), ("b", (8,))))},
    ]
    specs = [VectorSpec(**{**values, **change}) for change in changes]  # type: ignore[arg-type]
    assert len({spec.digest() for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    "change", [{"ranges": (1.0,)}, {"ranges": (1.0, 0.0)}, {"bits": 0}, {"sites": 0}, {"extras": ("loss", "count")}]
)
def test_a_spec_that_is_none_is_refused(change: dict[str, object]) -> None:
    values = {"layout": LAYOUT, "ranges": (1.0, 0.01), "bits": 8, "sites": 10, "extras": EXTRAS}
    with pytest.raises(VectorRefused):
        VectorSpec(**{**values, **change})  # type: ignore[arg-type]
