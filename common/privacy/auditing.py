"""What a privacy audit with one training run shows: from right guesses about canaries to a lower bound on epsilon.

Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (2023). Each of `canaries` is put into
training with chance one half; whoever audits guesses for some of them whether they are in. Differential privacy bounds
how often those guesses can be right, so many right guesses disprove a small epsilon.
"""

import math

from scipy.stats import binom

from common.errors import PrivacyError

__all__ = ["epsilon_shown", "p_value"]

# Bounds are looked for up to here; beyond it right guesses about millions of canaries would be needed.
MOST_EPSILON = 64.0


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The chance of at least `correct` right guesses of `guesses`, at most, if training were (epsilon, delta)-private.

    Theorem 5.2 of the paper: a binomial tail with success chance e^epsilon / (1 + e^epsilon), and for delta twice
    `canaries` times the steepest mean slope of the binomial distribution below `correct`.

    Raises:
        PrivacyError: the numbers do not fit each other.
    """
    if not 0 <= correct <= guesses <= canaries or epsilon < 0 or not 0 <= delta < 1:
        raise PrivacyError(
            "an audit needs 0 <= correct <= guesses <= canaries, epsilon >= 0 and 0 <= delta < 1;"
            f" found {correct}, {guesses}, {canaries}, {epsilon:g}, {delta:g}"
        )
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, chance))
    steepest = below = 0.0
    for distance, mass in enumerate(binom.pmf(range(correct - 1, -1, -1), guesses, chance).tolist(), start=1):
        below += mass
        steepest = max(steepest, below / distance)
    return min(1.0, tail + steepest * delta * 2 * canaries)


def epsilon_shown(canaries: int, guesses: int, correct: int, delta: float, *, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses disprove with `confidence`; 0 if none."""
    doubt = 1 - confidence
    if p_value(canaries, guesses, correct, 0.0, delta) >= doubt:
        return 0.0
    low, high = 0.0, MOST_EPSILON
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < doubt:
            low = middle
        else:
            high = middle
    return low
