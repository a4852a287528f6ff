"""Four institutions and a coordinator, set up and run by the commands that a person types: what they get."""

import contextlib
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from deployment import ROOT, SITES, Deployment, until
from flwr.cli.build import build_fab_from_files

from client.home import SiteHome
from client.node import Node, end_group
from client.site_keys import make_folders, make_keys
from client.vault_client import call_vault
from common.adapters import first_state, load_adapter, set_state
from common.config.manifest import Manifest
from common.evaluation import measure
from common.frames import Answer, Order, open_frame, seal_frame
from common.identity import Identity
from common.models import find_base, load_tokenizer
from common.roster import SignedRoster
from common.tasks.task import make_task
from server.home import CoordinatorHome, load_settings
from server.superlink import Control
from simulations.benchmarks.loopback import records, short_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # supervisors outlive the command that starts them
]


@pytest.fixture(scope="module")
def federation(manifest_for: Callable[..., Manifest]) -> Iterator[Deployment]:
    """Enrolled, started, and stopped at the end; with privacy and secure sums."""
    manifest = manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={
            "rounds": 4,
            "local_steps": 4,
            "batch_size": 40,
            "learning_rate": 0.03,
            "adam_epsilon": 1e-3,
            "head_learning_rate": 0.1,
        },
        privacy={"epsilon": 50.0, "delta": 1e-3, "clip": 1.0},
        secure_sum={"enabled": True, "min_sites": 3},
    )
    with short_folder() as folder:
        it = Deployment(folder, manifest)
        it.enrol()
        with it.running():
            yield it


def test_four_institutions_train_together(federation: Deployment) -> None:
    it = federation
    for name in SITES:
        assert "problem" not in it.type("site", "check", "--home", name)
    printed = it.run("--run-id", "first")
    assert "The coordinator learned sums over the sites and nothing of a single one." in printed
    summary = it.summary("first")
    assert summary["status"] == "finished"
    assert [each["answered"] for each in summary["rounds"][1:]] == [sorted(SITES)] * 4
    # Each site paid for four rounds, once each, and the audit log holds what it was asked.
    for name in SITES:
        assert it.charged(name) == [1, 2, 3, 4]
        decisions = [line.decision for line in it.audit(name)]
        assert "answered" in decisions
        assert "refused" not in decisions
    # A site brings the adapter through the gate; its vault, which runs, goes on with the same audit log.
    it.type("site", "fetch", "first", "--home", "north")
    assert [(line.kind, line.code) for line in it.audit("north")][-1] == ("fetch", "adapter")
    # The adapter loads, and beats the untuned base on records of nobody's.
    base = find_base(it.manifest.model)
    model, manifest = load_adapter(it.site("north").fetched / "first" / "adapter", base)
    assert manifest.digest() == it.manifest.digest()
    task = make_task(manifest, load_tokenizer(base))
    examples = task.encode(records("nobody", 90)).examples
    tuned = measure(model, task, examples, batch_size=90, precision="fp32")
    set_state(model, first_state(model, manifest.training.seed))
    untuned = measure(model, task, examples, batch_size=90, precision="fp32")
    assert tuned["loss_sum"] < 0.9 * untuned["loss_sum"]


def test_a_run_is_not_begun_twice_and_a_finished_one_not_resumed(federation: Deployment) -> None:
    until((federation.coordinator / "runs" / "first" / "adapter").exists)
    assert "exists already" in federation.run("--run-id", "first", fails=True)
    assert "has finished" in federation.run("--resume", "first", fails=True)
    assert "no run other" in federation.run("--resume", "other", fails=True)


def answer_to(it: Deployment, name: str, frame: bytes) -> Answer:
    """What a site's vault says to a frame that reaches its socket."""
    home = it.site(name)
    return open_frame(Answer, home.identity().public, call_vault(home.socket, frame))[0]


def test_an_order_of_another_key_is_refused_and_noted(federation: Deployment) -> None:
    it = federation
    roster = SignedRoster.from_json(it.site("north").roster.read_bytes()).roster
    order = Order(
        federation=roster.federation.hex(),
        epoch=roster.epoch,
        manifest_sha256=it.manifest.digest(),
        run_id="stolen",
        site=roster.site_of(it.site("north").identity().public),
        kind="request",
        sequence=2**62,
    )
    found = answer_to(it, "north", seal_frame(Identity.generate(), order, b"anything"))
    assert (found.kind, found.code) == ("refused", "signature")
    assert it.audit("north")[-1].code == "signature"


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/get-nodes", "/docs", "/health", "/"]
)
def test_nothing_but_the_fleet_is_behind_the_public_port(federation: Deployment, path: str) -> None:
    it = federation
    address = load_settings(CoordinatorHome(it.coordinator)).address
    context = ssl.create_default_context(cafile=str(CoordinatorHome(it.coordinator).authority))
    with httpx.Client(verify=context, base_url=f"https://{address}") as client:
        for method in ("GET", "POST"):
            answer = client.request(method, path, content=b"")
            assert (answer.status_code, answer.content) == (404, b"")


