"""Weighted mean of the sites' changes (FedAvg, McMahan et al. 2017, algorithm 1), matrix by matrix.

The factors A and B are averaged apart. That is not the mean of the products B A; it is what a secure sum can give,
and it costs nothing. Memory holds one running sum, however many sites answer.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.errors import AdapterError

__all__ = ["WeightedMean"]


class WeightedMean:
    """Collects changes one after the other and adds their weighted mean to the adapter they started from."""

    def __init__(self, before: AdapterState) -> None:
        self._before = before
        self._sum = {name: np.zeros(array.shape, dtype=np.float64) for name, array in before.items()}
        self._weight = 0.0

    def add(self, change: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Take in one site's change with a positive weight.

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or not finite. Nothing of it is taken in.
        """
        expected = {name: array.shape for name, array in self._before.items()}
        if {name: array.shape for name, array in change.items()} != expected:
            raise AdapterError("a site's change does not have the tensors of the adapter")
        if not all(np.isfinite(array).all() for array in change.values()):
            raise AdapterError("a site's change holds values that are not finite")
        if not 0 < weight < math.inf:
            raise AdapterError(f"a site's weight must be positive and finite, found {weight}")
        for name, array in change.items():
            self._sum[name] += weight * array.astype(np.float64)
        self._weight += weight

    def result(self) -> AdapterState:
        """The adapter after the round.

        Raises:
            AdapterError: no change was taken in.
        """
        if self._weight == 0:
            raise AdapterError("there is nothing to average: no site's change was taken in")
        return {
            name: (array.astype(np.float64) + self._sum[name] / self._weight).astype(np.float32)
            for name, array in self._before.items()
        }
