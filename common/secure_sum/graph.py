"""Who masks and shares with whom: everybody with everybody up to 128 sites, above it a ring of k neighbours.

The ring (a Harary graph on a shuffled order, Bell et al. 2020, "Secure single-server aggregation with (poly)logarithmic
overhead", section 3) is drawn from a hash of the round's context and all signed one-time keys; every site draws it
itself. Each site is joined to the w = k / 2 sites before and the w behind it.

What must hold, each but with chance 2^-80 over the ring: half of it is left to a coordinator that has 2^40 tries of its
colluding sites' keys.

* Shares: fewer than t' of the k neighbours of any site collude. Their number is hypergeometric; the chance for one
  site, times the number of sites, is the bound. t' is more than half of the neighbourhood besides.
* Connected: the sum falls into smaller sums only if somewhere w sites in a row are gone or colluding. Bell et al.
  take the gone ones as chance; here the coordinator may choose them with the ring before its eyes. So at most `a` of
  any w in a row collude (hypergeometric again), and every site checks on the list of survivors that fewer than w - a
  of any w in a row are gone. With that, no w in a row are.

k is the least number, in steps of an eighth, for which both hold and a round with a tenth of its sites gone fails with
chance below 2^-20. Where there is none below n - 1, the graph is complete.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from common.errors import PolicyRefused, SurvivorsRefused
from common.secure_sum.primitives import Label, digest
from common.secure_sum.thresholds import threshold

__all__ = ["COMPLETE", "MOST_COMPLETE", "Degree", "Ring", "around", "choose_degree", "draw_ring", "neighbours"]

MOST_COMPLETE = 128
COMPLETE = 0
LEAST_HALF = 8

SECURE = Fraction(1, 2**80)
CORRECT = Fraction(1, 2**20)
USUALLY_GONE = Fraction(1, 10)


@dataclass(frozen=True)
class Degree:
    """How dense the graph is."""

    neighbours: int
    """k, even; 0 says that the graph is complete."""
    share_threshold: int
    """Shares that open a secret."""
    most_gone: int
    """Most sites gone among any k / 2 in a row; of no meaning in a complete graph."""


@dataclass(frozen=True)
class Ring:
    """Sites in the order of the ring."""

    order: tuple[int, ...]
    half: int

    def around(self, site: int) -> tuple[int, ...]:
        """The neighbours of a site, sorted."""
        place, size = self.order.index(site), len(self.order)
        steps = [*range(-self.half, 0), *range(1, self.half + 1)]
        return tuple(sorted({self.order[(place + step) % size] for step in steps} - {site}))

    def require_connected(self, survivors: Collection[int], most_gone: int) -> None:
        """Refuse a list of survivors that leaves too few in any half neighbourhood.

        Raises:
            SurvivorsRefused: more than `most_gone` of k / 2 sites in a row are gone.
        """
        gone = [site not in survivors for site in self.order]
        run = sum(gone[: self.half])
        for place in range(len(gone)):
            if run > most_gone:
                raise SurvivorsRefused(
                    f"{run} of {self.half} neighbours in the graph of masks are gone and at most {most_gone} may be"
                )
            run += gone[(place + self.half) % len(gone)] - gone[place]


@functools.lru_cache(maxsize=64)
def choose_degree(sites: int, colluding: int, fewest: int) -> Degree:
    """The graph for `sites` invited sites of which `colluding` may collude and at least `fewest` send keys."""
    complete = Degree(COMPLETE, threshold(sites, colluding), 0)
    if sites <= MOST_COMPLETE:
        return complete
    half = LEAST_HALF
    while half < fewest // 2:
        degree = _degree(sites, colluding, fewest, half)
        if degree is not None:
            return degree
        half += max(1, half // 8)  # exact tails of two thousand sites take a while
    return complete


def _degree(sites: int, colluding: int, fewest: int, half: int) -> Degree | None:
    """A graph of 2 x half neighbours if it is secure and bears the usual number of sites gone."""
    k, gone = 2 * half, math.ceil(USUALLY_GONE * sites)
    # Colluding sites are the densest among the fewest sites.
    in_window = _bound(fewest, colluding, half, SECURE / fewest)
    in_neighbourhood = _bound(fewest - 1, colluding, k, SECURE / fewest)
    most_gone = half - in_window - 1
    share_threshold = max(k // 2 + 1, in_neighbourhood + 1)
    if most_gone < 0 or _bound(sites, gone, half, CORRECT / sites) > most_gone:
        return None
    if k - _bound(sites - 1, gone, k, CORRECT / sites) < share_threshold:
        return None
    return Degree(k, share_threshold, most_gone)


def _bound(total: int, marked: int, drawn: int, chance: Fraction) -> int:
    """The least number that is exceeded with at most this chance by the marked ones among those drawn."""
    allowed, tail = chance * math.comb(total, drawn), 0
    for number in range(min(marked, drawn), 0, -1):
        tail += math.comb(marked, number) * math.comb(total - marked, drawn - number)
        if tail > allowed:
            return number
    return 0


def draw_ring(keys_hash: bytes, sites: Sequence[int], degree: Degree) -> Ring:
    """The ring over the sites that sent keys.

    Raises:
        PolicyRefused: the sites are too few for such a graph.
    """
    if len(sites) <= degree.neighbours:
        raise PolicyRefused(f"{len(sites)} sites cannot have {degree.neighbours} neighbours each")
    seed = digest(Label.GRAPH, keys_hash)
    order = sorted(sites, key=lambda site: digest(Label.GRAPH, seed, site.to_bytes(2, "little")))
    return Ring(tuple(order), degree.neighbours // 2)


def neighbours(keys_hash: bytes, sites: Sequence[int], degree: Degree) -> dict[int, tuple[int, ...]]:
    """The neighbours of every site that sent keys, sorted."""
    if degree.neighbours == COMPLETE:
        return {site: tuple(other for other in sites if other != site) for site in sites}
    ring = draw_ring(keys_hash, sites, degree)
    return {site: ring.around(site) for site in ring.order}


def around(keys_hash: bytes, sites: Sequence[int], degree: Degree, site: int) -> tuple[int, ...]:
    """The neighbours of one site alone, sorted."""
    if degree.neighbours == COMPLETE:
        return tuple(other for other in sites if other != site)
    return draw_ring(keys_hash, sites, degree).around(site)
