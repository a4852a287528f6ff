"""Packing against Python's integers, which have no width."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec.fixed_point import MOST_BITS
from common.codec.packing import MOST_SITES, Lanes, aligned_words, bits_for
from common.errors import VectorRefused
from common.randomness import seeded

LANES = st.builds(Lanes, st.integers(1, MOST_BITS), st.integers(1, MOST_SITES))


@given(lanes=LANES, count=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_pack_and_unpack(lanes: Lanes, count: int, seed: int) -> None:
    levels = seeded(seed).integers(0, 2**lanes.bits, count, dtype=np.uint32)
    words = lanes.pack(levels)
    assert words.dtype == np.uint64
    assert words.shape == (lanes.words_for(count),)
    slow = [0] * len(words)
    for place, level in enumerate(levels.tolist()):
        slow[place % len(words)] += level << (lanes.lane_bits * (place // len(words)))
    assert words.tolist() == slow
    assert np.array_equal(lanes.unpack(words, count), levels)


@given(lanes=LANES, count=st.integers(1, 9), seed=st.integers(0, 2**32), top=st.booleans())
@settings(max_examples=60)
def test_the_most_sites_never_carry(lanes: Lanes, count: int, seed: int, top: bool) -> None:
    shape = (lanes.sites, count)
    levels = seeded(seed).integers(0, 2**lanes.bits, shape, dtype=np.uint32)
    if top:
        levels[:] = 2**lanes.bits - 1
    words = np.zeros(lanes.words_for(count), np.uint64)
    for row in levels:
        words += lanes.pack(row)
    assert np.array_equal(lanes.unpack(words, count), levels.sum(0, dtype=np.uint64))


def test_default_bits_keep_their_promise() -> None:
    for sites in range(1, MOST_SITES + 1):
        lanes = Lanes(bits_for(sites), sites)
        assert sites * (2**lanes.bits - 1) < 2**lanes.lane_bits
        assert lanes.lane_bits * lanes.per_word <= 64
        assert lanes.bytes_per_value <= 2.67
        assert lanes.bits == (16 if sites <= 32 else 14 if sites <= 128 else 11 if sites <= 1024 else 10)


def test_bytes_for_each_value_are_what_is_sent() -> None:
    for sites in (2, 8, 32, 100, 128):
        count = 1_000_000
        lanes = Lanes(bits_for(sites), sites)
        assert lanes.pack(np.zeros(count, np.uint32)).nbytes / count <= 2.67


@pytest.mark.parametrize("sites", [0, MOST_SITES + 1])
def test_too_many_sites_are_refused(sites: int) -> None:
    with pytest.raises(VectorRefused, match="sites"):
        bits_for(sites)
    with pytest.raises(VectorRefused, match="sites"):
        Lanes(8, sites)


def test_what_does_not_fit_is_refused() -> None:
    lanes = Lanes(8, 4)
    with pytest.raises(VectorRefused, match="8 bits"):
        lanes.pack(np.array([1, 256], np.uint32))
    with pytest.raises(VectorRefused, match="words"):
        lanes.unpack(np.zeros(2, np.uint64), 3)
    with pytest.raises(VectorRefused, match="bits"):
        Lanes(MOST_BITS + 1, 4)


def test_aligned_words_are_zeros_at_a_cache_line() -> None:
    for count in (0, 1, 7, 8, 9, 100_000):
        words = aligned_words(count)
        assert words.shape == (count,)
        assert words.dtype == np.dtype("<u8")
        assert not words.any()
        assert count == 0 or words.ctypes.data % 64 == 0
