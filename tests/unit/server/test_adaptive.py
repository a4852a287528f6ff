"""FedAdam and FedYogi against a slow loop written from the paper, and Adam against torch's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.manifest import AggregationSection
from common.randomness import seeded
from server.aggregation.adaptive import Adaptive, adam, yogi
from server.aggregation.momentum import ServerMomentum
from server.aggregation.optimiser import optimiser_for

SETTINGS = {"beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


def slow(kind: str, rate: float, changes: list[float], beta1: float, beta2: float, tau: float) -> list[float]:
    """Algorithm 2 of Reddi et al. 2021 for one number."""
    m, v, steps = 0.0, tau**2, []
    for change in changes:
        m = beta1 * m + (1 - beta1) * change
        square = change * change
        if kind == "adam":
            v = beta2 * v + (1 - beta2) * square
        else:
            sign = (v > square) - (v < square)
            v = v - (1 - beta2) * square * sign
        steps.append(rate * m / (math.sqrt(v) + tau))
    return steps


@settings(deadline=None)
@given(
    kind=st.sampled_from(["adam", "yogi"]),
    rate=st.floats(0.001, 0.99),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    tau=st.floats(1e-6, 1),
    changes=st.lists(st.floats(-10, 10), min_size=1, max_size=8),
)
def test_it_is_the_papers_algorithm(
    kind: str, rate: float, beta1: float, beta2: float, tau: float, changes: list[float]
) -> None:
    section = AggregationSection(
        server_optimizer=kind,  # type: ignore[arg-type]
        server_learning_rate=rate,
        server_beta1=beta1,
        server_beta2=beta2,
        server_tau=tau,
    )
    optimiser = optimiser_for(section)
    for change, wanted in zip(changes, slow(kind, rate, changes, beta1, beta2, tau), strict=True):
        step = optimiser({"a": np.array([[change, -change]])})["a"]
        assert step[0, 0] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert step[0, 1] == -step[0, 0]


def test_adam_is_torchs_but_for_the_correction_of_the_first_steps() -> None:
    # torch divides m by 1 - beta1^t and v by 1 - beta2^t and starts with v = 0; with rate and epsilon scaled by the
    # same corrections and a tau near zero, both take the same steps.
    changes = seeded(0, "adam").standard_normal((12, 5))
    optimiser = Adaptive(adam, 0.1, beta1=0.9, beta2=0.99, tau=1e-9)
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    oracle = torch.optim.Adam([weights], betas=(0.9, 0.99))
    place = np.zeros(5)
    for number, change in enumerate(changes, start=1):
        place += optimiser({"a": change})["a"]
        root = math.sqrt(1 - 0.99**number)
        oracle.param_groups[0].update(lr=0.1 * (1 - 0.9**number) / root, eps=1e-9 / root)
        weights.grad = torch.from_numpy(-change)  # torch goes down a gradient, the server along a change
        oracle.step()
        np.testing.assert_allclose(place, weights.detach().numpy(), rtol=1e-6)


def test_yogi_remembers_a_large_change_longer_than_adam() -> None:
    # After one large change small ones follow: Adam's v decays by a share of itself, Yogi's by a share of the small.
    last = {}
    for kind in (adam, yogi):
        optimiser = Adaptive(kind, 1.0, **{**SETTINGS, "beta2": 0.5})
        for change in [10.0] + [0.1] * 10:
            last[kind] = optimiser({"a": np.array([change])})["a"][0]
    assert last[yogi] < last[adam] / 5


@pytest.mark.parametrize("kind", [adam, yogi])
def test_memory_waits_is_forgotten_and_can_be_taken_back(kind: object) -> None:
    def new() -> Adaptive:
        return Adaptive(kind, 1.0, **SETTINGS)  # type: ignore[arg-type]

    one, two = new(), new()
    for optimiser in (one, two):
        optimiser({"a": np.array([8.0])})
    before = one.state
    one({"b": np.array([1.0])})
    assert one({"a": np.array([1.0])})["a"] == two({"a": np.array([1.0])})["a"]  # b's round left a alone
    one.state = before
    fresh = new()
    fresh({"a": np.array([8.0])})
    assert one({"a": np.array([2.0])})["a"] == fresh({"a": np.array([2.0])})["a"]
    one.forget(["a"])
    assert one({"a": np.array([3.0])})["a"] == new()({"a": np.array([3.0])})["a"]


def test_the_manifest_chooses() -> None:
    assert isinstance(optimiser_for(AggregationSection()), ServerMomentum)
    assert isinstance(optimiser_for(AggregationSection(server_optimizer="yogi", server_learning_rate=0.01)), Adaptive)
