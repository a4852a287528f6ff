"""A vault under privacy: charged before it trains, and nothing computed from records leaves but the noised change."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ledger import Ledger
from client.policy import load_policy
from client.protection import Population, Protection, mechanism, protected_units, published
from client.resident import resident
from client.state import SiteState
from client.vault import Vault
from common.adapters import first_state
from common.codec.state import state_digest
from common.config.manifest import Columns, Manifest
from common.contribution import Phase
from common.data_files import write_records
from common.errors import BudgetError, DataError, PrivacyError
from common.factors import factor_of
from common.messages import Envelope, Evaluate, Evaluated, Refused, RoundDone, RoundStart, decode, encode
from common.privacy.accounting import Steps, rdp_epsilon
from common.records import TextRecord

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
TRAINING = {"rounds": 3, "local_steps": 2, "batch_size": 4, "learning_rate": 0.01}
PEOPLE = Population("patients", 10, 8.0, 1e-3)


class Site:
    """A vault over a file of 24 records of 12 units, with its ledger."""

    def __init__(self, folder: Path, manifest: Manifest, population: Population = PEOPLE) -> None:
        self.manifest, self.folder = manifest, folder
        records = [TextRecord(unit=f"unit {n // 2}", text=f"clause {n} of it", label="abc"[n % 3]) for n in range(24)]
        write_records(folder / "train.jsonl", records, Columns())
        write_records(folder / "held_out.jsonl", records[:3], Columns())
        self.ledger = Ledger(folder / "ledger")
        self.population = population
        self.vault = self.open()
        self.first = first_state(resident(manifest).model, 0)

    def open(self) -> Vault:
        return Vault(
            "site-1",
            self.manifest,
            train=self.folder / "train.jsonl",
            held_out=self.folder / "held_out.jsonl",
            log=self.folder / "log",
            population=self.population,
            ledger=self.ledger,
        )

    def header(self, number: int) -> dict[str, Any]:
        return {
            "manifest_sha256": self.manifest.digest(),
            "run_id": "run",
            "round": number,
            "adapter_sha256": state_digest(self.first),
        }

    def ask(self, number: int, state: SiteState) -> tuple[Envelope, SiteState]:
        request = encode(
            Envelope(header=RoundStart(**self.header(number), evaluate=True, accepted=number - 1), tensors=self.first)
        )
        answer, state = self.vault.answer(request, state)
        return decode(answer), state


def private(manifest_for: Manifests, **privacy: Any) -> Manifest:
    section = {"epsilon": 8.0, "delta": 1e-3, "unit": "patient", **privacy}
    return manifest_for(training=TRAINING, privacy=section)


def test_what_leaves_is_the_change_and_public_numbers(manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = private(manifest_for)
    site = Site(tmp_path, manifest)
    how = mechanism(manifest, PEOPLE)
    for number in (1, 2):
        answer, state = site.ask(number, SiteState(last_round=number - 1))
        header = answer.header
        assert isinstance(header, RoundDone)
        assert header.model_dump(include={"records", "examples", "loss", "counts"}) == {
            "records": PEOPLE.units,  # not the 12 units or 24 records that there are
            "examples": TRAINING["local_steps"] * TRAINING["batch_size"],
            "loss": None,
            "counts": {},
        }
        assert header.seconds == int(header.seconds) > 0
        assert (header.noise_multiplier, header.sampling_rate) == (how.noise_multiplier, 0.4)
        assert all(np.abs(array).max() > 0 for array in answer.tensors.values())
        # LoRA with privacy: the factors in turn, and what has been checked is remembered.
        assert {factor_of(name) for name in answer.tensors} == {"", "BA"[number - 1]}
        assert state == SiteState(cursor=0, last_round=number, checked=(Phase.B, Phase.A)[number - 1])
    held_out = Envelope(header=Evaluate(**site.header(1)), tensors=site.first)
    measured = decode(site.vault.answer(encode(held_out), SiteState())[0]).header
    assert isinstance(measured, Evaluated)
    assert measured.counts == {}


def test_rounds_together_cost_what_the_manifest_allows(manifest_for: Manifests, tmp_path: Path) -> None:
    site = Site(tmp_path, private(manifest_for))
    for number in (1, 2, 3):
        site.ask(number, SiteState(last_round=number - 1))
    spent = site.ledger.spent("patients")
    assert [steps.count for steps in spent] == [6]
    assert 7.9 < rdp_epsilon(spent, 1e-3) <= 8.0
    entry = site.ledger.entries()[0].charge
    assert (entry.unit, entry.federation, entry.run_id, entry.round) == ("patient", "test", "run", 1)
    answer, _ = site.ask(1, SiteState())  # a round that comes again is paid again, and there is nothing left
    assert isinstance(answer.header, Refused)
    assert answer.header.code == "budget"
    with pytest.raises(BudgetError):
        site.open()


def test_spare_rounds_are_paid_for_by_more_noise(manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = private(manifest_for, spare_rounds=1)
    assert mechanism(manifest, PEOPLE).noise_multiplier > mechanism(private(manifest_for), PEOPLE).noise_multiplier
    site = Site(tmp_path, manifest)
    for number in (1, 1, 2, 3):
        answer, _ = site.ask(number, SiteState(last_round=number - 1))
        assert isinstance(answer.header, RoundDone)
    answer, _ = site.ask(3, SiteState(last_round=2))
    assert isinstance(answer.header, Refused)


def test_the_charge_is_durable_before_training_and_stays_when_it_fails(
    manifest_for: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, private(manifest_for))
    seen = []

    def dies(*arguments: Any, **options: Any) -> float:
        seen.append(len(Ledger(tmp_path / "ledger").entries()))
        raise MemoryError

    monkeypatch.setattr("client.round.train_private", dies)
    answer, state = site.ask(1, SiteState())
    assert isinstance(answer.header, Refused)
    assert state == SiteState()
    assert seen == [1]
    assert len(site.ledger.entries()) == 1


def test_without_budget_no_record_is_read(manifest_for: Manifests, tmp_path: Path) -> None:
    site = Site(tmp_path, private(manifest_for))
    (tmp_path / "train.jsonl").write_text("this would be an error if it were read")
    site.population = Population("patients", 10, 0.1, 1e-3)
    with pytest.raises(BudgetError, match=r"population 'patients': 2 more steps would bring epsilon from 0\.000 to"):
        site.open()


def test_without_a_ledger_there_is_no_private_training(manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = private(manifest_for)
    Site(tmp_path, manifest)
    with pytest.raises(PrivacyError, match="needs a population and a ledger"):
        Vault("site-1", manifest, train=tmp_path / "train.jsonl", held_out=None, log=tmp_path / "log")


def test_units_must_be_named_where_they_are_more_than_records(manifest_for: Manifests, tmp_path: Path) -> None:
    site = Site(tmp_path, private(manifest_for))
    (tmp_path / "train.jsonl").write_text('{"text": "x", "label": "a"}\n')
    with pytest.raises(DataError, match="no column 'unit'"):
        site.open()


@pytest.mark.parametrize(
    ("privacy", "units", "message"),
    [
        ({}, 4, "batch_size must be below the 4 privacy units"),
        ({}, 1, "batch_size must be below the 1 privacy units"),
        ({"delta": 0.2}, 10, "privacy.delta must be above 0 and below 1 / 10"),
    ],
)
def test_what_protects_nobody_is_refused(
    manifest_for: Manifests, privacy: dict[str, Any], units: int, message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        mechanism(private(manifest_for, **privacy), Population("patients", units, 8.0, 1e-3))


def test_a_manifest_without_privacy_has_no_mechanism(manifest_for: Manifests, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"no \[privacy\] table"):
        Protection(manifest_for(), PEOPLE, Ledger(tmp_path))


def test_units_are_records_or_what_owns_them() -> None:
    records = [TextRecord(unit="u", text=text, label="a") for text in ("x", "y")]
    records.append(TextRecord(unit="v", text="x", label="a"))
    assert list(protected_units(records, "patient")) == ["u", "v"]
    by_record = protected_units(records, "record")
    assert [len(own) for own in by_record.values()] == [1, 1, 1]
    assert len(by_record) == 3


def test_a_published_count_is_rounded_down() -> None:
    assert [published(n) for n in (1, 9, 10, 59, 99, 104, 1189, 12345)] == [0, 5, 10, 55, 95, 100, 1100, 12000]


def test_the_steps_of_a_round_are_those_of_the_manifest(manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = private(manifest_for)
    protection = Protection(manifest, PEOPLE, Ledger(tmp_path))
    how = mechanism(manifest, PEOPLE)
    assert protection.round == Steps(how.noise_multiplier, 0.4, TRAINING["local_steps"])
    assert how.expected_units == how.sampling_rate * PEOPLE.units == 4


def test_killed_at_twenty_moments_the_ledger_holds_all_that_was_released(
    manifest_for: Manifests, tmp_path: Path
) -> None:
    """A child answers rounds and releases each answer as a file; it is killed anywhere, also inside a step."""
    manifest = private(manifest_for, spare_rounds=2000)
    site = Site(tmp_path, manifest, Population("patients", 10, 1e6, 1e-3))
    site.ask(1, SiteState())  # so that what is left takes a few milliseconds a round
    (tmp_path / "released").mkdir()
    rng = random.Random(7)
    for kills in range(200):
        child = os.fork()
        if child == 0:
            try:
                for number in itertools.count():
                    site.ask(1, SiteState())
                    (tmp_path / "released" / f"{os.getpid()}-{number}").write_text("")
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.6) * (1 + kills // 20))  # a busy machine needs longer for a round
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        entries = Ledger(tmp_path / "ledger").entries()  # opens, and its chain holds
        released = len(list((tmp_path / "released").iterdir()))
        assert len(entries) >= 1 + released
        if kills >= 19 and released >= 5:
            break
    assert released >= 5


def test_a_vault_opens_by_its_sites_policy(manifest_for: Manifests, tmp_path: Path) -> None:
    rows = [{"patient": f"p{n // 2}", "note": f"clause {n} of it", "kind": "abc"[n % 3]} for n in range(24)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "site.toml").write_text(
        """\
