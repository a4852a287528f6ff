import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config.manifest import Manifest
from common.data_files import Cleaning
from common.records import Record, TextRecord
from server.coordinator import Coordinator, SiteAnswer, StoredRound
from server.guards import Rejection
from server.run_store import RunStore
from simulations import summarise
from simulations.sites import FederationData
from simulations.summary import RoundFacts, TableRow

MakeManifest = Callable[..., Manifest]


def rows_of(manifest: Manifest, **given: Any) -> dict[str, TableRow]:
    values: dict[str, Any] = {
        "untuned": None,
        "alone": {},
        "federated": None,
        "compared": None,
        "centralised": None,
        "examples": 0,
    }
    return {row.name: row for row in summarise.comparison(manifest, **{**values, **given})}


ALONE = {
    "small": {"accuracy": 0.25, "loss": 2.0},
    "good": {"accuracy": 0.75, "loss": 1.5},
    "mild": {"accuracy": 0.5, "loss": 1.0},
}


def test_the_table_has_the_mean_and_the_best_site(manifest_for: MakeManifest) -> None:
    manifest = manifest_for(training={"rounds": 2, "local_steps": 5, "batch_size": 4})
    untuned, ours, pooled = {"accuracy": 0.1}, {"accuracy": 0.9}, {"accuracy": 0.95}
    rows = rows_of(manifest, untuned=untuned, alone=ALONE, federated=ours, centralised=pooled, examples=100)
    names = ["untuned", "local only (mean)", "local only (best site)", "federated", "centralised"]
    assert list(rows) == names
    assert rows["local only (mean)"].figures == {"accuracy": 0.5, "loss": 1.5}
    assert rows["local only (best site)"].figures == ALONE["good"]
    # A site alone takes 2 x 5 steps of 4; all records in one place as many as the three sites together.
    seen = {name: row.examples_seen for name, row in rows.items()}
    assert seen == dict(zip(names, (0, 40, 40, 100, 120), strict=True))


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "good"), ("loss", "mild")])
def test_the_first_metric_says_which_site_is_best(manifest_for: MakeManifest, metric: str, best: str) -> None:
    manifest = manifest_for(evaluation={"metrics": [metric]})
    assert rows_of(manifest, alone=ALONE)["local only (best site)"].figures == ALONE[best]


def test_a_site_without_a_figure_is_not_the_best(manifest_for: MakeManifest) -> None:
    alone = {"strange": {"accuracy": math.nan}, "plain": {"accuracy": 0.2}}
    assert rows_of(manifest_for(), alone=alone)["local only (best site)"].figures == {"accuracy": 0.2}


def test_only_what_was_measured_has_a_row(manifest_for: MakeManifest) -> None:
    assert rows_of(manifest_for()) == {}
    assert list(rows_of(manifest_for(), federated={"accuracy": 1.0}, examples=7)) == ["federated"]


def rounds(*losses: tuple[float | None, float | None]) -> list[RoundFacts]:
    """Rounds from 0 with (training loss, validation loss)."""
    return [
        RoundFacts(
            round=number,
            train_loss=train,
            validation={} if loss is None else {"accuracy": 0.5, "loss": loss},
            answered=2,
            failed=0,
            bytes_up=1,
            bytes_down=1,
            seconds=1.0,
            training_seconds=1.0,
        )
        for number, (train, loss) in enumerate(losses)
    ]


RISING = [(None, 3.0), (2.0, 1.5), (1.0, 1.0), (0.5, 1.2), (0.25, 1.4)]


def test_over_fitting_is_named_with_its_round_and_what_to_do() -> None:
    said = summarise.overfitting(rounds(*RISING), 4)
    assert said == (
        "Over-fitting: validation loss was lowest after round 2 (1.000) and rose to 1.400 by round 4 while training"
        ' loss fell; use fewer rounds, or evaluation.select = "best".'
    )


def test_where_an_earlier_round_was_selected_nothing_is_advised() -> None:
    said = summarise.overfitting(rounds(*RISING), 2)
    assert said.endswith("while training loss fell; the adapter of round 2 was selected.")


@pytest.mark.parametrize(
    "losses",
    [
        [(None, 3.0), (2.0, 1.5), (1.0, 1.0), (0.5, 0.8)],  # still falling
        [(None, 3.0), (2.0, 1.0), (1.0, 1.015)],  # less than 2 percent is noise
        [(None, 0.5), (2.0, 1.0), (1.0, 0.9)],  # round 0 was better, which no training made
        [(None, 3.0), (1.0, 1.0), (1.5, 1.5)],  # training loss rises too: that is divergence
        [(None, 3.0), (2.0, None), (1.0, 1.0), (0.5, None)],  # one value tells nothing
        [(None, 3.0), (2.0, math.nan), (1.0, 1.0)],
        [(None, None), (2.0, None), (1.0, None)],
        [(None, 3.0)],
        [],
    ],
)
def test_over_fitting_is_not_named_without_cause(losses: list[tuple[float | None, float | None]]) -> None:
    assert summarise.overfitting(rounds(*losses), len(losses) - 1) == ""


def test_a_round_without_a_figure_does_not_hide_over_fitting() -> None:
    losses = [(None, 3.0), (3.0, math.nan), (2.0, 1.0), (1.0, 1.3), (0.5, 1.5)]
    assert "lowest after round 2 (1.000) and rose to 1.500 by round 4" in summarise.overfitting(rounds(*losses), 4)


