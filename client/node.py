"""Keeps a site's Flower node running: starts it with nothing but our launchers on its path, and again when it ends.

    python -P -m client.node FOLDER      of a site that has joined; it needs FOLDER/relay and nothing else there

Flower refuses a node whose predecessor it has not yet missed (at most 60 s), and the node then ends instead of trying
again: it is started again after waits that grow. HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE of the environment hold.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from client.app import SOCKET
from client.flower_pins import require_known_flower
from client.home import Agreement, SiteHome
from client.launcher import AGREEMENT, agreed_digest
from client.proxy import proxy_settings
from common.durable import write_text
from common.errors import CoadaptError, EnrolmentError, ServiceError

__all__ = ["Node", "end_group", "free_port", "write_launchers"]

LAUNCHERS = {"flwr-clientapp": "clientapp", "flower-superexec": "superexec"}

# Waits in seconds before the next start. Together they are longer than the 60 s in which Flower may refuse a node.
DELAYS = (2.0, 5.0, 10.0, 20.0, 40.0, 65.0)

# A node that ran so long was accepted; what ends it is something new.
ACCEPTED_SECONDS = 60.0
GRACE_SECONDS = 8.0

# What a node may take over from whoever starts it.
KEPT = ("HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR")


def write_launchers(folder: Path) -> Path:
    """Make `folder` hold exactly the two commands that Flower may start; anything else there is removed.

    Raises:
        ServiceError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        for path in folder.iterdir():
            if path.name not in LAUNCHERS:
                path.unlink()
        for name, command in LAUNCHERS.items():
            path = folder / name
            line = f'exec {shlex.quote(sys.executable)} -P -m client.launcher {command} "$@"'
            write_text(path, f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
    except OSError as error:
        raise ServiceError(
            f"{folder} cannot be written: {error.strerror}; the relay needs a folder of its own"
        ) from error
    return folder


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def end_group(process: "subprocess.Popen[bytes]", grace: float = GRACE_SECONDS) -> None:
    """End a process that leads a group, and everything in the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # nothing of the group is left
            break
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


class Node:
    """The node of the site in `home`. `run` returns when `stop` is set.

    Raises:
        EnrolmentError: the site has not joined.
        AppRefused: Flower, or the agreed bundle, is not the one that this version knows.
    """

    def __init__(self, home: SiteHome, *, environment: Mapping[str, str] | None = None) -> None:
        self._home = home
        self._given = os.environ if environment is None else environment
        self.stop = threading.Event()
        self._agreement_file = home.relay.absolute() / "agreement.json"
        try:
            self._agreement = Agreement.model_validate_json(self._agreement_file.read_bytes())
        except (OSError, ValueError) as error:
            raise EnrolmentError(
                f"{self._agreement_file} cannot be used ({type(error).__name__}); `coadapt site join` makes it"
            ) from error
        os.environ[AGREEMENT] = str(self._agreement_file)
        require_known_flower()
        agreed_digest()
        self._folder = home.relay.absolute() / "flower"
        write_launchers(self._folder / "bin")

    def command(self) -> list[str]:
        """How the SuperNode is started."""
        command = [sys.executable, "-P", "-m", "client.launcher", "supernode"]
        command += ["--superlink", self._agreement.address]
        certificate = self._home.certificate.absolute()
        if certificate.exists() and certificate.stat().st_size:
            command += ["--root-certificates", str(certificate)]
        command += ["--auth-supernode-private-key", str(self._home.node_key.absolute())]
        return [*command, "--host", "127.0.0.1", "--port", str(free_port())]

    def environment(self) -> dict[str, str]:
        """All that Flower sees of the environment."""
        kept = {name: self._given[name] for name in KEPT if name in self._given}
        return (
            kept
            | proxy_settings(self._given)
            | {
                "PATH": str(self._folder / "bin"),
                "FLWR_HOME": str(self._folder),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "OMP_NUM_THREADS": "1",
                AGREEMENT: str(self._agreement_file),
                SOCKET: str(self._home.socket.absolute()),
            }
        )

    def run(self) -> None:
        """Start the node, and again whenever it ends, until `stop` is set."""
        ends = 0
        while not self.stop.is_set():
            began = time.monotonic()
            process = subprocess.Popen(
                self.command(),
                cwd=self._folder,
                env=self.environment(),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            try:
                while process.poll() is None and not self.stop.wait(0.1):
                    pass
            finally:
                end_group(process)
            if self.stop.is_set():
                return
            ends = 0 if time.monotonic() - began >= ACCEPTED_SECONDS else ends + 1
            delay = DELAYS[min(ends, len(DELAYS) - 1)]
            print(f"Flower's node ended with {process.returncode}; it starts again in {delay:.0f} s", file=sys.stderr)
            self.stop.wait(delay)


def main(arguments: list[str]) -> int:
    """Run a site's node until SIGTERM or SIGINT."""
    if len(arguments) != 1:
        print("the site's folder is wanted", file=sys.stderr)
        return 64
    try:
        node = Node(SiteHome(Path(arguments[0])))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.stop.set())
        node.run()
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
