"""How far AdamW can move a value: torch's own AdamW never moves one farther."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.training import TrainingSection
from common.randomness import seeded
from common.schedule import learning_rate, most_moved


def section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate({"rounds": 4, "local_steps": 6, "warmup_steps": 3, **values})


def moved_by_torch(training: TrainingSection, round_number: int, gradients: np.ndarray, start: np.ndarray) -> float:
    """The farthest that torch's AdamW moves a value in one round, from gradients [steps, values]."""
    value = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([value], weight_decay=training.weight_decay, eps=training.adam_epsilon)
    total, farthest = training.rounds * training.local_steps, 0.0
    for step, gradient in enumerate(gradients):
        first = (round_number - 1) * training.local_steps
        optimizer.param_groups[0]["lr"] = learning_rate(training, first + step, total)
        value.grad = torch.from_numpy(gradient)
        optimizer.step()
        farthest = max(farthest, float((value.detach() - torch.from_numpy(start)).abs().max()))
    return farthest


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    round_number=st.integers(1, 4),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    steps=st.integers(1, 40),
    kind=st.sampled_from(["noise", "growing", "shrinking", "one sign", "spikes"]),
)
def test_no_gradients_move_a_value_farther(
    seed: int, round_number: int, schedule: str, decay: float, steps: int, kind: str
) -> None:
    training = section(local_steps=steps, schedule=schedule, weight_decay=decay, learning_rate=0.3)
    rng = seeded(seed, "gradients")
    gradients = rng.standard_normal((steps, 50))
    growth = np.exp(rng.uniform(0, 3, 50) * np.arange(steps)[:, None])
    gradients *= {"growing": growth, "shrinking": 1 / growth}.get(kind, 1.0)
    gradients = np.abs(gradients) if kind == "one sign" else gradients
    gradients *= rng.random(gradients.shape) < 0.1 if kind == "spikes" else 1.0
    start = rng.standard_normal(50)
    bound = most_moved(training, round_number=round_number, head=False, largest=float(np.abs(start).max()))
    assert moved_by_torch(training, round_number, gradients, start) <= bound * (1 + 1e-9)


def test_the_worst_gradients_reach_it() -> None:
    # Equality in Cauchy and Schwarz: g_i in proportion to a_i / b_i. A looser bound would waste bits.
    steps, training = (
        12,
        section(local_steps=12, warmup_steps=0, schedule="constant", weight_decay=0.0, adam_epsilon=1e-12),
    )
    ages = np.arange(steps)[::-1]
    gradients = ((0.9 / 0.999) ** ages)[:, None]
    last = moved_by_torch(training, 1, gradients, np.zeros(1))
    bound = most_moved(training, round_number=1, head=False, largest=0.0)
    assert 0.97 * bound < last <= bound


def test_a_heads_own_rate_counts() -> None:
    training = section(learning_rate=0.1, head_learning_rate=0.4, weight_decay=0.0)
    rest, head = (most_moved(training, round_number=2, head=head, largest=1.0) for head in (False, True))
    assert head == pytest.approx(4 * rest)
