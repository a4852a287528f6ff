"""Documents that are made from the code say what the code says."""

import json
import re
from pathlib import Path

import pytest

from common.config.loading import load_manifest
from server.aggregation.methods import BUILT_IN
from simulations.contracts import FIRMS, LABELS
from simulations.summary import RunSummary

ROOT = Path(__file__).resolve().parents[3]
SCENARIOS = sorted((ROOT / "simulations" / "scenarios").glob("*.toml"))


def test_the_schema_of_summaries_is_up_to_date() -> None:
    # To renew it: python tests/unit/docs/test_documents.py
    written = json.loads((ROOT / "docs" / "summary.schema.json").read_text(encoding="utf-8"))

    assert written == RunSummary.model_json_schema()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_is_a_valid_manifest(path: Path) -> None:
    assert load_manifest(path).simulation is not None
    private = load_manifest(path, ["privacy.epsilon=8"])
    assert private.privacy is not None
    assert private.privacy.epsilon == 8


def test_there_are_the_scenarios_of_the_readme() -> None:
    assert {path.stem for path in SCENARIOS} == {"contracts", "cuad", "ncbi", "medquad"}


def test_the_default_scenario_agrees_with_its_generator() -> None:
    manifest = load_manifest(ROOT / "simulations" / "scenarios" / "contracts.toml")

    assert manifest.task.labels == LABELS
    assert manifest.simulation is not None
    assert manifest.simulation.site_names == FIRMS


def test_the_table_of_aggregation_says_what_the_methods_declare() -> None:
    text = (ROOT / "docs" / "aggregation.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    *built_in, own = rows

    assert [row[0].strip("`") for row in built_in] == [facts.name for facts in BUILT_IN]
    for row, facts in zip(built_in, BUILT_IN, strict=True):
        assert row[2] == str(facts.sums)
        assert row[3].startswith("no" if facts.exact.startswith("no") else "yes" if facts.exact[0] == "y" else row[3])
        assert row[4] == ("yes" if facts.mixed_ranks else "no")
    assert (own[0], own[2]) == ("`module:function`", "each site's own")


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:docs|simulations|common|client|server)/[\w./]+|[A-Z]+\.md)`", text))

    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


if __name__ == "__main__":
    schema = json.dumps(RunSummary.model_json_schema(), indent=2)
    (ROOT / "docs" / "summary.schema.json").write_text(schema + "\n", encoding="utf-8")
