"""The site's side of Flower, without Flower's processes: pins, bundles, launchers, and what a node is given."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from client.flower_pins import PINNED, module_digest, require_known_flower
from client.home import SiteHome
from client.launcher import (
    AGREEMENT,
    IDLE_SECONDS,
    MOST_IDLE_SECONDS,
    REPLY_SECONDS,
    Waits,
    _replace,
    admit,
    agreed_digest,
    main,
    woken,
)
from client.node import LAUNCHERS, Node, write_launchers
from common.app_bundle import app_bundle, app_digest
from common.errors import AppRefused, EnrolmentError, ServiceError


def joined(folder: Path, app: str | None = None) -> SiteHome:
    home = SiteHome(folder)
    home.relay.mkdir(parents=True)
    values = {
        "version": 1, "roster_sha256": "a" * 64, "manifest_sha256": "b" * 64, "app_sha256": app or app_digest(),
        "address": "gate.example:9092", "joined": "2026-11-25T12:00:00Z",
    }  # fmt: skip
    (home.relay / "agreement.json").write_text(json.dumps(values))
    return home


def test_flower_is_the_one_that_the_launcher_was_written_for() -> None:
    require_known_flower()


@pytest.mark.parametrize("module", PINNED)
def test_one_changed_module_is_refused(module: str) -> None:
    with pytest.raises(AppRefused, match=f"{module} is not that of flwr"):
        require_known_flower({**PINNED, module: "0" * 64})


def test_a_module_that_is_gone_is_refused() -> None:
    with pytest.raises(AppRefused, match="no module"):
        require_known_flower({"flwr.nothing": "0" * 64})


def test_a_digest_is_that_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_run.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert module_digest("never_run") == hashlib.sha256((tmp_path / "never_run.py").read_bytes()).hexdigest()


def test_the_agreed_bundle_and_no_other_is_admitted() -> None:
    admit(app_bundle(), app_digest())
    for other in (b"", app_bundle() + b"\0", app_bundle()[:-1]):
        with pytest.raises(AppRefused):
            admit(other, app_digest())


def test_an_agreement_to_another_versions_bundle_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = joined(tmp_path, "c" * 64).relay / "agreement.json"
    monkeypatch.setenv(AGREEMENT, str(path))
    with pytest.raises(AppRefused, match="another version's"):
        agreed_digest()
    path.write_text("{}")
    with pytest.raises(EnrolmentError, match="no agreement"):
        agreed_digest()
    monkeypatch.delenv(AGREEMENT)
    with pytest.raises(EnrolmentError, match="no agreement"):
        agreed_digest()


def test_a_name_that_flower_does_not_have_is_not_replaced() -> None:
    with pytest.raises(AppRefused, match="has no nothing"):
        _replace(json, nothing=1)
    assert not hasattr(json, "nothing")
    assert main(["agentapp"]) == 64


def test_the_path_holds_the_launchers_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "flwr-agentapp").write_text("#!/bin/sh\n")
    (folder / "flwr-clientapp").write_text("#!/bin/sh\nexec evil\n")
    write_launchers(folder)
    assert {path.name for path in folder.iterdir()} == set(LAUNCHERS)
    for name, command in LAUNCHERS.items():
        text = (folder / name).read_text()
        assert text.startswith("#!/bin/sh\nexec ")
        assert text.endswith(f' -P -m client.launcher {command} "$@"\n')
        assert (folder / name).stat().st_mode & 0o777 == 0o755
    (folder / "folder").mkdir()
    with pytest.raises(ServiceError, match="cannot be written"):
        write_launchers(folder)


def test_a_node_is_given_nothing_but_what_it_needs(tmp_path: Path) -> None:
    home = joined(tmp_path)
    given = {
        "PATH": "/usr/bin", "HTTPS_PROXY": "http://proxy", "no_proxy": "localhost", "AWS_SECRET_ACCESS_KEY": "secret",
        "LD_PRELOAD": "/tmp/evil.so", "FLWR_HOME": "/elsewhere", "FLWR_TELEMETRY_ENABLED": "1", "HOME": "/home/site",
        "PYTHONSTARTUP": "/tmp/x",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AGREEMENT, "")
        node = Node(home, environment=given)
    found = node.environment()
    assert found["PATH"] == str(home.relay / "flower" / "bin")
    assert found["FLWR_HOME"] == str(home.relay / "flower")
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (found["HTTPS_PROXY"], found["NO_PROXY"], found["HOME"]) == ("http://proxy", "localhost", "/home/site")
    assert not {"AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "PYTHONSTARTUP"} & set(found)
    command = node.command()
    assert command[command.index("--superlink") + 1] == "gate.example:9092"
    assert "--root-certificates" not in command
    home.certificate.parent.mkdir(exist_ok=True)
    home.certificate.write_text("PEM")
    command = node.command()
    assert command[command.index("--root-certificates") + 1] == str(home.certificate.absolute())
    assert "--insecure" not in command


def test_a_site_that_has_not_joined_starts_no_node(tmp_path: Path) -> None:
    with pytest.raises(EnrolmentError, match="coadapt site join"):
        Node(SiteHome(tmp_path))


class Sleeper:
    """A clock that sleeping moves, and what was slept and woken."""

    def __init__(self) -> None:
        self.now, self.slept, self.wakes = 100.0, list[float](), 0

    def rest(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def wake(self) -> None:
        self.wakes += 1

    def waits(self) -> Waits:
        return Waits(self.wake, clock=lambda: self.now, rest=self.rest)


def test_a_node_wakes_its_superexec_once_for_each_message() -> None:
    it = Sleeper()
    waits = it.waits()
    for message in range(1, 4):
        waits.sleep(3)
        assert it.wakes == message - 1
        for _ in range(5):
            waits.sleep(0.5)
        assert it.wakes == message
    assert it.slept.count(REPLY_SECONDS) == 15


def test_a_node_looks_less_often_the_longer_nothing_came() -> None:
    it = Sleeper()
    waits, began = it.waits(), it.now
    while it.now < began + 60:
        since = it.now - began
        waits.sleep(3)
        assert it.slept[-1] == pytest.approx(min(MOST_IDLE_SECONDS, max(IDLE_SECONDS, since / 6)))
    assert it.slept[0] == IDLE_SECONDS
    assert it.slept[-1] == MOST_IDLE_SECONDS
    waits.sleep(0.5)  # a message: it looks often again
    waits.sleep(3)
    assert it.slept[-1] == IDLE_SECONDS


def test_a_written_pipe_ends_the_sleep_and_a_closed_one_leaves_a_plain_one() -> None:
    reads, writes = os.pipe()
    sleep = woken(reads)
    try:
        timer = threading.Timer(0.05, lambda: os.write(writes, b"!!"))
        timer.start()
        began = time.monotonic()
        sleep(30)
        assert time.monotonic() - began < 15
        timer.join()
        began = time.monotonic()
        sleep(0.05)  # both bytes were taken
        assert time.monotonic() - began >= 0.05
    finally:
        os.close(writes)
    sleep(30)  # notices that nobody can write any more
    began = time.monotonic()
    sleep(0.05)
    assert time.monotonic() - began >= 0.05
    os.close(reads)


@pytest.mark.parametrize("module", ["flwr.supernode.start_client_internal", "flwr.supercore.superexec.run_superexec"])
def test_what_sleeps_otherwise_than_flower_is_pinned(module: str) -> None:
    assert module in PINNED
