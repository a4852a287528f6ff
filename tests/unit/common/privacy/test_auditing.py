"""The audit's statistics against the paper's own algorithm, and against randomised response, which is tight."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from common.errors import PrivacyError
from common.privacy.auditing import epsilon_shown, p_value


def slow(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 from its definition: every window below v, summed anew."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = sum(mass[v:])
    slopes = [sum(mass[v - i : v]) / i for i in range(1, v + 1)]
    return min(1.0, tail + max(slopes, default=0.0) * delta * 2 * m)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_chance_is_that_of_the_theorem(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 40))
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    epsilon, delta = data.draw(st.floats(0, 4)), data.draw(st.sampled_from([0.0, 1e-5, 1e-2]))
    assert math.isclose(p_value(m, r, v, epsilon, delta), slow(m, r, v, epsilon, delta), rel_tol=1e-9, abs_tol=1e-12)


def test_without_delta_it_is_the_bound_of_clopper_and_pearson() -> None:
    # 900 of 1,000 right: the lower confidence limit of the chance, as log odds.
    from scipy.stats import beta

    low = beta.ppf(0.05, 900, 101)
    assert math.isclose(epsilon_shown(1000, 1000, 900, 0.0), math.log(low / (1 - low)), rel_tol=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_never_accused_and_nearly_found_out(epsilon: float) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    correct = rng.binomial(4000, 1 / (1 + math.exp(-epsilon)), size=200)
    shown = np.array([epsilon_shown(4000, 4000, int(v), 0.0) for v in correct])
    # At 95 % confidence 10 of 200 may be wrong; 20 are more than three standard errors above that.
    assert (shown > epsilon).sum() <= 20
    assert shown.mean() > epsilon - 0.25


def test_more_delta_and_more_canaries_show_less() -> None:
    values = [epsilon_shown(1000, 200, 180, delta) for delta in (0.0, 1e-6, 1e-4)]
    assert values == sorted(values, reverse=True)
    assert epsilon_shown(100000, 200, 180, 1e-4) < epsilon_shown(1000, 200, 180, 1e-4)


def test_guesses_no_better_than_a_coin_show_nothing() -> None:
    assert epsilon_shown(1000, 500, 250, 1e-5) == 0.0
    assert epsilon_shown(1000, 0, 0, 0.0) == 0.0
    assert p_value(1000, 500, 0, 1.0, 1e-5) == 1.0
    assert binom.sf(249, 500, 0.5) > 0.05


@pytest.mark.parametrize("numbers", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(PrivacyError, match="0 <= correct <= guesses <= canaries"):
        p_value(*numbers, 1.0, 1e-5)
