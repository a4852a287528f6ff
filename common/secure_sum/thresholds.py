"""How many sites must agree, share and survive, from the number of sites and of those that may collude.

With n sites of which c collude with the coordinator, a site signs one list of survivors, a colluding one two. Two lists
that t sites each signed need (n - c) + 2 c >= 2 t signatures, so 2 t > n + c leaves one list at most, and with it one
kind of share for every peer (Bonawitz et al. 2017, section 6.2). The third term of t is the paper's two thirds.
"""

from common.errors import PolicyRefused

__all__ = ["least_survivors", "threshold"]


def threshold(sites: int, colluding: int) -> int:
    """t = max(floor(2 n / 3) + 1, floor((n + c) / 2) + 1).

    Raises:
        PolicyRefused: no threshold can do with so many colluding sites.
    """
    least = max(2 * sites // 3 + 1, (sites + colluding) // 2 + 1)
    if sites < 2 or not 0 <= colluding <= sites - 2 or least > sites:
        raise PolicyRefused(
            f"{sites} sites of which {colluding} may collude: at least two must not, or the sum is one site's vector"
        )
    return least


def least_survivors(required: int, *, min_sites: int, least_honest: int, colluding: int) -> int:
    """Fewest sites in an opened sum: the threshold, the agreed crowd, and enough honest ones beside those colluding."""
    return max(required, min_sites, least_honest + colluding)
