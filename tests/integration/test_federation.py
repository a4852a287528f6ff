"""Four institutions and a coordinator, set up and run by the commands that a person types: what they get."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from deployment import ROOT, SITES, Deployment, until
from document import Typed, in_passing, lines, recording, run_elsewhere, shape
from flwr.cli.build import build_fab_from_files
from proxying import Proxy

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
from common.progress import RoundFinished, RoundStarted
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
def typed() -> Iterator[Typed]:
    """Every command that ran in this file so far."""
    with recording() as commands:
        yield commands


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """Every site's way to the coordinator; what the coordinator's own processes say to each other is not for it."""
    with Proxy("clinic", "se cret").up() as it, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", it.url.replace(" ", "%20"))
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there, and nobody must go there
        yield it


@pytest.fixture(scope="module")
def federation(manifest_for: Callable[..., Manifest], typed: Typed, proxy: Proxy) -> Iterator[Deployment]:
    """Enrolled, started, and stopped at the end; with privacy and secure sums, the sites behind a proxy."""
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
        checked = it.type("site", "check", "--home", name)
        assert "problem" not in checked
        assert "through the proxy" in checked
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


def ports_of(it: Deployment, name: str) -> set[int]:
    """Where the connections of a site's node lead to, as the system knows them."""
    found = it.supernode(name).net_connections("tcp")
    return {each.raddr.port for each in found if each.status == psutil.CONN_ESTABLISHED and each.raddr}


def test_sites_reach_the_gate_through_their_proxy_and_nothing_else_does(federation: Deployment, proxy: Proxy) -> None:
    it = federation
    address = load_settings(CoordinatorHome(it.coordinator)).address
    assert len(proxy.asked) >= len(SITES)
    assert set(proxy.asked) == {address}
    assert proxy.refused == []
    gate = int(address.rpartition(":")[2])
    for name in SITES:
        until(lambda name=name: proxy.port in ports_of(it, name), 60)
        assert gate not in ports_of(it, name)
        shown = it.type("site", "status", "--home", name)
        assert f"{address} is connected" in shown
        assert "first, round 4" in shown
        assert "4 rounds paid" in shown
        assert "does not take orders" not in shown


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
    address = load_settings(CoordinatorHome(it.coordinator)).address
    it.set(it.folder / "west" / "site.toml", rounds=3)
    it.type("site", "stop", "--home", "west")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", address.rpartition(":")[0])
        it.type("site", "start", "--home", "west", "--log-json")
    flood = Flood(address, 10.0)
    running = it.begin("--run-id", "second")
    until(lambda: any(isinstance(each, RoundStarted) for each in it.events("second")))
    flood.start()
    # A person stops the run in the midst of it, and goes on with it.
    until(lambda: any(isinstance(each, RoundFinished) for each in it.events("second")))
    it.type("run", "--home", "c", "--stop", "second")
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "coadapt run --resume second" in " ".join(told.split())
    printed = it.run("--resume", "second")
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


def test_no_proxy_is_a_direct_way_and_json_is_all_that_is_logged(federation: Deployment, proxy: Proxy) -> None:
    it = federation
    gate = int(load_settings(CoordinatorHome(it.coordinator)).address.rpartition(":")[2])
    until(lambda: gate in ports_of_all(it, "west"), 60)
    assert proxy.port not in ports_of_all(it, "west")
    folder = it.folder / "west" / "run" / "log"
    for name, least in (("vault", {"policy_breach", "ready"}), ("relay", {"output"})):
        # What was written before the site was started in this way is above.
        text = (folder / f"{name}.log").read_text().splitlines()
        first = next(place for place, line in enumerate(text) if line.startswith('{"time"'))
        found = [json.loads(line) for line in text[first:]]
        assert {line["process"] for line in found} == {name}
        assert least <= {line["event"] for line in found}
    status = json.loads(it.type("site", "status", "--home", "west", "--json"))
    assert (status["vault_answers"], status["connected"]) == ("yes", "yes")
    assert "policy" in {refusal["code"] for refusal in status["refusals"]}


def ports_of_all(it: Deployment, name: str) -> set[int]:
    """As `ports_of`; what frames the relay's lines stands between it and its supervisor."""
    relay = it.process(it.folder / name / "run", "relay")
    found = [each for process in relay.children(recursive=True) for each in process.net_connections("tcp")]
    return {each.raddr.port for each in found if each.status == psutil.CONN_ESTABLISHED and each.raddr}


