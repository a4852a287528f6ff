"""Quantisation against exact fractions, its error bound, and its bias with tolerances in standard errors."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codec.fixed_point import MOST_BITS, decode_sum, quantise, rounding_bytes, step_of
from common.errors import NotFiniteValue, VectorRefused

ERRORS = 5.0
LIMITS = st.floats(1e-6, 1e6)
BITS = st.integers(1, MOST_BITS)


def zeros(count: int) -> bytes:
    return bytes(count)


def ones(count: int) -> bytes:
    return b"\xff" * count


@given(
    limit=LIMITS,
    bits=BITS,
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    draws=st.integers(0, 2**32 - 1),
)
def test_a_value_is_off_by_less_than_a_step(limit: float, bits: int, values: list[float], draws: int) -> None:
    array = np.array([value * limit for value in values], np.float32)
    levels = quantise(array, limit, bits, lambda count: draws.to_bytes(4, "little") * (count // 4))
    assert levels.max() <= 2**bits - 1
    back = decode_sum(levels, limit, bits, 1)
    inside = np.clip(array.astype(np.float64), -limit, limit)
    # Beside a step, float64 arithmetic on numbers of the range's size.
    assert np.abs(back - inside).max() <= step_of(limit, bits) * (1 + 1e-9) + limit * 2.0**-48


@given(limit=LIMITS, bits=BITS, value=st.floats(-1, 1), draw=st.integers(0, 2**32 - 1))
def test_it_is_the_level_of_exact_fractions(limit: float, bits: int, value: float, draw: int) -> None:
    array = np.array([value * limit], np.float32)
    (level,) = quantise(array, limit, bits, lambda _: draw.to_bytes(4, "little"))
    step = Fraction(2) * Fraction(limit) / (2**bits - 1)
    inside = min(max(Fraction(float(array[0])), -Fraction(limit)), Fraction(limit))
    exact = (inside + Fraction(limit)) / step + (Fraction(draw) + Fraction(1, 2)) / 2**32
    # Float64 may fall on the other side only where the exact number all but is an integer.
    if abs(exact - round(exact)) > Fraction(1, 2**30):
        assert level == exact.__floor__()
    else:
        assert abs(level - exact) <= 1


@pytest.mark.parametrize("bits", [1, 2, 9, 16, MOST_BITS])
@pytest.mark.parametrize("limit", [0.1, 1.0, 3.7])
@pytest.mark.parametrize("source", [zeros, ones])
def test_values_outside_are_taken_to_the_nearer_end(bits: int, limit: float, source: object) -> None:
    values = np.array([limit, 2 * limit, 1e30, 3e38, -limit * 1.0001, -2 * limit, -3e38], np.float32)
    levels = quantise(values, limit, bits, source)  # type: ignore[arg-type]
    inside = np.clip(values.astype(np.float64), -limit, limit)
    assert levels[1:].tolist() == [2**bits - 1] * 3 + [0] * 3
    assert abs(decode_sum(levels, limit, bits, 1)[0] - inside[0]) <= step_of(limit, bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_is_refused(bad: float) -> None:
    values = np.zeros(100_000, np.float32)
    values[77_777] = bad
    with pytest.raises(NotFiniteValue):
        quantise(values, 1.0, 8)


@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan, np.inf, 5e-324])
def test_a_range_must_be_a_positive_number(limit: float) -> None:
    with pytest.raises(VectorRefused, match="range"):
        step_of(limit, 8)


@pytest.mark.parametrize("bits", [0, MOST_BITS + 1])
def test_bits_are_few(bits: int) -> None:
    with pytest.raises(VectorRefused, match="bits"):
        step_of(1.0, bits)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_rounding_is_unbiased(fraction: float) -> None:
    count, bits = 400_000, 12
    limit = (2**bits - 1) / 2.0  # a step of 1
    values = np.full(count, 100 + fraction - limit, np.float32)
    exact = float(values[0]) + limit
    levels = quantise(values, limit, bits).astype(np.float64)
    part = exact - np.floor(exact)
    assert set(np.unique(levels)) <= {np.floor(exact), np.floor(exact) + 1}
    assert abs(levels.mean() - exact) <= ERRORS * np.sqrt(part * (1 - part) / count) + 2.0**-33
    # Neighbours are rounded independently.
    off = levels - exact
    spread = part * (1 - part)
    assert abs(np.mean(off[1:] * off[:-1])) <= ERRORS * spread / np.sqrt(count - 1) + 1e-12


def test_rounding_is_unbiased_over_all_values() -> None:
    count, bits, limit = 1_000_000, 4, 1.0
    values = np.linspace(-limit, limit, count, dtype=np.float32)
    off = decode_sum(quantise(values, limit, bits), limit, bits, 1) - values
    step = step_of(limit, bits)
    # The variance of rounding a fraction f is f (1 - f), 1/6 on average.
    assert abs(off.mean()) < ERRORS * step * np.sqrt(1 / 6 / count)
    assert abs(off.var() / step**2 - 1 / 6) < ERRORS * 0.5 / np.sqrt(count)


def test_two_calls_draw_anew() -> None:
    values = np.full(1000, 0.3, np.float32)
    assert not np.array_equal(quantise(values, 1.0, 3), quantise(values, 1.0, 3))
    assert rounding_bytes()(64) != rounding_bytes()(64)


def test_a_source_that_repeats_gives_the_same() -> None:
    values = np.linspace(-1, 1, 100_001, dtype=np.float32)
    assert np.array_equal(quantise(values, 1.0, 8, zeros), quantise(values, 1.0, 8, zeros))
    assert (quantise(values, 1.0, 8, ones) >= quantise(values, 1.0, 8, zeros)).all()


@given(count=st.integers(1, 2048), limit=LIMITS, bits=BITS)
def test_a_sum_decodes_to_a_sum(count: int, limit: float, bits: int) -> None:
    top = 2**bits - 1
    found = decode_sum(np.array([0, count * top], np.uint64), limit, bits, count)
    assert found == pytest.approx([-count * limit, count * limit], rel=1e-12)
