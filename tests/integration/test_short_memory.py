"""Memory that runs out in the middle of a private run: the run ends well, and its privacy is that of any other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client.ledger import Ledger
from common.progress import BatchHalved, SiteFailed, SlotClosed, read_events
from simulations.devices import EMULATED
from simulations.summary import RunSummary
from tests.integration.simulating import LONGEST_RUN, World, clauses, write_manifest, write_rows

pytestmark = pytest.mark.slow

ROUNDS, STEPS = 2, 4

# So little that the footprint is measured; nothing keeps the workers below it, and the report says what it is.
DEVICE = "emulated GPU 0 (2.2 GiB)"

# North never has memory for more than eight records at once. South has too little in its first three passes: for what
# its worker would take, for the half of it, and once more when it is asked again. West always has enough.
SCARCE = """
import sys, time
from pathlib import Path

import torch

from common.flower import quiet
from common.config.loading import load_manifest
from common.tasks.text_classification import TextClassification
from simulations.app import client
from simulations.engine import Run
from simulations.starting import start_flower

LOSSES = TextClassification.losses


class Scarce:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, message, context):
        site = message.content.config_records["notes"]["site"]
        here = Path(self.folder)

        def losses(task, output, batch):
            records = len(batch.targets)
            if torch.is_grad_enabled() and site == "north" and records > 8:
                raise torch.OutOfMemoryError("injected")
            if torch.is_grad_enabled() and site == "south" and records > 3 and len(list(here.glob("south-*"))) < 3:
                (here / f"south-{time.time_ns()}").touch()
                raise torch.OutOfMemoryError("injected")
            return LOSSES(task, output, batch)

        TextClassification.losses = losses
        try:
            return client(message, context)
        finally:
            TextClassification.losses = LOSSES


if __name__ == "__main__":
    quiet()
    here = Path.cwd()
    run = Run.prepare(load_manifest(here / "federation.toml"), [here], began=time.monotonic(), baselines=False)
    with run.folder(here / "runs", "r", None):
        start_flower(run, Scarce(str(here)))
        run.finish()
"""


@pytest.fixture(scope="module")
def ended(new_world: Callable[[], World], encoder: Path) -> Path:
    """The folder of the run."""
    world = new_world()
    write_rows(world.folder / "train.jsonl", clauses("train", 40, {"north": "abc", "south": "abc", "west": "abc"}))
    write_manifest(
        world.folder,
        encoder,
        training={"rounds": ROUNDS, "local_steps": STEPS, "batch_size": 16},
        privacy={"epsilon": 8.0, "delta": 1e-3},
        evaluation={"holdout": 0.0},
        simulation={"sites": ["north", "south", "west"], "workers": 2},
    )
    (world.folder / "scarce.py").write_text(SCARCE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "scarce.py"],
        cwd=world.folder,
        env={**world.environment(), EMULATED: "2.2"},
        capture_output=True,
        text=True,
        timeout=LONGEST_RUN,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return world.folder / "runs" / "r"


def test_the_run_ends_well_with_the_privacy_of_any_other(ended: Path) -> None:
    summary = RunSummary.model_validate_json((ended / "summary.json").read_bytes())
    assert summary.status == "finished"
    assert not [event for event in read_events(ended / "events.jsonl") if isinstance(event, SiteFailed)]
    assert [each.answered for each in summary.rounds[1:]] == [3] * ROUNDS
    facts = summary.privacy
    assert facts is not None
    assert {(site.steps, site.epsilon) for site in facts.sites} == {(ROUNDS * STEPS, facts.sites[0].epsilon)}
    for folder in (ended / "ledgers").iterdir():  # the round that was trained twice is charged once
        assert [entry.charge.round for entry in Ledger(folder, simulated=True).entries()] == [1, 2]


def test_what_happened_to_memory_is_told(ended: Path) -> None:
    events = list(read_events(ended / "events.jsonl"))
    closed = [event for event in events if isinstance(event, SlotClosed)]
    assert [(event.round, event.site, event.device, event.left) for event in closed] == [(1, "south", DEVICE, 1)]
    halved = [event for event in events if isinstance(event, BatchHalved)]
    assert {event.site for event in halved} <= {"north", "south"}
    assert "south" in {event.site for event in halved}
    summary = RunSummary.model_validate_json((ended / "summary.json").read_bytes())
    assert summary.memory is not None
    assert [each.left for each in summary.memory.closed_slots] == [1]
    assert len(summary.memory.halvings) == len(halved)
    page = (ended / "report.html").read_text(encoding="utf-8")
    assert "Memory ran out." in page
    assert f"at most 1 worker at once on {DEVICE} from then on" in page


def test_the_plan_stands_beside_what_was_used(ended: Path) -> None:
    summary = RunSummary.model_validate_json((ended / "summary.json").read_bytes())
    assert summary.memory is not None
    (device,) = summary.memory.devices
    assert (device.name, device.workers, device.records, device.emulated) == (DEVICE, 2, 16, True)
    assert summary.memory.measured
    assert device.used is not None
    assert device.planned == pytest.approx(device.used, rel=0.15)
