"""Two models compared: the verdict's words, when there is one, and what cannot be compared."""

import json
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from assessed import KINDS, Manifests, records, tiny

from common.config.manifest import METRICS
from common.errors import AssessmentError
from common.randomness import seeded
from server.assessment.comparison import Comparison, compare, compare_outcomes
from server.assessment.evaluation import evaluate
from server.assessment.outcomes import Outcomes


def sided(both: int, only_a: int, only_b: int, neither: int) -> tuple[Outcomes, Outcomes]:
    """Outcomes of two models that have so many records right together, alone and not at all."""
    sides = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    a, b = np.array(sides, dtype=float).T
    return _rights(a), _rights(b)


def _rights(right: np.ndarray) -> Outcomes:
    return Outcomes("text-classification", ("records", "correct"), np.column_stack([np.ones(len(right)), right]))


def accuracy(a: Outcomes, b: Outcomes) -> str:
    return compare_outcomes(a, b, metrics=["accuracy"]).verdict


def test_the_planted_three_points_are_told_in_words() -> None:
    verdict = accuracy(*sided(850, 20, 50, 80))
    assert verdict == "B is better by 3.0 points of accuracy (95 % interval 1.4 to 4.6)"
    # By hand: (50 - 20) / 1000; standard error sqrt(70 - 30^2 / 1000) / 1000 = 0.0083, and 1.96 of them 1.6 points.
    assert accuracy(*sided(850, 50, 20, 80)).startswith("A is better by 3.0 points of accuracy (95 % interval 1.")


def test_no_difference_says_what_would_have_been_seen() -> None:
    found = compare_outcomes(*sided(850, 36, 34, 80), metrics=["accuracy"])
    assert found.better is None
    # (1.96 + 0.84) sqrt(70) / 1000
    assert found.seen_above == pytest.approx(2.80 * math.sqrt(70) / 1000, rel=0.05)
    assert found.verdict.startswith("no difference of accuracy found (B minus A is -0.2 points, 95 % interval -1.")
    assert re.search(r"; one above 2\.[34] points would have been seen in 4 of 5 such comparisons$", found.verdict)


def test_what_would_have_been_seen_is_seen_in_four_of_five() -> None:
    shares = (0.87, 0.03, 0.03, 0.07)
    rng = seeded(3, "power")
    seen = np.mean([_compared(rng, shares).seen_above for _ in range(20)])
    moved = (0.87, 0.03 - seen / 2, 0.03 + seen / 2, 0.07)
    trials = 200
    found = sum(_compared(rng, moved).better == "B" for _ in range(trials))
    # The normal law and the mean of twenty are good to some points; four standard errors are 11.
    assert found / trials == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / trials))


def _compared(rng: np.random.Generator, shares: Sequence[float]) -> Comparison:
    kind = rng.choice(4, size=800, p=shares)
    return compare_outcomes(_rights(kind <= 1), _rights((kind == 0) | (kind == 2)), metrics=["accuracy"])


def test_two_that_do_the_same_are_told_so() -> None:
    found = compare_outcomes(*sided(90, 0, 0, 10), metrics=["accuracy"])
    assert found.better is None
    assert "A and B count the same on all 100 records; one above" in found.verdict
    # Six records of 100 must differ: with 8.8 % (Binomial) there are as many in 4 of 5 draws.
    chance = sum(math.comb(100, k) * found.seen_above**k * (1 - found.seen_above) ** (100 - k) for k in range(6))
    assert 1 - chance == pytest.approx(0.8, abs=1e-9)


def test_a_handful_of_records_decides_nothing() -> None:
    # The bootstrap alone would say that B is better: in 19 of 20 draws of five records, four in B's favour are left.
    found = compare_outcomes(*sided(1, 0, 4, 0), metrics=["accuracy"])
    assert found.differences[0].difference.excludes_zero
    assert found.mcnemar is not None
    assert found.mcnemar.p == 0.125
    assert found.better is None
    assert ", but McNemar's p is 0.125);" in found.verdict
    assert found.verdict.endswith("so few records could not have shown one")


def test_nothing_is_told_as_minus_zero() -> None:
    found = accuracy(*sided(8500, 21, 20, 1459))
    assert "B minus A is 0.0 points" in found  # it is -0.01
    assert "-0.0 " not in found


