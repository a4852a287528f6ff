"""Shamir's secret sharing (1979) of 32-byte secrets over the integers mod p = 2^257 - 93.

A secret s < 2^256 < p is the value at 0 of a polynomial of degree t - 1 whose other coefficients are uniform mod p;
site i holds the value at x = i + 1. Fewer than t values are uniform whatever s is. A share is 33 bytes,
little-endian.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.errors import ShareRefused
from common.randomness import system_bytes
from common.secure_sum.primitives import KEY_BYTES

__all__ = ["PRIME", "SHARE_BYTES", "combine", "disagreeing", "split", "subsets"]

PRIME = 2**257 - 93
SHARE_BYTES = 33

# So many sets of t shares are tried when a secret does not fit its commitment.
MOST_SUBSETS = 1000


def split(
    secret: bytes, holders: Sequence[int], threshold: int, source: Callable[[int], bytes] = system_bytes
) -> dict[int, bytes]:
    """A share for every holder (site ids); any `threshold` of them give the secret back."""
    if len(secret) != KEY_BYTES or not 1 <= threshold <= len(holders) or len(set(holders)) != len(holders):
        raise ShareRefused(f"a 32-byte secret is split among {threshold} or more distinct holders")
    coefficients = [_uniform(source) for _ in range(threshold - 1)]
    shares = {}
    for holder in holders:
        value, x = 0, holder + 1
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        value = (value * x + int.from_bytes(secret, "little")) % PRIME
        shares[holder] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from exactly `threshold` shares by holder.

    Raises:
        ShareRefused: there are fewer or more, one is no field element, or together they give no secret of 32 bytes.
    """
    if len(shares) != threshold:
        raise ShareRefused(f"a secret needs {threshold} shares, not {len(shares)}")
    value = _value_at(shares, 0)
    if value >> (8 * KEY_BYTES):
        raise ShareRefused("the shares of a secret disagree")
    return value.to_bytes(KEY_BYTES, "little")


def disagreeing(good: Mapping[int, bytes], others: Mapping[int, bytes]) -> tuple[int, ...]:
    """The holders among `others` whose share does not lie on the polynomial through the good ones."""
    return tuple(
        sorted(
            holder
            for holder, share in others.items()
            if holder not in good and _value_at(good, holder + 1) != int.from_bytes(share, "little")
        )
    )


def subsets(holders: Sequence[int], threshold: int) -> Iterator[tuple[int, ...]]:
    """Sets of `threshold` holders to try: every one if they are at most a thousand, else those next to each other.

    With neighbours (cyclic), one liar among more than `threshold` holders is always left out by some set.
    """
    if math.comb(len(holders), threshold) <= MOST_SUBSETS:
        yield from itertools.combinations(holders, threshold)
        return
    for start in range(len(holders)):
        yield tuple(sorted(holders[(start + step) % len(holders)] for step in range(threshold)))


def _value_at(shares: Mapping[int, bytes], x: int) -> int:
    """The value at x of the polynomial of least degree through the shares."""
    holders = tuple(sorted(shares))
    values = [int.from_bytes(shares[holder], "little") for holder in holders]
    if any(len(shares[holder]) != SHARE_BYTES for holder in holders) or any(value >= PRIME for value in values):
        raise ShareRefused("a share is no field element")
    return sum(weight * value for weight, value in zip(_weights(holders, x), values, strict=True)) % PRIME


@functools.lru_cache(maxsize=256)
def _weights(holders: tuple[int, ...], x: int) -> tuple[int, ...]:
    """Lagrange weights at x, made once for each set of responders."""
    points = [holder + 1 for holder in holders]
    weights = []
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * (x - other) % PRIME
                below = below * (point - other) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _uniform(source: Callable[[int], bytes]) -> int:
    """A uniform field element: 257 bits, drawn again in the 93 cases of 2^257 that are none."""
    while True:
        value = int.from_bytes(source(SHARE_BYTES), "little") & (2**257 - 1)
        if value < PRIME:
            return value
