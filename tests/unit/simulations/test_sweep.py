"""A sweep: its points, its page, and what it would cost in reality."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from summary_samples import sample

from common.errors import ManifestError, RunError, TrainingError
from common.privacy.accounting import Steps, rdp_epsilon
from simulations.summary import PrivacyFacts, RunSummary, SitePrivacy
from simulations.sweep import Sweep, parse_sweep, run_sweep

NOISE = {"1": 2.0, "8": 0.8}


def private(value: str) -> PrivacyFacts | None:
    if value == "inf":
        return None
    sites = [
        SitePrivacy(
            name=name,
            units=100,
            noise_multiplier=NOISE[value],
            sampling_rate=rate,
            steps=40,
            epsilon=rdp_epsilon([Steps(NOISE[value], rate, 40)], 1e-5),
            epsilon_prv=0.5,
        )
        for name, rate in (("north", 0.1), ("south", 0.2))
    ]
    return PrivacyFacts(unit="patient", epsilon=float(value), delta=1e-5, clip=1.0, protects=True, sites=sites)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs that are not run: what each was asked, and a summary that depends on it."""
    asked: list[dict[str, Any]] = []

    def simulate(manifest: Path, **options: Any) -> RunSummary:
        asked.append(options)
        value = options["overrides"][-1].partition("=")[2]
        if value == "broken":
            raise TrainingError("it broke")
        (options["runs"] / options["run_id"]).mkdir(parents=True)
        status = "interrupted" if value == "stop" else "finished"
        return sample(
            run_id=options["run_id"], privacy=private(value) if value in {*NOISE, "inf"} else None, status=status
        )

    monkeypatch.setattr("simulations.sweep.simulate", simulate)
    return asked


def swept(folder: Path, text: str, **options: Any) -> Any:
    settings = {"data": None, "runs": folder, "run_id": "s", "overrides": ["a=b"], "baselines": False, "view": None}
    return run_sweep(Path("federation.toml"), parse_sweep(text), **{**settings, **options})


def test_every_value_is_a_run_beside_one_table_and_one_page(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    summary, folder = swept(tmp_path, "privacy.epsilon=1, 8,inf")
    assert folder == tmp_path / "s"
    assert [asked["overrides"] for asked in runs] == [["a=b", f"privacy.epsilon={v}"] for v in ("1", "8", "inf")]
    assert [asked["run_id"] for asked in runs] == [f"privacy.epsilon-{v}" for v in ("1", "8", "inf")]
    assert all(asked["runs"] == folder for asked in runs)
    federated = next(row.figures for row in sample().table if row.name == "federated")
    assert [point.figures for point in summary.points] == [federated] * 3
    assert [point.epsilon is None for point in summary.points] == [False, False, True]
    # South pays more in each point; its points compose.
    whole = rdp_epsilon([Steps(2.0, 0.2, 40), Steps(0.8, 0.2, 40)], 1e-5)
    assert summary.epsilon_of_all == pytest.approx(whole)
    assert json.loads((folder / "sweep.json").read_text())["points"][1]["value"] == "8"
    page = (folder / "sweep.html").read_text()
    assert "<svg" in page
    assert re.findall(r'<a href="([^"]+)"', page) == [f"privacy.epsilon-{v}/report.html" for v in ("1", "8", "inf")]
    assert "A site that really tried all of them would have paid" in page
    assert not re.search(r'(src|href)="[a-z]+:', page)


def test_what_is_finished_stays_when_a_point_fails(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    with pytest.raises(TrainingError):
        swept(tmp_path, "privacy.epsilon=8,broken,1")
    assert [point["value"] for point in json.loads((tmp_path / "s" / "sweep.json").read_text())["points"]] == ["8"]
    assert len(runs) == 2


def test_a_wish_to_stop_ends_the_sweep(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    summary, _ = swept(tmp_path, "x.y=8,stop,1")
    assert [point.status for point in summary.points] == ["finished", "interrupted"]
    assert len(runs) == 2


def test_a_sweep_never_writes_over_another(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(RunError, match="exists already"):
        swept(tmp_path, "a.b=1,2")
    assert not runs


@pytest.mark.parametrize("text", ["", "a", "a=", "a=1", "=1,2", "a=1,,2", "a=1,1", "a=1,2,"])
def test_what_is_no_sweep_is_one_line(text: str) -> None:
    with pytest.raises(ManifestError, match=r"must be KEY=VALUE,VALUE,\.\.\. with different values"):
        parse_sweep(text)


def test_a_sweep_is_a_key_and_values() -> None:
    assert parse_sweep("privacy.epsilon=1,3,inf") == Sweep("privacy.epsilon", ("1", "3", "inf"))
