"""How far the values that a site sends can lie, whatever its records are; from the manifest and the adapter alone.

Ranges of secure sums follow from it, and a site refuses others: which function of the values is summed is not the
coordinator's to choose. With a range far too small the sum would be one of signs.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.config.manifest import Manifest
from common.errors import PolicyRefused
from common.factors import is_head, newest, pairs_of, scale
from common.schedule import most_moved

__all__ = ["LEAST", "bounds", "require_ranges"]

# Least share of its bound that a range may have.
LEAST = 1 / 64

# float32 rounds up to half a unit in the last place in every step of training.
ROUNDING = 1.001

# Two machines' cosines may differ in the last digit.
TOLERANCE = 1e-6


def bounds(manifest: Manifest, adapter: Mapping[str, npt.NDArray[Any]], round_number: int) -> dict[str, float]:
    """The largest absolute value of everything that a site may send in a round that starts from `adapter`, by name.

    Of a low-rank pair these are its change, the change of its product (BA) and the parts of its sketch (Y, Z).
    """
    section, factor = manifest.training, scale(manifest.adapter)
    state = newest({name: np.asarray(array, np.float32) for name, array in adapter.items()}, manifest.adapter.rank)
    largest = {name: float(np.abs(array).max(initial=0.0)) for name, array in state.items()}
    moved = {
        name: ROUNDING * most_moved(section, round_number=round_number, head=is_head(name), largest=value)
        for name, value in largest.items()
    }
    found = dict(moved)
    for pair in pairs_of(state):
        (rank, inputs), outputs = state[pair.a].shape, len(state[pair.b])
        a, b, a_moved, b_moved = largest[pair.a], largest[pair.b], moved[pair.a], moved[pair.b]
        # Of s B A after training: each entry is a product of a row of B and a column of A, r values each.
        after = (b + b_moved) * (a + a_moved)
        found[pair.name("BA")] = factor * rank * (b * a_moved + b_moved * a + b_moved * a_moved)
        # |Y_ij| <= s |B_i| |A| for columns of Omega of length 1; |Z_ij| is at most the length of column j of s B A.
        found[pair.name("Y")] = factor * rank * math.sqrt(inputs) * after
        found[pair.name("Z")] = factor * rank * math.sqrt(outputs) * after
    return found


def require_ranges(ranges: Mapping[str, float], most: Mapping[str, float]) -> None:
    """Refuse ranges that do not follow from the bounds `most`.

    Raises:
        PolicyRefused: one is wider than its bound, or narrower than `LEAST` of it.
    """
    for name, limit in ranges.items():
        bound = most.get(name, math.nan)
        if not LEAST * bound * (1 - TOLERANCE) <= limit <= bound * (1 + TOLERANCE):
            raise PolicyRefused(
                f"the range of {name!r} is {limit:.3g} and must be {LEAST * bound:.3g} to {bound:.3g}, which follows"
                " from optimiser and adapter; nothing was sent"
            )
