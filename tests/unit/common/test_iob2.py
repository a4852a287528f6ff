import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks.iob2 import decode

TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


def valid(sequence: tuple[str, ...]) -> bool:
    return all(
        not after.startswith("I-") or (before is not None and before in ("B" + after[1:], after))
        for before, after in zip((None, *sequence), sequence, strict=False)
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_the_sequence_is_the_best_of_all_valid_ones(seed: int, words: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(words, len(TAGS)))
    every = [sequence for sequence in itertools.product(TAGS, repeat=words) if valid(sequence)]
    best = max(every, key=lambda sequence: sum(scores[place, TAGS.index(tag)] for place, tag in enumerate(sequence)))
    assert decode(scores, TAGS) == list(best)


def test_a_stray_inside_becomes_the_start_of_an_entity_where_that_is_likelier() -> None:
    #                   O    B-a  I-a  B-b  I-b
    scores = np.array([[5.0, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0]])
    assert decode(scores, TAGS) == ["O", "B-a", "I-a"]


@pytest.mark.parametrize("words", [0, 1])
def test_short_sentences(words: int) -> None:
    assert decode(np.zeros((words, len(TAGS))), TAGS) == ["O"] * words
