"""Products of tall and wide matrices, back to a low-rank pair of factors. No torch."""

import math

import numpy as np
import numpy.typing as npt

__all__ = ["factors_of"]

Matrix = npt.NDArray[np.float64]


def factors_of(
    left: Matrix, right: Matrix | None, rank: int, factor: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """B [m, rank] and A [rank, k] for which factor x B A is nearest to left @ right (Eckart and Young 1936).

    `left` is [m, n] and `right` [n, k]; without `right`, `left` is the product [m, k] itself. With the singular value
    decomposition U S V^T of the product, A is the first rows of V^T, each of length 1 / sqrt(3), and B takes the rest:
    that is the length at which A starts (`first_state`), so both factors go on learning at the rate they began with,
    and a direction that B does not use yet is not lost. Columns and rows come by falling singular value, so that the
    first n are the best pair of rank n. Rows and columns beyond the product's own sides are zero.
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
