"""A person's own aggregator, named by import path: f(changes, weights) -> change.

`changes` is a list of the sites' changes, dictionaries from tensor names to float32 arrays, `weights` a list of
positive numbers, both in the order in which answers came. It needs every site's change by itself, so it cannot be
used with a secure sum. What it returns takes the place of the weighted mean; the server's step follows as always.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.errors import AdapterError, ExtensionError
from server.aggregation.mean import require_fit
from server.aggregation.method import Facts, Mean, length_of, moved
from server.aggregation.optimiser import Optimiser

__all__ = ["Own"]


class Own:
    """Aggregation by `function`, which the manifest names as `path`."""

    def __init__(self, path: str, function: Callable[..., Any]) -> None:
        self.facts = Facts(name=path, needs="individual", sums=1, exact="not known", mixed_ranks=False)
        self._function = function

    def collector(self, shapes: Mapping[str, tuple[int, ...]]) -> "_Gathered":
        """A collector that keeps every site's change."""
        return _Gathered(shapes, self.facts.name, self._function)

    def length(self, adapter: AdapterState, mean: Mean) -> float:
        """L2 norm of the change."""
        return length_of(mean)

    def after(self, adapter: AdapterState, mean: Mean, accepted: int, step: Optimiser) -> AdapterState:
        """The adapter, moved by the step that the change asks for."""
        return moved(adapter, step(mean))


class _Gathered:
    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: str, function: Callable[..., Any]) -> None:
        self._shapes, self._path, self._function = dict(shapes), path, function
        self._changes: list[AdapterState] = []
        self._weights: list[float] = []

    def add(self, contribution: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Take in one site's change; an AdapterError refuses one that does not fit."""
        require_fit(self._shapes, contribution, weight)
        self._changes.append(dict(contribution))
        self._weights.append(weight)

    def result(self) -> dict[str, npt.NDArray[np.float64]]:
        """What the function makes of the changes.

        Raises:
            AdapterError: there are none.
            ExtensionError: the function fails, or what it returns is no change of the adapter.
        """
        if not self._changes:
            raise AdapterError("there is nothing to average: no site's change was taken in")
        try:
            made = self._function(self._changes, self._weights)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExtensionError(f"aggregation.method {self._path!r} failed with {reason}") from error
        try:
            change = {str(name): np.asarray(array, dtype=np.float64) for name, array in dict(made).items()}
        except (TypeError, ValueError) as error:
            raise ExtensionError(
                f"aggregation.method {self._path!r} must return a dictionary from names to arrays, found"
                f" {type(made).__name__}"
            ) from error
        wrong = sorted(
            name
            for name in change.keys() | self._shapes.keys()
            if name not in change or change[name].shape != self._shapes.get(name) or not np.isfinite(change[name]).all()
        )
        if wrong:
            found = change[wrong[0]].shape if wrong[0] in change else "none"
            raise ExtensionError(
                f"aggregation.method {self._path!r} must return finite arrays of the changes' names and shapes; for"
                f" {wrong[0]} wanted {self._shapes.get(wrong[0], 'none')}, found {found}"
            )
        return change
