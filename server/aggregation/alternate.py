"""`alternate`: only B trains in one round and only A in the next (RoLoRA, Chen et al. 2025, arXiv 2502.01755).

With one factor the same at all sites, mean(B_i A) = mean(B_i) A: the mean of the sites' changes is the mean of their
products exactly, and half the values travel. Which factor trains follows from the number of accepted aggregations
(`common/contribution.py`); B begins, since while B = 0 the gradient of A is zero and with privacy A would get noise
alone.
"""

from collections.abc import Mapping

from common.codec.state import AdapterState
from server.aggregation.mean import WeightedMean
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["Alternate"]


class Alternate:
    """Needs the mean alone; what is in it is the sites' part of the agreement."""

    facts = Facts(
        name="alternate",
        needs="sum",
        sums=1,
        exact="yes: one factor at a time is the same at all sites",
        mixed_ranks=False,
    )

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightedMean:
        """One weighted mean."""
        return WeightedMean(shapes)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change of the tensors that trained."""
        return length_of(mean)

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter with the tensors that trained moved; the others stay, and so does their momentum."""
        return moved(adapter, step(mean))