def test_a_training_loss_of_zero_is_a_low_one() -> None:
    assert summarise.overfitting(rounds((None, 3.0), (1.0, 1.0), (0.0, 2.0)), 2) != ""


def answer(site: str, **other: Any) -> SiteAnswer:
    facts = {"records": 4, "examples": 8, "loss": 1.0, "seconds": 2.0, "bytes_up": 10, "bytes_down": 20}
    return SiteAnswer(site=site, **{**facts, **other})


def counts(correct: float, records: float) -> dict[str, float]:
    return {"records": records, "correct": correct, "loss_sum": records}


@pytest.fixture
def stored() -> list[StoredRound]:
    """Two rounds of sites one and two; two sits the second out."""
    return [
        StoredRound(0, counts={"one": counts(1, 4), "two": counts(3, 4)}),
        StoredRound(
            1,
            answers=[answer("one", loss=3.0), answer("two", loss=1.0, seconds=5.0)],
            bytes_down=40,
            seconds=9.0,
            counts={"one": counts(2, 4)},
        ),
        StoredRound(
            2,
            answers=[answer("one", loss=0.5)],
            failures={"two": "timeout"},
            rejected=Rejection("max_norm", 9.0, 3.0),
            bytes_down=40,
            seconds=7.0,
            counts={"one": counts(4, 4), "two": {}},
        ),
    ]


def test_round_facts_sum_the_sites(tmp_path: Path, manifest_for: MakeManifest, stored: list[StoredRound]) -> None:
    store = RunStore(tmp_path / "run", lambda folder, state: None)
    coordinator = Coordinator(
        manifest_for(evaluation={"metrics": ["accuracy"]}),
        run_id="x",
        sites=["one", "two"],
        first={"a": np.float32([0.0])},
        channel=None,  # type: ignore[arg-type]  # nothing is sent
        store=store,
        report=lambda event: None,
    )
    coordinator.rounds = stored
    first, second, third = summarise.round_facts(coordinator, stored)
    assert (first.round, first.train_loss, first.answered, first.training_seconds) == (0, None, 0, 0.0)
    assert first.validation == {"accuracy": 0.5}
    assert (second.train_loss, second.validation) == (2.0, {"accuracy": 0.5})
    assert (second.bytes_up, second.bytes_down, second.seconds, second.training_seconds) == (20, 40, 9.0, 5.0)
    assert (third.answered, third.failed, third.train_loss) == (1, 1, 0.5)
    assert [facts.rejected for facts in (first, second, third)] == ["", "", "max_norm: 9 is above 3"]


def text(label: str, unit: str) -> Record:
    return TextRecord(text=f"{label}{unit}", label=label, unit=unit)


@pytest.fixture
def data() -> FederationData:
    one = [text("a", "u1"), text("a", "u1"), text("b", "u2")]
    test = [text("a", "u9"), text("b", "u9")]
    cleaning = Cleaning(normalised=3, duplicates=2)
    return FederationData({"one": one, "two": [text("c", "u3")]}, {"one": [text("a", "u4")]}, test, cleaning)


def test_site_facts_have_a_place_for_every_round(
    manifest_for: MakeManifest, data: FederationData, stored: list[StoredRound]
) -> None:
    manifest = manifest_for(evaluation={"metrics": ["accuracy"]})
    held_out = {"two": {"accuracy": 0.5}}
    one, two = summarise.site_facts(manifest, data, stored, {"one": {"accuracy": 0.25}}, held_out)
    assert (one.name, one.records, one.held_out, one.units, one.labels) == ("one", 3, 1, 2, {"a": 2, "b": 1})
    assert (one.train_loss, two.train_loss) == ([3.0, 0.5], [1.0, None])
    assert one.validation == [{"accuracy": 0.25}, {"accuracy": 0.5}, {"accuracy": 1.0}]
    assert two.validation == [{"accuracy": 0.75}, None, None]
    assert (one.seconds, one.bytes_up, one.bytes_down) == (4.0, 20, 40)
    assert (two.seconds, two.bytes_up, two.bytes_down) == (5.0, 10, 20)
    assert (two.held_out, two.units, two.labels) == (0, 1, {"c": 1})
    assert (one.local_only, two.local_only) == ({"accuracy": 0.25}, None)
    assert (one.local_only_held_out, two.local_only_held_out) == (None, {"accuracy": 0.5})


def test_data_facts_count_by_split(data: FederationData) -> None:
    facts = summarise.data_facts(data, {"train": 1, "dev": 0, "test": 2}, "dirichlet")
    assert facts.records == {"train": 4, "dev": 1, "test": 2}
    assert facts.units == {"train": 3, "dev": 1, "test": 1}
    assert facts.truncated == {"train": 1, "dev": 0, "test": 2}
    assert facts.cleaning.model_dump() == {"normalised": 3, "control_characters": 0, "duplicates": 2, "empty": 0}
    assert facts.partitioner == "dirichlet"


def test_failures_are_listed_in_order(stored: list[StoredRound]) -> None:
    stored[1].failures = {"one": "data", "two": "not_finite_loss"}
    found = [(failure.round, failure.site, failure.code) for failure in summarise.failures(stored)]
    assert found == [(1, "one", "data"), (1, "two", "not_finite_loss"), (2, "two", "timeout")]


def test_the_machine_is_this_one() -> None:
    facts = summarise.machine_facts(3, 2)
    assert (facts.workers, facts.threads_per_worker) == (3, 2)
    assert facts.cores >= 1
    assert facts.memory_gib > 0
    assert facts.devices
