"""`sketch`: the mean of the products B A, found in two sums of thin matrices (the idea of FedASK, arXiv 2507.09990).

First sum: Y = mean of scale x B_i (A_i Omega), where Omega [k, k_s] is agreed (`common/contribution.py`). Its columns
span where the mean product leads to; Q [m, k_s] is an orthonormal basis of them. Second sum: Z = mean of
scale x (Q^T B_i) A_i. Q Z is the mean product, projected on Q: exact where k_s reaches its rank, and otherwise nearly
the best (Halko et al. 2011, theorem 10.5). No site makes a matrix as large as a layer, and each may have a rank of its
own.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.factors import Pair, pairs_of, scale
from common.low_rank import factors_of
from server.aggregation.mean import WeightedMean
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["Sketch"]


class Sketch:
    """Needs two means. `server_learning_rate` scales the step; an optimiser with a memory does not go with it."""

    facts = Facts(
        name="sketch",
        needs="sum",
        sums=2,
        exact="nearly the best pair of the rank for the mean of products; the best where rank + 8 holds it",
        mixed_ranks=True,
    )

    def __init__(self, manifest: Manifest) -> None:
        self._rank, self._scale = manifest.adapter.rank, scale(manifest.adapter)
        self._learning_rate = manifest.aggregation.server_learning_rate

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightedMean:
        """One weighted mean, for each of the two sums."""
        return WeightedMean(shapes)

    def basis(self, mean: Mean) -> AdapterState:
        """Q of every layer's mean Y, under the name of Y; empty in rounds that train the head alone."""
        return {pair.name("Y"): self._orthonormal(mean, pair) for pair in _sketched(mean)}

    def _orthonormal(self, mean: Mean, pair: Pair) -> npt.NDArray[np.float32]:
        return np.linalg.qr(mean[pair.name("Y")])[0].astype(np.float32)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change: of Q Z less the product that the round began with, and of other tensors."""
        pairs = _sketched(mean)
        thin = {name for pair in pairs for name in (pair.name("Y"), pair.name("Z"))}
        square = length_of({name: array for name, array in mean.items() if name not in thin}) ** 2
        for pair in pairs:
            left, right = self._product(adapter, mean, pair, before=-1.0, rate=1.0)
            # The squared norm of left @ right, without a matrix as large as the layer.
            square += float(np.sum((left.T @ left) * (right @ right.T)))
        return float(np.sqrt(max(0.0, square)))

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter whose products are nearest to (1 - rate) times the old ones plus rate times Q Z."""
        pairs = _sketched(mean)
        after = moved(adapter, step({name: array for name, array in mean.items() if name in adapter}))
        for pair in pairs:
            rate = self._learning_rate
            left, right = self._product(adapter, mean, pair, before=1 - rate, rate=rate)
            after[pair.b], after[pair.a] = factors_of(left, right, self._rank, self._scale)
        return after

    def _product(
        self, adapter: AdapterState, mean: Mean, pair: Pair, *, before: float, rate: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """before x scale x B A + rate x Q Z, as left [m, r + k_s] and right [r + k_s, k]."""
        basis = self._orthonormal(mean, pair).astype(np.float64)
        left = np.hstack([before * self._scale * adapter[pair.b].astype(np.float64), rate * basis])
        return left, np.vstack([adapter[pair.a].astype(np.float64), mean[pair.name("Z")]])


def _sketched(mean: Mean) -> tuple[Pair, ...]:
    """The pairs whose Y a mean holds."""
    marks = (".lora_A", ".lora_B")
    names = [name.replace(".lora_Y", mark) for name in mean if ".lora_Y" in name for mark in marks]
    return pairs_of(names)
