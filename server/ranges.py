"""How far the values of a secure sum may go: from the optimiser at first, then also from the means that were opened.

Only public things go in: the manifest, the adapter that everybody has, and earlier means. The privacy clip does not:
AdamW's first step is as long as its learning rate, however short the gradient was.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.bounds import LEAST, bounds
from common.config.manifest import Manifest

__all__ = ["Ranges"]

Arrays = Mapping[str, npt.NDArray[Any]]

# A site's values can be as many times larger than the mean's as there are sites; where their noise is independent, the
# square root of it. Four times that, and never less than a 64th (`LEAST`) of what the optimiser could do, saturates
# nothing that was seen; with 16 bits it leaves more than 9 for the mean's own size.
ROOM = 4.0


class Ranges:
    """Ranges of the summed tensors, by name, round for round."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._shares: dict[str, float] = {}
        self._bounds: dict[str, float] = {}

    def of(self, names: Iterable[str], adapter: Arrays, *, round_number: int, sites: int) -> dict[str, float]:
        """Ranges for what is summed under `names` in a round that starts from `adapter`."""
        most, room = bounds(self._manifest, adapter, round_number), ROOM * math.sqrt(sites)
        self._bounds = {name: most[name] for name in sorted(names)}
        return {
            name: bound * min(1.0, max(LEAST, room * self._shares.get(name, 1.0)))
            for name, bound in self._bounds.items()
        }

    @property
    def shares(self) -> dict[str, float]:
        """How much of its bound each tensor's last opened mean took; all that is remembered from round to round."""
        return dict(self._shares)

    @shares.setter
    def shares(self, shares: Mapping[str, float]) -> None:
        self._shares = dict(shares)

    def saw(self, mean: Arrays) -> None:
        """Remember how much of its bound the opened mean took."""
        for name, array in mean.items():
            if name in self._bounds and array.size:
                self._shares[name] = float(np.abs(array).max()) / self._bounds[name]
