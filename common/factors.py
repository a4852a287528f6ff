"""What the names of an adapter's tensors say: the head, the factors A and B of low-rank pairs, and stacks of pairs.

A pair is B [m, r] and A [r, k] of one layer; the layer's weight changes by scale x B A. A *stack* is several pairs of
one layer, side by side: B [m, r p] and A [r p, k], which is one pair of rank r p. The newest part, the last r columns
and rows, is the one that trains. No torch.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.config.manifest import AdapterSection
from common.errors import AdapterError

__all__ = ["Pair", "below", "depth", "factor_of", "is_head", "newest", "pairs_of", "scale", "stacked", "turned"]

_HEAD = re.compile(r"(^|\.)(head|classifier|score)\.")
_FACTOR = re.compile(r"(?<=\.lora_)[AB](?=\.(?:default\.)?weight$)")


class Pair(NamedTuple):
    """The names of one layer's factors."""

    a: str
    b: str

    def name(self, kind: Literal["BA", "Y", "Z"]) -> str:
        """Name of a tensor that is made of the pair: the product BA, or the parts Y and Z of its sketch."""
        return _FACTOR.sub(kind, self.a)


def is_head(name: str) -> bool:
    """Whether a trained parameter of this name belongs to the task's head."""
    return _HEAD.search(name) is not None


def factor_of(name: str) -> Literal["A", "B", ""]:
    """Which factor of a low-rank pair a tensor of this name is; empty for anything else."""
    found = _FACTOR.search(name)
    return "" if found is None else "A" if found[0] == "A" else "B"


def pairs_of(names: Iterable[str]) -> tuple[Pair, ...]:
    """The low-rank pairs among the names, sorted.

    Raises:
        AdapterError: a factor stands alone.
    """
    factors = {name for name in names if factor_of(name)}
    pairs = sorted(Pair(_FACTOR.sub("A", name), _FACTOR.sub("B", name)) for name in factors)
    alone = [pair for pair in pairs if not factors.issuperset(pair)]
    if alone:
        raise AdapterError(
            f"the adapter holds one factor of a pair alone: {alone[0].a} and {alone[0].b} belong together"
        )
    return tuple(dict.fromkeys(pairs))


def scale(section: AdapterSection) -> float:
    """The factor before B A: alpha / r (Hu et al. 2021, section 4.1), rank-stabilised alpha / sqrt(r)."""
    return section.alpha / (math.sqrt(section.rank) if section.method == "rslora" else section.rank)


def depth(shapes: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """How many pairs of `rank` each layer's stack holds, one where there are no pairs.

    Raises:
        AdapterError: layers have different numbers, or a pair's rank is no multiple of `rank`.
    """
    factors = [shapes[pair.a] for pair in pairs_of(shapes)] + [shapes[pair.b][::-1] for pair in pairs_of(shapes)]
    ranks = {shape[0] if len(shape) == 2 else 0 for shape in factors}
    if len(ranks) > 1 or any(size == 0 or size % rank for size in ranks):
        raise AdapterError(f"all low-rank pairs must have one rank, a multiple of {rank}; found {sorted(ranks)}")
    return ranks.pop() // rank if ranks else 1


def newest(state: Mapping[str, npt.NDArray[np.float32]], rank: int) -> AdapterState:
    """The state with the newest pair of every stack alone: what trains."""
    return {
        name: array[-rank:] if (factor := factor_of(name)) == "A" else array[:, -rank:] if factor else array
        for name, array in state.items()
    }


def turned(state: Mapping[str, npt.NDArray[np.float32]], first: int) -> AdapterState:
    """The state with the first `first` columns of every B and rows of every A moved to the end, where a stack's newest
    part is; B A stays what it was. A site of smaller rank trains those, and leaves the others as they are."""
    return {
        name: np.roll(array, -first, axis=0)
        if (factor := factor_of(name)) == "A"
        else np.roll(array, -first, axis=1)
        if factor
        else array
        for name, array in state.items()
    }


def below(state: Mapping[str, npt.NDArray[np.float32]], rank: int) -> AdapterState:
    """The pairs under the newest ones, as one pair a layer; empty where nothing lies under them."""
    if all(len(array) <= rank for name, array in state.items() if factor_of(name) == "A"):
        return {}
    parts = {}
    for name, array in state.items():
        if factor := factor_of(name):
            parts[name] = array[:-rank] if factor == "A" else array[:, :-rank]
    return parts


def stacked(under: Mapping[str, npt.NDArray[np.float32]], top: Mapping[str, npt.NDArray[np.float32]]) -> AdapterState:
    """The state whose newest pairs are those of `top`, on the pairs of `under`; B A becomes the sum of both."""
    axes = {"A": 0, "B": 1}
    return {
        name: np.concatenate([under[name], array], axis=axes[factor])
        if (factor := factor_of(name)) and name in under
        else array
        for name, array in top.items()
    }
