"""The coordinator's own step along the mean change, chosen by the manifest. It uses nothing but the mean."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.config.manifest import AggregationSection
from server.aggregation.adaptive import Adaptive, adam, yogi
from server.aggregation.momentum import ServerMomentum

__all__ = ["Optimiser", "optimiser_for"]

Change = Mapping[str, npt.NDArray[np.float64]]


class Optimiser(Protocol):
    """A step for every tensor of the mean change, with a memory of its own for each name.

    A tensor that is not in a round's change is not moved, and its memory waits. `state` is replaced and never changed
    in place, so that a rejected round can be taken back by putting the former state in again.
    """

    state: Mapping[str, Any]

    def __call__(self, change: Change) -> dict[str, npt.NDArray[np.float64]]:
        """What to add to the adapter where the sites' mean change is `change`."""

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew for tensors that others have taken the place of."""


def optimiser_for(section: AggregationSection) -> Optimiser:
    """The optimiser that the manifest names."""
    rate = section.server_learning_rate
    if section.server_optimizer == "momentum":
        return ServerMomentum(rate, section.server_momentum)
    second_moment = adam if section.server_optimizer == "adam" else yogi
    return Adaptive(second_moment, rate, beta1=section.server_beta1, beta2=section.server_beta2, tau=section.server_tau)