version = 1
name = "st-anna"
[data]
train = "notes.jsonl"
columns = { text = "note", label = "kind", unit = "patient" }
[population]
name = "patients"
unit = "patient"
units = 10
epsilon = 8.0
delta = 1e-3
"""
    )
    manifest = private(manifest_for)
    policy = load_policy(tmp_path / "site.toml")
    vault = Vault.of(policy, manifest, log=tmp_path / "log")
    first = first_state(resident(manifest).model, 0)
    header = {
        "manifest_sha256": manifest.digest(),
        "run_id": "run",
        "round": 1,
        "adapter_sha256": state_digest(first),
    }
    start = encode(Envelope(header=RoundStart(**header, evaluate=False, accepted=0), tensors=first))
    answer = decode(vault.answer(start, SiteState())[0])
    assert isinstance(answer.header, RoundDone), (tmp_path / "log").read_text()
    (entry,) = Ledger(tmp_path / "ledger").entries()
    assert (entry.charge.population, entry.charge.unit, entry.simulated) == ("patients", "patient", False)
    with pytest.raises(PrivacyError, match="protects each 'matter', the population 'patients'"):
        Vault.of(policy, private(manifest_for, unit="matter"), log=tmp_path / "log")


def test_what_trains_is_checked_anew_after_the_head_also_by_a_site_that_missed_the_change(
    manifest_for: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(manifest_for).model_copy(
        update={"training": private(manifest_for).training.model_copy(update={"rounds": 6, "head_rounds": 2})}
    )
    site, checked = Site(tmp_path, manifest), []
    monkeypatch.setattr("client.round.check_gradients", lambda *_: checked.append(number))
    state = SiteState()
    for number in (1, 3, 4, 5, 6):  # round 2 was sat out
        answer, state = site.ask(number, state)
        assert isinstance(answer.header, RoundDone)
    assert checked == [1, 3, 4]  # the head, B with it, A with it
