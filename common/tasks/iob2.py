"""The likeliest valid IOB2 sequence of a sentence: an I-x only ever continues an entity of its own type x."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["decode"]


def decode(scores: npt.NDArray[np.floating], tags: Sequence[str]) -> list[str]:
    """The valid sequence with the largest sum of `scores` [words, tags], found by the Viterbi algorithm.

    Scores of a word are logits or log-probabilities: what a softmax takes off them is the same for all its tags.
    (Viterbi, "Error bounds for convolutional codes", 1967.)
    """
    best = scores.argmax(axis=1)
    if not len(best):
        return []
    forbidden = _forbidden(tags)
    if not forbidden[np.concatenate([[-1], best[:-1]]), best].any():  # the common case: nothing to mend
        return [tags[tag] for tag in best]
    penalty = np.where(forbidden, -np.inf, 0.0)
    total = scores[0] + penalty[-1]
    pointers = []
    for word in scores[1:]:
        paths = total[:, None] + penalty[:-1]
        came_from = paths.argmax(axis=0)
        pointers.append(came_from)
        total = paths[came_from, np.arange(len(tags))] + word
    path = [int(total.argmax())]
    for came_from in reversed(pointers):
        path.append(int(came_from[path[-1]]))
    return [tags[tag] for tag in reversed(path)]


def _forbidden(tags: Sequence[str]) -> npt.NDArray[np.bool_]:
    """[tags + 1, tags]: whether a tag may not follow another; the last row is the start of the sentence."""
    return np.array(
        [
            [after.startswith("I-") and before[1:] != after[1:] for after in tags]  # "B-x"[1:] == "I-x"[1:] == "-x"
            for before in [*tags, ""]
        ]
    )
