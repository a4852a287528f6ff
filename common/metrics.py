"""Figures from counts that add.

A site turns its predictions into counts; counts of records, batches and sites are summed, so that a secure sum can do
it too; figures are computed from the sums alone. The figures of a federation are therefore those of all its records
together, not a mean of the sites' figures. This file knows neither models nor tensors.

Keys of counts: `records`; `loss_sum` (sum of per-record losses, nats); text classification `correct` and, for label
number i, `tp/i`, `fp/i`, `fn/i`; token classification `tp`, `fp`, `fn` (entities); causal `nll` (nats), `tokens`,
`bytes` (UTF-8 bytes of the answers); `metric:<import path>` (value times records) for a metric of one's own.
A task's counts always have the same keys, whatever the records.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common.config.manifest import LOWER_IS_BETTER, METRICS, Manifest
from common.errors import ExtensionError, ManifestError

__all__ = [
    "Counts",
    "add",
    "better",
    "causal_counts",
    "count_names",
    "entities",
    "entity_counts",
    "figures",
    "own_counts",
    "text_counts",
]

Counts = dict[str, float]


def text_counts(predicted: Sequence[int], expected: Sequence[int], labels: int) -> Counts:
    """Counts of text classification from label numbers, one a record; `labels` is how many labels the task has."""
    guess, truth = np.asarray(predicted, dtype=np.int64), np.asarray(expected, dtype=np.int64)
    if guess.shape != truth.shape or guess.ndim != 1:
        raise ValueError(f"predicted and expected must be as long as each other: {guess.shape}, {truth.shape}")
    if any(numbers.size and not 0 <= numbers.min() <= numbers.max() < labels for numbers in (guess, truth)):
        raise ValueError(f"label numbers must be in 0..{labels - 1}")
    hit = guess == truth
    counts = {"records": float(len(truth)), "correct": float(hit.sum())}
    for key, numbers in (("tp", truth[hit]), ("fp", guess[~hit]), ("fn", truth[~hit])):
        counts |= {f"{key}/{label}": float(n) for label, n in enumerate(np.bincount(numbers, minlength=labels))}
    return counts


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities of a BIO sequence as (start, end, type), end exclusive, under strict IOB2.

    An entity is a B-x and every I-x that follows at once. An I-x that continues no entity of its type is none.
    """
    found: set[tuple[int, int, str]] = set()
    start = 0
    kind: str | None = None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and not (prefix == "I" and name == kind):
            found.add((start, place, kind))
            kind = None
        if prefix == "B":
            start, kind = place, name
    return found


def entity_counts(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> Counts:
    """Counts of token classification from tags: an entity is right if start, end and type all are.

    The figures equal those of seqeval 1.2.2 with mode="strict", scheme=IOB2, average="micro".
    """
    right = guessed = true = 0
    for guess, truth in zip(predicted, expected, strict=True):
        if len(guess) != len(truth):
            raise ValueError(f"a record must have as many predicted as expected tags: {len(guess)}, {len(truth)}")
        ours, theirs = entities(guess), entities(truth)
        right, guessed, true = right + len(ours & theirs), guessed + len(ours), true + len(theirs)
    return {
        "records": float(len(expected)),
        "tp": float(right),
        "fp": float(guessed - right),
        "fn": float(true - right),
    }


def causal_counts(nll: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]) -> Counts:
    """Counts of causal language modelling, one entry a record.

    `nll` is the negative log-likelihood of the answer in nats, summed over its `tokens`; `sizes` its UTF-8 bytes.
    A record's loss is its nll per token.
    """
    losses = [value / count if count else 0.0 for value, count in zip(nll, tokens, strict=True)]
    return {
        "records": float(len(losses)),
        "loss_sum": math.fsum(losses),
        "nll": math.fsum(nll),
        "tokens": float(sum(tokens)),
        "bytes": float(sum(size for size, _ in zip(sizes, losses, strict=True))),
    }


