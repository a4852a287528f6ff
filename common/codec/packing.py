"""Several levels in one 64-bit word, so that adding words adds every level.

A level has b bits, a lane L = b + ceil(log2 n) bits for up to n sites, and a word floor(64 / L) lanes; value j of d
lies in word j mod w and lane j div w, where w is the number of words: each lane is one contiguous part of the vector.

No carry between lanes: a level is at most 2^b - 1, so n of them add to at most n (2^b - 1) < 2^b 2^ceil(log2 n) = 2^L.
By induction from the lowest lane, no lane ever passes anything to the next, and the highest ends at bit 64 or below.
So sums of words mod 2^64, of at most n sites, are words of sums, and masks that cancel mod 2^64 change nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.codec.fixed_point import MOST_BITS
from common.errors import VectorRefused

__all__ = ["MOST_SITES", "Lanes", "Words", "aligned_words", "bits_for"]

Words = npt.NDArray[np.uint64]

# Extras (vector.py) add without overflow for as many sites.
MOST_SITES = 2048

WORD_BITS = 64
CACHE_LINE_BYTES = 64
# Lanes of 21 bits, three in a word: 2.67 bytes for each value.
DEFAULT_BITS = ((32, 16), (128, 14), (1024, 11), (MOST_SITES, 10))


def bits_for(sites: int) -> int:
    """Bits of a value for so many sites: as many as leave 2.67 bytes for each value."""
    for most, bits in DEFAULT_BITS:
        if 1 <= sites <= most:
            return bits
    raise VectorRefused(f"a secure sum can have 1 to {MOST_SITES} sites, not {sites}")


@dataclass(frozen=True)
class Lanes:
    """How levels of `bits` bits lie in words that are summed over at most `sites` sites."""

    bits: int
    sites: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise VectorRefused(f"values can have 1 to {MOST_BITS} bits, not {self.bits}")
        if not 1 <= self.sites <= MOST_SITES:
            raise VectorRefused(f"a secure sum can have 1 to {MOST_SITES} sites, not {self.sites}")

    @property
    def lane_bits(self) -> int:
        """L = b + ceil(log2 n)."""
        return self.bits + (self.sites - 1).bit_length()

    @property
    def per_word(self) -> int:
        """Lanes in a word."""
        return WORD_BITS // self.lane_bits

    @property
    def bytes_per_value(self) -> float:
        """Bytes that a value takes on the wire."""
        return 8 / self.per_word

    def words_for(self, count: int) -> int:
        """Words that `count` values take."""
        return -(-count // self.per_word)

    def pack(self, levels: npt.NDArray[np.uint32]) -> Words:
        """Words of one site's levels [count].

        Raises:
            VectorRefused: a level is above 2^bits - 1.
        """
        if len(levels) and int(levels.max()) >> self.bits:
            raise VectorRefused(f"a level has more than {self.bits} bits")
        width = self.words_for(len(levels))
        words = np.zeros(width, np.uint64)
        for lane in range(self.per_word):
            part = levels[lane * width : (lane + 1) * width].astype(np.uint64)
            words[: len(part)] |= part << np.uint64(lane * self.lane_bits)
        return words

    def unpack(self, words: Words, count: int) -> Words:
        """Levels [count], or sums of levels, that the words hold."""
        width = self.words_for(count)
        if words.shape != (width,):
            raise VectorRefused(f"{count} values take {width} words, not {len(words)}")
        levels = np.empty(count, np.uint64)
        mask = np.uint64((1 << self.lane_bits) - 1)
        for lane in range(self.per_word):
            place = slice(lane * width, min((lane + 1) * width, count))
            if place.start < place.stop:
                part = words[: place.stop - place.start]
                levels[place] = (part >> np.uint64(lane * self.lane_bits)) & mask
        return levels


def aligned_words(count: int) -> Words:
    """Zeros, little-endian, that begin at a cache line; adding to them is a third faster."""
    room = np.zeros(count + CACHE_LINE_BYTES // 8, "<u8")
    first = -room.ctypes.data % CACHE_LINE_BYTES // 8
    return room[first : first + count]
