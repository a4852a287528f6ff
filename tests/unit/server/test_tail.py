import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation.tail import mean_adapter

NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=9))
def test_it_is_the_mean_of_every_number(values: list[tuple[float, float]]) -> None:
    found = mean_adapter({"a": np.float32([[x]]), "b": np.float32([y, 1.0])} for x, y in values)
    assert found["a"].dtype == np.float32
    assert found["a"].shape == (1, 1)
    assert found["a"][0, 0] == np.float32(sum(x for x, _ in values) / len(values))
    assert found["b"][0] == np.float32(sum(y for _, y in values) / len(values))
    assert found["b"][1] == 1.0


def test_one_adapter_comes_back_bit_for_bit() -> None:
    adapter = {"a": np.float32([0.1, -1e-30, 3e38])}
    assert np.array_equal(mean_adapter([adapter])["a"], adapter["a"])
