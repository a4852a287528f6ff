"""`dense`: the mean of the products B A themselves, brought back to the rank (FlexLoRA, Bai et al. 2024).

Every site sends the change of scale x B A of each layer, as large as the layer. The coordinator adds the mean to its
own product and takes the nearest pair of the adapter's rank, which is exact where the rank is enough. Sites of any
rank can take part. For small models: what travels is the size of the base's adapted layers.
"""

from collections.abc import Mapping

import numpy as np

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import AdapterError
from common.factors import pairs_of, scale
from common.low_rank import factors_of
from server.aggregation.mean import WeightedMean
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["MOST_VALUES", "Dense"]

# Values of all products together; 200 MB in float32 for each site and round.
MOST_VALUES = 50_000_000


class Dense:
    """Needs the mean alone.

    Raises:
        AdapterError: the products of all layers hold more than 50 million values.
    """

    facts = Facts(
        name="dense", needs="sum", sums=1, exact="the best pair of the rank for the mean of products", mixed_ranks=True
    )

    def __init__(self, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._rank, self._scale = manifest.adapter.rank, scale(manifest.adapter)
        values = sum(shapes[pair.b][0] * shapes[pair.a][1] for pair in pairs_of(shapes))
        if values > MOST_VALUES:
            raise AdapterError(
                f"aggregation.method 'dense' may send at most {MOST_VALUES:,} values of products, the adapter's layers"
                f" have {values:,}; take 'sketch' or 'alternate', or fewer adapter.targets"
            )

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightedMean:
        """One weighted mean."""
        return WeightedMean(shapes)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change of products and other tensors."""
        return length_of(mean)

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter whose products are nearest to the old ones with the step added."""
        change = step(mean)
        after = moved(adapter, change)
        for pair in pairs_of(adapter):
            if pair.name("BA") in change:
                product = self._scale * (adapter[pair.b].astype(np.float64) @ adapter[pair.a].astype(np.float64))
                target = product + change[pair.name("BA")]
                after[pair.b], after[pair.a] = factors_of(target, None, self._rank, self._scale)
        return after
