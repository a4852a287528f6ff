"""What trains in a round and what a site sends of it: the part of aggregation that both sides must agree on.

Both follow from the manifest and from `accepted`, the number of aggregations that the coordinator has accepted so far,
which stands in the signed start of a round. A tensor that does not train is not sent. No torch.

    separate, a person's own   the change of every tensor
    alternate                  the change of head and other tensors, and of B or A in turn, B first (RoLoRA, Chen et
                               al. 2025, section 3): while B = 0 the gradient of A is zero
    ffa                        the same with B alone; A stays as it was drawn (FFA-LoRA, Sun et al. 2024, section 4)
    dense                      the change of scale x B A of every pair, and the change of other tensors
    sketch                     scale x B (A Omega) of every pair, and the change of other tensors; in a second sum
                               scale x (Q^T B) A (Halko et al. 2011, algorithm 4.1, over sites)

While `training.head_rounds` lasts, counted in accepted aggregations too, the head alone trains.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import AdapterError
from common.factors import factor_of, is_head, newest, pairs_of, scale
from common.randomness import seeded

__all__ = [
    "EXTRA_COLUMNS",
    "Phase",
    "contribution",
    "contribution_shapes",
    "phase_of",
    "products",
    "projection",
    "projection_shapes",
    "sketch_columns",
    "sketch_matrix",
    "trained_names",
]

Arrays = Mapping[str, npt.NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]

# Random columns of a sketch beside those that point where the last adapter points: with 8 the projected mean of ten
# sites is as good as the best of its rank (the study of secure aggregation, part 2).
EXTRA_COLUMNS = 8


class Phase(IntEnum):
    """What trains in a round; the values are bits, so that a site can remember which ones it has checked."""

    HEAD = 1
    ALL = 2
    B = 4
    A = 8


def phase_of(manifest: Manifest, accepted: int) -> Phase:
    """What trains in the round that follows on `accepted` aggregations."""
    if accepted < manifest.training.head_rounds:
        return Phase.HEAD
    method = manifest.aggregation_method
    if method == "alternate":
        return Phase.A if (accepted - manifest.training.head_rounds) % 2 else Phase.B
    return Phase.B if method == "ffa" else Phase.ALL


def trained_names(names: Iterable[str], phase: Phase) -> list[str]:
    """Those of the adapter's tensors that train in a phase."""
    return [name for name in names if _trains(name, phase)]


def _trains(name: str, phase: Phase) -> bool:
    if phase is Phase.HEAD:
        return is_head(name)
    return phase is Phase.ALL or factor_of(name) in ("", phase.name)


def sketch_columns(rank: int, shape: tuple[int, int]) -> int:
    """Columns of a layer's sketch, k_s = rank + 8, at most the smaller side of the layer's weight `shape` [m, k]."""
    return min(rank + EXTRA_COLUMNS, *shape)


def contribution_shapes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], accepted: int) -> Shapes:
    """The shapes of what a site sends first in a round, from those of the tensors that a site's model trains."""
    method, phase = manifest.aggregation_method, phase_of(manifest, accepted)
    found: Shapes = {name: tuple(shapes[name]) for name in trained_names(shapes, phase)}
    if method in ("dense", "sketch") and phase is Phase.ALL:
        for pair in pairs_of(found):
            (rank, inputs), (outputs, _) = found.pop(pair.a), found.pop(pair.b)
            columns = inputs if method == "dense" else sketch_columns(rank, (outputs, inputs))
            found[pair.name("BA" if method == "dense" else "Y")] = (outputs, columns)
    return found


def projection_shapes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], accepted: int) -> Shapes:
    """The shapes of what a site sends second in a round; empty where one sum is enough."""
    if manifest.aggregation_method != "sketch" or phase_of(manifest, accepted) is not Phase.ALL:
        return {}
    return {
        pair.name("Z"): (sketch_columns(shapes[pair.a][0], (shapes[pair.b][0], shapes[pair.a][1])), shapes[pair.a][1])
        for pair in pairs_of(shapes)
    }


def contribution(manifest: Manifest, before: Arrays, after: Arrays, accepted: int) -> AdapterState:
    """What a site sends first: `before` is the adapter as it came, `after` what training made of its newest pairs.

    Where products are sent, the pairs of `after` may have a rank of their own.
    """
    start = newest(before, manifest.adapter.rank)
    method, phase = manifest.aggregation_method, phase_of(manifest, accepted)
    names = trained_names(after, phase)
    pairs = pairs_of(names) if method in ("dense", "sketch") else ()
    factors = {name for pair in pairs for name in pair}
    sent: AdapterState = {name: after[name] - start[name] for name in names if name not in factors}
    factor = scale(manifest.adapter)
    for pair in pairs:
        if method == "dense":
            product = _product(after[pair.b], after[pair.a]) - _product(start[pair.b], start[pair.a])
            sent[pair.name("BA")] = (factor * product).astype(np.float32)
        else:
            omega = sketch_matrix(manifest, pair.a, start[pair.a], len(start[pair.b]), accepted)
            through = after[pair.a].astype(np.float64) @ omega
            sent[pair.name("Y")] = (factor * (after[pair.b].astype(np.float64) @ through)).astype(np.float32)
    return sent


def projection(factor: float, after: Arrays, basis: Arrays) -> AdapterState:
    """What a site sends second: factor x (Q^T B) A for every Q [m, k_s] of `basis`, which comes under the names of Y.

    Raises:
        AdapterError: the basis does not fit the pairs.
    """
    pairs = pairs_of(after)
    wanted = {pair.name("Y"): after[pair.b].shape[0] for pair in pairs}
    if {name: array.shape[0] for name, array in basis.items() if array.ndim == 2} != wanted:
        raise AdapterError("the basis of the second sum does not have one matrix for each low-rank pair")
    sent: AdapterState = {}
    for pair in pairs:
        inner = basis[pair.name("Y")].astype(np.float64).T @ after[pair.b]
        sent[pair.name("Z")] = (factor * (inner @ after[pair.a])).astype(np.float32)
    return sent


def products(state: Arrays) -> AdapterState:
    """The pairs of a state alone: all that the second sum of a sketch needs."""
    return {name: np.ascontiguousarray(array) for name, array in state.items() if factor_of(name)}


def sketch_matrix(
    manifest: Manifest, name: str, a: npt.NDArray[np.float32], outputs: int, accepted: int
) -> npt.NDArray[np.float64]:
    """Omega [k, k_s] of a sketch: the rows of the round's A, and random columns from the agreed seed, all of length 1.

    The rows of A are a warm start: the mean of products points mostly where the last one did. No orthogonalisation:
    its signs could differ between machines, and all sites must use one matrix.
    """
    columns = sketch_columns(len(a), (outputs, a.shape[1]))
    drawn = seeded(manifest.training.seed, "sketch", accepted, name).standard_normal((a.shape[1], columns))
    warm = min(len(a), columns)
    drawn[:, :warm] = a[:warm].T
    lengths: npt.NDArray[np.float64] = np.linalg.norm(drawn, axis=0)
    return drawn / np.where(lengths > 0, lengths, 1.0)


def _product(b: npt.NDArray[np.float32], a: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return b.astype(np.float64) @ a.astype(np.float64)
