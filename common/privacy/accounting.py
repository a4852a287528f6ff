"""What noised steps cost together, and how much noise a budget asks for. No state: histories in, numbers out.

A step samples every privacy unit on its own with a known rate (Poisson sampling), bounds each unit's part, and adds
Gaussian noise. Two accountants of Opacus look at a history of such steps. Rényi differential privacy (Mironov 2017;
Mironov, Talwar and Zhang 2019) is robust and enforces every limit; its orders reach far beyond Opacus' own, which
alone cannot show an epsilon below 0.1. The privacy loss random variables of Gopi, Lee and Wutschitz (2021) are
tighter and stand beside it in reports. Opacus' GDP accountant is never used: it underestimates.

Opacus brings torch with it, which takes seconds: it is imported by the first sum, and a command that sums nothing
starts without it.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import PrivacyError

__all__ = ["LEAST_NOISE", "Steps", "calibrate", "check_delta", "merged", "prv_epsilon", "rdp_epsilon"]

# Orders of Rényi divergence: fine where large epsilons have their optimum, far out for small ones.
ORDERS = (
    *(1 + step / 10 for step in range(1, 100)),
    *range(11, 64),
    *range(64, 256, 16),
    *range(256, 1024, 128),
    1024,
    2048,
    4096,
)

# Less noise than this is no privacy that anyone would sign, and the accountants leave their range.
LEAST_NOISE = 0.3
MOST_NOISE = 2.0**14

# Noise multipliers are multiples of this: histories of many runs then hold few distinct entries.
NOISE_STEP = 1e-3


@dataclass(frozen=True)
class Steps:
    """`count` steps with one noise multiplier (deviation of the noise over the clip) and one sampling rate."""

    noise_multiplier: float
    sampling_rate: float
    count: int

    def __post_init__(self) -> None:
        if not LEAST_NOISE <= self.noise_multiplier <= MOST_NOISE:
            raise PrivacyError(
                f"a noise multiplier must lie between {LEAST_NOISE} and {MOST_NOISE:g}, found {self.noise_multiplier:g}"
            )
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"a sampling rate must be above 0 and at most 1, found {self.sampling_rate:g}")
        if self.count < 0:
            raise PrivacyError(f"a number of steps cannot be negative, found {self.count}")


def merged(history: Iterable[Steps]) -> list[Steps]:
    """The history with equal steps added up; their order does not matter to what they cost."""
    counts: dict[tuple[float, float], int] = {}
    for steps in history:
        key = (steps.noise_multiplier, steps.sampling_rate)
        counts[key] = counts.get(key, 0) + steps.count
    return [Steps(noise, rate, count) for (noise, rate), count in sorted(counts.items()) if count]


def check_delta(delta: float, *, units: int) -> None:
    """Refuse a delta that permits to publish a unit outright.

    Raises:
        PrivacyError: delta is not above 0 and below 1/units.
    """
    if not 0 < delta < 1 / max(1, units):
        raise PrivacyError(
            f"privacy.delta must be above 0 and below 1 / {units} privacy units = {1 / max(1, units):.2g},"
            f" found {delta:g}; with a larger one whole units may leak"
        )


def rdp_epsilon(history: Iterable[Steps], delta: float) -> float:
    """Epsilon of all steps together at `delta`, by Rényi differential privacy; 0 for an empty history."""
    entries = merged(history)
    return _epsilon(ORDERS, _rdp(entries, ORDERS), delta)[0] if entries else 0.0


def _rdp(entries: Sequence[Steps], orders: Sequence[float]) -> np.ndarray:
    """What the entries cost together at each order of Rényi divergence."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with _without_advice():
        return sum(
            (
                np.asarray(
                    compute_rdp(q=e.sampling_rate, noise_multiplier=e.noise_multiplier, steps=e.count, orders=orders)
                )
                for e in entries
            ),
            np.zeros(len(orders)),
        )


def _epsilon(orders: Sequence[float], rdp: np.ndarray, delta: float) -> tuple[float, float]:
    """The least epsilon that one of the orders shows, and that order. Fewer orders never show a smaller one."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _without_advice():
        epsilon, order = get_privacy_spent(orders=orders, rdp=rdp, delta=delta)
    return max(0.0, float(epsilon)), float(order)


def prv_epsilon(history: Iterable[Steps], delta: float) -> float:
    """An upper bound on epsilon that is tighter than `rdp_epsilon` by the loss variables themselves; for reports.

    It takes seconds where epsilon is large or a history has many distinct entries. Its error is at most 0.01.
    """
    entries = merged(history)
    if not entries:
        return 0.0
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(each.noise_multiplier, each.sampling_rate, each.count) for each in entries]
    with _without_advice():
        return max(0.0, float(accountant.get_epsilon(delta)))


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Opacus advises other orders where the best is the first or last: the bound is then loose, never wrong."""
    with (
        warnings.catch_warnings(),
        np.errstate(divide="ignore"),
    ):  # without sampling it takes the logarithm of 0, rightly
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def calibrate(epsilon: float, delta: float, *, sampling_rate: float, steps: int, spent: Sequence[Steps] = ()) -> float:
    """The least noise multiplier with which `steps` steps, after those `spent`, stay within (epsilon, delta).

    Raises:
        PrivacyError: no noise is enough, since too much is spent, or epsilon is not positive.
    """
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"privacy.epsilon must be positive and finite here, found {epsilon:g}")

    already = merged(spent)

    def at(noise: int, orders: Sequence[float]) -> tuple[float, float]:
        return _epsilon(orders, _rdp([*already, Steps(noise * NOISE_STEP, sampling_rate, steps)], orders), delta)

    # Fewer orders are quicker and never show a smaller epsilon, so what is enough for them is enough; whether less
    # noise would be is asked of all orders in the end.
    least, most = math.ceil(LEAST_NOISE / NOISE_STEP), round(MOST_NOISE / NOISE_STEP)
    high, order = next(
        (found for found in (_enough(at, epsilon, most, o) for o in (ORDERS[::8], ORDERS)) if found), (0, 0)
    )
    if not high:
        raise PrivacyError(
            f"no noise keeps {steps} steps within epsilon {epsilon:g} at delta {delta:g}:"
            f" {rdp_epsilon(already, delta):.3g} is spent already"
        )
    while True:
        place, low = ORDERS.index(order), least
        while low < high:
            middle = (low + high) // 2
            if at(middle, ORDERS[max(0, place - 8) : place + 9])[0] <= epsilon:
                high = middle
            else:
                low = middle + 1
        if high <= least:
            return LEAST_NOISE
        shown, order = at(high - 1, ORDERS)
        if shown > epsilon:
            return round(high * NOISE_STEP, 6)
        high -= 1


def _enough(
    at: Callable[[int, Sequence[float]], tuple[float, float]], epsilon: float, most: int, orders: Sequence[float]
) -> tuple[int, float] | None:
    """Some noise that these orders find enough, by doubling, and the order that shows it; None where there is none."""
    noise = round(1 / NOISE_STEP)
    while noise <= most:
        shown, order = at(noise, orders)
        if shown <= epsilon:
            return noise, order
        noise *= 2
    return None
