"""What a method of aggregation is: what it needs, what it costs, and how a mean becomes the next adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from server.aggregation.optimiser import Optimiser

__all__ = ["Collector", "Facts", "Mean", "Method", "TwoSums", "length_of", "moved"]

# A mean of what sites sent, by the names of the contribution.
Mean = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method declares about itself; `coadapt check` prints it, docs/aggregation.md lists it.

    `needs`: "sum" where a weighted mean of what the sites send is enough, so that a secure sum can give it, or
    "individual" where each site's own is needed. `sums` is how many such means a round takes. `exact` says how the
    result relates to the mean of the products B A. `mixed_ranks`: whether a site may train another rank.
    """

    name: str
    needs: Literal["sum", "individual"]
    sums: int
    exact: str
    mixed_ranks: bool


class Collector(Protocol):
    """Takes contributions in, one after the other."""

    def add(self, contribution: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Take in one site's contribution with a positive weight.

        Raises:
            AdapterError: it does not fit; nothing of it is taken in.
        """

    def result(self) -> dict[str, npt.NDArray[np.float64]]:
        """What all contributions together come to.

        Raises:
            AdapterError: there is none.
        """


class Method(Protocol):
    """One method of aggregation under one manifest."""

    @property
    def facts(self) -> Facts:
        """What the method needs and gives."""

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> Collector:
        """A collector for one round's contributions of these shapes."""

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change, all tensors together."""

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter after a round that followed on `accepted` aggregations."""


@runtime_checkable
class TwoSums(Protocol):
    """What a method has beside the rest when it takes a second sum in a round."""

    def basis(self, mean: Mean) -> AdapterState:
        """What the sites need for the second sum; empty where this round has none. The second mean's tensors join the
        first one's in `after`."""


def length_of(mean: Mean) -> float:
    """L2 norm over all tensors."""
    return float(np.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in mean.values())))


def moved(adapter: AdapterState, change: Mean) -> AdapterState:
    """The adapter with a change, added in float64; tensors without one stay as they are."""
    return {
        name: (array.astype(np.float64) + change[name]).astype(np.float32) if name in change else array
        for name, array in adapter.items()
    }
