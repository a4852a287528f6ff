"""A real SuperLink, and a real SuperNode with our launcher: what a coordinator ships is not run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.home import Agreement, SiteHome
from client.node import end_group, free_port
from common.app_bundle import app_digest
from server.home import CoordinatorHome
from server.superlink import Control, superlink_command, superlink_environment, write_loopback_certificate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

FOREIGN = """
from pathlib import Path
from flwr.{kind} import {name}
Path({file!r}).write_text("ran")
app = {name}()
"""
SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(0.2)
    began = time.monotonic()
    sent = grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    answers = []
    while not answers:
        time.sleep(0.1)
        answers = list(grid.pull_messages(sent))
    said = [[a.error.code, a.error.reason] if a.has_error() else [0, ""] for a in answers]
    Path({file!r}).write_text(json.dumps([said, time.monotonic() - began]))
"""
PYPROJECT = """[project]
name = "foreign"
version = "1"
[tool.flwr.app]
publisher = "other"
[tool.flwr.app.components]
serverapp = "foreign_server:app"
clientapp = "foreign_client:app"
"""


def test_a_foreign_bundle_is_refused_and_none_of_its_code_runs_at_the_site(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_files

    home, site = CoordinatorHome(tmp_path / "coordinator"), SiteHome(tmp_path / "site")
    write_loopback_certificate(home.database.parent)
    port = free_port()
    environment = superlink_environment(home) | {"PYTHONPATH": str(ROOT)}
    folder = home.database.parent
    log = (tmp_path / "superlink.log").open("wb")
    started = [
        subprocess.Popen(
            superlink_command(home, port), cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    ]
    try:
        control = Control(home, port)
        control.wait()
        site.relay.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP384R1())
        private, public = serialization.PrivateFormat.OpenSSH, serialization.PublicFormat.OpenSSH
        site.node_key.write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
        line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, public).decode()
        assert control.register("site", line) == control.register("site", line)
        agreement = Agreement(
            roster_sha256="0" * 64,
            manifest_sha256="0" * 64,
            app_sha256=app_digest(),
            address=f"127.0.0.1:{port}",
            joined="2026-01-01T00:00:00Z",
        )
        (site.relay / "agreement.json").write_text(agreement.model_dump_json())
        site.certificate.write_bytes((folder / "loopback.pem").read_bytes())
        node_log = (tmp_path / "node.log").open("wb")
        started.append(
            subprocess.Popen(
                [sys.executable, "-P", "-m", "client.node", str(site.folder)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=node_log,
                stderr=node_log,
                start_new_session=True,
            )
        )
        ran, told = tmp_path / "ran", tmp_path / "told.json"
        bundle, _ = build_fab_from_files(
            {
                "pyproject.toml": PYPROJECT.encode(),
                "foreign_server.py": SERVER.format(file=str(told)).encode(),
                "foreign_client.py": FOREIGN.format(kind="clientapp", name="ClientApp", file=str(ran)).encode(),
            }
        )
        run = control.submit({}, bundle)
        deadline = time.monotonic() + 60
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        said, seconds = json.loads(told.read_text()), control.status(run)
        assert said[0] == [[2, "app"]], (said, seconds)
        print(f"seconds for a message: {said[1]:.2f}")
        assert not ran.exists()
    finally:
        for process in started[::-1]:
            end_group(process)
