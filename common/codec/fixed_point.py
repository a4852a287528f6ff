"""Real numbers to fixed-point levels that add, with unbiased rounding, and a sum of levels back to real numbers.

With range R and b bits the levels are 0 ... 2^b - 1 and the step is q = 2 R / (2^b - 1). A value x is limited to
[-R, R], y = (x + R) / q, and the level is floor(y + u) with u uniform on [0, 1).

* Error: a value within the range is off by less than q, whatever u is. A value outside is taken to the nearer end; it
  never wraps around.
* Unbiased: P(floor(y + u) = floor(y) + 1) is the fraction of y, so the mean level is y. u has 32 random bits and sits
  in the middle of its cell, which leaves a bias of at most q 2^-33. (Suresh et al. 2017, "Distributed mean estimation
  with limited communication", section 2.2.) The standard deviation is at most q / 2.
* No overflow: y is at most 2^b - 1 and u at most 1 - 2^-33, so y + u is at most 2^b - 2^-33. With b at most 20 that
  number has 53 bits, so float64 holds it and rounds no smaller sum above it. So the level is at most 2^b - 1, and n
  levels add to at most n (2^b - 1).

The range is a setting of its own. It follows from the optimiser, the learning rate, the steps and means opened earlier,
never from a privacy clip: with Adam the first step already leaves a range derived from it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import NotFiniteValue, VectorRefused
from common.randomness import system_bytes
from common.secure_sum.primitives import KEY_BYTES, Keystream

__all__ = ["MOST_BITS", "ByteSource", "decode_sum", "quantise", "rounding_bytes", "step_of"]

MOST_BITS = 20

# Values at a time, so that the float64 numbers between stay in the cache.
BLOCK = 1 << 15

ByteSource = Callable[[int], bytes]
"""Gives as many bytes as it is asked for; rounding draws from it."""


def rounding_bytes() -> ByteSource:
    """An AES-256-CTR keystream under a key from the operating system: as good as its bytes, and much faster."""
    return Keystream(system_bytes(KEY_BYTES)).bytes


def step_of(limit: float, bits: int) -> float:
    """The step q between two levels, in the unit of the values.

    Raises:
        VectorRefused: the range is not a positive number, or the bits are not 1 to 20.
    """
    if not 1 <= bits <= MOST_BITS:
        raise VectorRefused(f"values can have 1 to {MOST_BITS} bits, not {bits}")
    if not (math.isfinite(limit) and limit > 0 and limit / float(2**bits) > 0 and math.isfinite(2 * limit)):
        raise VectorRefused(f"a range must be a positive number, not {limit!r}")
    return 2 * limit / float(2**bits - 1)


def quantise(
    values: npt.NDArray[np.float32], limit: float, bits: int, source: ByteSource | None = None
) -> npt.NDArray[np.uint32]:
    """Levels 0 ... 2^bits - 1 of values [count] in the range +-`limit`.

    Raises:
        NotFiniteValue: a value is NaN or infinite.
    """
    step, top = step_of(limit, bits), float(2**bits - 1)
    source = source or rounding_bytes()
    levels = np.empty(values.shape, np.uint32)
    for start in range(0, len(values), BLOCK):
        part = values[start : start + BLOCK].astype(np.float64)
        if not np.isfinite(part).all():
            raise NotFiniteValue("a value to be summed is NaN or infinite; nothing was sent")
        np.clip(part, -limit, limit, out=part)
        part += limit
        part /= step
        np.minimum(part, top, out=part)  # 2 R / q may lie a rounding error above it
        draws = np.frombuffer(source(4 * len(part)), "<u4").astype(np.float64)
        draws += 0.5
        draws *= 2.0**-32
        part += draws
        levels[start : start + BLOCK] = part  # the cast cuts the fraction off, and no value is negative
    return levels


def decode_sum(levels: npt.NDArray[Any], limit: float, bits: int, count: int) -> npt.NDArray[np.float64]:
    """The sum of `count` sites' values from the sum of their levels [count of values], float64."""
    return levels.astype(np.float64) * step_of(limit, bits) - count * limit
