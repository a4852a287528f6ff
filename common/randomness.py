"""The only code that makes random generators.

Seeded ones are for experiments: partitions, splits, batches and first adapters that another person must be able to
repeat. Nothing that protects a person is drawn from them: noise, masks, keys and sampling under privacy come from
the operating system.
"""

import hashlib
import os

import numpy as np

__all__ = ["SystemRandomness", "seed_dropout", "seeded", "seeded_int", "system_bytes"]


def seeded_int(seed: int, *labels: str | int) -> int:
    """A 63-bit number that depends on the seed and on every label, for libraries that take a number."""
    text = "\x1f".join(str(part) for part in ("coadapt", seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded(seed: int, *labels: str | int) -> np.random.Generator:
    """A generator of its own for each purpose: `seeded(7, "partition")` never repeats `seeded(7, "split")`.

    Equal seeds and labels give equal streams on every machine (PCG64, seeded with SHA-256 of seed and labels).
    """
    return np.random.Generator(np.random.PCG64(seeded_int(seed, *labels)))


def system_bytes(count: int) -> bytes:
    """`count` bytes from the operating system, for keys, seeds and shares; nobody can repeat them."""
    return os.urandom(count)


def seed_dropout(seed: int, *labels: str | int) -> None:
    """Seed torch's global generators, which dropout draws from; nothing else of Coadapt may draw from them."""
    import torch

    torch.manual_seed(seeded_int(seed, "dropout", *labels))


class SystemRandomness:
    """Noise and sampling that protect people: from the operating system, and from nothing that can be repeated.

    `unsafe_seed` makes both repeatable, for tests and simulations: whoever knows the seed takes the noise off again.
    """

    def __init__(self, *, unsafe_seed: int | None = None) -> None:
        self._seeded = None if unsafe_seed is None else seeded(unsafe_seed, "unsafe system randomness")

    def normal(self, count: int) -> np.ndarray:
        """`count` independent standard normal numbers, float64 [count] (Box and Muller 1958).

        The uniform numbers behind them have 53 bits; the largest possible value is 8.6.
        """
        pairs = (count + 1) // 2
        uniform = self._uniform(2 * pairs)
        radius = np.sqrt(-2.0 * np.log1p(-uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def chosen(self, count: int, rate: float) -> np.ndarray:
        """Indices below `count`, each there with probability `rate` independently of the others (Poisson sampling)."""
        return np.flatnonzero(self._uniform(count) < rate)

    def some_of(self, count: int, most: int) -> np.ndarray:
        """`most` different indices below `count`, every set with the same chance; all of them if there are no more."""
        if count <= most:
            return np.arange(count)
        return np.sort(np.argsort(self._uniform(count), kind="stable")[:most])

    def _uniform(self, count: int) -> np.ndarray:
        """Multiples of 2^-53 in [0, 1)."""
        data = os.urandom(8 * count) if self._seeded is None else self._seeded.bytes(8 * count)
        return (np.frombuffer(data, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53
