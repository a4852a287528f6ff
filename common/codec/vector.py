"""The whole vector that is summed: packed adapter, extras, two checksum words; and the sum back to numbers.

Extras are named numbers beside the adapter (example counts, metric counts). Each is one word: signed fixed point in
units of 2^-20, limited to +-(2^32 - 2^-20). 2^11 sites add to at most 2^11 (2^52 - 1) < 2^63 units, so the sum never
leaves the signed range.

Checksum. For words w_j and public numbers rho_j the checksum is c = sum_j rho_j w_j mod 2^64. It is linear: the
checksums of the sites add to the checksum of the sum, so it is masked and summed like every other word and tells
nothing that the sum does not. The rho are keystreams keyed by the round's context, so nobody can know them before
everything else is fixed. In the first word they are odd: one wrong word never passes. In the second they are any
numbers: an error e whose words all are multiples of 2^v, and not all of 2^(v+1), passes it with chance 2^-(64-v);
without it, errors of 2^63 in an even number of words would always pass. A sum that came out as noise passes both with
chance 2^-128. It finds a mask that did not cancel, a vector cut short, a site in another context, a bug. It does not
stop a site that lies about its values: that site computes a fitting checksum.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.codec.fixed_point import ByteSource, decode_sum, quantise, rounding_bytes, step_of
from common.codec.layout import Layout
from common.codec.packing import Lanes, Words, aligned_words, bits_for
from common.codec.state import AdapterState
from common.errors import ChecksumMismatch, NotFiniteValue, VectorRefused
from common.secure_sum.primitives import Keystream, Label, digest

__all__ = ["CHECKSUM_WORDS", "DecodedSum", "VectorSpec", "decode_words", "encode", "encode_body", "with_checksum"]

CHECKSUM_WORDS = 2
EXTRA_UNIT = 2.0**-20
EXTRA_MOST = 2**52 - 1

# 256 KiB of words at a time.
BLOCK = 1 << 15


@dataclass(frozen=True, kw_only=True)
class VectorSpec:
    """What both sides must agree on about the vector; its digest is part of the round's configuration."""

    layout: Layout
    """Names and shapes of the tensors."""
    ranges: tuple[float, ...]
    """Range R of each tensor in the layout's order, in the unit of its values."""
    bits: int
    """Bits of a value."""
    sites: int
    """Most sites whose vectors may be added."""
    extras: tuple[str, ...] = ()
    """Names of the extras, sorted."""

    def __post_init__(self) -> None:
        if len(self.ranges) != len(self.layout.tensors):
            raise VectorRefused(f"{len(self.layout.tensors)} tensors need as many ranges, not {len(self.ranges)}")
        if list(self.extras) != sorted(set(self.extras)):
            raise VectorRefused("the names of the extras must be distinct and sorted")
        for limit in self.ranges:
            step_of(limit, self.bits)
        _ = self.lanes

    @classmethod
    def of(
        cls, layout: Layout, limit: float | Mapping[str, float], sites: int, *, extras: tuple[str, ...] = ()
    ) -> "VectorSpec":
        """With the default bits for so many sites, and one range for all tensors or one for each name."""
        limits = limit if isinstance(limit, Mapping) else {name: limit for name, _ in layout.tensors}
        if limits.keys() != {name for name, _ in layout.tensors}:
            raise VectorRefused("every tensor of the layout needs a range, and nothing else does")
        ranges = tuple(float(limits[name]) for name, _ in layout.tensors)
        return cls(layout=layout, ranges=ranges, bits=bits_for(sites), sites=sites, extras=tuple(sorted(extras)))

    @property
    def lanes(self) -> Lanes:
        """How values lie in words."""
        return Lanes(self.bits, self.sites)

    @property
    def body_words(self) -> int:
        """Words of packed adapter and extras."""
        return self.lanes.words_for(self.layout.size) + len(self.extras)

    @property
    def words(self) -> int:
        """Words of the whole vector, checksums included."""
        return self.body_words + CHECKSUM_WORDS

    def digest(self) -> bytes:
        """SHA-256 over everything above."""
        ranges = struct.pack(f"<{len(self.ranges)}d", *self.ranges)
        numbers = struct.pack("<HHHQ", self.bits, self.sites, self.lanes.lane_bits, self.words)
        extras = (name.encode() for name in self.extras)
        return digest(Label.SPEC, self.layout.canonical(), ranges, numbers, *extras)

    def schema_digest(self) -> bytes:
        """SHA-256 over names and shapes alone."""
        return hashlib.sha256(self.layout.canonical()).digest()


