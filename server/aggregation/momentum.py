"""The coordinator's own step along the mean change: FedAvgM (Hsu, Qi and Brown 2019, algorithm 1; Reddi et al. 2021).

A round's mean change is short where sites disagree and take few steps. The coordinator may go further along it
(`learning_rate` above 1) and keep part of its last direction (`momentum`). Both use nothing but the mean.
"""

import numpy as np

from common.codec.state import AdapterState

__all__ = ["ServerMomentum"]


class ServerMomentum:
    """step_t = momentum * step_(t-1) + (mean_t - before); after = before + learning_rate * step_t.

    With learning rate 1 and momentum 0 the adapter after the round is the mean itself.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._step: AdapterState = {}

    def __call__(self, before: AdapterState, mean: AdapterState) -> AdapterState:
        """The adapter after a round that began with `before` and whose mean is `mean`."""
        after = {}
        for name, start in before.items():
            last = self._step.get(name, np.float32(0))
            self._step[name] = (self._momentum * last + (mean[name] - start)).astype(np.float32)
            # before + learning_rate * step, written so that rounding leaves the mean itself where it is the result.
            beyond = self._momentum * last + (self._learning_rate - 1) * self._step[name]
            after[name] = (mean[name] + beyond).astype(np.float32)
        return after