def test_a_node_with_an_unknown_key_is_not_let_in(federation: Deployment) -> None:
    it = federation
    stranger = SiteHome(it.folder / "stranger")
    make_folders(stranger)
    make_keys(stranger)
    for each in ("agreement.json", "coordinator.pem"):
        shutil.copy(it.site("north").relay / each, stranger.relay / each)
    node = Node(stranger)
    environment = {**node.environment(), "PYTHONPATH": str(ROOT)}
    with (it.folder / "stranger.txt").open("wb") as log:  # a pipe would stay open as long as any child of the node's
        process = subprocess.Popen(node.command(), env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: "2004" in (it.folder / "stranger.txt").read_text(), 120)
    finally:
        end_group(process)
    with Control(CoordinatorHome(it.coordinator)) as control:
        assert len(control.nodes()) == len(SITES)


FOREIGN = """
from pathlib import Path
from flwr.{kind} import {app}
Path({file!r}).write_text("ran")
app = {app}()
"""
FOREIGN_SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    sent = grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    answers = []
    waiting = set(map(str, sent))
    while waiting:
        time.sleep(0.1)
        for each in grid.pull_messages(list(waiting)):
            waiting.discard(str(each.metadata.reply_to_message_id))
            answers.append(each)
    said = [[each.error.code, each.error.reason] if each.has_error() else [0, ""] for each in answers]
    Path({file!r}).write_text(json.dumps(said))
"""
FOREIGN_PROJECT = """
[project]
name = "foreign"
version = "1"
[tool.flwr.app]
publisher = "other"
[tool.flwr.app.components]
serverapp = "foreign_server:app"
clientapp = "foreign_client:app"
"""


def test_code_that_a_coordinator_ships_runs_at_no_site(federation: Deployment) -> None:
    it = federation
    ran, told = it.folder / "ran", it.folder / "told.json"
    bundle, _ = build_fab_from_files(
        {
            "pyproject.toml": FOREIGN_PROJECT.encode(),
            "foreign_server.py": FOREIGN_SERVER.format(file=str(told)).encode(),
            "foreign_client.py": FOREIGN.format(kind="clientapp", app="ClientApp", file=str(ran)).encode(),
        }
    )
    with Control(CoordinatorHome(it.coordinator)) as control:
        control.start(bundle, {})
        until(told.exists, 120)
    assert json.loads(told.read_text()) == [[2, "app"]] * len(SITES)
    assert not ran.exists()
    for name in SITES:
        (line,) = (line for line in it.audit(name) if line.kind == "app")
        assert (line.decision, line.code, line.payload) == ("refused", "app", hashlib.sha256(bundle).hexdigest())


class Flood(threading.Thread):
    """About a thousand malformed requests a second at the gate, for some seconds."""

    def __init__(self, address: str, seconds: float) -> None:
        super().__init__(daemon=True)
        self.host, port = address.rsplit(":", 1)
        self.port, self.seconds, self.sent = int(port), seconds, 0

    def run(self) -> None:
        bad = b"POST /v1/fleet/%2e%2e/control HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                plain = socket.create_connection((self.host, self.port), timeout=5)
                with context.wrap_socket(plain) as connection:
                    for _ in range(100):  # an answer or an end comes to the first; the rest is noise
                        connection.sendall(bad)
                        self.sent += 1
                    connection.sendall(b"\0\xff garbage\r\n\r\n")


def test_a_site_whose_policy_forbids_it_stays_out_and_a_flood_does_not_stop_a_round(federation: Deployment) -> None:
    it = federation
    it.set(it.folder / "west" / "site.toml", rounds=3)
    it.type("site", "stop", "--home", "west")
    it.type("site", "start", "--home", "west")
    flood = Flood(load_settings(CoordinatorHome(it.coordinator)).address, 10.0)
    flood.start()
    printed = it.run("--run-id", "second")
    flood.join()
    assert flood.sent > 2000
    assert "west refused: training.rounds" in printed.replace("\n", " ")
    summary = it.summary("second")
    assert summary["status"] == "finished"
    assert [each["answered"] for each in summary["rounds"][1:]] == [sorted(set(SITES) - {"west"})] * 4
    assert {each["failed"].get("west") for each in summary["rounds"][1:]} == {"policy"}
    line = it.audit("west")[-1]
    assert (line.decision, line.code) == ("refused", "policy")
    assert "asked 4, allowed 3" in line.reason
