import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score

from common.config.manifest import METRICS
from common.errors import ExtensionError, ManifestError
from common.metrics import (
    Counts,
    add,
    better,
    causal_counts,
    entities,
    entity_counts,
    figures,
    own_counts,
    text_counts,
)

LABELS = 5
PAIRS = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), max_size=30)
# Any order of tags, so most sequences are malformed: I-x at the start, after O, after another type.
TAG = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"])
TAG_PAIRS = st.lists(st.lists(st.tuples(TAG, TAG), max_size=8), max_size=6)


def text(pairs: list[tuple[int, int]]) -> Counts:
    return text_counts([p for p, _ in pairs], [e for _, e in pairs], LABELS)


def tagged(records: list[list[tuple[str, str]]]) -> tuple[list[list[str]], list[list[str]]]:
    return [[p for p, _ in r] for r in records], [[e for _, e in r] for r in records]


@settings(deadline=None)
@given(pairs=PAIRS.filter(len))
def test_classification_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = zip(*pairs, strict=True)
    found = figures("text-classification", text(pairs), ("accuracy", "macro_f1"))
    assert found["accuracy"] == pytest.approx(accuracy_score(expected, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro", zero_division=0))


@settings(max_examples=300, deadline=None)
@given(records=TAG_PAIRS.filter(len))
def test_entities_equal_seqeval(records: list[list[tuple[str, str]]]) -> None:
    predicted, expected = tagged(records)
    found = figures("token-classification", entity_counts(predicted, expected), METRICS["token-classification"][:3])
    options = {"mode": "strict", "scheme": IOB2, "average": "micro", "zero_division": 0}
    assert found["entity_f1"] == pytest.approx(seqeval_f1(expected, predicted, **options))
    assert found["entity_precision"] == pytest.approx(seqeval_precision(expected, predicted, **options))
    assert found["entity_recall"] == pytest.approx(seqeval_recall(expected, predicted, **options))


def test_entities_are_strict() -> None:
    assert entities(["I-a", "B-a", "I-a", "I-b", "O", "B-b", "B-b", "I-b"]) == {(1, 3, "a"), (5, 6, "b"), (6, 8, "b")}
    assert entities([]) == set()
    assert entities(["B-x-y", "I-x-y"]) == {(0, 2, "x-y")}


@settings(deadline=None)
@given(a=PAIRS, b=PAIRS)
def test_text_counts_add(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    assert add(text(a), text(b)) == text(a + b)


@settings(deadline=None)
@given(a=TAG_PAIRS, b=TAG_PAIRS)
def test_entity_counts_add(a: list[list[tuple[str, str]]], b: list[list[tuple[str, str]]]) -> None:
    assert add(entity_counts(*tagged(a)), entity_counts(*tagged(b))) == entity_counts(*tagged(a + b))


# Quarters are exact in floating point, so sums do not depend on their order.
ANSWERS = st.lists(
    st.tuples(st.integers(0, 400).map(lambda n: n / 4), st.sampled_from([0, 1, 2, 4]), st.integers(0, 9))
)


def causal(rows: list[tuple[float, int, int]]) -> Counts:
    return causal_counts([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


@settings(deadline=None)
@given(a=ANSWERS, b=ANSWERS)
def test_causal_counts_add(a: list[tuple[float, int, int]], b: list[tuple[float, int, int]]) -> None:
    assert add(causal(a), causal(b)) == causal(a + b)


def test_counts_have_the_same_keys_for_any_records() -> None:
    assert text([]).keys() == text([(0, 1)]).keys()
    assert entity_counts([], []).keys() == entity_counts([["O"]], [["B-a"]]).keys()
    assert causal([]).keys() == causal([(1.0, 1, 1)]).keys()


def test_causal_figures_by_hand() -> None:
    # Every token has probability 1/4: perplexity 4, 2 bits a token; 3 tokens of 12 bytes: half a bit a byte.
    counts = causal([(2 * math.log(4), 2, 7), (math.log(4), 1, 5)])
    found = figures("causal-lm", counts, METRICS["causal-lm"])
    assert found == pytest.approx({"perplexity": 4.0, "bits_per_byte": 0.5, "loss": math.log(4)})
    assert figures("causal-lm", {"nll": 1e6, "tokens": 1}, ["perplexity"]) == {"perplexity": math.inf}


def test_loss_is_the_mean_over_records_of_all_sites() -> None:
    counts = add({"loss_sum": 3.0, "records": 1.0}, {"loss_sum": 3.0, "records": 2.0})
    assert figures("text-classification", counts, ["loss"]) == {"loss": 2.0}


def test_nothing_to_divide_by() -> None:
    nothing = figures("text-classification", text([]), METRICS["text-classification"])
    assert nothing["macro_f1"] == 0.0
    assert math.isnan(nothing["accuracy"])
    assert math.isnan(nothing["loss"])
    assert set(figures("token-classification", {}, METRICS["token-classification"][:3]).values()) == {0.0}
    assert all(math.isnan(value) for value in figures("causal-lm", {}, METRICS["causal-lm"]).values())
    assert math.isnan(figures("causal-lm", {}, ["m:f"])["m:f"])


def test_own_metrics_are_weighted_by_records() -> None:
    counts = add(text([(0, 0)]), own_counts("m:f", 1.0, 1), text([(0, 0)] * 3), own_counts("m:f", 0, 3))
    assert figures("text-classification", counts, ["m:f", "accuracy"]) == {"m:f": 0.25, "accuracy": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much", [1], 10**400])
def test_an_own_metric_must_give_a_finite_number(value: object) -> None:
    with pytest.raises(ExtensionError, match="metric 'm:f': must return a"):
        own_counts("m:f", value, 1)


def test_a_metric_of_another_task_is_refused() -> None:
    with pytest.raises(ManifestError, match="'perplexity' is no metric of text-classification"):
        figures("text-classification", {}, ["perplexity"])


def test_every_metric_of_the_manifest_has_a_figure() -> None:
    for kind, metrics in METRICS.items():
        assert list(figures(kind, {}, metrics)) == list(metrics)


def test_better() -> None:
    assert better("accuracy", 0.9, 0.8)
    assert better("m:f", 0.9, 0.8)
    assert better("bits_per_byte", 1.0, 2.0)
    assert not better("loss", 2.0, 1.0)
    assert not better("accuracy", 0.8, 0.8)
    assert better("loss", 9.0, math.nan)
    assert not better("loss", math.nan, 9.0)
    assert not better("loss", math.nan, math.nan)


def test_unequal_lengths_and_unknown_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="as long as"):
        text_counts([0], [0, 1], 2)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        text_counts([0], [2], 2)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        text_counts([-1], [0], 2)
    with pytest.raises(ValueError, match="argument 2"):
        entity_counts([], [["O"]])
    with pytest.raises(ValueError, match="as many predicted"):
        entity_counts([["O", "O"]], [["O"]])
    with pytest.raises(ValueError, match="argument 2"):
        causal_counts([1.0], [1], [1, 2])
