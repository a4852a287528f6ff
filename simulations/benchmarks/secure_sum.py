"""What the secure sum costs: masking, unmasking, sharing and key agreement, beside Flower's SecAgg+ primitives.

All in one process and on one thread, in turn, A B C A B C; ratios are taken inside each turn, and medians reported.
Seconds are of processor time, so that other processes that take their turns on the core do not count.
Masking stands beside the bare AES-256-CTR keystream of as many bytes, which is the bound. Flower's masks are measured
on at most `FLOWER_MASKS` masks and multiplied; every mask costs the same there.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from common.codec.packing import Lanes, aligned_words, bits_for
from common.randomness import system_bytes
from common.secure_sum.derivations import pair_mask_key
from common.secure_sum.masks import BLOCK_BYTES, Mask, apply_masks
from common.secure_sum.primitives import Keystream, new_private_key, public_key
from common.secure_sum.shamir import combine, split
from common.secure_sum.thresholds import threshold

__all__ = ["REPETITIONS", "SITES", "VALUES", "measure_secure_sum"]

VALUES = (1_000_000, 10_000_000)
SITES = (8, 32, 100)
REPETITIONS = 3
FLOWER_MASKS = 4
LEAST_MASKS = 64
FLOWER_RANGE = 1 << 32
AGREEMENTS = 50


def measure_secure_sum(
    *, values: Sequence[int] = VALUES, sites: Sequence[int] = SITES, repetitions: int = REPETITIONS
) -> dict[str, float]:
    """The figures of `coadapt bench secure-sum`; names end in VALUES_SITES or SITES."""
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for count in sites:
        for _ in range(repetitions):
            _measure_keys(count, note)
    for size in values:
        for count in sites:
            for _ in range(repetitions):
                _measure_masks(size, count, note)
    return {name: float(f"{statistics.median(found):.4g}") for name, found in figures.items()}


Note = Callable[[str, float], None]


def _measure_masks(values: int, sites: int, note: Note) -> None:
    place = f"{values}_{sites}"
    lanes = Lanes(bits_for(sites), sites)
    words = aligned_words(lanes.words_for(values))
    gone = max(1, sites // 10)
    left = sites - gone
    # A site adds its own mask and one with every other; the coordinator takes off the own masks of those left, and the
    # masks between each of them and each that is gone, whose keys it must agree on first.
    expansions = left + left * gone
    keystream = masking = 0.0
    times = max(1, LEAST_MASKS // sites)  # a single short turn measures what else the machine does
    for _ in range(times):
        keystream += _seconds(lambda: _keystream(words.nbytes, sites)) / times
        masking += _seconds(lambda: apply_masks(words, _fresh_masks(sites))) / times
    flower = _flower_masks(values, sites)
    unmasking = _seconds(lambda: apply_masks(words, [*_fresh_masks(left), *_agreed_masks(left * gone)]))
    flower_unmasking = _flower_masks(values, expansions)
    note(f"bytes_per_value_{place}", words.nbytes / values)
    note(f"keystream_gigabytes_per_second_{place}", words.nbytes * sites / keystream / 1e9)
    note(f"mask_seconds_{place}", masking)
    note(f"mask_share_of_keystream_bound_{place}", keystream / masking)
    note(f"mask_flower_seconds_{place}", flower)
    note(f"mask_times_flower_{place}", flower / masking)
    note(f"unmask_seconds_{place}", unmasking)
    note(f"unmask_flower_seconds_{place}", flower_unmasking)
    note(f"unmask_times_flower_{place}", flower_unmasking / unmasking)


def _measure_keys(sites: int, note: Note) -> None:
    """Sharing both secrets of a site among all, opening one, and one key agreement."""
    required = threshold(sites, 0)
    seed, private = system_bytes(32), new_private_key()
    holders = range(sites)
    elliptic = ec.generate_private_key(ec.SECP384R1())
    pem = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    shares: list[dict[int, bytes]] = []
    flower_shares: list[list[bytes]] = []
    splitting = _seconds(lambda: shares.extend(split(secret, holders, required) for secret in (seed, private)))
    flower_splitting = _seconds(
        lambda: flower_shares.extend(create_shares(secret, required, sites) for secret in (seed, pem))
    )
    some = {holder: shares[0][holder] for holder in range(required)}
    combine({holder: shares[0][holder] for holder in range(required)}, required)  # weights are made once for a set
    opening = _seconds(lambda: combine(some, required))
    flower_opening = _seconds(lambda: combine_shares(flower_shares[0][:required]))
    public, elliptic_public = public_key(new_private_key()), ec.generate_private_key(ec.SECP384R1()).public_key()
    agreeing = _seconds(lambda: [pair_mask_key(private, public, bytes(32), 0, 1) for _ in range(AGREEMENTS)])
    flower_agreeing = _seconds(lambda: [generate_shared_key(elliptic, elliptic_public) for _ in range(AGREEMENTS)])
    for name, own, other in (
        ("split", splitting, flower_splitting),
        ("open", opening, flower_opening),
        ("agree", agreeing / AGREEMENTS, flower_agreeing / AGREEMENTS),
    ):
        note(f"{name}_seconds_{sites}", own)
        note(f"{name}_flower_seconds_{sites}", other)
        note(f"{name}_times_flower_{sites}", other / own)


def _fresh_masks(count: int) -> list[Mask]:
    return [(system_bytes(32), 1 if place % 2 else -1) for place in range(count)]


def _agreed_masks(count: int) -> list[Mask]:
    private, public = new_private_key(), public_key(new_private_key())
    return [(pair_mask_key(private, public, bytes(32), 0, place + 1), 1) for place in range(count)]


def _keystream(count: int, times: int) -> None:
    """As many bytes of keystream as so many masks take, in the blocks that masks are made in, and nothing else."""
    room = aligned_words(BLOCK_BYTES // 8).data.cast("B")
    for _ in range(times):
        stream = Keystream(system_bytes(32))
        for start in range(0, count, BLOCK_BYTES):
            stream.into(room[: count - start])


def _flower_masks(values: int, count: int) -> float:
    """Seconds that Flower's SecAgg+ client takes for so many masks of one array of int64."""
    measured = min(count, FLOWER_MASKS)
    vector: list[Any] = [np.zeros(values, np.int64)]

    def add_all() -> None:
        total = vector
        for _ in range(measured):
            total = parameters_addition(total, pseudo_rand_gen(system_bytes(32), FLOWER_RANGE, [(values,)]))

    return _seconds(add_all) * count / measured


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
