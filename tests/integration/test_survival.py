"""What is killed comes back: `kill -9` of everything that runs, in turn, while a federation trains.

    make federation

Each scenario begins from the same enrolled folders. Without privacy and with a fixed seed a run whose coordinator was
killed ends with the adapter of an undisturbed one, bit for bit.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment import SITES, Deployment, kill, until

from common.config.manifest import Manifest
from common.progress import RoundFinished, RoundStarted
from simulations.benchmarks.loopback import short_folder

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # supervisors outlive the command that starts them
]

ROUNDS = 3


def manifest_of(manifest_for: Callable[..., Manifest], *, private: bool) -> Manifest:
    return manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={
            "rounds": ROUNDS,
            "local_steps": 40,
            "batch_size": 40,
            "learning_rate": 0.02,
            "adam_epsilon": 1e-3,
            "seed": 5,
        },
        aggregation={"min_sites": 3},
        secure_sum={"enabled": True, "min_sites": 3},
        **({"privacy": {"epsilon": 50.0, "delta": 1e-3, "clip": 1.0}} if private else {}),
    )


class Enrolled:
    """A deployment that can be put back to where enrolment left it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.it, self.kept = Deployment(folder, manifest), folder.with_name(folder.name + "k")
        self.it.enrol()
        shutil.copytree(folder, self.kept, symlinks=True)

    def again(self) -> Deployment:
        shutil.rmtree(self.it.folder)
        shutil.copytree(self.kept, self.it.folder, symlinks=True)
        return self.it


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "private"])
def enrolled(request: pytest.FixtureRequest, manifest_for: Callable[..., Manifest]) -> Iterator[Enrolled]:
    with short_folder() as folder:
        made = Enrolled(folder, manifest_of(manifest_for, private=request.param))
        try:
            yield made
        finally:
            shutil.rmtree(made.kept, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(enrolled: Enrolled) -> bytes:
    it = enrolled.again()
    with it.running():
        it.run("--run-id", "run")
    return it.adapter("run")


def in_round(it: Deployment, number: int, seconds: float) -> None:
    """Wait until a round goes on, and so long in it."""
    until(lambda: any(isinstance(event, RoundStarted) and event.round == number for event in it.events("run")))
    time.sleep(seconds)


def agree(it: Deployment) -> None:
    """Ledgers, round numbers and the run store tell one story."""
    summary = it.summary("run")
    assert summary["status"] == "finished"
    assert [each["number"] for each in summary["rounds"]] == list(range(ROUNDS + 1))
    stored = sorted(path.name for path in (it.coordinator / "runs" / "run" / "rounds").iterdir())
    assert stored == [f"{number:04d}" for number in range(ROUNDS + 1)]
    assert {event.round for event in it.events("run") if isinstance(event, RoundFinished)} == {1, 2, 3}
    for name in SITES:
        if it.manifest.privacy is not None:
            charged = it.charged(name)
            assert charged == sorted(set(charged))  # a round is paid for once
            for each in summary["rounds"][1:]:
                assert name not in each["answered"] or each["number"] in charged
        lines = it.audit(name)  # raises where the chain is broken
        assert lines


@pytest.mark.parametrize("moment", [0.5, 6.0], ids=["early", "late"])
@pytest.mark.parametrize("what", ["app", "superlink"])
def test_the_coordinator_is_killed_and_resumed(
    enrolled: Enrolled, undisturbed: bytes, what: str, moment: float
) -> None:
    it = enrolled.again()
    with it.running():
        going = it.begin("--run-id", "run")
        in_round(it, 2, moment)
        kill(it.app() if what == "app" else it.superlink())
        printed, _ = going.communicate(timeout=120)
        assert going.returncode != 0
        assert "--resume run" in printed or "does not answer" in printed
        it.run("--resume", "run")
    agree(it)
    if it.manifest.privacy is None:
        assert [each["answered"] for each in it.summary("run")["rounds"][1:]] == [sorted(SITES)] * ROUNDS
        assert it.adapter("run") == undisturbed


@pytest.mark.parametrize("what", ["vault", "supernode"])
def test_a_site_is_killed_and_the_run_goes_on(enrolled: Enrolled, what: str) -> None:
    it = enrolled.again()
    with it.running():
        going = it.begin("--run-id", "run")
        in_round(it, 1, 1.0)
        kill(it.vault("south") if what == "vault" else it.supernode("south"))
        printed, _ = going.communicate(timeout=400)
        assert going.returncode == 0, f"{printed}\n{it.logs()}"
    agree(it)
    rounds = it.summary("run")["rounds"][1:]
    assert all(len(each["answered"]) >= 3 for each in rounds)
    assert any("south" in each["answered"] for each in rounds)  # it came back by itself


def test_everything_is_killed_at_once(enrolled: Enrolled) -> None:
    it = enrolled.again()
    try:
        it.start()
        going = it.begin("--run-id", "run")
        in_round(it, 2, 2.0)
        kill(*it.everything())
        going.communicate(timeout=120)
        it.start()
        it.run("--resume", "run")
    finally:
        it.stop()
    agree(it)