def test_lower_is_better_for_bits_per_byte() -> None:
    rng = seeded(4, "bits")
    base = rng.gamma(4, 10, 200)

    def model(factor: float) -> Outcomes:
        keys = ("records", "loss_sum", "nll", "tokens", "bytes")
        noise = 1 + 0.02 * rng.standard_normal(200)
        columns = [np.ones(200), base / 20, base * factor * noise, np.full(200, 20), np.full(200, 80)]
        return Outcomes("causal-lm", keys, np.column_stack(columns))

    found = compare_outcomes(model(1.0), model(0.9))
    assert found.better == "B"
    assert found.verdict.startswith("B is better by 0.0")
    assert " bits per byte (95 % interval 0.0" in found.verdict
    assert found.mcnemar is None
    assert compare_outcomes(model(0.9), model(1.0)).better == "A"
    assert compare_outcomes(model(1.0), model(0.9), metric="perplexity").verdict.endswith(")")


def test_a_figure_that_is_no_number_gives_no_verdict() -> None:
    keys = ("records", "loss_sum", "nll", "tokens", "bytes")
    good = Outcomes("causal-lm", keys, np.array([[1.0, 1.0, 5.0, 4.0, 9.0]] * 3))
    bad = Outcomes("causal-lm", keys, np.array([[1.0, 1.0, 5000.0, 4.0, 9.0]] * 3))
    found = compare_outcomes(good, bad, metric="perplexity")
    assert found.better is None
    assert found.verdict == "no verdict: perplexity of B is not a finite number"
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_compared_on_their_own_figures(kind: str, manifest_for: Manifests) -> None:
    a, b, rows = tiny(manifest_for(kind)), tiny(manifest_for(kind)), records(kind, 30)
    for weight in b.network.parameters():
        weight.data.mul_(1.3)
    found = compare(a, b, rows)
    assert [row.metric for row in found.differences] == list(METRICS[kind])
    for model, side in ((a, "a"), (b, "b")):
        alone = evaluate(model, rows, most_tokens=0, timed=False)
        assert [getattr(row, side) for row in found.differences] == list(alone.figures)
    same = compare(a, a, rows, metric="loss")
    assert same.differences[0].metric == "loss"
    assert same.better is None
    assert "A and B count the same on all 30 records" in same.verdict


def test_written_answers_can_decide(manifest_for: Manifests) -> None:
    model, rows = tiny(manifest_for("causal-lm")), records("causal-lm", 6)
    found = compare(model, model, rows, metric="rouge_l", most_tokens=4)
    assert found.differences[0].metric == "rouge_l"
    with pytest.raises(AssessmentError, match="'rouge_l' is no metric of this comparison; known: bits_per_byte"):
        compare(model, model, rows, metric="rouge_l")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda make: make("causal-lm"), "do different tasks, text-classification and causal-lm"),
        (
            lambda make: make(task={"labels": ["a", "b", "d", "e"]}),
            r"different labels: 1 are A's alone and 2 B's alone \('c' for one\)",
        ),
    ],
)
def test_what_cannot_be_compared(other: Callable[..., object], words: str, manifest_for: Manifests) -> None:
    model = tiny(manifest_for("text-classification"))
    with pytest.raises(AssessmentError, match=words):
        compare(model, tiny(other(manifest_for)), records("text-classification", 3))  # type: ignore[arg-type]


def test_labels_in_another_order_are_the_same_labels(manifest_for: Manifests) -> None:
    rows = records("text-classification", 30)
    model = tiny(manifest_for("text-classification"))
    turned = tiny(manifest_for("text-classification", task={"labels": ["c", "a", "b"]}))
    head, own = turned.network.head, model.network.head  # the same head with its rows in the other order
    head.weight.data = own.weight.data[[2, 0, 1]]
    head.bias.data = own.bias.data[[2, 0, 1]]
    found = compare(model, turned, rows)
    assert [row.difference.difference for row in found.differences] == pytest.approx([0, 0, 0], abs=1e-6)


def test_interval_of_macro_f1_and_the_paired_one_come_from_the_same_figure(manifest_for: Manifests) -> None:
    found = compare(*(tiny(manifest_for("text-classification")) for _ in "ab"), records("text-classification", 30))
    for row in found.differences:
        assert row.a.low <= row.a.value <= row.a.high
        assert row.difference.difference == row.b.value - row.a.value == 0
