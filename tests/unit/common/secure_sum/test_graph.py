"""Thresholds by counting votes, and the ring by drawing many of them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import PolicyRefused, SurvivorsRefused
from common.randomness import seeded
from common.secure_sum.graph import (
    COMPLETE,
    MOST_COMPLETE,
    Degree,
    Ring,
    _bound,
    choose_degree,
    draw_ring,
    neighbours,
)
from common.secure_sum.thresholds import least_survivors, threshold


@pytest.mark.parametrize(
    ("sites", "colluding", "expected"),
    [(2, 0, 2), (3, 0, 3), (4, 0, 3), (10, 0, 7), (10, 3, 7), (10, 6, 9), (100, 33, 67)],
)
def test_known_thresholds(sites: int, colluding: int, expected: int) -> None:
    assert threshold(sites, colluding) == expected


@given(sites=st.integers(2, 2048), data=st.data())
def test_two_lists_never_both_get_enough_votes(sites: int, data: st.DataObject) -> None:
    colluding = data.draw(st.integers(0, sites - 2))
    least = threshold(sites, colluding)
    assert least <= sites
    # Honest sites vote once, colluding ones for both lists.
    assert (sites - colluding) + 2 * colluding < 2 * least
    assert 3 * least > 2 * sites
    smaller = least - 1
    assert 3 * smaller <= 2 * sites or sites + colluding >= 2 * smaller


@pytest.mark.parametrize(("sites", "colluding"), [(1, 0), (0, 0), (3, 2), (5, 5), (5, -1)])
def test_a_crowd_without_two_honest_sites_is_refused(sites: int, colluding: int) -> None:
    with pytest.raises(PolicyRefused):
        threshold(sites, colluding)


def test_survivors_are_the_most_of_three_rules() -> None:
    assert least_survivors(7, min_sites=3, least_honest=2, colluding=0) == 7
    assert least_survivors(7, min_sites=9, least_honest=2, colluding=0) == 9
    assert least_survivors(7, min_sites=3, least_honest=5, colluding=3) == 8


@given(total=st.integers(2, 60), data=st.data())
@settings(max_examples=50)
def test_the_bound_is_the_hypergeometric_tail(total: int, data: st.DataObject) -> None:
    marked, drawn = data.draw(st.integers(0, total)), data.draw(st.integers(1, total))
    chance = data.draw(st.sampled_from([0.3, 0.01, 1e-6]))
    found = _bound(total, marked, drawn, Fraction(chance))
    tail = stats.hypergeom(total, marked, drawn).sf
    assert tail(found) <= chance * (1 + 1e-9)
    assert found == 0 or tail(found - 1) > chance * (1 - 1e-9)


def test_up_to_128_sites_everybody_is_a_neighbour() -> None:
    assert MOST_COMPLETE == 128
    for sites in (2, 3, 10, 128):
        degree = choose_degree(sites, 0, threshold(sites, 0))
        assert degree == Degree(COMPLETE, threshold(sites, 0), 0)
        around = neighbours(bytes(32), range(sites), degree)
        assert all(len(others) == sites - 1 and site not in others for site, others in around.items())


@pytest.mark.parametrize(("sites", "colluding"), [(129, 0), (300, 30), (1000, 0), (1000, 100), (1000, 330)])
def test_a_sparse_graph_is_secure_by_its_bounds(sites: int, colluding: int) -> None:
    fewest = threshold(sites, colluding)
    degree = choose_degree(sites, colluding, fewest)
    k, half = degree.neighbours, degree.neighbours // 2
    assert 0 < k < sites
    # By scipy: no site has as many colluding neighbours as open a share, and no half neighbourhood is all lost.
    for present in (fewest, sites):
        neighbourhood = stats.hypergeom(present - 1, colluding, k).logsf(degree.share_threshold - 1)
        window = stats.hypergeom(present, colluding, half).logsf(half - degree.most_gone - 1)
        assert max(neighbourhood, window) + math.log(present) <= -80 * math.log(2) + 1e-6
    assert 2 * degree.share_threshold > k


def test_the_ring_is_even_public_and_its_own_each_time() -> None:
    degree, sites = choose_degree(200, 0, 134), range(0, 600, 3)
    around = neighbours(b"a" * 32, sites, degree)
    assert around == neighbours(b"a" * 32, sites, degree) != neighbours(b"b" * 32, sites, degree)
    for site, others in around.items():
        assert len(others) == degree.neighbours
        assert list(others) == sorted(set(others))
        assert all(site in around[other] for other in others)
    with pytest.raises(PolicyRefused):
        neighbours(b"a" * 32, sites[: degree.neighbours], degree)


def test_every_pair_is_joined_as_often_as_any() -> None:
    count, draws, degree = 12, 3000, Degree(4, 3, 1)
    joined = np.zeros((count, count))
    for number in range(draws):
        for site, others in neighbours(number.to_bytes(32, "little"), range(count), degree).items():
            joined[site, list(others)] += 1
    chance = 4 / (count - 1)
    pairs = joined[np.triu_indices(count, 1)] / draws
    assert np.abs(pairs - chance).max() < 5 * np.sqrt(chance * (1 - chance) / draws)


def components(ring: Ring, kept: set[int]) -> int:
    seen: set[int] = set()
    parts = 0
    for site in kept:
        parts += site not in seen
        reach = {site} - seen
        while reach:
            seen |= reach
            reach = {other for one in reach for other in ring.around(one) if other in kept} - seen
    return parts


def test_what_passes_the_check_is_connected_whoever_colludes() -> None:
    draws, degree = seeded(3), Degree(8, 5, 2)
    passed = failed = 0
    for number in range(300):
        ring = draw_ring(number.to_bytes(32, "little"), range(30), degree)
        place = int(draws.integers(30))
        gone = {ring.order[(place + step) % 30] for step in draws.choice(10, int(draws.integers(1, 6)), replace=False)}
        survivors = set(range(30)) - gone
        windows = [{ring.order[(start + step) % 30] for step in range(4)} for start in range(30)]
        try:
            ring.require_connected(survivors, degree.most_gone)
        except SurvivorsRefused:
            failed += 1
            assert any(len(window & gone) > 2 for window in windows)
            continue
        passed += 1
        assert all(len(window & gone) <= 2 for window in windows)
        # Any one site of every half neighbourhood may collude beside them.
        colluding = {site for place, site in enumerate(ring.order) if place % 4 == number % 4 and place < 28}
        assert components(ring, survivors - colluding) == 1
    assert passed > 30
    assert failed > 30
