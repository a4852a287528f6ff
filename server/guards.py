"""Guards between an opened mean and the adapter: a bound on its length, and a test on public records.

Both see what the coordinator sees under a secure sum, the mean and nothing of one site. A round that a guard rejects
leaves the adapter as it was; the sites have trained and, with privacy, paid for it all the same.
"""

import math
from dataclasses import dataclass

from common.config.manifest import LOWER_IS_BETTER, AggregationSection

__all__ = ["Rejection", "too_long", "too_much_worse"]


@dataclass(frozen=True)
class Rejection:
    """Why a round was rejected: the setting that it breaks, the value found and the most that is allowed."""

    setting: str
    value: float
    bound: float

    def __str__(self) -> str:
        return f"{self.setting}: {self.value:.4g} is above {self.bound:.4g}"


def too_long(section: AggregationSection, length: float) -> Rejection | None:
    """Reject a mean change whose L2 norm is above `aggregation.max_norm`, or is no number."""
    if section.max_norm is None or length <= section.max_norm:
        return None
    return Rejection("max_norm", length, section.max_norm)


def too_much_worse(section: AggregationSection, metric: str, before: float, after: float) -> Rejection | None:
    """Reject an adapter that is worse in `metric` by more than `aggregation.accept_drop` than the last accepted one.

    What is compared with is the last accepted adapter, not the best: small losses in many rounds can add up. A figure
    that is no number counts as infinitely bad, unless it was none before.
    """
    if section.accept_drop is None or math.isnan(before):
        return None
    drop = after - before if metric in LOWER_IS_BETTER else before - after
    drop = math.inf if math.isnan(drop) else drop
    return Rejection("accept_drop", drop, section.accept_drop) if drop > section.accept_drop else None