@dataclass(frozen=True)
class DecodedSum:
    """Sums over the sites: float64 tensors and extras."""

    state: dict[str, npt.NDArray[np.float64]]
    extras: dict[str, float]


def encode_body(
    state: AdapterState, extras: Mapping[str, float], spec: VectorSpec, *, source: ByteSource | None = None
) -> Words:
    """Packed adapter and extras, uint64 [spec.body_words]; rounding draws from `source`.

    Raises:
        AdapterError: the state does not fit the layout.
        VectorRefused: the extras are not those of the spec.
        NotFiniteValue: a value is NaN or infinite.
    """
    source = source or rounding_bytes()
    values = spec.layout.flatten(state)
    levels = np.empty(len(values), np.uint32)
    for (_, _, place), limit in zip(spec.layout.places(), spec.ranges, strict=True):
        levels[place] = quantise(values[place], limit, spec.bits, source)
    return np.concatenate([spec.lanes.pack(levels), _encode_extras(extras, spec)])


def with_checksum(body: Words, context: bytes) -> Words:
    """The body and its two checksum words under a round's context."""
    words = aligned_words(len(body) + CHECKSUM_WORDS)
    words[: len(body)] = body
    words[len(body) :] = _checksums(body, context)
    return words


def encode(
    state: AdapterState,
    extras: Mapping[str, float],
    spec: VectorSpec,
    context: bytes,
    *,
    source: ByteSource | None = None,
) -> Words:
    """One site's whole vector, uint64 [spec.words]."""
    return with_checksum(encode_body(state, extras, spec, source=source), context)


def decode_words(words: Words, count: int, spec: VectorSpec, context: bytes) -> DecodedSum:
    """What the sum of `count` sites' vectors says.

    Raises:
        VectorRefused: it has another length, more sites than the lanes can hold, or a level too high for the sites.
        ChecksumMismatch: it is no sum of vectors encoded under this context.
    """
    if words.shape != (spec.words,):
        raise VectorRefused(f"a sum has {spec.words} words, not {len(words)}")
    if not 1 <= count <= spec.sites:
        raise VectorRefused(f"the lanes hold sums over 1 to {spec.sites} sites, not {count}")
    body = words[:-CHECKSUM_WORDS]
    if not np.array_equal(_checksums(body, context), words[-CHECKSUM_WORDS:]):
        raise ChecksumMismatch("the opened sum does not have the checksum of its sites; it is thrown away")
    packed = spec.body_words - len(spec.extras)
    levels = spec.lanes.unpack(body[:packed], spec.layout.size)
    most = count * (2**spec.bits - 1)
    if levels.size and int(levels.max()) > most:
        raise VectorRefused(f"a sum has levels above {most}, which {count} sites cannot have sent; it is thrown away")
    values = np.empty(spec.layout.size)
    for (_, _, place), limit in zip(spec.layout.places(), spec.ranges, strict=True):
        values[place] = decode_sum(levels[place], limit, spec.bits, count)
    extras = body[packed:].view(np.int64).astype(np.float64) * EXTRA_UNIT
    return DecodedSum(spec.layout.unflatten(values), dict(zip(spec.extras, extras.tolist(), strict=True)))


def _encode_extras(extras: Mapping[str, float], spec: VectorSpec) -> Words:
    if extras.keys() != set(spec.extras):
        raise VectorRefused(f"the extras must be {list(spec.extras)}, not {sorted(extras)}")
    units = []
    for name in spec.extras:
        if not math.isfinite(extras[name]):
            raise NotFiniteValue(f"the extra {name!r} is NaN or infinite; nothing was sent")
        limited = min(max(extras[name], -(2.0**32)), 2.0**32)
        units.append(min(max(round(limited / EXTRA_UNIT), -EXTRA_MOST), EXTRA_MOST))
    return np.array(units, np.int64).view(np.uint64)


def _checksums(body: Words, context: bytes) -> Words:
    """sum_j rho_j w_j mod 2^64 for the two sequences of rho, uint64 [2]."""
    totals = []
    for label, low_bit in ((Label.CHECKSUM_ODD, 1), (Label.CHECKSUM_ANY, 0)):
        stream, total = Keystream(digest(label, context)), 0
        for start in range(0, len(body), BLOCK):
            part: Any = body[start : start + BLOCK]
            rho = np.frombuffer(stream.bytes(8 * len(part)), "<u8") | np.uint64(low_bit)
            total += int((rho * part).sum(dtype=np.uint64))
        totals.append(total & (2**64 - 1))
    return np.array(totals, np.uint64)
