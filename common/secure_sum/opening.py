"""Opening a shared secret when some shares may be wrong: the commitment says which set of shares is right."""

from collections.abc import Callable, Collection, Mapping

from common.errors import ShareRefused
from common.secure_sum.shamir import combine, disagreeing, subsets

__all__ = ["open_secret"]


def open_secret(
    shares: Mapping[int, bytes],
    threshold: int,
    verify: Callable[[bytes], bool],
    *,
    suspects: Collection[int] = (),
) -> tuple[bytes | None, tuple[int, ...]]:
    """The secret, and the holders whose shares disagree with it; None if no set of shares tried gives it.

    Holders who were found lying before come last. Where the first set opens the secret, nobody else is looked at.
    """
    holders = sorted(shares, key=lambda holder: (holder in suspects, holder))
    first = True
    for chosen in subsets(holders, threshold) if len(holders) >= threshold else ():
        good = {holder: shares[holder] for holder in chosen}
        try:
            secret = combine(good, threshold)
        except ShareRefused:
            first = False
            continue
        if verify(secret):
            return secret, () if first else _liars(good, shares)
        first = False
    return None, ()


def _liars(good: Mapping[int, bytes], shares: Mapping[int, bytes]) -> tuple[int, ...]:
    found = []
    for holder, share in shares.items():
        if holder not in good and disagreeing(good, {holder: share}):
            found.append(holder)
    return tuple(found)
