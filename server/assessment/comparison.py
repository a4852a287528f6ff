"""Whether one of two models is better on the same records, and how sure that is, in words."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from scipy import stats

from common.config.manifest import LOWER_IS_BETTER, METRICS, TaskSection
from common.errors import AssessmentError
from common.records import Record
from server.assessment.evaluation import TIMED_TEXTS, Figure, drawn, figures_with_intervals, finite, outcomes_of
from server.assessment.outcomes import GENERATED, Outcomes
from server.assessment.significance import LEVEL, McNemar, Paired, mcnemar, paired_bootstrap
from server.assessment.text_quality import Check
from server.assessment.timing import SpeedRatio, compared_latency, texts_of
from server.distillation.domain_model import DomainModel

__all__ = ["Comparison", "Difference", "check_tasks", "compare", "compare_outcomes"]

Winner = Literal["A", "B"]

# The chance with which a true difference of `seen_above` is found.
POWER = 0.8
# Fewest records, all in favour of one model, for which McNemar's exact p is below 0.05: 2 / 2^6 = 0.031.
FEWEST = 6

_UNITS = {"bits_per_byte": " bits per byte", "loss": " nats a record", "perplexity": " of perplexity"}


@dataclass(frozen=True)
class Difference:
    """One figure of both models, and B minus A with the limits of its interval, in the figure's own unit."""

    metric: str
    a: Figure
    b: Figure
    difference: Paired


