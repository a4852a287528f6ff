import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.codec.state import AdapterState
from common.errors import AdapterError
from server.aggregation.mean import WeightedMean
from server.aggregation.method import moved

# Exact in float32, so that an oracle over fractions knows the sum to the last bit.
NUMBERS = st.integers(-(2**20), 2**20).map(lambda number: number / 1024)
SHAPES = st.dictionaries(st.sampled_from("abcde"), arrays.array_shapes(max_dims=3, max_side=3), min_size=1, max_size=3)


def state(**values: Any) -> AdapterState:
    return {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}


def oracle(before: AdapterState, changes: list[tuple[AdapterState, float]]) -> AdapterState:
    """before + sum(w c) / sum(w), number by number, in exact arithmetic."""
    after = {name: array.copy() for name, array in before.items()}
    total = sum((Fraction(weight) for _, weight in changes), Fraction(0))
    for name, array in before.items():
        for place in np.ndindex(array.shape):
            part = sum(
                (Fraction(weight) * Fraction(float(change[name][place])) for change, weight in changes), Fraction(0)
            )
            after[name][place] = np.float32(float(Fraction(float(array[place])) + part / total))
    return after


def mean(before: AdapterState, changes: list[tuple[AdapterState, float]]) -> AdapterState:
    collector = WeightedMean(shapes(before))
    for change, weight in changes:
        collector.add(change, weight)
    return moved(before, collector.result())


def shapes(adapter: AdapterState) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in adapter.items()}


@st.composite
def federations(draw: st.DrawFn) -> tuple[AdapterState, list[tuple[AdapterState, float]]]:
    shapes = draw(SHAPES)

    def one() -> AdapterState:
        return {name: draw(arrays.arrays(np.float32, shape, elements=NUMBERS)) for name, shape in shapes.items()}

    weights = draw(st.lists(st.integers(1, 5000) | st.floats(0.01, 100.0), min_size=1, max_size=5))
    return one(), [(one(), weight) for weight in weights]


@settings(deadline=None, max_examples=60)
@given(federation=federations(), seed=st.randoms(use_true_random=False))
def test_it_is_the_exact_weighted_mean_whatever_the_order(
    federation: tuple[AdapterState, list[tuple[AdapterState, float]]], seed: Any
) -> None:
    before, changes = federation
    wanted = oracle(before, changes)
    shuffled = list(changes)
    seed.shuffle(shuffled)
    for order in (changes, changes[::-1], shuffled):
        found = mean(before, order)
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            assert array.dtype == np.float32
            assert array.shape == before[name].shape
            np.testing.assert_allclose(array, wanted[name], rtol=2e-7, atol=1e-6)


def test_every_site_has_a_part_in_it() -> None:
    # The first site's adapter alone would be [1, 0], the last one's [0, 3].
    found = mean(state(a=[0.0, 0.0]), [(state(a=[1.0, 0.0]), 1), (state(a=[0.0, 3.0]), 3)])
    np.testing.assert_array_equal(found["a"], np.float32([0.25, 2.25]))


def test_one_site_gives_its_own_adapter_whatever_its_weight() -> None:
    before, change = state(a=[1.0, 2.0], b=[[3.0]]), state(a=[0.5, -1.0], b=[[0.25]])
    for weight in (1, 0.001, 7):
        found = mean(before, [(change, weight)])
        np.testing.assert_array_equal(found["a"], np.float32([1.5, 1.0]))
        np.testing.assert_array_equal(found["b"], np.float32([[3.25]]))


def test_many_small_changes_are_not_lost() -> None:
    # In float32 a running sum of 100 000 times 0.1 is off by more than 1e-2; the mean must be 0.1.
    collector, change = WeightedMean({"a": (1,)}), state(a=[0.1])
    for _ in range(100_000):
        collector.add(change, 1)
    assert np.float32(collector.result()["a"][0]) == np.float32(0.1)


def test_what_went_in_is_not_changed() -> None:
    before, change = state(a=[1.0]), state(a=[2.0])
    mean(before, [(change, 2), (change, 3)])
    assert (before["a"][0], change["a"][0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (state(a=[9.0, 9.0]), "tensors"),  # b is missing
        (state(a=[9.0, 9.0], b=[[9.0]], c=[9.0]), "tensors"),
        (state(a=[9.0, 9.0, 9.0], b=[[9.0]]), "tensors"),
        (state(a=[9.0, 9.0], b=[9.0]), "tensors"),  # as many numbers, another shape
        (state(a=[9.0, 9.0], b=[[math.nan]]), "not finite"),
        (state(a=[9.0, math.inf], b=[[9.0]]), "not finite"),
        ({}, "tensors"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_whole(change: AdapterState, said: str) -> None:
    good = state(a=[1.0, 3.0], b=[[5.0]])
    collector = WeightedMean(shapes(good))
    collector.add(good, 2)
    with pytest.raises(AdapterError, match=said):
        collector.add(change, 2)
    np.testing.assert_array_equal(collector.result()["a"], np.float32([1.0, 3.0]))
    np.testing.assert_array_equal(collector.result()["b"], np.float32([[5.0]]))


@pytest.mark.parametrize("weight", [0, -1, math.nan])
def test_a_weight_must_be_positive(weight: float) -> None:
    collector = WeightedMean({"a": (1,)})
    with pytest.raises(AdapterError, match="weight must be positive"):
        collector.add(state(a=[1.0]), weight)
    with pytest.raises(AdapterError, match="nothing to average"):
        collector.result()


def test_an_infinite_weight_is_refused() -> None:
    collector = WeightedMean({"a": (1,)})
    with pytest.raises(AdapterError, match="weight"):
        collector.add(state(a=[1.0]), math.inf)


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(AdapterError, match="nothing to average"):
        WeightedMean({"a": (1,)}).result()
