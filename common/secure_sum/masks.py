"""Masks: AES-256-CTR keystreams added to or taken from 64-bit words, mod 2^64, in place.

All masks of one block of 256 KiB are applied before the next block begins, so that the words, the keystream and the
zeros it is made from stay in the processor's second-level cache, and AES is what takes the time.
"""

from collections.abc import Sequence

import numpy as np

from common.codec.packing import Words
from common.secure_sum.primitives import Keystream

__all__ = ["Mask", "apply_masks"]

BLOCK_BYTES = 1 << 18

Mask = tuple[bytes, int]
"""A 32-byte key that serves for this one mask, and +1 to add it or -1 to take it away."""


def apply_masks(words: Words, masks: Sequence[Mask]) -> None:
    """Add or take away every mask, in place: words[j] += sign * keystream[j] mod 2^64, little-endian words."""
    streams = [(Keystream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
    room = bytearray(BLOCK_BYTES + 16)  # the library asks for a block more than it writes
    view = memoryview(room)
    stream_words = np.frombuffer(room, "<u8", BLOCK_BYTES // 8)
    for start in range(0, len(words), BLOCK_BYTES // 8):
        block = words[start : start + BLOCK_BYTES // 8]
        mask = stream_words[: len(block)]
        for stream, combine in streams:
            stream.into(view, 8 * len(block))
            combine(block, mask, out=block)
