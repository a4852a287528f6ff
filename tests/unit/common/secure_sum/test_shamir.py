"""Sharing against exact fractions, and that too few shares fit every secret."""

from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ShareRefused
from common.randomness import seeded
from common.secure_sum.opening import open_secret
from common.secure_sum.shamir import PRIME, SHARE_BYTES, combine, disagreeing, split, subsets

SECRETS = st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32])
HOLDERS = st.lists(st.integers(0, 2047), min_size=1, max_size=12, unique=True)


def test_the_modulus_is_prime_and_holds_a_secret() -> None:
    assert sympy.isprime(PRIME)
    assert PRIME > 2**256
    assert PRIME < 2 ** (8 * SHARE_BYTES)


@given(secret=SECRETS, holders=HOLDERS, data=st.data())
@settings(deadline=None)
def test_any_set_of_shares_gives_the_secret(secret: bytes, holders: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split(secret, holders, threshold)
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert combine({holder: shares[holder] for holder in chosen}, threshold) == secret
    good = {holder: shares[holder] for holder in chosen}
    assert disagreeing(good, shares) == ()


@given(secret=SECRETS, other=SECRETS, holders=HOLDERS.filter(lambda holders: len(holders) > 1), data=st.data())
@settings(deadline=None)
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, holders: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, len(holders)))
    shares = split(secret, holders, threshold)
    few = holders[: threshold - 1]
    # The value at one more holder that makes `other` the secret; by the slow formula over fractions.
    missing = holders[threshold - 1]
    points = [0, *(holder + 1 for holder in few)]
    values = [int.from_bytes(other, "little"), *(int.from_bytes(shares[holder], "little") for holder in few)]
    total = Fraction(0)
    for point, value in zip(points, values, strict=True):
        weight = Fraction(1)
        for against in points:
            if against != point:
                weight *= Fraction(missing + 1 - against, point - against)
        total += weight * value
    fitting = total.numerator * pow(total.denominator, -1, PRIME) % PRIME
    forged = {holder: shares[holder] for holder in few} | {missing: fitting.to_bytes(SHARE_BYTES, "little")}
    assert combine(forged, threshold) == other


def test_shares_are_drawn_anew_and_uniform() -> None:
    secret, holders = bytes(32), range(5)
    assert split(secret, holders, 3) != split(secret, holders, 3)
    assert split(secret, holders, 1) == dict.fromkeys(holders, bytes(SHARE_BYTES))
    # The top byte of a share is one bit: p lies just below 2^257. 5 standard errors.
    tops = [split(secret, [7], 1) and split(secret, range(2), 2)[0][-1] for _ in range(2000)]
    assert abs(sum(tops) / 2000 - 0.5) < 5 * 0.5 / 2000**0.5


def test_coefficients_above_the_prime_are_drawn_again() -> None:
    draws = iter(
        [(2**257 - 93).to_bytes(33, "little"), (2**257 - 1).to_bytes(33, "little"), (5).to_bytes(33, "little")]
    )
    shares = split((7).to_bytes(32, "little"), [0, 1], 2, lambda count: next(draws))
    assert [int.from_bytes(shares[holder], "little") for holder in (0, 1)] == [12, 17]


@pytest.mark.parametrize(
    ("secret", "holders", "threshold"),
    [(bytes(31), [0, 1], 2), (bytes(32), [0, 1], 3), (bytes(32), [0, 0, 1], 2), (bytes(32), [0, 1], 0)],
)
def test_a_split_that_is_none_is_refused(secret: bytes, holders: list[int], threshold: int) -> None:
    with pytest.raises(ShareRefused):
        split(secret, holders, threshold)


def test_too_few_too_many_or_malformed_shares_are_refused() -> None:
    shares = split(b"s" * 32, range(5), 3)
    for count in (0, 2, 4):
        with pytest.raises(ShareRefused, match="3 shares"):
            combine(dict(list(shares.items())[:count]), 3)
    for bad in (b"", bytes(32), PRIME.to_bytes(33, "little"), b"\xff" * 33):
        with pytest.raises(ShareRefused, match="field element"):
            combine({0: shares[0], 1: shares[1], 2: bad}, 3)
    with pytest.raises(ShareRefused, match="disagree"):
        combine({0: (2**256).to_bytes(33, "little")}, 1)


@pytest.mark.parametrize(
    ("holders", "threshold", "liars"), [(8, 7, 1), (10, 7, 2), (10, 7, 1), (40, 27, 1), (40, 27, 5)]
)
def test_wrong_shares_are_found_and_named(holders: int, threshold: int, liars: int) -> None:
    secret = b"s" * 32
    shares = split(secret, range(holders), threshold)
    bad = tuple(range(2, 2 + liars))
    for liar in bad:  # of another secret, so that no two errors cancel
        shares[liar] = split(secret, range(holders), threshold)[liar]
    found, named = open_secret(shares, threshold, lambda guess: guess == secret)
    assert found == secret
    assert named == bad
    # Who was named once is asked last.
    tries = []
    found, named = open_secret(shares, threshold, lambda guess: tries.append(guess) or guess == secret, suspects=bad)
    assert (found, named, len(tries)) == (secret, (), 1)


def test_errors_that_cancel_name_nobody() -> None:
    secret, threshold = b"s" * 32, 7
    shares = {holder: int.from_bytes(share, "little") for holder, share in split(secret, range(10), threshold).items()}
    # Holders 3 and 4 lie so that the set without 2, 5 and 9 opens the secret; holder 2 lies at random.
    chosen = (0, 1, 3, 4, 6, 7, 8)
    weights = {}
    for holder in (3, 4):
        weight = Fraction(1)
        for other in chosen:
            if other != holder:
                weight *= Fraction(-(other + 1), holder - other)
        weights[holder] = weight.numerator * pow(weight.denominator, -1, PRIME) % PRIME
    shares[2] += 1
    shares[3] += weights[4]
    shares[4] -= weights[3]
    forged = {holder: (share % PRIME).to_bytes(SHARE_BYTES, "little") for holder, share in shares.items()}
    assert combine({holder: forged[holder] for holder in chosen}, threshold) == secret
    assert open_secret(forged, threshold, lambda guess: guess == secret) == (secret, ())
    # One liar, but three are thought possible: too few true points to be sure.
    single = split(secret, range(8), threshold)
    single[0] = single[1]
    assert open_secret(single, threshold, lambda guess: guess == secret, colluding=3) == (secret, ())
    assert open_secret(single, threshold, lambda guess: guess == secret, colluding=1) == (secret, (0,))


def test_too_many_wrong_shares_open_nothing() -> None:
    secret = b"s" * 32
    shares = split(secret, range(10), 7)
    for liar in range(4):
        shares[liar] = b"\xff" * SHARE_BYTES
    assert open_secret(shares, 7, lambda guess: guess == secret) == (None, ())
    assert open_secret({0: shares[9]}, 7, lambda guess: True) == (None, ())


def test_sets_are_few() -> None:
    holders = seeded(0).permutation(90).tolist()
    sets = list(subsets(holders, 61))
    assert len(sets) == 90
    assert all(any(liar not in chosen for chosen in sets) for liar in holders)
    assert len(list(subsets(range(10), 7))) == 120
