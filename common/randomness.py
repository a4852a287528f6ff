"""The only code that makes random generators.

Seeded ones are for experiments: partitions, splits, batches and first adapters that another person must be able to
repeat. Nothing that protects a person is drawn from them: noise, masks, keys and sampling under privacy come from
the operating system.
"""

import hashlib

import numpy as np

__all__ = ["seed_dropout", "seeded", "seeded_int"]


def seeded_int(seed: int, *labels: str | int) -> int:
    """A 63-bit number that depends on the seed and on every label, for libraries that take a number."""
    text = "\x1f".join(str(part) for part in ("coadapt", seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded(seed: int, *labels: str | int) -> np.random.Generator:
    """A generator of its own for each purpose: `seeded(7, "partition")` never repeats `seeded(7, "split")`.

    Equal seeds and labels give equal streams on every machine (PCG64, seeded with SHA-256 of seed and labels).
    """
    return np.random.Generator(np.random.PCG64(seeded_int(seed, *labels)))


def seed_dropout(seed: int, *labels: str | int) -> None:
    """Seed torch's global generators, which dropout draws from; nothing else of Coadapt may draw from them."""
    import torch

    torch.manual_seed(seeded_int(seed, "dropout", *labels))
