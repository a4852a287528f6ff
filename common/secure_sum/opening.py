"""Opening a shared secret when some shares may be wrong: the commitment says which set of shares is right.

Whose share disagrees. Wrong shares can be chosen so that their errors cancel in one set, which then opens the right
secret and makes true shares look wrong. So nobody is named on the word of one set. Let A of m shares lie on the
polynomial that a set gives. The secret is verified and so is one more point of it. If at most c holders lie and A - c
>= t - 1, then t true points lie on it and it is the true one; two polynomials with A >= (m + t - 1) / 2 each would
have t points in common, so there is one at most. Only with both are the other holders named. Even then it may be the
site that shared the secret who gave them a wrong share.
"""

from collections.abc import Callable, Collection, Mapping

from common.errors import ShareRefused
from common.secure_sum.shamir import combine, disagreeing, subsets

__all__ = ["open_secret"]


def open_secret(
    shares: Mapping[int, bytes],
    threshold: int,
    verify: Callable[[bytes], bool],
    *,
    colluding: int = 0,
    suspects: Collection[int] = (),
) -> tuple[bytes | None, tuple[int, ...]]:
    """The secret, and the holders whose shares disagree with it; None if no set of shares tried gives it.

    Holders in `suspects` come last. Where the first set opens the secret, nobody else is looked at.
    """
    holders = sorted(shares, key=lambda holder: (holder in suspects, holder))
    if len(holders) < threshold:
        return None, ()
    opened = None
    for place, chosen in enumerate(subsets(holders, threshold)):
        good = {holder: shares[holder] for holder in chosen}
        try:
            secret = combine(good, threshold)
        except ShareRefused:
            continue
        if not verify(secret):
            continue
        if place == 0:
            return secret, ()
        opened = secret
        wrong = disagreeing(good, shares)
        agreeing = len(shares) - len(wrong)
        if 2 * agreeing >= len(shares) + threshold - 1 and agreeing - colluding >= threshold - 1:
            return secret, wrong
    return opened, ()
