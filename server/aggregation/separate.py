"""`separate`: the mean of the sites' changes, A and B apart (FedIT, Zhang et al. 2024; FedAvg on every tensor).

The product of the means is not the mean of the products: the difference is mean(b a) - mean(b) mean(a), of second
order in the sites' changes b and a. For adapters without low-rank pairs the mean is exact.
"""

from collections.abc import Mapping

from common.codec.state import AdapterState
from server.aggregation.mean import WeightedMean
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["Separate"]


class Separate:
    """Needs the mean alone."""

    facts = Facts(
        name="separate",
        needs="sum",
        sums=1,
        exact="no: B and A are averaged apart, off by second order in the sites' changes",
        mixed_ranks=False,
    )

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightedMean:
        """One weighted mean."""
        return WeightedMean(shapes)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change."""
        return length_of(mean)

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter, moved by the step that the mean change asks for."""
        return moved(adapter, step(mean))
