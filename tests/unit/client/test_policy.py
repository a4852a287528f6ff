"""The site policy, and the command that shows the ledger."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.commands import site
from client.ledger import Account, Charge, Ledger
from client.policy import load_policy
from client.protection import Population
from common.config.manifest import Manifest
from common.errors import ManifestError
from common.privacy.accounting import Steps, rdp_epsilon

POLICY = """\
version = 1
name = "st-anna"
[data]
train = "records.jsonl"
[population]
name = "cardiology patients"
unit = "patient"
units = 1100
epsilon = 10.0
delta = 1e-4
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(POLICY)
    return path


def problems(path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(ManifestError) as error:
        load_policy(path)
    return error.value.problems


def test_a_policy_is_read_and_its_files_are_found_from_anywhere(policy: Path, tmp_path: Path) -> None:
    read = load_policy(policy)
    assert read.account() == Population("cardiology patients", 1100, 10.0, 1e-4)
    assert read.data.train == str(tmp_path / "records.jsonl")
    assert read.data.held_out is None
    assert read.ledger == str(tmp_path / "ledger")


def test_the_stricter_of_policy_and_manifest_holds_in_a_sum(
    policy: Path, manifest_for: Callable[..., Manifest]
) -> None:
    policy.write_text(POLICY + "[secure_sum]\nmin_sites = 5\nmetrics = 'none'\n")
    mine = load_policy(policy)
    assert mine.secure_sum.metrics == "none"
    loose = {"min_sites": 2, "max_colluding": 1, "unsafe_two_sites": True}
    found = mine.sum_policy(manifest_for(secure_sum=loose, privacy={"epsilon": 1.0}))
    assert (found.min_sites, found.max_colluding, found.unsafe_two_sites) == (5, 1, False)
    assert found.noised_at_site
    assert mine.sum_policy(manifest_for(secure_sum={"min_sites": 7})).min_sites == 7
    assert load_policy(policy).sum_policy(manifest_for()).noised_at_site is False
    assert "must be an integer from 3 to 2048, found 2" in problems(policy, POLICY + "[secure_sum]\nmin_sites = 2\n")[0]


def test_every_problem_has_its_line_and_a_hint(policy: Path) -> None:
    text = POLICY.replace("units = 1100", "units = 1\nepsilom = 3").replace('train = "records.jsonl"', "")
    assert problems(policy, text) == [
        "site.toml:3: data.train is missing: file of the records to train on; it must be text that is not empty",
        "site.toml:9: population.epsilom is not a known key; did you mean population.epsilon?",
        "site.toml:8: population.units must be an integer of at least 2, found 1",
    ]


def test_a_policy_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no such file; a site\'s policy says where its data is"):
        load_policy(tmp_path / "site.toml")


def show(policy: Path) -> str:
    result = CliRunner().invoke(site, ["ledger", str(policy)], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_ledger_is_shown_by_population_federation_and_run(policy: Path, tmp_path: Path) -> None:
    assert "nothing is spent" in show(policy)
    assert not (tmp_path / "ledger").exists()
    ledger = Ledger(tmp_path / "ledger")
    account, steps = Account("cardiology patients", 10.0, 1e-4), Steps(1.5, 0.05, 20)
    for federation, run, number in (("heart", "a", 1), ("heart", "a", 2), ("lungs", "b", 1)):
        ledger.charge(
            account, Charge("cardiology patients", "patient", federation, "0" * 64, run, number, steps), ["x"]
        )
    shown = show(policy)
    whole = rdp_epsilon([Steps(1.5, 0.05, 60)], 1e-4)
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["population", "cardiology", "patients"]
    assert ["heart", "a", "patient", "2", "40"] in [line[:5] for line in lines]
    assert ["lungs", "b", "patient", "1", "20"] in [line[:5] for line in lines]
    assert ["all", "together", "3", "60", f"{whole:.3f}"] in [line[:5] for line in lines]
    assert f"cap 10 at delta 0.0001: {whole:.3f} spent, {10 - whole:.3f} left" in shown
    assert "simulated" not in shown
