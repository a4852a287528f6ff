"""Ranges of sums: nothing that training can do leaves them, and opened means make them narrower."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bounds import LEAST
from common.config.manifest import Manifest
from common.contribution import contribution, contribution_shapes, projection, projection_shapes
from common.factors import scale
from common.randomness import seeded
from common.schedule import most_moved
from server.ranges import ROOM, Ranges

A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "head.weight"
SHAPES = {A: (2, 7), B: (5, 2), HEAD: (3, 4)}


def state(seed: int, size: float) -> dict[str, Any]:
    rng = seeded(seed, "state")
    return {name: (size * rng.uniform(-1, 1, shape)).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def manifests(manifest_for: Callable[..., Manifest]) -> Callable[[str], Manifest]:
    def make(method: str) -> Manifest:
        return manifest_for(
            adapter={"rank": 2, "alpha": 6.0},
            aggregation={"method": method},
            training={"rounds": 3, "local_steps": 2, "learning_rate": 0.1, "head_learning_rate": 0.5},
        )

    return make


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.0, 0.01, 1.0]),
    method=st.sampled_from(["separate", "dense", "sketch"]),
)
def test_whatever_training_does_stays_within(
    manifests: Callable[[str], Manifest], seed: int, size: float, method: str
) -> None:
    manifest, before = manifests(method), state(seed, size)
    rng, after = seeded(seed, "moved"), {}
    for name, array in before.items():
        largest = float(np.abs(array).max())
        most = most_moved(manifest.training, round_number=1, head=name == HEAD, largest=largest)
        after[name] = (array + most * rng.choice([-1.0, 1.0], array.shape)).astype(np.float32)
    ranges = Ranges(manifest).of(contribution_shapes(manifest, SHAPES, 0), before, round_number=1, sites=3)
    sent = contribution(manifest, before, after, 0)
    assert sent.keys() == ranges.keys()
    for name, array in sent.items():
        assert np.abs(array).max() <= ranges[name]
    if method == "sketch":
        y = next(name for name in sent if "lora_Y" in name)
        second = projection(scale(manifest.adapter), after, {y: np.linalg.qr(sent[y])[0].astype(np.float32)})
        room = Ranges(manifest).of(projection_shapes(manifest, SHAPES, 0), before, round_number=1, sites=3)
        assert second.keys() == room.keys()
        assert all(np.abs(array).max() <= room[name] for name, array in second.items())


def test_opened_means_make_ranges_narrower_within_limits(manifests: Callable[[str], Manifest]) -> None:
    ranges, before = Ranges(manifests("separate")), state(0, 1.0)
    one = ranges.of(SHAPES, before, round_number=1, sites=4)
    ranges.saw({A: np.full((2, 7), 0.01 * one[A]), B: np.zeros((5, 2)), HEAD: np.full((3, 4), 0.9 * one[HEAD])})
    two = ranges.of(SHAPES, before, round_number=2, sites=4)
    bounds = Ranges(manifests("separate")).of(SHAPES, before, round_number=2, sites=4)
    assert two[A] == pytest.approx(0.01 * ROOM * 2 * bounds[A])
    assert two[B] == pytest.approx(LEAST * bounds[B])  # a mean of nothing says little about the next round
    assert two[HEAD] == bounds[HEAD]
    # A round that summed other tensors forgets nothing.
    ranges.of([HEAD], before, round_number=3, sites=4)
    ranges.saw({HEAD: np.zeros((3, 4))})
    assert ranges.of([A], before, round_number=2, sites=4)[A] == pytest.approx(two[A])
