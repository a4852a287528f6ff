"""Weighted mean of what the sites send (FedAvg, McMahan et al. 2017, algorithm 1), tensor by tensor.

It is all that a method of aggregation may know where the sites send through a secure sum. Memory holds one running
sum, however many sites answer.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.errors import AdapterError

__all__ = ["WeightedMean", "require_fit"]


class WeightedMean:
    """Collects contributions of agreed shapes one after the other."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sum = {name: np.zeros(shape, dtype=np.float64) for name, shape in shapes.items()}
        self._weight = 0.0

    def add(self, contribution: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Take in one site's contribution with a positive weight.

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or not finite. Nothing of it is taken in.
        """
        require_fit({name: array.shape for name, array in self._sum.items()}, contribution, weight)
        for name, array in contribution.items():
            self._sum[name] += weight * array.astype(np.float64)
        self._weight += weight

    def result(self) -> dict[str, npt.NDArray[np.float64]]:
        """The weighted mean.

        Raises:
            AdapterError: nothing was taken in.
        """
        if self._weight == 0:
            raise AdapterError("there is nothing to average: no site's change was taken in")
        return {name: total / self._weight for name, total in self._sum.items()}


def require_fit(
    shapes: Mapping[str, tuple[int, ...]], contribution: Mapping[str, npt.NDArray[np.float32]], weight: float
) -> None:
    """Refuse what cannot be averaged.

    Raises:
        AdapterError: a tensor is missing, unknown, of another shape or not finite, or the weight is not positive.
    """
    if {name: array.shape for name, array in contribution.items()} != dict(shapes):
        raise AdapterError("a site's change does not have the tensors of the round")
    if not all(np.isfinite(array).all() for array in contribution.values()):
        raise AdapterError("a site's change holds values that are not finite")
    if not 0 < weight < math.inf:
        raise AdapterError(f"a site's weight must be positive and finite, found {weight}")
