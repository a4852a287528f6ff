"""The mean of the last rounds' adapters (Polyak and Juditsky 1992; over the tail alone: Jain et al. 2018).

With privacy the steps carry noise that the adapter keeps swaying with; a mean of where it went sways less. It is made
of adapters that the sites' answers gave anyway, so it costs no privacy and asks nothing of the sites.
"""

from collections.abc import Iterable

import numpy as np

from common.codec.state import AdapterState

__all__ = ["mean_adapter"]


def mean_adapter(adapters: Iterable[AdapterState]) -> AdapterState:
    """The tensors' means over one or more adapters of one shape, float32; the sums are taken in float64."""
    total: dict[str, np.ndarray] = {}
    count = 0
    for adapter in adapters:
        count += 1
        for name, array in adapter.items():
            total[name] = total.get(name, 0.0) + array.astype(np.float64)
    return {name: (array / count).astype(np.float32) for name, array in total.items()}
