"""Accounting against published values, against a closed form, and against its own rules."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import PrivacyError
from common.privacy.accounting import LEAST_NOISE, Steps, calibrate, check_delta, merged, prv_epsilon, rdp_epsilon

noises = st.sampled_from([0.7, 1.0, 1.5, 4.0])
rates = st.sampled_from([0.01, 0.1, 0.5])
histories = st.lists(st.builds(Steps, noises, rates, st.integers(1, 50)), min_size=1, max_size=4)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Exact epsilon of one Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        first = norm.cdf(1 / (2 * noise) - epsilon * noise)
        return float(first - math.exp(epsilon) * norm.cdf(-1 / (2 * noise) - epsilon * noise) - delta)

    return float(brentq(excess, 0, 50))


@pytest.mark.parametrize(
    ("steps", "rdp", "prv"),
    [(Steps(1.0, 0.01, 1000), 2.101, 1.838), (Steps(0.6, 0.05, 500), 26.99, 24.34)],
)
def test_both_agree_with_measured_values(steps: Steps, rdp: float, prv: float) -> None:
    assert rdp_epsilon([steps], 1e-5) == pytest.approx(rdp, abs=0.01)
    assert prv_epsilon([steps], 1e-5) == pytest.approx(prv, abs=0.03)


@pytest.mark.parametrize("noise", [1.0, 2.0, 8.0, 40.0])
def test_without_sampling_both_bound_the_closed_form(noise: float) -> None:
    # k steps of noise s are one step of noise s / sqrt(k).
    exact = gaussian_epsilon(noise / math.sqrt(4), 1e-5)
    history = [Steps(noise, 1.0, 4)]
    assert exact <= prv_epsilon(history, 1e-5) <= exact + 0.02
    assert exact <= rdp_epsilon(history, 1e-5) <= 1.35 * exact + 0.01


def test_small_epsilons_have_no_floor() -> None:
    assert rdp_epsilon([Steps(50.0, 0.01, 10)], 1e-5) < 0.01


@settings(deadline=None, max_examples=25)
@given(histories)
def test_order_and_merging_change_nothing_and_more_steps_cost_more(history: list[Steps]) -> None:
    whole = rdp_epsilon(history, 1e-5)
    assert rdp_epsilon(history[::-1], 1e-5) == pytest.approx(whole, rel=1e-9)
    assert rdp_epsilon(merged(history), 1e-5) == pytest.approx(whole, rel=1e-9)
    assert sum(each.count for each in merged(history)) == sum(each.count for each in history)
    assert rdp_epsilon([*history, history[0]], 1e-5) > whole
    assert rdp_epsilon(history, 1e-6) > whole


def test_nothing_costs_nothing() -> None:
    assert rdp_epsilon([], 1e-5) == prv_epsilon([], 1e-5) == rdp_epsilon([Steps(1.0, 0.1, 0)], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(8.0, 0.05, 1000), (1.0, 0.3, 40), (0.1, 0.01, 500), (8.0, 0.43, 5), (200.0, 0.01, 1), (0.02, 0.2, 3)],
)
def test_calibration_is_the_least_noise_that_is_enough(epsilon: float, rate: float, steps: int) -> None:
    noise = calibrate(epsilon, 1e-5, sampling_rate=rate, steps=steps)
    assert rdp_epsilon([Steps(noise, rate, steps)], 1e-5) <= epsilon
    assert noise == LEAST_NOISE or rdp_epsilon([Steps(noise - 0.001, rate, steps)], 1e-5) > epsilon


def test_calibration_counts_what_was_spent() -> None:
    spent = [Steps(1.2, 0.05, 300)]
    noise = calibrate(8.0, 1e-5, sampling_rate=0.05, steps=700, spent=spent)
    assert noise == pytest.approx(1.278, abs=0.005)
    assert 7.95 < rdp_epsilon([*spent, Steps(noise, 0.05, 700)], 1e-5) <= 8.0
    # A budget that is all but spent: what is left is found to the last thousandth, and no order is forgotten.
    left = rdp_epsilon(spent, 1e-5) + 1e-4
    noise = calibrate(left, 1e-5, sampling_rate=0.05, steps=10, spent=spent)
    assert rdp_epsilon([*spent, Steps(noise, 0.05, 10)], 1e-5) <= left
    assert rdp_epsilon([*spent, Steps(noise - 0.001, 0.05, 10)], 1e-5) > left
    with pytest.raises(PrivacyError, match="no noise keeps 10 steps within epsilon 1 at delta 1e-05: 4"):
        calibrate(1.0, 1e-5, sampling_rate=0.05, steps=10, spent=spent)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.epsilon must be positive and finite"):
        calibrate(epsilon, 1e-5, sampling_rate=0.1, steps=10)


@pytest.mark.parametrize("values", [(0.1, 0.5, 1), (0.0, 0.5, 1), (1.0, 0.0, 1), (1.0, 1.01, 1), (1.0, 0.5, -1)])
def test_steps_outside_the_accountants_range_are_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError):
        Steps(*values)


def test_a_delta_that_lets_a_unit_leak_is_refused() -> None:
    check_delta(0.9e-3, units=1000)
    for delta in (1e-3, 0.5, 0.0, -1.0):
        with pytest.raises(PrivacyError, match=r"below 1 / 1000 privacy units = 0.001"):
            check_delta(delta, units=1000)
