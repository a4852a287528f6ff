"""`ffa`: A stays as it was drawn and B trains (FFA-LoRA, Sun et al. 2024); now and then a new pair is begun.

The mean is exact, as with one factor of `alternate`, and half the values travel. But the update B A can only use the
few input directions of one random A. With `refresh_every` = T, after every T accepted rounds of the adapter the pair
is kept as it is and a new one is put on top of it, whose A is drawn from the agreed seed and whose B is zero: the
model computes the same, and then learns in other directions. The adapter is one pair of rank r x parts all the time,
which is what is stored and what PEFT loads; sites get all of it and send the change of the newest B.
"""

import math
from collections.abc import Mapping

import numpy as np

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.factors import below, depth, newest, pairs_of, stacked
from common.randomness import seeded
from server.aggregation.mean import WeightedMean
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["Ffa", "begun_anew"]


class Ffa:
    """Needs the mean alone."""

    facts = Facts(name="ffa", needs="sum", sums=1, exact="yes: A is the same at all sites and stays", mixed_ranks=False)

    def __init__(self, manifest: Manifest) -> None:
        self._rank, self._seed = manifest.adapter.rank, manifest.training.seed
        self._every = manifest.aggregation.refresh_every
        self._head_rounds, self._rounds = manifest.training.head_rounds, manifest.training.rounds

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightedMean:
        """One weighted mean."""
        return WeightedMean(shapes)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the mean change of the tensors that trained."""
        return length_of(mean)

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter with the newest B moved, and with a new pair on top where one is due."""
        after = moved(newest(adapter, self._rank), step(mean))
        after = stacked(below(adapter, self._rank), after)
        trained = accepted + 1 - self._head_rounds
        last = accepted + 1 == self._rounds  # a pair that no round trains would only make the result larger
        if self._every is not None and trained > 0 and trained % self._every == 0 and not last:
            step.forget(pair.b for pair in pairs_of(after))
            after = begun_anew(after, self._rank, self._seed)
        return after


def begun_anew(adapter: AdapterState, rank: int, seed: int) -> AdapterState:
    """The adapter with a new pair of `rank` on every layer's stack, drawn as the first one was, from the agreed seed.

    A is uniform with bound 1 / sqrt(inputs), B zero, as in `first_state`; so B A changes nothing.
    """
    part = depth({name: array.shape for name, array in adapter.items()}, rank)
    top = newest(adapter, rank)
    for pair in pairs_of(adapter):
        bound = 1 / math.sqrt(top[pair.a].shape[1])
        generator = seeded(seed, "refresh", part, pair.a)
        top[pair.a] = generator.uniform(-bound, bound, top[pair.a].shape).astype(np.float32)
        top[pair.b] = np.zeros_like(top[pair.b])
    return stacked(adapter, top)
