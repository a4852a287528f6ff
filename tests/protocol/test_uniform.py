"""One site's masked vector against everything that a coordinator below the threshold has: uniform, and of its own.

The coordinator has a colluding site's keys and one share less than it needs of every secret of the victim. It takes off
what it can: the mask shared with the colluding site, and masks from secrets guessed by the shares that it has. What is
left must look uniform and tell nothing about the input. With one share more it is the input, so the test sees a leak.
"""

import numpy as np
from federation import Federation, opened
from scipy import stats

from common.codec.layout import Layout
from common.codec.packing import Words
from common.randomness import seeded
from common.secure_sum import derivations
from common.secure_sum.coordinator import Stage
from common.secure_sum.masks import Mask, apply_masks
from common.secure_sum.shamir import _value_at

ERRORS = 5.0
ROUNDS = 30
VICTIM, HONEST, COLLUDING = 0, (1, 2), 3


def guessed(shares: dict[int, bytes]) -> bytes:
    """The secret if there were no more shares than these."""
    return (_value_at(shares, 0) % 2**256).to_bytes(32, "little")


def round_with(federation: Federation, number: int, body: Words, shares: int) -> Words:
    """What is left of the victim's masked vector when the coordinator has so many of its shares."""
    federation.bodies[VICTIM] = body
    attempt = federation.attempt(number).run_to(Stage.MASKED)
    keys_hash = attempt.rounds[VICTIM].state.keys_hash
    public = {peer.site: peer.masking for peer in attempt.rounds[VICTIM].state.keys}
    # The colluding site hands its key over before it forgets it.
    colluding_key = dict(attempt.rounds[COLLUDING].state.mask_keys)[VICTIM]
    attempt.exchange()
    held = {
        holder: next(share for share in attempt.rounds[holder].state.shares if share[0] == VICTIM)
        for holder in (COLLUDING, *HONEST)[:shares]
    }
    seed = guessed({holder: share[1] for holder, share in held.items()})
    private = guessed({holder: share[2] for holder, share in held.items()})
    masks: list[Mask] = [(derivations.self_mask_key(seed, keys_hash, VICTIM), -1)]
    for peer in HONEST:
        masks.append((derivations.pair_mask_key(private, public[peer], keys_hash, VICTIM, peer), -1))
    masks.append((colluding_key, -1))
    words = np.frombuffer(opened(attempt.sent[Stage.MASKED, VICTIM], federation).body.vector, "<u8").copy()
    apply_masks(words, masks)
    return words[: len(body)]


def inputs_and_rests(shares: int, rounds: int) -> tuple[Words, Words]:
    federation = Federation(4, colluding=1, layout=Layout((("a", (9000,)),)))
    draws = seeded(shares, "inputs")
    inputs, rests = [], []
    for number in range(rounds):
        # Words of all ones or none: nothing is easier to see.
        body = draws.integers(0, 2, federation.spec.body_words, dtype=np.uint64) * np.uint64(2**64 - 1)
        inputs.append(body)
        rests.append(round_with(federation, number, body, shares))
    return np.concatenate(inputs), np.concatenate(rests)


def test_below_the_threshold_what_is_left_is_uniform_and_independent_of_the_input() -> None:
    inputs, rests = inputs_and_rests(shares=2, rounds=ROUNDS)
    for place in range(8):
        values = rests.view(np.uint8)[place::8]
        chi_square = stats.chisquare(np.bincount(values, minlength=256)).statistic
        assert abs(chi_square - 255) < ERRORS * np.sqrt(2 * 255)
    ones = inputs > 0
    spread = np.sqrt(1 / ones.sum() + 1 / (~ones).sum())
    for bit in range(64):
        bits = (rests >> np.uint64(bit)) & np.uint64(1)
        assert abs(bits.mean() - 0.5) < ERRORS * 0.5 / np.sqrt(len(bits))
        assert abs(bits[ones].mean() - bits[~ones].mean()) < ERRORS * 0.5 * spread
        assert abs(np.corrcoef(bits[1:], bits[:-1])[0, 1]) < ERRORS / np.sqrt(len(bits) - 1)
    # The same place in the next round.
    low = (rests.reshape(ROUNDS, -1) & np.uint64(1)).astype(float)
    assert abs(np.corrcoef(low[1:].ravel(), low[:-1].ravel())[0, 1]) < ERRORS / np.sqrt(low[1:].size)


def test_with_one_share_more_it_is_the_input() -> None:
    inputs, rests = inputs_and_rests(shares=3, rounds=2)
    assert np.array_equal(inputs, rests)
