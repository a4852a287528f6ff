"""The learning rate of every step, and how far AdamW can move a value in a round. No torch.

How far is a bound, not a guess: both sides of a secure sum take the range of what they sum from it, so that nothing
that training does can leave the range.
"""

import math
from functools import lru_cache

from common.config.training import TrainingSection

__all__ = ["learning_rate", "most_moved"]

# AdamW's decay rates, which the manifest does not change.
BETA_1, BETA_2 = 0.9, 0.999


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a whole run: linear warm-up, then the manifest's schedule to zero."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[section.schedule]
    return section.learning_rate * max(0.0, factor)


def most_moved(section: TrainingSection, *, round_number: int, head: bool, largest: float) -> float:
    """The farthest that a value of at most `largest` can move in round `round_number` (from 1), whatever its gradients.

    AdamW's step t is lr_t (m_t / (sqrt(v_t) + eps) + decay w), its moments starting afresh each round. With weights a_i
    of the mean m_t and b_i of the mean v_t over the gradients g_i, the inequality of Cauchy and Schwarz gives
    |sum a_i g_i| <= sqrt(sum a_i^2 / b_i) sqrt(sum b_i g_i^2), so |m_t| / sqrt(v_t) is at most the first root: 1 at
    t = 1, 1.16 at t = 20, below 7.3 for ever.
    """
    total = section.rounds * section.local_steps
    own = section.head_learning_rate
    peak = section.learning_rate if own is None or not head else own
    moved = 0.0
    for step in range(section.local_steps):
        rate = learning_rate(section, (round_number - 1) * section.local_steps + step, total)
        rate *= peak / section.learning_rate
        moved += rate * (_longest(step + 1) + section.weight_decay * (largest + moved))
    return moved


@lru_cache(maxsize=4096)
def _longest(step: int) -> float:
    """Most that |m| / sqrt(v) can be at a step (from 1): sqrt of sum a_i^2 / b_i over the gradients so far.

    a_i = (1 - beta_1) beta_1^(t-i) / (1 - beta_1^t), b_i the same with beta_2, so with q = beta_1^2 / beta_2 the sum is
    (1 - beta_1)^2 (1 - beta_2^t) / ((1 - beta_1^t)^2 (1 - beta_2)) times the geometric series of q.
    """
    ratio = BETA_1**2 / BETA_2
    series = (1 - ratio**step) / (1 - ratio)
    first = (1 - BETA_1) / (1 - BETA_1**step)
    second = (1 - BETA_2) / (1 - BETA_2**step)
    return math.sqrt(first**2 / second * series)
