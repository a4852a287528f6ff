"""How sure a figure is: intervals of one model's figures, and whether two models differ.

Everything is computed from per-record counts (`outcomes.py`). Random numbers come from a fixed seed, so that the same
records and models give the same interval and verdict on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from common.randomness import seeded
from server.assessment.outcomes import Outcomes, figure_of

__all__ = ["FEW", "LEVEL", "RESAMPLES", "SEED", "Interval", "McNemar", "Paired", "bootstrap", "mcnemar"]
__all__ += ["paired_bootstrap", "wilson"]

SEED = 0
RESAMPLES = 2000
LEVEL = 0.95
# Discordant records below which McNemar's test is the exact one.
FEW = 25

# Numbers in one block of drawn weights: 32 MB.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """Limits between which a figure lies with probability `LEVEL`, in the figure's own unit."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """The difference of two models' figures on the same records, second minus first, in the figure's own unit."""

    difference: float
    low: float
    high: float
    standard_error: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """A test of whether two models are right equally often; `p` is two-sided."""

    only_first: int
    """records that the first model alone has right"""
    only_second: int
    """records that the second model alone has right"""
    p: float
    method: Literal["exact", "mid-p"]


def wilson(right: int, records: int, *, level: float = LEVEL) -> Interval:
    """The interval of a share, `right` of `records` (Wilson 1927, without correction for continuity)."""
    found = stats.binomtest(right, records).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap(
    outcomes: Outcomes, metric: str, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> Interval:
    """The percentile interval of a figure (Efron 1979; Efron and Tibshirani 1993, section 13.3).

    Records are drawn with replacement, as many as there are, and the figure is computed from the sum of their counts.
    """
    (values,) = _drawn([outcomes], metric, resamples, seed)
    return _percentiles(values, level)


def paired_bootstrap(
    first: Outcomes,
    second: Outcomes,
    metric: str,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Paired:
    """The difference of two models' figures on the same records, with its percentile interval.

    Each time the same records are drawn for both (Koehn 2004 for machine translation; Berg-Kirkpatrick et al. 2012),
    so what makes a record hard for both cancels. Rows of `first` and `second` must be of the same records.
    """
    if len(first.rows) != len(second.rows):
        raise ValueError(f"paired outcomes must be of the same records: {len(first.rows)}, {len(second.rows)}")
    ours, theirs = _drawn([first, second], metric, resamples, seed)
    with np.errstate(invalid="ignore"):  # a perplexity beyond a float, less another
        values = theirs - ours
    interval = _percentiles(values, level)
    known = values[np.isfinite(values)]
    return Paired(
        difference=figure_of(second.kind, second.total, metric) - figure_of(first.kind, first.total, metric),
        low=interval.low,
        high=interval.high,
        standard_error=float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
    )


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> McNemar:
    """McNemar's test (McNemar 1947) on which records, [records], each model has right.

    Under the null hypothesis the discordant records are the first model's with probability 1/2. Below `FEW` of them
    p is the exact conditional one, 2 P(X <= min), which never exceeds its level; from there on the mid-p,
    that less P(X = min), which Fagerland, Lydersen and Laake (2013) recommend since the exact test is too careful.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant, least = only_first + only_second, min(only_first, only_second)
    law = stats.binom(discordant, 0.5)
    point = float(law.pmf(least))
    exact = min(1.0, 2.0 * float(law.cdf(least)))
    if discordant < FEW:
        return McNemar(only_first, only_second, exact, "exact")
    # Where both have as many, the two tails meet in the point itself, of which half counts.
    middle = 1.0 - point / 2 if only_first == only_second else exact - point
    return McNemar(only_first, only_second, middle, "mid-p")


def _drawn(models: Sequence[Outcomes], metric: str, resamples: int, seed: int) -> list[npt.NDArray[np.float64]]:
    """The figure of each model, [resamples], over records drawn with replacement, the same ones for all models.

    Records with equal rows are one type. How often each type is drawn is multinomial, with the types' shares, which
    is what drawing the records one by one gives; there are few types where records are right or wrong.
    """
    parts = [model.needed(metric) for model in models]
    types, repeats = np.unique(np.hstack([part.rows for part in parts]), axis=0, return_counts=True)
    records = int(repeats.sum())
    rng = seeded(seed, "bootstrap", metric)
    block = max(1, _BLOCK // len(types))
    sums = np.vstack(
        [
            rng.multinomial(records, repeats / records, size=min(block, resamples - start)) @ types
            for start in range(0, resamples, block)
        ]
    )
    ends = np.cumsum([len(part.keys) for part in parts])[:-1]
    return [_figures(part, metric, own) for part, own in zip(parts, np.split(sums, ends, axis=1), strict=True)]


def _figures(part: Outcomes, metric: str, sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The figure of every row of summed counts; equal rows, of which there are many for a share, only once."""
    different, places = np.unique(sums, axis=0, return_inverse=True)
    values = [figure_of(part.kind, dict(zip(part.keys, row, strict=True)), metric) for row in different.tolist()]
    return np.array(values)[places.reshape(-1)]


def _percentiles(values: npt.NDArray[np.float64], level: float) -> Interval:
    """The limits that leave (1 - level) / 2 of the finite values on each side; nan where there are none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
