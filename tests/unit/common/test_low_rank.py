import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.low_rank import factors_of
from common.randomness import seeded


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    inner=st.integers(1, 6),
    rank=st.integers(1, 6),
    seed=st.integers(0),
)
def test_it_is_the_best_pair_of_the_rank(rows: int, columns: int, inner: int, rank: int, seed: int) -> None:
    # The oracle is the tail of the singular values (Eckart and Young): no matrix of the rank is nearer.
    rng = seeded(seed % 2**31, "low rank")
    left, right = rng.standard_normal((rows, inner)), rng.standard_normal((inner, columns))
    product = left @ right
    tail = np.linalg.svd(product, compute_uv=False)[rank:]
    for given_right in (right, None):
        b, a = factors_of(left if given_right is not None else product, given_right, rank, 0.5)
        assert (b.shape, a.shape, b.dtype, a.dtype) == ((rows, rank), (rank, columns), np.float32, np.float32)
        error = np.linalg.norm(product - 0.5 * b.astype(float) @ a)
        assert error == pytest.approx(math.sqrt(np.sum(tail**2)), abs=1e-5 * (1 + np.linalg.norm(product)))


def test_a_keeps_the_length_that_it_starts_with_also_where_b_is_zero() -> None:
    b, a = factors_of(np.zeros((6, 7)), None, 3, 1.0)
    assert not b.any()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1 / math.sqrt(3), rtol=1e-6)
    # First adapters have A uniform with bound 1 / sqrt(inputs): rows of root mean square length 1 / sqrt(3).
    drawn = seeded(0, "first").uniform(-1 / math.sqrt(400), 1 / math.sqrt(400), (200, 400))
    assert np.linalg.norm(drawn, axis=1).mean() == pytest.approx(1 / math.sqrt(3), rel=0.01)


def test_the_first_columns_and_rows_are_the_best_pair_of_a_smaller_rank() -> None:
    rng = seeded(1, "smaller")
    product = rng.standard_normal((6, 4)) @ rng.standard_normal((4, 5))
    b, a = factors_of(product, None, 4, 0.5)
    u, s, vt = np.linalg.svd(product)
    for rank in (1, 2, 3):
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(0.5 * b[:, :rank] @ a[:rank], best, atol=1e-5)
