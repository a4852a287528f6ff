"""FedAvgM, a step along the mean change with momentum (Hsu, Qi and Brown 2019, algorithm 1; Reddi et al. 2021).

A round's mean change is short where sites disagree and take few steps. The coordinator may go further along it
(`learning_rate` above 1) and keep part of its last direction (`momentum`). Both use nothing but the mean.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["ServerMomentum"]

Arrays = Mapping[str, npt.NDArray[np.float64]]


class ServerMomentum:
    """memory_t = momentum * memory_(t-1) + change_t; the step is learning_rate * memory_t.

    With learning rate 1 and momentum 0 the step is the mean change itself. `state` holds the memories by name.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self._learning_rate = learning_rate
        self._momentum = momentum
        self.state: Arrays = {}

    def __call__(self, change: Arrays) -> dict[str, npt.NDArray[np.float64]]:
        """What to add to the adapter where the sites' mean change is `change`."""
        memory = {
            name: self._momentum * self.state.get(name, np.float64(0)) + np.asarray(array, np.float64)
            for name, array in change.items()
        }
        self.state = {**self.state, **memory} if self._momentum else {}
        return {name: self._learning_rate * array for name, array in memory.items()}

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew for tensors that others have taken the place of."""
        gone = set(names)
        self.state = {name: array for name, array in self.state.items() if name not in gone}
