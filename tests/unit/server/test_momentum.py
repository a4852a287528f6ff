import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec.state import AdapterState
from server.aggregation.momentum import ServerMomentum

NUMBERS = st.floats(-10, 10, width=32)


@settings(deadline=None)
@given(
    rate=st.floats(0.1, 3.0),
    momentum=st.floats(0.0, 0.95),
    start=NUMBERS,
    moves=st.lists(NUMBERS, min_size=1, max_size=6),
)
def test_it_follows_the_written_recurrence(rate: float, momentum: float, start: float, moves: list[float]) -> None:
    # step_t = momentum * step_(t-1) + (mean_t - before); after = before + rate * step_t, number by number.
    step_along = ServerMomentum(rate, momentum)
    adapter: AdapterState = {"a": np.float32([[start, 1.0]]), "b": np.float32([2.0])}
    steps = {"a0": 0.0, "b": 0.0}
    position = {"a0": float(start), "b": 2.0}
    for move in moves:
        mean = {"a": adapter["a"] + np.float32([[move, 0.0]]), "b": adapter["b"] - np.float32(move)}
        adapter = step_along(adapter, mean)
        for name, wanted in (("a0", move), ("b", -move)):
            steps[name] = momentum * steps[name] + wanted
            position[name] += rate * steps[name]
        assert adapter["a"][0, 0] == pytest.approx(position["a0"], rel=1e-4, abs=1e-3)
        assert adapter["b"][0] == pytest.approx(position["b"], rel=1e-4, abs=1e-3)
        assert adapter["a"][0, 1] == 1.0
        assert adapter["a"].dtype == np.float32


@settings(deadline=None)
@given(values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
def test_rate_one_without_momentum_is_the_mean(values: list[tuple[float, float]]) -> None:
    step_along = ServerMomentum(1.0, 0.0)
    for before, mean in values:
        after = step_along({"a": np.float32([before])}, {"a": np.float32([mean])})
        assert after["a"][0] == np.float32(mean)


def test_momentum_goes_on_where_the_sites_stand_still() -> None:
    step_along = ServerMomentum(1.0, 0.5)
    adapter = step_along({"a": np.float32([0.0])}, {"a": np.float32([8.0])})
    places = [float(adapter["a"][0])]
    for _ in range(3):
        adapter = step_along(adapter, adapter)
        places.append(float(adapter["a"][0]))
    assert places == [8.0, 12.0, 14.0, 15.0]


def test_what_went_in_is_not_changed() -> None:
    before, mean = {"a": np.float32([1.0])}, {"a": np.float32([3.0])}
    step_along = ServerMomentum(2.0, 0.9)
    step_along(before, mean)
    step_along(before, mean)
    assert (before["a"][0], mean["a"][0]) == (1.0, 3.0)
