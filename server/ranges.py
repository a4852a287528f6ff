"""How far the values of a secure sum may go: from the optimiser at first, then also from the means that were opened.

Only public things go in: the manifest, the adapter that everybody has, and earlier means. The privacy clip does not:
AdamW's first step is as long as its learning rate, however short the gradient was.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.config.manifest import Manifest
from common.factors import is_head, newest, pairs_of, scale
from common.schedule import most_moved

__all__ = ["Ranges"]

Arrays = Mapping[str, npt.NDArray[Any]]

# A site's values can be as many times larger than the mean's as there are sites; where their noise is independent, the
# square root of it. Four times that, and never less than a 64th of what the optimiser could do, saturates nothing that
# was seen; with 16 bits it leaves more than 9 for the mean's own size.
ROOM = 4.0
LEAST = 1 / 64

# float32 rounds up to half a unit in the last place in every step of training.
ROUNDING = 1.001


class Ranges:
    """Ranges of the summed tensors, by name, round for round."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._shares: dict[str, float] = {}
        self._bounds: dict[str, float] = {}

    def of(self, names: Iterable[str], adapter: Arrays, *, round_number: int, sites: int) -> dict[str, float]:
        """Ranges for what is summed under `names` in a round that starts from `adapter`."""
        bounds, room = self._all_bounds(adapter, round_number), ROOM * math.sqrt(sites)
        self._bounds = {name: bounds[name] for name in sorted(names)}
        return {
            name: bound * min(1.0, max(LEAST, room * self._shares.get(name, 1.0)))
            for name, bound in self._bounds.items()
        }

    def saw(self, mean: Arrays) -> None:
        """Remember how much of its bound the opened mean took."""
        for name, array in mean.items():
            if name in self._bounds and array.size:
                self._shares[name] = float(np.abs(array).max()) / self._bounds[name]

    def _all_bounds(self, adapter: Arrays, round_number: int) -> dict[str, float]:
        section, factor = self._manifest.training, scale(self._manifest.adapter)
        state = newest(
            {name: np.asarray(array, np.float32) for name, array in adapter.items()}, self._manifest.adapter.rank
        )
        largest = {name: float(np.abs(array).max(initial=0.0)) for name, array in state.items()}
        moved = {
            name: ROUNDING * most_moved(section, round_number=round_number, head=is_head(name), largest=value)
            for name, value in largest.items()
        }
        bounds = dict(moved)
        for pair in pairs_of(state):
            (rank, inputs), outputs = state[pair.a].shape, len(state[pair.b])
            a, b, a_moved, b_moved = largest[pair.a], largest[pair.b], moved[pair.a], moved[pair.b]
            # Of s B A after training: each entry is a product of a row of B and a column of A, r values each.
            after = (b + b_moved) * (a + a_moved)
            bounds[pair.name("BA")] = factor * rank * (b * a_moved + b_moved * a + b_moved * a_moved)
            # |Y_ij| <= s |B_i| |A| for columns of Omega of length 1; |Z_ij| is at most the length of column j of s B A.
            bounds[pair.name("Y")] = factor * rank * math.sqrt(inputs) * after
            bounds[pair.name("Z")] = factor * rank * math.sqrt(outputs) * after
        return bounds
