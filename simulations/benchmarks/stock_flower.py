"""Flower as its documentation deploys it, on loopback: TLS, node authentication, and none of Coadapt's launchers.

`flower-superlink`, a `flower-supernode` for each site and `flwr run`, all as installed, with their own waits.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from client.home import SiteHome
from client.node import end_group
from client.site_keys import make_folders, make_keys, node_public
from common.errors import RunError
from common.tls import new_authority, new_server
from simulations.benchmarks import stock_app
from simulations.benchmarks.loopback import ENVIRONMENT, free_port

__all__ = ["StockFlower"]

LOOPBACK = "127.0.0.1"
COMMAND_SECONDS = 240.0
ROUND_SECONDS = 600.0

PROJECT = """
[project]
name = "stock"
version = "1.0.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"
[tool.flwr.app.config]
rounds = 1
sites = 1
values = 1
into = ""
"""
CONNECTION = """
[superlink]
default = "stock"
[superlink.stock]
address = "{address}"
root-certificates = {certificate}
"""


class StockFlower:
    """A SuperLink and `sites` SuperNodes under `folder`.

    Raises:
        RunError: a command of Flower's failed, or a run did not end.
    """

    def __init__(self, folder: Path, *, sites: int) -> None:
        self._folder, self._address = folder, f"{LOOPBACK}:{free_port()}"
        self._registered = False
        self._processes: list[subprocess.Popen[bytes]] = []
        for name in ("app", "home", "empty"):
            (folder / name).mkdir(parents=True)
        authority = new_authority("stock")
        pair = new_server(authority, ["localhost", LOOPBACK])
        for file, data in (("ca.pem", authority.certificate), ("server.pem", pair.certificate)):
            (folder / file).write_bytes(data)
        (folder / "server.key").write_bytes(pair.key)
        (folder / "home" / "config.toml").write_text(
            CONNECTION.format(address=self._address, certificate=json.dumps(str(folder / "ca.pem"))), encoding="utf-8"
        )
        (folder / "app" / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        source = Path(stock_app.__file__).read_text(encoding="utf-8")
        (folder / "app" / "stock_app.py").write_text(source, encoding="utf-8")
        self._nodes = [SiteHome(folder / f"node{number}") for number in range(sites)]
        for node in self._nodes:
            make_folders(node)
            make_keys(node)
            (node.folder / "node.pub").write_text(node_public(node) + "\n", encoding="ascii")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """SuperLink and SuperNodes; all ended at the end."""
        folder = self._folder
        try:
            self._start(
                "superlink",
                *("flower-superlink", "--ssl-ca-certfile", folder / "ca.pem", "--ssl-certfile", folder / "server.pem"),
                *("--ssl-keyfile", folder / "server.key", "--enable-supernode-auth"),
                *("--database", folder / "state.db", "--host", LOOPBACK, "--port", self._address.split(":")[1]),
                "--disable-runtime-dependency-installation",  # nothing can be installed here, and nothing need be
            )
            self._wait_until_open()
            self._register()
            for number, node in enumerate(self._nodes):
                self._start(
                    f"node{number}",
                    *("flower-supernode", "--root-certificates", folder / "ca.pem", "--superlink", self._address),
                    *("--auth-supernode-private-key", node.node_key, "--host", LOOPBACK, "--port", free_port()),
                )
            yield
        finally:
            for process in reversed(self._processes):
                end_group(process)
            self._processes.clear()

    def run(self, rounds: int, values: int) -> list[list[float]]:
        """Run an app of so many rounds over arrays of so many values; see `stock_app.main` for what comes back."""
        into = self._folder / "rounds.json"
        into.unlink(missing_ok=True)
        said = f'rounds={rounds} sites={len(self._nodes)} values={values} into="{into}"'
        self._flwr("run", str(self._folder / "app"), "stock", "-c", said)
        deadline = time.monotonic() + ROUND_SECONDS * (rounds + 1)
        while not into.exists():
            if time.monotonic() > deadline:
                raise RunError(f"Flower's run did not end in time: {self._log('superlink')}")
            for process in self._processes:
                if process.poll() is not None:
                    raise RunError(f"a process of Flower's ended with {process.returncode}: {self._log('node0')}")
            time.sleep(0.5)
        found: list[list[float]] = json.loads(into.read_bytes())
        return found

    def _wait_until_open(self) -> None:
        host, _, port = self._address.partition(":")
        deadline = time.monotonic() + COMMAND_SECONDS
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=2).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RunError(f"Flower's SuperLink does not come up: {self._log('superlink')}") from error
                time.sleep(0.5)

    def _register(self) -> None:
        """Let the nodes in, once; the SuperLink keeps them in its database."""
        for node in () if self._registered else self._nodes:
            self._flwr("supernode", "register", str(node.folder / "node.pub"), "stock")
        self._registered = True

    def _flwr(self, *words: str) -> None:
        done = subprocess.run(
            [_installed("flwr"), *words],
            env=self._environment("home"),
            cwd=self._folder / "empty",
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())
            raise RunError(f"`flwr {' '.join(words)}` failed: {said[-500:]}")

    def _start(self, name: str, command: str, *words: object) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [_installed(command), *map(str, words)],
                    env=self._environment(name),
                    cwd=self._folder / "empty",  # Flower's workers look for modules there first
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _environment(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            **ENVIRONMENT,
            "FLWR_HOME": str(self._folder / "home" if name == "home" else self._folder / f"{name}.home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # Flower finds its own commands by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def _log(self, name: str) -> str:
        text = (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return text[-500:].replace("\n", " ")


def _installed(command: str) -> str:
    return str(Path(sys.executable).with_name(command))
