"""Counts of single records: together they are what measuring counts."""

import numpy as np
import pytest
from assessed import KINDS, Manifests, records, tiny

from common.config.manifest import METRICS
from common.errors import AssessmentError
from common.evaluation import measure
from common.metrics import figures
from server.assessment.outcomes import count_records, figure_of


@pytest.mark.parametrize("kind", KINDS)
def test_the_records_counts_sum_to_what_measure_counts(kind: str, manifest_for: Manifests) -> None:
    model, rows = tiny(manifest_for(kind)), records(kind, 37)
    whole = measure(model.network, model.task, model.task.encode(rows).examples, batch_size=8, precision="fp32")
    found = count_records(model, rows, batch_size=8)

    assert found.rows.shape == (37, len(whole))
    assert found.total == pytest.approx(whole, rel=1e-5)
    for key in whole:
        if key not in ("loss_sum", "nll"):  # counts proper are exact
            assert found.total[key] == whole[key], key
    for metric in METRICS[kind]:
        assert figure_of(kind, found.total, metric) == pytest.approx(figures(kind, whole, [metric])[metric], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_its_own_record(kind: str, manifest_for: Manifests) -> None:
    model, rows = tiny(manifest_for(kind)), records(kind, 9)
    found = count_records(model, rows, batch_size=4)
    for place, record in enumerate(rows):
        alone = measure(model.network, model.task, model.task.encode([record]).examples, batch_size=1, precision="fp32")
        assert dict(zip(found.keys, found.rows[place], strict=True)) == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_of_a_metric_are_enough_for_it(kind: str, manifest_for: Manifests) -> None:
    found = count_records(tiny(manifest_for(kind)), records(kind, 12))
    for metric in METRICS[kind]:
        part = found.needed(metric)
        assert len(part.keys) < len(found.keys)
        assert figure_of(kind, part.total, metric) == figure_of(kind, found.total, metric)


def test_right_is_whether_the_whole_record_is(manifest_for: Manifests) -> None:
    text = count_records(tiny(manifest_for("text-classification")), records("text-classification", 40))
    assert text.right is not None
    assert 0 < text.right.sum() == text.total["correct"] < 40
    tokens = count_records(tiny(manifest_for("token-classification")), records("token-classification", 40))
    assert tokens.right is not None
    for right, row in zip(tokens.right, tokens.rows, strict=True):
        counts = dict(zip(tokens.keys, row, strict=True))
        assert right == (counts["fp"] + counts["fn"] == 0)
    assert count_records(tiny(manifest_for("causal-lm")), records("causal-lm", 2)).right is None


def test_a_model_in_training_stays_so_and_no_records_are_refused(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("text-classification"))
    model.network.train()
    found = count_records(model, records("text-classification", 5))
    assert model.network.training
    assert np.isfinite(found.rows).all()
    with pytest.raises(AssessmentError, match="no records"):
        count_records(model, [])