def own_counts(path: str, value: object, records: int) -> Counts:
    """Counts of a metric of one's own, the function at `path`, which gave `value` on `records` records.

    The figure is the mean of the sites' values, weighted by records. An ExtensionError refuses what is not a finite
    number: one site's nan would be everybody's.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ExtensionError(f"metric {path!r}: must return a number, found {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ExtensionError(f"metric {path!r}: must return a finite number for any records, found {number}")
    return {f"metric:{path}": number * records}


def count_names(manifest: Manifest) -> tuple[str, ...]:
    """The keys that a manifest's counts have, sorted: what sites must know before they can add them."""
    kind, labels = manifest.task.kind, len(manifest.task.labels)
    of_the_task = {
        "text-classification": [
            "loss_sum",
            "correct",
            *(f"{k}/{n}" for k in ("tp", "fp", "fn") for n in range(labels)),
        ],
        "token-classification": ["loss_sum", "tp", "fp", "fn"],
        "causal-lm": ["loss_sum", "nll", "tokens", "bytes"],
    }[kind]
    own = [f"metric:{metric}" for metric in manifest.metrics if ":" in metric]
    return tuple(sorted(["records", *of_the_task, *own]))


def add(*counts: Mapping[str, float]) -> Counts:
    """The sum of counts, key by key; a key that is missing is 0."""
    total: Counts = {}
    for part in counts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def figures(kind: str, counts: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of task `kind` from summed counts, in the order asked for.

    Where there is nothing to divide by, means (accuracy, loss, perplexity, bits_per_byte, own metrics) are nan and
    entity_precision, entity_recall, entity_f1 and macro_f1 are 0. A ManifestError refuses a metric of another task.
    """
    result: dict[str, float] = {}
    for metric in metrics:
        if ":" in metric:
            result[metric] = _mean(counts.get(f"metric:{metric}", 0.0), counts.get("records", 0.0))
        elif metric in METRICS[kind]:
            result[metric] = _FIGURES[metric](counts)
        else:
            raise ManifestError([f"evaluation.metrics: {metric!r} is no metric of {kind}"])
    return result


def better(metric: str, a: float, b: float) -> bool:
    """Whether `a` is strictly better than `b`: lower for losses, higher for all else, and any number than nan."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(b) and not math.isnan(a)
    return a < b if metric in LOWER_IS_BETTER else a > b


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f1(tp: float, fp: float, fn: float) -> float:
    # 2 tp / (2 tp + fp + fn) is the harmonic mean of precision tp / (tp + fp) and recall tp / (tp + fn).
    return _share(2 * tp, 2 * tp + fp + fn)


def _macro_f1(counts: Mapping[str, float]) -> float:
    """Unweighted mean of F1 over the labels that were expected or predicted, as scikit-learn's average="macro"."""
    labels = [key.removeprefix("tp/") for key in counts if key.startswith("tp/")]
    parts = [[counts[f"{key}/{label}"] for key in ("tp", "fp", "fn")] for label in labels]
    present = [_f1(*part) for part in parts if sum(part)]
    return _share(math.fsum(present), len(present))


def _perplexity(counts: Mapping[str, float]) -> float:
    """exp(nll / tokens); inf where that is beyond a float."""
    try:
        return math.exp(_mean(counts.get("nll", 0.0), counts.get("tokens", 0.0)))
    except OverflowError:
        return math.inf


_FIGURES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "accuracy": lambda c: _mean(c.get("correct", 0.0), c.get("records", 0.0)),
    "macro_f1": _macro_f1,
    "entity_precision": lambda c: _share(c.get("tp", 0.0), c.get("tp", 0.0) + c.get("fp", 0.0)),
    "entity_recall": lambda c: _share(c.get("tp", 0.0), c.get("tp", 0.0) + c.get("fn", 0.0)),
    "entity_f1": lambda c: _f1(c.get("tp", 0.0), c.get("fp", 0.0), c.get("fn", 0.0)),
    "perplexity": _perplexity,
    # nats / ln 2 = bits; per byte, so that models with different tokenizers can be compared.
    "bits_per_byte": lambda c: _mean(c.get("nll", 0.0) / math.log(2), c.get("bytes", 0.0)),
    "loss": lambda c: _mean(c.get("loss_sum", 0.0), c.get("records", 0.0)),
}
