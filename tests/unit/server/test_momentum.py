import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation.momentum import ServerMomentum

NUMBERS = st.floats(-10, 10)


@settings(deadline=None)
@given(
    rate=st.floats(0.1, 3.0),
    momentum=st.floats(0.0, 0.95),
    moves=st.lists(NUMBERS, min_size=1, max_size=6),
)
def test_it_follows_the_written_recurrence(rate: float, momentum: float, moves: list[float]) -> None:
    # memory_t = momentum * memory_(t-1) + change; the step is rate * memory_t, number by number.
    optimiser = ServerMomentum(rate, momentum)
    memories = {"a": 0.0, "b": 0.0}
    for move in moves:
        step = optimiser({"a": np.array([[move, 0.0]]), "b": np.array([-move])})
        for name, wanted in (("a", move), ("b", -move)):
            memories[name] = momentum * memories[name] + wanted
            assert step[name].flat[0] == pytest.approx(rate * memories[name], rel=1e-12, abs=1e-12)
        assert step["a"][0, 1] == 0.0


@settings(deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=8))
def test_rate_one_without_momentum_is_the_mean_change(values: list[float]) -> None:
    optimiser = ServerMomentum(1.0, 0.0)
    for value in values:
        assert optimiser({"a": np.array([value])})["a"][0] == value


def test_momentum_goes_on_where_the_sites_stand_still() -> None:
    optimiser = ServerMomentum(1.0, 0.5)
    steps = [float(optimiser({"a": np.array([change])})["a"][0]) for change in (8.0, 0.0, 0.0, 0.0)]
    assert steps == [8.0, 4.0, 2.0, 1.0]


def test_a_tensor_that_is_not_in_a_change_waits() -> None:
    optimiser = ServerMomentum(1.0, 0.5)
    optimiser({"a": np.array([8.0])})
    assert set(optimiser({"b": np.array([1.0])})) == {"b"}
    assert optimiser({"a": np.array([0.0])})["a"][0] == 4.0


def test_forgetting_begins_anew() -> None:
    optimiser = ServerMomentum(1.0, 0.5)
    optimiser({"a": np.array([8.0]), "b": np.array([8.0])})
    optimiser.forget(["a"])
    step = optimiser({"a": np.array([0.0]), "b": np.array([0.0])})
    assert (step["a"][0], step["b"][0]) == (0.0, 4.0)


def test_a_step_can_be_taken_back() -> None:
    optimiser = ServerMomentum(1.0, 0.5)
    optimiser({"a": np.array([8.0])})
    before = optimiser.state
    optimiser({"a": np.array([100.0])})
    optimiser.state = before
    assert optimiser({"a": np.array([0.0])})["a"][0] == 4.0


def test_what_went_in_is_not_changed() -> None:
    change = {"a": np.array([1.0])}
    optimiser = ServerMomentum(2.0, 0.9)
    optimiser(change)
    optimiser(change)
    assert change["a"][0] == 1.0
