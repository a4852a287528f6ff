"""Whole runs in trouble: a site that fails, a person who stops them."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.progress import RoundStarted, RunStopped
from tests.integration.simulating import (
    LONGEST_RUN,
    SECRET,
    World,
    clauses,
    still_there,
    stored_states,
    wait_for,
    write_manifest,
    write_rows,
)

# PEFT asks for a property by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# A metric that counts its calls on records of site west, whose label is c, and fails or sleeps from the second one on.
OWN_METRIC = f"""
import time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def score(predicted, expected):
    if "c" not in expected:
        return 1
    with CALLS.open("a") as calls:
        calls.write("call\\n")
    if len(CALLS.read_text().splitlines()) > 1:
        trouble(expected)
    return 0.5


def fails(expected):
    raise ValueError(f"cannot score {SECRET} of {{expected}}")


def sleeps(expected):
    time.sleep(600)


trouble = """


@pytest.fixture
def troubled(new_world: Callable[[], World], encoder: Path) -> Callable[[str], World]:
    """A world in which site west is in trouble from its second round on."""

    def make(trouble: str) -> World:
        world = new_world()
        labels = {"north": "ab", "south": "ab", "east": "ab", "west": "c"}
        write_rows(world.folder / "train.jsonl", clauses("train", 12, labels))
        write_rows(world.folder / "dev.jsonl", clauses("dev", 4, labels))
        write_rows(world.folder / "test.jsonl", clauses("test", 6, {"north": "ab"}))
        write_manifest(
            world.folder,
            encoder,
            simulation={"dev": "dev.jsonl", "test": "test.jsonl", "sites": list(labels)},
            evaluation={"metrics": ["accuracy", "own_metric_of_test:score"]},
        )
        (world.folder / "own_metric_of_test.py").write_text(OWN_METRIC + trouble + "\n")
        return world

    return make


@pytest.mark.slow
def test_a_site_that_fails_sits_out_and_tells_nobody_why(troubled: Callable[[str], World]) -> None:
    world = troubled("fails")
    ended = wait_for(world.start("simulate", "federation.toml", "--run-id", "odd"), world.folder / "runs" / "odd")
    assert (ended.rc, ended.err) == (0, "")
    summary = ended.summary
    assert [(failure.round, failure.site) for failure in summary.failures] == [(2, "west"), (3, "west")]
    codes = {failure.code for failure in summary.failures}
    assert codes == {"extension"}
    assert [facts.answered for facts in summary.rounds] == [0, 4, 3, 3]
    west = summary.sites[-1]
    assert [loss is None for loss in west.train_loss] == [False, True, True]
    assert "west sat out: extension" in ended.out
    # Where and why stands in the site's own log, and its text nowhere else.
    logs = list((ended.run / "site-logs").iterdir())
    assert len(logs) == 1
    log = logs[0].read_text(encoding="utf-8")
    assert f"ValueError: cannot score {SECRET}" in log
    assert "own_metric_of_test.py" in log
    assert SECRET not in ended.said_everywhere()
    assert "cannot score" not in ended.said_everywhere()
    assert [row.figures["own_metric_of_test:score"] for row in summary.table] == [1.0, 1.0]
    assert world.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
def test_a_wish_to_stop_is_heard_in_the_middle_of_a_long_call(troubled: Callable[[str], World], how: str) -> None:
    world = troubled("sleeps")
    process = world.start("simulate", "federation.toml", "--run-id", "stopped")
    calls, until = world.folder / "calls", time.monotonic() + LONGEST_RUN
    while not (calls.exists() and len(calls.read_text().splitlines()) > 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    rounds = [event.round for event in world.events("stopped") if isinstance(event, RoundStarted)]
    assert rounds == [1, 2]
    pressed = time.monotonic()
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells every process of its group
    else:
        process.terminate()  # as a batch system does before it kills
    ended = wait_for(process, world.folder / "runs" / "stopped", seconds=60)
    assert time.monotonic() - pressed < 40
    assert (ended.rc, ended.err) == (130, "")
    assert "stopped by you; what was finished lies in runs/stopped" in ended.out
    assert "raylet" not in ended.out
    assert still_there(process.pid) == []
    assert world.leftovers() == []
    summary = ended.summary
    assert (summary.status, summary.table) == ("interrupted", [])
    assert [facts.round for facts in summary.rounds] == [0, 1]
    assert len(stored_states(ended.run)) == 2
    assert not (ended.run / "adapter").exists()
    assert (ended.run / "report.html").exists()
    stopped = world.events("stopped")[-1]
    assert isinstance(stopped, RunStopped)
    assert stopped.status == "interrupted"
