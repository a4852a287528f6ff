"""A study goes on where it ended, never takes a result for another cell's, and keeps its time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, RunError
from simulations.studies import aggregation
from simulations.studies.aggregation import METHODS, SEEDS, cells_of_the_study, manifest_of, markdown
from simulations.studies.cells import Cell, finished, run_cells

CELLS = [Cell(f"cell {number}", "kind", f"digest {number}") for number in range(4)]


class Clock:
    """Each cell takes ten seconds."""

    def __init__(self) -> None:
        self.now, self.worked, self.told = 0.0, list[str](), list[str]()

    def work(self, cell: Cell) -> Mapping[str, Any]:
        self.now += 10.0
        self.worked.append(cell.name)
        return {"status": "finished", "value": len(self.worked)}

    def run(self, path: Path, seconds: float = 1000.0, cells: list[Cell] = CELLS, work: Any = None) -> dict[str, Any]:
        return run_cells(cells, path, work or self.work, seconds=seconds, tell=self.told.append, clock=lambda: self.now)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_cell_is_written_at_once_and_never_done_again(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "new" / "results.jsonl"

    def looks(cell: Cell) -> Mapping[str, Any]:
        assert len(rows(path) if path.exists() else []) == len(clock.worked)
        return clock.work(cell)

    done = clock.run(path, work=looks)
    assert [row["cell"] for row in rows(path)] == [cell.name for cell in CELLS]
    assert {name: row["value"] for name, row in done.items()} == {f"cell {n}": n + 1 for n in range(4)}
    assert [row["seconds"] for row in rows(path)] == [10.0] * 4
    again = Clock()
    assert again.run(path) == done
    assert again.worked == []


def test_no_cell_is_begun_that_would_end_too_late(tmp_path: Path) -> None:
    # Nothing is known of the first; the second ends at 20; the third would end at 30.
    clock = Clock()
    assert set(clock.run(tmp_path / "r", seconds=25.0)) == {"cell 0", "cell 1"}
    assert clock.told[-2:] == ["cell 2: no time left in this call", "cell 3: no time left in this call"]
    later = Clock()
    assert set(later.run(tmp_path / "r", seconds=25.0)) == {cell.name for cell in CELLS}
    assert later.worked == ["cell 2", "cell 3"]
    # How long one takes is known from the file too.
    more = Clock()
    more.run(tmp_path / "r", seconds=5.0, cells=[*CELLS, Cell("cell 4", "kind", "d")])
    assert more.worked == []
    more.run(tmp_path / "r", seconds=5.0, cells=[Cell("cell 5", "another kind", "d")])
    assert more.worked == ["cell 5"]


def test_results_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    clock = Clock()
    clock.run(tmp_path / "r", cells=CELLS[:1])
    other = Cell("cell 0", "kind", "another digest")
    assert finished(tmp_path / "r", [other]) == {}
    clock.run(tmp_path / "r", cells=[other])
    assert clock.worked == ["cell 0", "cell 0"]


def test_a_failed_cell_is_noted_and_tried_again(tmp_path: Path) -> None:
    clock = Clock()

    def fails(cell: Cell) -> Mapping[str, Any]:
        if cell.name == "cell 1":
            raise DataError("no file")
        return clock.work(cell)

    assert set(clock.run(tmp_path / "r", work=fails)) == {"cell 0", "cell 2", "cell 3"}
    assert [(row["status"], row.get("reason")) for row in rows(tmp_path / "r")][1] == ("failed", "no file")
    clock.run(tmp_path / "r")
    assert clock.worked[-1] == "cell 1"
    assert set(finished(tmp_path / "r", CELLS)) == {cell.name for cell in CELLS}


def test_an_interrupted_cell_ends_the_call_and_leaves_nothing(tmp_path: Path) -> None:
    clock = Clock()
    clock.run(tmp_path / "r", work=lambda cell: {**clock.work(cell), "status": "interrupted"})
    assert clock.worked == ["cell 0"]
    assert not (tmp_path / "r").exists()


def test_a_line_that_a_crash_cut_is_done_again_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r"
    Clock().run(path, cells=CELLS[:2])
    path.write_bytes(path.read_bytes()[:-9])
    assert set(finished(path, CELLS)) == {"cell 0"}
    clock = Clock()
    clock.run(path)
    assert clock.worked == ["cell 1", "cell 2", "cell 3"]
    assert [row["cell"] for row in rows(path)] == [cell.name for cell in CELLS]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("notes\n", "notes", '{"cell": 1}\n', "[1]\n"):
        (tmp_path / "r").write_text(text)
        with pytest.raises(RunError, match="r:1: is no result of a study"):
            Clock().run(tmp_path / "r")
        assert (tmp_path / "r").read_text() == text


def test_the_cells_of_the_aggregation_study() -> None:
    cells = cells_of_the_study()
    assert len(cells) == len({cell.digest for cell in cells}) == 18
    assert [cell.name for cell in cells][:4] == [
        "separate plain seed 0",
        "alternate plain seed 0",
        "ffa plain seed 0",
        "separate private seed 0",
    ]
    for method, private, seed in cells.values():
        manifest = manifest_of(method, private, seed, workers=1)
        assert manifest.aggregation_method == method
        assert (manifest.privacy is not None) == private
        assert manifest.training.seed == seed
        simulation = manifest.simulation
        assert simulation is not None
        assert (simulation.max_records, simulation.dev, simulation.test) == (2000, None, "cuad_clauses.dev.jsonl.gz")
        # The same seed deals the same clauses to the same firms in every cell, and each factor gets as many rounds.
        assert (simulation.seed, simulation.site_names) == (0, tuple(f"site-{n}" for n in range(1, 7)))
        assert (manifest.training.rounds - manifest.training.head_rounds) % 2 == 0


def test_the_table_has_means_with_their_seeds_and_names_what_is_missing() -> None:
    done = {
        f"separate plain seed {seed}": {"accuracy": 0.6 + 0.1 * seed, "macro_f1": 0.5, "loss": 1.0, "bytes_up": 2e6}
        | {"epsilon": None}
        for seed in SEEDS
    }
    done["ffa private seed 1"] = {"accuracy": 0.5, "macro_f1": 0.25, "loss": 2.0, "bytes_up": 1e6, "epsilon": 7.991}
    lines = markdown(done).splitlines()
    assert lines[2] == "| separate | none | 0.700 ± 0.100 | 0.500 ± 0.000 | 1.000 ± 0.000 | 2.0 | 3 of 3 |"
    assert lines[2 + 5] == "| ffa | epsilon 7.991 | 0.500 | 0.250 | 2.000 | 1.0 | 1 of 3 |"
    assert lines[-1].startswith("Unfinished: alternate plain seed 0, ffa plain seed 0, separate private seed 0")
    assert lines[-1].count("seed") == 18 - 4
    everything = dict.fromkeys((cell.name for cell in cells_of_the_study()), done["ffa private seed 1"])
    assert markdown(everything).endswith("All cells are finished.")
    assert len(METHODS) == 3


def test_the_command_goes_on_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(manifest: Any, data: Path) -> dict[str, Any]:
        trained.append((manifest.aggregation_method, manifest.privacy is not None, manifest.training.seed))
        return {"status": "finished", "accuracy": 0.5, "macro_f1": 0.4, "loss": 1.0, "bytes_up": 1000, "epsilon": None}

    monkeypatch.setattr(aggregation, "train", train)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "r"), "--hours", "1"]
    assert aggregation.main([*arguments, "--only", "plain seed 0"]) == 0
    assert trained == [("separate", False, 0), ("alternate", False, 0), ("ffa", False, 0)]
    assert "| 1 of 3 |" in capsys.readouterr().out
    assert aggregation.main(arguments) == 0
    assert len(trained) == len(set(trained)) == 18
    assert capsys.readouterr().out.endswith("All cells are finished.\n")
    assert aggregation.main([*arguments[:2], "--out", str(tmp_path)]) == 1
