"""Masks: AES-256-CTR keystreams added to or taken from 64-bit words, mod 2^64, in place.

A block of 256 KiB gets all masks before the next block begins. So words, keystream and the zeros that it is made from
stay in the processor's second-level cache, and AES takes the time: for a block 35 us, beside 5 us of adding where words
begin at a cache line, or 7 us where they do not (measured, Xeon with VAES). `codec/packing.aligned_words` makes such.
"""

from collections.abc import Sequence

import numpy as np

from common.codec.packing import Words, aligned_words
from common.secure_sum.primitives import Keystream

__all__ = ["BLOCK_BYTES", "Mask", "apply_masks"]

BLOCK_BYTES = 1 << 18

Mask = tuple[bytes, int]
"""A 32-byte key that serves for this one mask, and +1 to add it or -1 to take it away."""


def apply_masks(words: Words, masks: Sequence[Mask]) -> None:
    """Add or take away every mask, in place: words[j] += sign * keystream[j] mod 2^64, little-endian words."""
    streams = [(Keystream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
    size = BLOCK_BYTES // 8
    mask = aligned_words(min(size, len(words)))
    for start in range(0, len(words), size):
        block = words[start : start + size]
        part = mask[: len(block)]
        room = part.data.cast("B")
        for stream, combine in streams:
            stream.into(room)
            combine(block, part, out=block)
