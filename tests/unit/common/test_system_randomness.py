"""Noise and sampling: the distribution they should have, with tolerances in standard errors, and no repetition."""

import numpy as np
import pytest
from scipy import stats

from common.randomness import SystemRandomness

# Every statistic may be 5 standard errors off: about one false alarm in 1.7 million.
ERRORS = 5.0


@pytest.mark.parametrize("seed", [None, 7])
def test_noise_is_standard_normal(seed: int | None) -> None:
    count = 1_000_000
    draws = SystemRandomness(unsafe_seed=seed).normal(count)
    assert abs(draws.mean()) < ERRORS / np.sqrt(count)
    assert abs(draws.var() - 1) < ERRORS * np.sqrt(2 / count)
    assert abs(stats.skew(draws)) < ERRORS * np.sqrt(6 / count)
    assert abs(stats.kurtosis(draws)) < ERRORS * np.sqrt(24 / count)
    # Kolmogorov and Smirnov: sqrt(n) D above 2.7 has a chance below 1e-6.
    assert stats.kstest(draws, "norm").statistic * np.sqrt(count) < 2.7
    # Neighbours, and the two halves of which Box and Muller's pairs are made, are independent.
    for other in (draws[1:], draws[count // 2 :]):
        mine = draws[: len(other)]
        assert abs(np.mean(mine * other)) < ERRORS / np.sqrt(len(other))
        assert abs(np.mean((mine**2 - 1) * (other**2 - 1))) < ERRORS * 2 / np.sqrt(len(other))
    assert len(np.unique(draws)) > count - 10


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_it_gives_as_many_numbers_as_asked_for(count: int) -> None:
    assert SystemRandomness().normal(count).shape == (count,)


def test_every_index_is_drawn_on_its_own_with_the_same_chance() -> None:
    randomness, count, rate, draws = SystemRandomness(), 40, 0.2, 20_000
    present = np.zeros((draws, count))
    for row in present:
        row[randomness.chosen(count, rate)] = 1
    deviation = np.sqrt(rate * (1 - rate))
    assert np.abs(present.mean(0) - rate).max() < ERRORS * deviation / np.sqrt(draws)
    sizes = present.sum(1)
    expected = count * rate * (1 - rate)  # a binomial size: fixed sizes would have no variance
    fourth = expected * (1 + 3 * (count - 2) * rate * (1 - rate))
    assert abs(sizes.var() - expected) < ERRORS * np.sqrt((fourth - expected**2) / draws)
    covariance = np.cov(present.T) / deviation**2
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 6 / np.sqrt(draws)  # 780 pairs
    assert np.abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < ERRORS / np.sqrt(draws)
    assert randomness.chosen(count, 1.0).tolist() == list(range(count))


def test_a_capped_unit_gives_every_record_the_same_chance() -> None:
    randomness, draws = SystemRandomness(), 20_000
    counts = np.zeros(5)
    for _ in range(draws):
        picked = randomness.some_of(5, 2)
        assert len(set(picked.tolist())) == 2
        counts[picked] += 1
    assert np.abs(counts / draws - 0.4).max() < ERRORS * np.sqrt(0.4 * 0.6 / draws)
    assert randomness.some_of(3, 5).tolist() == [0, 1, 2]


def test_nothing_but_an_unsafe_seed_repeats() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = SystemRandomness().normal(8)
    np.random.seed(0)  # noqa: NPY002
    assert not np.array_equal(first, SystemRandomness().normal(8))
    assert np.array_equal(SystemRandomness(unsafe_seed=1).normal(8), SystemRandomness(unsafe_seed=1).normal(8))
    assert not np.array_equal(SystemRandomness(unsafe_seed=1).normal(8), SystemRandomness(unsafe_seed=2).normal(8))
    repeated = SystemRandomness(unsafe_seed=1)
    assert not np.array_equal(repeated.normal(8), repeated.normal(8))
