"""FedAdam and FedYogi: adaptive steps along the mean change (Reddi et al. 2021, algorithm 2).

    m_t = beta1 m_(t-1) + (1 - beta1) change_t
    v_t = beta2 v_(t-1) + (1 - beta2) change_t^2                                    Adam
    v_t = v_(t-1) - (1 - beta2) change_t^2 sign(v_(t-1) - change_t^2)               Yogi
    step_t = learning_rate m_t / (sqrt(v_t) + tau)

with m_0 = 0 and v_0 = tau^2, number by number and without correction of the first steps' bias, as in the paper.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["Adaptive", "adam", "yogi"]

Array = npt.NDArray[np.float64]


class Adaptive:
    """Steps whose size adapts by `second_moment(v, change^2, beta2)`; `state` holds (m, v) by name."""

    def __init__(
        self,
        second_moment: Callable[[Array, Array, float], Array],
        learning_rate: float,
        *,
        beta1: float,
        beta2: float,
        tau: float,
    ) -> None:
        self._second_moment = second_moment
        self._learning_rate = learning_rate
        self._beta1, self._beta2, self._tau = beta1, beta2, tau
        self.state: Mapping[str, tuple[Array, Array]] = {}

    def __call__(self, change: Mapping[str, Array]) -> dict[str, Array]:
        """What to add to the adapter where the sites' mean change is `change`."""
        steps: dict[str, Array] = {}
        state = dict(self.state)
        for name, given in change.items():
            array = np.asarray(given, np.float64)
            m, v = state.get(name) or (np.zeros_like(array), np.full_like(array, self._tau**2))
            m = self._beta1 * m + (1 - self._beta1) * array
            v = self._second_moment(v, np.square(array), self._beta2)
            state[name] = (m, v)
            steps[name] = self._learning_rate * m / (np.sqrt(v) + self._tau)
        self.state = state
        return steps

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew for tensors that others have taken the place of."""
        gone = set(names)
        self.state = {name: moments for name, moments in self.state.items() if name not in gone}


def adam(v: Array, squared: Array, beta2: float) -> Array:
    """The decaying mean of squares."""
    return beta2 * v + (1 - beta2) * squared


def yogi(v: Array, squared: Array, beta2: float) -> Array:
    """`v` moved towards the squares by a bounded share, so that one small change does not make the next step large."""
    moved: Array = v - (1 - beta2) * squared * np.sign(v - squared)
    return moved
