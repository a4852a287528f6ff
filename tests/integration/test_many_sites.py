"""A thousand sites of which ten take part in a round; and a run on a Ray cluster that was there before."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledger import Ledger
from common.config.loading import load_manifest
from common.progress import RoundFinished, RoundStarted, SumOpened
from server.participants import participants
from tests.integration.simulating import LONGEST_RUN, World, clauses, wait_for, write_manifest, write_rows

pytestmark = pytest.mark.slow

SITES, INVITED, ROUNDS, STEPS = 1000, 10, 2, 1


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    temporary = Path(tempfile.mkdtemp(prefix="ca-", dir="/tmp"))
    yield World(tmp_path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def test_of_a_thousand_sites_only_the_invited_train_and_pay(world: World, encoder: Path) -> None:
    write_rows(world.folder / "train.jsonl", clauses("train", 5, dict.fromkeys(map(str, range(SITES)), "abc")))
    write_manifest(
        world.folder,
        encoder,
        training={"rounds": ROUNDS, "local_steps": STEPS, "batch_size": 2, "participants": INVITED},
        privacy={"epsilon": 20.0, "delta": 0.01},
        evaluation={"holdout": 0.0},
        simulation={"sites": SITES, "partitioner": "iid", "test_fraction": 0.0, "workers": 1},
    )
    ended = wait_for(world.start("simulate", "federation.toml", "--run-id", "r"), world.folder / "runs" / "r")
    assert ended.rc == 0, ended.err
    manifest, events = load_manifest(ended.run / "federation.toml"), world.events("r")
    names = [f"site-{number + 1}" for number in range(SITES)]
    invited = [participants(manifest, names, number) for number in range(1, ROUNDS + 1)]
    assert [event.sites for event in events if isinstance(event, RoundStarted)] == invited
    finished = [event for event in events if isinstance(event, RoundFinished)]
    assert [(event.answered, event.failed) for event in finished] == [(INVITED, 0)] * ROUNDS
    assert [set(event.survivors) for event in events if isinstance(event, SumOpened)] == list(map(set, invited))
    # Each site pays for the rounds that it was invited to, and the others have not even a ledger.
    times = Counter(site for each in invited for site in each)
    private = ended.summary.privacy
    assert private is not None
    assert {site.name: site.steps for site in private.sites} == {name: STEPS * times[name] for name in names}
    assert {site.name for site in private.sites if site.epsilon > 0} == set(times)
    ledgers = {f"site-{folder.name}": folder for folder in (ended.run / "ledgers").iterdir()}
    assert set(ledgers) == set(times)
    for name, folder in ledgers.items():
        rounds = Ledger(folder, simulated=True).rounds_of(manifest.digest(), "r")
        assert rounds == [number for number, each in enumerate(invited, start=1) if name in each]
    assert len(ended.summary.sites) == SITES
    assert f"Shown are 20 of {SITES} sites" in (ended.run / "report.html").read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def cluster(world: World) -> Iterator[str]:
    """The address of a Ray cluster in a process group of its own, with its files in a folder of its own."""
    address, log = f"127.0.0.1:{free_port()}", world.temporary / "ray.log"
    with log.open("w", encoding="utf-8") as out:
        ray = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
                *(f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", "--num-cpus=2"),
                *(f"--ray-client-server-port={free_port()}", "--include-dashboard=false"),
                *(f"--temp-dir={world.temporary / 'ray'}", "--object-store-memory=100000000"),
            ],
            env=world.environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + LONGEST_RUN
        while "Ray runtime started" not in log.read_text(encoding="utf-8"):
            assert ray.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(ray.pid, signal.SIGTERM)
        try:
            ray.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)
            ray.wait()


def test_a_run_on_a_cluster_that_was_there_before_gives_the_same(world: World, encoder: Path, cluster: str) -> None:
    write_rows(world.folder / "train.jsonl", clauses("train", 12, {"north": "aab", "south": "bbc", "west": "cca"}))
    write_manifest(world.folder, encoder, training={"rounds": 2}, evaluation={"holdout": 0.0})
    summaries = []
    for run_id, settings in (("there", ["--set", f'simulation.ray_address="{cluster}"']), ("here", [])):
        process = world.start("simulate", "federation.toml", "--run-id", run_id, *settings)
        ended = wait_for(process, world.folder / "runs" / run_id)
        assert ended.rc == 0, ended.err
        summaries.append(ended.summary)
    there, here = summaries
    assert there.machine.workers == 2  # the cluster's processors, where the manifest has one worker
    assert here.machine.workers == 1
    assert [each.train_loss for each in there.rounds] == pytest.approx([each.train_loss for each in here.rounds])
    assert there.table[-1].figures == pytest.approx(here.table[-1].figures)