USERS = ("--vault-user", "65002", "--relay-user", "65001")


def test_every_command_of_the_document_was_run(federation: Deployment, typed: Typed) -> None:
    """The last of this file: runs what was not run yet, ends everything, and holds the document against all of it."""
    it, north, east = federation, ("--home", "north"), ("--home", "east")
    assert "nothing left, nothing was charged" in it.type("site", "preview", *north)
    assert "problem" not in it.type("site", "check", "--offline", *north)
    assert "cap 100" in it.type("site", "ledger", *north)
    assert "answered" in it.type("site", "log", "--last", 20, *north)
    for role, home, count in (("site", "north", 4), ("coordinator", "c", 3)):
        for option in ((), ("--log-json",)):
            into = it.folder / f"services-{role}{len(option)}"
            it.type(role, "service", "--home", home, "--into", into, *option)
            assert len(list(into.iterdir())) == count
    assert json.loads(it.type("coordinator", "status", "--home", "c", "--json"))["run"]["status"] == "finished"
    assert "published" in it.type("coordinator", "publish", "first", "--home", "c")
    for name in SITES:
        assert "stopped" in it.type("site", "stop", "--home", name)
    forbidden = with_two_users(it, *east)
    shell(it)
    it.type("coordinator", "renew", "--home", "c")
    it.type("coordinator", "revoke", "west", "--home", "c", "--yes")
    assert "stopped" in it.type("coordinator", "stop", "--home", "c")
    it.type("coordinator", "start", "--home", "c", "--log-json")
    assert "revoked" not in it.type("coordinator", "status", "--home", "c")
    assert "stopped" in it.type("coordinator", "stop", "--home", "c")
    for name in ("gate", "superlink"):
        text = (it.coordinator / "log" / f"{name}.log").read_text().splitlines()
        first = next(place for place, line in enumerate(text) if line.startswith('{"time"'))
        assert {json.loads(line)["process"] for line in text[first:]} == {name}
    told = ("--name", "clinic", "--train", "records.jsonl", "--population", "patients", "--unit", "patient")
    it.type("site", "init", "--home", "clinic", *told, "--units", 1100, "--epsilon", 10, "--yes")
    base = it.manifest.model.base
    it.type("init", "other.toml", "--name", "other", "--task", "text-classification", "--labels", "a,b", "--base", base)
    ours = {line: shape(line) for line in [*lines(), *in_passing()] if line.startswith("coadapt ")}
    missing = {line for line, wanted in ours.items() if not typed.covers(wanted) and not run_elsewhere(wanted)}
    assert {line for line in missing if not (ours[line][0] in forbidden and "relay_user" in ours[line][1])} == set()


def with_two_users(it: Deployment, *home: str) -> set[str]:
    """Isolate a site and start it as two users; what this machine does not allow, and is named then, comes back.

    Only root may; and a Python that lies in root's own folder is nobody else's to run.
    """
    if os.geteuid() != 0:
        for words in ("isolate", "start"):
            assert "needs root" in it.type("site", words, *home, *USERS, fails=True)
        return {"coadapt site isolate", "coadapt site start"}
    it.type("site", "isolate", *home, *USERS)
    try:
        subprocess.run([sys.executable, "-c", ""], user=65002, group=65001, check=True, cwd="/")
    except PermissionError:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.supervise.LAUNCH_SECONDS", 3.0)
            assert "did not start" in it.type("site", "start", *home, *USERS, fails=True)
        assert "Permission denied" in (it.folder / "east" / "run" / "log" / "supervisor.log").read_text()
        return {"coadapt site start"}
    it.type("site", "start", *home, *USERS)
    users = {name: it.process(it.folder / "east" / "run", name).uids().real for name in ("vault", "relay")}
    assert users == {"vault": 65002, "relay": 65001}
    it.type("site", "stop", *home)
    return set()


def shell(it: Deployment) -> None:
    """The document's other commands: each is known here with the folder that it is typed in, and ends well there."""
    folders = {"tar": ("north", "c"), "openssl": ("c",)}
    for line in lines():
        if line.startswith("coadapt "):
            continue
        place = folders[line.split()[0]]
        home = "c" if "coordinator" in line or len(place) == 1 else "north"
        done = subprocess.run(["bash", "-ec", line], cwd=it.folder / home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if "--list" in line:
            names = done.stdout.splitlines()
            assert "keys/signing.key" in names
            assert any(name.startswith("runs/") for name in names)
