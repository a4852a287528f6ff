"""Runs in a folder: what is told of them, what differs between two, and what cleaning deletes and never does."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from watched_run import BEGAN, PRIVATE, a_round, beginning, ending, whole, write

from common.errors import RunError
from simulations.commands import main
from simulations.runs.cleaning import clean, plan
from simulations.runs.facts import facts_of, runs_in, size_of
from simulations.runs.settings import differences

RESULT = {"adapter", "events.jsonl", "federation.toml", "summary.json", "report.html", "compact", "mine.txt", "rounds"}


def made(folder: Path, *, finished: bool = True, rounds: int = 3, **changes: Any) -> Path:
    """A simulated run's folder with what a run leaves, and what a person put there."""
    events = whole(rounds) if finished else [*beginning(rounds), *a_round(1)]
    write(folder, events, **changes)
    for number in range(rounds + 1):
        path = folder / "rounds" / f"{number:04d}"
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    for name in ("journal", "site-logs", "ledgers", "compact", *(["adapter"] if finished else [])):
        (folder / name).mkdir()
        (folder / name / "file").write_bytes(b"y" * 10)
    for name in ("report.html", "mine.txt", "measured.json"):
        (folder / name).write_text("text")
    summary = {"privacy": {"sites": [{"name": "a", "epsilon": 3.25}, {"name": "b", "epsilon": 4.5}]}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["coadapt", "runs", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out + output.err


def test_the_facts_of_a_finished_run(tmp_path: Path) -> None:
    facts = facts_of(made(tmp_path / "one"))
    assert (facts.federation, facts.status, facts.done, facts.rounds, facts.sites) == (
        "city-hospitals",
        "finished",
        3,
        3,
        3,
    )
    assert (facts.began, facts.last) == (BEGAN, BEGAN + 9 + 60 + 4)
    assert (facts.figures, facts.measured) == ({"accuracy": 0.875, "loss": 0.5}, "test")
    assert (facts.allowed, facts.epsilon, facts.failures, facts.bytes) == (8.0, 4.5, 1, 27_000)
    assert facts.size == sum(path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file())


def test_without_a_test_set_the_best_held_out_figures_are_told(tmp_path: Path) -> None:
    events = [*beginning(), *a_round(1), *a_round(2), *a_round(3)]
    facts = facts_of(write(tmp_path / "one", events))
    assert (facts.figures, facts.measured) == ({"accuracy": 0.5, "loss": 1.5}, "held out")
    assert (facts.status, facts.done, facts.epsilon) == ("stopped", 3, None)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_how_a_run_ended_and_that_it_goes_on(tmp_path: Path, status: str) -> None:
    folder = write(tmp_path / "one", [*beginning(), *a_round(1), *ending(1, status, "because")])
    assert (facts_of(folder).status, facts_of(folder).reason) == (status, "because")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert facts_of(folder).status == "running"
    os.close(lock)


def test_a_damaged_run_is_listed_and_a_sweep_is_opened(tmp_path: Path) -> None:
    made(tmp_path / "one")
    made(tmp_path / "one" / "compared")  # the run's own
    made(tmp_path / "sweep-1" / "rank-4")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "events.jsonl").write_bytes(b'\xff\n{"event": "round_finished"}\n')
    (tmp_path / "no-run").mkdir()
    assert {facts.name for facts in runs_in(tmp_path)} == {"one", "sweep-1/rank-4", "broken"}
    with pytest.raises(RunError, match="there is no folder"):
        runs_in(tmp_path / "none")


def test_settings_that_differ(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [], manifest='name = "x"\n[training]\nrounds = 3\nlearning_rate = 0.1\n' + PRIVATE)
    b = write(
        tmp_path / "b", [], manifest='name = "x"\n[training]\nrounds = 4\nlearning_rate = 0.1\n[adapter]\nr = [1]\n'
    )
    assert differences(a, b) == {
        "training.rounds": ("3", "4"),
        "privacy.epsilon": ("8.0", None),
        "privacy.delta": ("1e-05", None),
        "privacy.unit": ('"patient"', None),
        "adapter.r": (None, "[1]"),
    }
    assert differences(a, a) == {}
    (b / "federation.toml").unlink()
    with pytest.raises(RunError, match="settings of this run are not known"):
        differences(a, b)


def test_a_finished_run_keeps_its_result_and_what_is_not_ours(tmp_path: Path) -> None:
    folder = made(tmp_path / "one")
    before = size_of(folder)
    (each,) = plan(tmp_path, runs_in(tmp_path), everything=False)
    assert names(folder) > RESULT  # nothing is deleted by looking
    assert clean(each) == each.size == before - size_of(folder)
    assert names(folder) == RESULT
    assert list((folder / "rounds").iterdir()) == []
    assert facts_of(folder).status == "finished"
    (again,) = plan(tmp_path, runs_in(tmp_path), everything=False)
    assert (again.paths, again.size) == ((), 0)


def test_of_an_unfinished_simulated_run_the_newest_round_stays(tmp_path: Path) -> None:
    folder = made(tmp_path / "one", finished=False)
    (folder / "rounds" / ".0004.part").mkdir()
    (each,) = plan(tmp_path, runs_in(tmp_path), everything=False)
    clean(each)
    assert names(folder / "rounds") == {"0003"}
    assert names(folder) >= {"site-logs", "ledgers", "summary.json", "report.html"}


def test_a_run_that_can_be_resumed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").touch()
    made(tmp_path / "runs" / "open", finished=False)
    made(tmp_path / "runs" / "done")
    plans = {each.facts.name: each for each in plan(tmp_path / "runs", runs_in(tmp_path / "runs"), everything=True)}
    assert (plans["open"].paths, plans["open"].why) == ((), "it can be resumed")
    kept = plan(tmp_path / "runs", [plans["done"].facts], everything=False)[0]
    clean(kept)
    assert names(tmp_path / "runs" / "done") == RESULT | {"ledgers", "site-logs"}  # none of a coordinator's are ours


@pytest.mark.parametrize("everything", [False, True])
def test_a_running_run_is_never_touched(tmp_path: Path, everything: bool) -> None:
    folder = made(tmp_path / "one")
    planned = plan(tmp_path, runs_in(tmp_path), everything=everything)[0]
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (each,) = plan(tmp_path, runs_in(tmp_path), everything=everything)
    assert (each.paths, each.why) == ((), "it runs")
    before = size_of(folder)
    with pytest.raises(RunError, match="in use by a process; nothing of it was deleted"):
        clean(planned)  # it began after the person looked
    os.close(lock)
    assert size_of(folder) == before


def test_a_run_that_went_on_meanwhile_is_not_touched(tmp_path: Path) -> None:
    folder = made(tmp_path / "one")
    (each,) = plan(tmp_path, runs_in(tmp_path), everything=True)
    write(folder, a_round(4))
    with pytest.raises(RunError, match="has gone on since"):
        clean(each)
    assert names(folder) > RESULT


def test_links_lead_nowhere(tmp_path: Path) -> None:
    other = made(tmp_path / "elsewhere" / "two")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "two").symlink_to(other)
    folder = made(tmp_path / "runs" / "one")
    (folder / "rounds" / "0009").symlink_to(other)
    before = {path: path.stat().st_size for path in other.rglob("*")}
    linked, ours = plan(
        tmp_path / "runs", sorted(runs_in(tmp_path / "runs"), key=lambda each: each.name != "two"), everything=True
    )
    assert (linked.paths, linked.why) == ((), "a link; what it leads to is not touched")
    clean(plan(tmp_path / "runs", [ours.facts], everything=False)[0])
    assert {path: path.stat().st_size for path in other.rglob("*")} == before
    assert list((folder / "rounds").iterdir()) == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs" / "one")
    made(tmp_path / "runs" / "[two]", manifest="[training]\nrounds = 9\n", finished=False)

    def ask(*arguments: str) -> tuple[int, str]:
        return command(monkeypatch, capsys, *arguments)

    for arguments in ((), ("runs",), ("list", "runs")):
        status, text = ask(*arguments)
        lines = [line.split() for line in text.splitlines()]
        assert status == 0
        assert lines[0] == ["run", "federation", "began", "status", "rounds", "best", "figure", "epsilon", "size"]
        rows = {line[0]: line for line in lines[1:]}
        assert rows["one"][4:] == [
            "finished",
            "3/3",
            "accuracy",
            "0.875",
            "(test)",
            "4.5",
            "of",
            "8",
            *rows["one"][-2:],
        ]
        assert rows["[two]"][4:9] == ["stopped", "1/3", "accuracy", "0.250", "(held"]
    assert {each["name"] for each in json.loads(ask("--json")[1])["runs"]} == {"one", "[two]"}

    status, text = ask("compare", "one", "[two]")
    assert status == 0
    assert ["training.rounds", "-", "9"] in [line.split() for line in text.splitlines()]
    assert ["accuracy", "0.875", "0.250"] in [line.split() for line in text.splitlines()]
    assert "may be chance" in text
    assert "coadapt compare one [two] DATA" in text
    assert "different records" in text

    before = size_of(tmp_path / "runs")
    status, text = ask("clean", "--run", "one")
    assert "--yes deletes them" in text
    assert "journal, ledgers, measured.json, rounds, site-logs" in text
    assert size_of(tmp_path / "runs") == before
    status, text = ask("clean", "--run", "one", "--yes")
    assert (status, text.splitlines()[-1]) == (0, "deleted 4.0 kB")
    assert size_of(tmp_path / "runs") == before - 4034
    status, text = ask("clean", "--all", "--run", "one", "--yes")
    assert names(tmp_path / "runs") == {"[two]"}
    assert ask("clean", "--run", "one") == (1, "error: there is no run 'one' in runs; `coadapt runs runs` lists them\n")
    assert ask("none") == (1, "error: there is no folder none; name the folder that holds the runs\n")
