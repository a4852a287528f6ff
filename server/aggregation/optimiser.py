"""The coordinator's own step along the mean change, chosen by the manifest. It uses nothing but the mean."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.config.manifest import AggregationSection
from server.aggregation.adaptive import Adaptive, adam, yogi
from server.aggregation.momentum import ServerMomentum

__all__ = ["Optimiser", "memory_of", "optimiser_for", "remember"]

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


def memory_of(step: Optimiser) -> dict[str, npt.NDArray[np.float64]]:
    """The optimiser's memory for the disk: each tensor's parts as "part/name", from "0/name"."""
    parts = {name: kept if isinstance(kept, tuple) else (kept,) for name, kept in step.state.items()}
    return {
        f"{part}/{name}": np.ascontiguousarray(array, np.float64)
        for name, arrays in parts.items()
        for part, array in enumerate(arrays)
    }


def remember(step: Optimiser, memory: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Put back what `memory_of` gave."""
    parts: dict[str, list[npt.NDArray[np.float64]]] = {}
    for key in sorted(memory):
        parts.setdefault(key.split("/", 1)[1], []).append(memory[key])
    step.state = {name: arrays[0] if len(arrays) == 1 else tuple(arrays) for name, arrays in parts.items()}
