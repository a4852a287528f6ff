from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.randomness import seed_dropout, seeded, seeded_int

SEED = st.integers(0, 2**31 - 1)
LABELS = st.lists(st.text("abc", min_size=1, max_size=3) | st.integers(0, 99), max_size=3).map(tuple)


@given(seed=SEED, labels=LABELS)
def test_equal_arguments_give_equal_streams(seed: int, labels: tuple[Any, ...]) -> None:
    assert seeded_int(seed, *labels) == seeded_int(seed, *labels)
    assert 0 <= seeded_int(seed, *labels) < 2**63
    assert seeded(seed, *labels).random(4).tolist() == seeded(seed, *labels).random(4).tolist()


@given(one=st.tuples(SEED, LABELS), other=st.tuples(SEED, LABELS))
def test_other_arguments_give_other_streams(one: tuple[int, Any], other: tuple[int, Any]) -> None:
    if (one[0], [str(label) for label in one[1]]) != (other[0], [str(label) for label in other[1]]):
        assert seeded_int(one[0], *one[1]) != seeded_int(other[0], *other[1])
        assert seeded(one[0], *one[1]).random() != seeded(other[0], *other[1]).random()


def test_labels_do_not_run_together() -> None:
    numbers = [seeded_int(*arguments) for arguments in ((1, "ab", "c"), (1, "a", "bc"), (1, "abc"), (11, "c"), (1, 1))]
    assert len(set(numbers)) == len(numbers)


def test_the_stream_is_the_same_on_every_machine() -> None:
    # printf 'coadapt\x1f7\x1fsplit' | sha256sum begins with 01beb6bf04c788d3; half of it has 63 bits.
    assert seeded_int(7, "split") == 0x01BEB6BF04C788D3 // 2


def test_streams_of_neighbours_are_unrelated() -> None:
    # 200 streams of 500 values: neighbours correlate by about 1/sqrt(500) = 0.045; the largest of 199 is below 5 of it.
    streams = [seeded(seed, "x").normal(size=500) for seed in range(200)]
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairwise(streams)) < 5 / np.sqrt(500)


def test_dropout_is_repeatable_and_of_its_own() -> None:
    drawn = {}
    for arguments in product((1, 2), ("site-1", "site-2"), (1, 2)):
        seed_dropout(*arguments)
        drawn[arguments] = tuple(torch.rand(3).tolist())
        seed_dropout(*arguments)
        assert drawn[arguments] == tuple(torch.rand(3).tolist())
    assert len(set(drawn.values())) == len(drawn)
