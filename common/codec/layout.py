"""Which tensors of an adapter's state lie where in a flat vector. Canonical order is the sorted names."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.errors import AdapterError

__all__ = ["Layout", "chosen"]


@dataclass(frozen=True)
class Layout:
    """Names and shapes in canonical order; `Layout.of(state)` makes one. A sum of extras alone has no tensors."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.tensors]
        if names != sorted(set(names)):
            raise AdapterError("a layout needs tensors with distinct names in sorted order")
        if any(side < 0 for _, shape in self.tensors for side in shape):
            raise AdapterError("a layout needs tensors without negative shapes")

    @classmethod
    def of(cls, state: Mapping[str, npt.NDArray[Any]]) -> "Layout":
        """The layout of a state."""
        return cls(tuple((name, state[name].shape) for name in sorted(state)))

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def canonical(self) -> bytes:
        """The bytes that a digest of the schema is taken of."""
        return json.dumps([[name, list(shape)] for name, shape in self.tensors], separators=(",", ":")).encode()

    def places(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        """Name, shape and place in the vector of each tensor."""
        start = 0
        for name, shape in self.tensors:
            size = math.prod(shape)
            yield name, shape, slice(start, start + size)
            start += size

    def flatten(self, state: AdapterState) -> npt.NDArray[np.float32]:
        """The state as one float32 vector [size].

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or not float32.
        """
        known = {name for name, _ in self.tensors}
        if missing := sorted(known - state.keys()):
            raise AdapterError(f"the adapter state lacks {missing[0]!r}, which the layout has; send what was agreed")
        if unknown := sorted(state.keys() - known):
            raise AdapterError(
                f"the adapter state has {unknown[0]!r}, which the layout has not; choose the names first"
            )
        vector = np.empty(self.size, np.float32)
        for name, shape, place in self.places():
            array = state[name]
            if array.shape != shape or array.dtype != np.float32:
                raise AdapterError(
                    f"tensor {name!r} is {array.dtype} {list(array.shape)} and must be float32 {list(shape)}"
                )
            vector[place] = array.reshape(-1)
        return vector

    def unflatten(self, vector: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Tensors with the vector's dtype, from a vector [size]."""
        if vector.shape != (self.size,):
            raise AdapterError(f"a vector {list(vector.shape)} does not fit a layout of {self.size} values")
        return {name: vector[place].reshape(shape) for name, shape, place in self.places()}


def chosen(state: AdapterState, names: Iterable[str]) -> AdapterState:
    """The tensors of these names alone, for rounds that sum a part of the adapter.

    Raises:
        AdapterError: the state lacks one of them.
    """
    wanted = sorted(set(names))
    if missing := [name for name in wanted if name not in state]:
        raise AdapterError(f"the adapter state lacks {missing[0]!r}; it cannot be chosen")
    return {name: state[name] for name in wanted}