@dataclass(frozen=True)
class Comparison:
    """Two models on the same `records`; the verdict is about the first of `differences`, the main metric."""

    kind: str
    records: int
    differences: tuple[Difference, ...]
    mcnemar: McNemar | None
    """on records that are right as a whole; None for causal-lm, where a record is neither right nor wrong"""
    better: Winner | None
    """None: no difference was found"""
    seen_above: float
    """a true difference of this size would have been found with a chance of 80 %"""
    verdict: str
    parameters: tuple[int, int] | None = None
    speed: SpeedRatio | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; what is not finite becomes None."""
        return cast(dict[str, Any], finite(dataclasses.asdict(self)))


def compare(
    a: DomainModel,
    b: DomainModel,
    records: Sequence[Record],
    *,
    metric: str | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    most_tokens: int = 0,
    check: Check | None = None,
    timed: bool = False,
) -> Comparison:
    """Both models on `records`, each by its own tokenizer; `metric` is the main one, else the task's first.

    With `timed`, latencies too, taken in turns in this process.

    Raises:
        AssessmentError: the models do different tasks or have different labels, there are no records, or `metric` is
            none of the task.
    """
    check_tasks(a.manifest.task, b.manifest.task)
    known = (*METRICS[a.manifest.task.kind], *(GENERATED if most_tokens else ()))
    if metric is not None and metric not in known:
        raise AssessmentError(f"{metric!r} is no metric of this comparison; known: {', '.join(known)}")
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "most_tokens": most_tokens}
    outcomes = [outcomes_of(model, records, check=check, **options) for model in (a, b)]
    found = compare_outcomes(*outcomes, metric=metric)
    speed = compared_latency(a, b, texts_of(drawn(records, TIMED_TEXTS))) if timed else None
    return dataclasses.replace(found, parameters=(a.parameters, b.parameters), speed=speed)


def compare_outcomes(
    a: Outcomes, b: Outcomes, *, metric: str | None = None, metrics: Sequence[str] | None = None
) -> Comparison:
    """The comparison of two models' outcomes on the same records, in the same order.

    `metric` is the main one, else the task's first; `metrics` are all to report, None for every one there is.

    A difference counts as found if the paired bootstrap's interval excludes zero, and, where the main metric is a
    share of right records, McNemar's test agrees (p < 0.05): with a handful of records on which the models differ the
    percentile interval is too narrow, and the exact test is not.
    """
    ours, theirs = figures_with_intervals(a, metrics), figures_with_intervals(b, metrics)
    differences = [
        Difference(first.metric, first, second, paired_bootstrap(a, b, first.metric))
        for first, second in zip(ours, theirs, strict=True)
    ]
    main = metric or METRICS[a.kind][0]
    if main not in [difference.metric for difference in differences]:
        raise AssessmentError(f"{main!r} was not measured; measured: {', '.join(d.metric for d in differences)}")
    differences.sort(key=lambda difference: difference.metric != main)  # stable: the others stay in their order
    test = None if a.right is None or b.right is None else mcnemar(a.right, b.right)
    better = _better(differences[0], test if main == "accuracy" else None)
    return Comparison(
        kind=a.kind,
        records=len(a.rows),
        differences=tuple(differences),
        mcnemar=test,
        better=better,
        seen_above=(seen := _seen_above(differences[0], len(a.rows))),
        verdict=_verdict(differences[0], better, seen, len(a.rows), test),
    )


def check_tasks(a: TaskSection, b: TaskSection) -> None:
    """Whether two models can be compared: they do the same task with the same labels, in any order.

    Raises:
        AssessmentError: they do not; the line says where they differ.
    """
    if a.kind != b.kind:
        raise AssessmentError(f"the models do different tasks, {a.kind} and {b.kind}; compare models of one task")
    ours, theirs = set(a.labels), set(b.labels)
    if ours != theirs:
        raise AssessmentError(
            f"the models have different labels: {len(ours - theirs)} are A's alone and {len(theirs - ours)} B's alone"
            f" ({_first(ours ^ theirs)} for one); compare models of one federation"
        )


def _better(main: Difference, test: McNemar | None) -> Winner | None:
    found = main.difference
    agreed = test is None or test.p < 1 - LEVEL
    if not (math.isfinite(found.difference) and found.excludes_zero and agreed):
        return None
    return "B" if (found.difference < 0) == (main.metric in LOWER_IS_BETTER) else "A"


def _seen_above(main: Difference, records: int) -> float:
    """The true difference that is found with a chance of `POWER`, in the metric's unit; nan where that is unknown.

    (z of 97.5 % + z of 80 %) standard errors, by the normal law of the difference (Cohen 1988, section 2.1). For a
    share of right records no less than the share d of which, with that chance, `FEWEST` of the records differ:
    P(Binomial(n, d) >= k) is the distribution function of Beta(k, n - k + 1) at d.
    """
    error = main.difference.standard_error
    usual = float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * error
    if main.metric != "accuracy":
        return usual if error > 0 else math.nan
    if records < FEWEST:
        return math.nan
    return max(usual, float(stats.beta.ppf(POWER, FEWEST, records - FEWEST + 1)))


def _verdict(main: Difference, better: Winner | None, seen: float, records: int, test: McNemar | None) -> str:
    found, name = main.difference, main.metric.replace("_", " ")
    if not math.isfinite(found.difference):
        return f"no verdict: {name} of {'A' if not math.isfinite(main.a.value) else 'B'} is not a finite number"
    if better is not None:
        # Told as a gain of the better one, whatever its letter and whether less is better.
        low, high = sorted((abs(found.low), abs(found.high)))
        gain = _amount(abs(found.difference), main.metric)
        return f"{better} is better by {gain}{_of(main.metric)} ({_LIMITS} {_limits(low, high, main.metric)})"
    if found.low == found.high == 0:
        text = f"no difference of {name} found: A and B count the same on all {records} records"
    else:
        text = (
            f"no difference of {name} found (B minus A is {_amount(found.difference, main.metric)},"
            f" {_LIMITS} {_limits(found.low, found.high, main.metric)}"
        )
        # Where the two tests disagree the interval alone would puzzle: it lies on one side of zero.
        text += f", but McNemar's p is {test.p:.3f})" if found.excludes_zero and test is not None else ")"
    if math.isfinite(seen):
        return f"{text}; one above {_amount(seen, main.metric)} would have been seen in 4 of 5 such comparisons"
    return f"{text}; so few records could not have shown one" if records < FEWEST else text


_LIMITS = "95 % interval"


def _amount(value: float, metric: str) -> str:
    """A difference with its unit: shares in points, which are hundredths."""
    return f"{_number(value, metric)}{_UNITS.get(metric, ' points')}"


def _of(metric: str) -> str:
    return "" if metric in _UNITS else f" of {metric.replace('_', ' ')}"


def _limits(low: float, high: float, metric: str) -> str:
    return f"{_number(low, metric)} to {_number(high, metric)}"


def _number(value: float, metric: str) -> str:
    digits, scaled = (3, value) if metric in _UNITS else (1, 100 * value)
    return f"{round(scaled, digits) + 0.0:.{digits}f}"  # without the minus of -0.04


def _first(names: set[str]) -> str:
    return repr(min(names))
