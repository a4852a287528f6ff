"""What a model is worth on records: figures with intervals, and what it costs to run."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from common.config.manifest import METRICS
from common.errors import AssessmentError
from common.evaluation import measure
from common.metrics import figures
from common.randomness import seeded
from common.records import InstructionRecord, Record
from server.assessment.generation import answers
from server.assessment.outcomes import GENERATED, Outcomes, count_records, figure_of
from server.assessment.significance import SEED, Interval, bootstrap, wilson
from server.assessment.text_quality import Check, exact_match, rouge_l
from server.assessment.timing import Latency, Throughput, latency, texts_of, throughput
from server.distillation.domain_model import DomainModel

__all__ = ["Cost", "Evaluation", "Figure", "drawn", "evaluate", "figures_with_intervals", "outcomes_of"]

TIMED_TEXTS = 100  # texts that latency and throughput are measured on
MOST_TOKENS = 128  # tokens of a written answer

# Shares of records, for which Wilson's interval holds also near 0 and 1 and for few records.
_SHARES = {"accuracy": "correct", "exact_match": "exact_match", "format_compliance": "format_compliance"}


@dataclass(frozen=True)
class Figure:
    """One figure with the limits of its 95 % interval; the limits are nan for a metric of one's own."""

    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What a model costs to run, on one thread."""

    latency: Latency
    throughput: Throughput


@dataclass(frozen=True)
class Evaluation:
    """A model's figures on `records` records; `cost` is None where it was not asked for."""

    kind: str
    records: int
    truncated: int
    parameters: int
    """0 where the weights are another runtime's"""
    figures: tuple[Figure, ...]
    cost: Cost | None = None

    def value(self, metric: str) -> float:
        """The figure of this name."""
        return next(figure.value for figure in self.figures if figure.metric == metric)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; what is not finite becomes None."""
        return cast(dict[str, Any], finite(dataclasses.asdict(self)))


def evaluate(
    model: DomainModel,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    most_tokens: int = MOST_TOKENS,
    check: Check | None = None,
    timed: bool = True,
) -> Evaluation:
    """All figures of the model's task, each with its 95 % interval, and with `timed` latency and throughput.

    A causal model writes answers of up to `most_tokens` tokens, which ROUGE-L, exact match and, with `check`, format
    compliance look at; with 0 it writes none. Intervals: Wilson's for shares of records, else a bootstrap over records
    (`significance.py`). Metrics of one's own in the manifest have none.

    Raises:
        AssessmentError: there are no records, or `check` is given for a model that writes no answers.
    """
    outcomes = outcomes_of(
        model, records, batch_size=batch_size, precision=precision, most_tokens=most_tokens, check=check
    )
    found = figures_with_intervals(outcomes)
    if own := [metric for metric in model.manifest.evaluation.metrics if ":" in metric]:
        task, kind = model.task, model.manifest.task.kind
        examples = task.encode(records).examples
        counts = measure(model.network, task, examples, batch_size=batch_size, precision=precision, metrics=own)
        found += tuple(Figure(name, value, math.nan, math.nan) for name, value in figures(kind, counts, own).items())
    return Evaluation(
        kind=outcomes.kind,
        records=len(records),
        truncated=outcomes.truncated,
        parameters=model.parameters,
        figures=found,
        cost=_cost(model, records) if timed else None,
    )


def outcomes_of(
    model: DomainModel,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    most_tokens: int = 0,
    check: Check | None = None,
) -> Outcomes:
    """Per-record counts, for a causal model with those of its written answers unless `most_tokens` is 0.

    Raises:
        AssessmentError: there are no records, or `check` is given for a model that writes no answers.
    """
    writes = model.manifest.task.kind == "causal-lm" and most_tokens > 0
    if check is not None and not writes:
        raise AssessmentError(
            f"a pattern or schema needs answers that a causal-lm model writes; this one does {model.manifest.task.kind}"
            if model.manifest.task.kind != "causal-lm"
            else "a pattern or schema needs written answers; give --max-new-tokens of 1 or more"
        )
    outcomes = count_records(model, records, batch_size=batch_size, precision=precision)
    if not writes:
        return outcomes
    written = list(answers(model, records, most_tokens=most_tokens))
    expected = [record.output for record in cast(Sequence[InstructionRecord], records)]
    pairs = list(zip(written, expected, strict=True))
    outcomes = outcomes.with_column("rouge_l", [rouge_l(ours, theirs) for ours, theirs in pairs])
    outcomes = outcomes.with_column("exact_match", [exact_match(ours, theirs) for ours, theirs in pairs])
    if check is not None:
        outcomes = outcomes.with_column("format_compliance", [check(text) for text in written])
    return outcomes


def figures_with_intervals(outcomes: Outcomes, metrics: Sequence[str] | None = None) -> tuple[Figure, ...]:
    """The named figures, or every one that the counts allow in the order of the task's metrics, with intervals."""
    counts, found = outcomes.total, []
    known = [*METRICS[outcomes.kind], *(metric for metric in GENERATED if metric in outcomes.keys)]
    for metric in known if metrics is None else metrics:
        interval = _interval(outcomes, metric, counts)
        found.append(Figure(metric, figure_of(outcomes.kind, counts, metric), interval.low, interval.high))
    return tuple(found)


def drawn(records: Sequence[Record], limit: int | None) -> list[Record]:
    """At most `limit` records in their order, drawn with a fixed seed: a file's first ones may be of one label."""
    if limit is None or limit >= len(records):
        return list(records)
    chosen = seeded(SEED, "limit").choice(len(records), size=limit, replace=False)
    return [records[index] for index in sorted(int(index) for index in chosen)]


def finite(value: Any) -> Any:
    """Nested plain values with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(outcomes: Outcomes, metric: str, counts: dict[str, float]) -> Interval:
    if metric in _SHARES:
        return wilson(round(counts[_SHARES[metric]]), round(counts["records"]))
    return bootstrap(outcomes, metric)


def _cost(model: DomainModel, records: Sequence[Record]) -> Cost:
    texts = texts_of(drawn(records, TIMED_TEXTS))
    return Cost(latency(model, texts, repetitions=1), throughput(model, texts, repetitions=1))
