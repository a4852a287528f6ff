"""Products of tall and wide matrices, back to a low-rank pair of factors. No torch."""

import math

import numpy as np
import numpy.typing as npt

from common.errors import AdapterError

__all__ = ["factors_of", "of_smaller_rank"]

Matrix = npt.NDArray[np.float64]


def factors_of(
    left: Matrix, right: Matrix | None, rank: int, factor: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """B [m, rank] and A [rank, k] for which factor x B A is nearest to left @ right (Eckart and Young 1936).

    `left` is [m, n] and `right` [n, k]; without `right`, `left` is the product [m, k] itself. With the singular value
    decomposition U S V^T of the product, A is the first rows of V^T, each of length 1 / sqrt(3), and B takes the rest:
    that is the length at which A starts (`first_state`), so both factors go on learning at the rate they began with,
    and a direction that B does not use yet is not lost. Rows and columns beyond the product's own sides are zero.
    """
    if right is None:
        u, s, vt = np.linalg.svd(left, full_matrices=False)
    else:
        # Through the QR decompositions of both, so that nothing of size m x k is made.
        left_q, left_r = np.linalg.qr(left)
        right_q, right_r = np.linalg.qr(right.T)
        u, s, vt = np.linalg.svd(left_r @ right_r.T, full_matrices=False)
        u, vt = left_q @ u, vt @ right_q.T
    kept = min(rank, len(s))
    length = 1 / math.sqrt(3)
    b, a = np.zeros((u.shape[0], rank), np.float32), np.zeros((rank, vt.shape[1]), np.float32)
    b[:, :kept] = u[:, :kept] * (s[:kept] / (factor * length))
    a[:kept] = vt[:kept] * length
    return b, a


def of_smaller_rank(
    b: npt.NDArray[np.float32], a: npt.NDArray[np.float32], rank: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """B and A of the same rank and product, whose first `rank` columns and rows are the best pair of that rank.

    A site that can train a smaller rank trains those and sends the product with the others, which it leaves alone.

    Raises:
        AdapterError: the pair's own rank is smaller.
    """
    if not 1 <= rank <= len(a):
        raise AdapterError(f"a smaller rank must be from 1 to {len(a)}, found {rank}")
    return factors_of(b.astype(np.float64), a.astype(np.float64), len(a), 1.0)
