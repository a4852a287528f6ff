"""A federation of real processes on loopback: four sites and a coordinator, and what can be killed of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from client.audit_log import AuditLine, read_audit
from client.home import SiteHome
from client.ledger import Ledger
from common.config.manifest import Manifest
from common.errors import RunError
from common.progress import Event, read_events
from common.supervise import states
from simulations.benchmarks.loopback import ENVIRONMENT, Loopback

ROOT = Path(__file__).parents[2]
SITES = ("north", "south", "east", "west")
LONGEST = 400  # seconds; a run of four rounds takes about a minute on an idle machine


class Deployment(Loopback):
    """Four sites, and a coordinator that asks often and gives up early."""

    def __init__(self, folder: Path, manifest: Manifest, **policy: Any) -> None:
        settings = {"poll_seconds": 0.2, "requests_per_second": 500.0, "phase_seconds": 120.0}
        super().__init__(folder, manifest, sites=SITES, settings=settings, policy=policy)

    def type(self, *words: object, fails: bool = False) -> str:
        try:
            return super().type(*words, fails=fails)
        except RunError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def begin(self, *words: object) -> "subprocess.Popen[str]":
        """`coadapt run` in the background."""
        code = "from simulations.commands import main; main()"
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, "run", "--home", "c", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            cwd=self.folder,
        )

    def logs(self) -> str:
        paths = [path for path in self.folder.rglob("*.log") if "runs" not in path.parts]
        return "\n".join(f"== {path}\n{_worth_reading(path.read_text(errors='replace'))}" for path in sorted(paths))

    def site(self, name: str) -> SiteHome:
        return SiteHome(self.folder / name)

    def audit(self, name: str) -> list[AuditLine]:
        return list(read_audit(self.site(name).audit))

    def charged(self, name: str) -> list[int]:
        return [entry.charge.round for entry in Ledger(self.folder / name / "ledger").entries()]

    def events(self, run_id: str) -> list[Event]:
        path = self.coordinator / "runs" / run_id / "events.jsonl"
        return list(read_events(path)) if path.exists() else []

    def adapter(self, run_id: str) -> bytes:
        return (self.coordinator / "runs" / run_id / "adapter" / "adapter_model.safetensors").read_bytes()

    # What can be killed.

    def process(self, place: Path, name: str) -> psutil.Process:
        """A supervised process by its name."""
        (state,) = (each for each in states(place) if each.name == name)
        return psutil.Process(state.pid)

    def vault(self, name: str) -> psutil.Process:
        return self.process(self.folder / name / "run", "vault")

    def supernode(self, name: str) -> psutil.Process:
        """Flower's node, which the relay's process keeps running."""
        return self.process(self.folder / name / "run", "relay").children()[0]

    def superlink(self) -> psutil.Process:
        return self.process(self.coordinator / "run", "superlink")

    def app(self) -> psutil.Process:
        """The coordinator's app, which Flower started."""
        found = [
            each for each in self.superlink().children(recursive=True) if "flwr-serverapp" in " ".join(each.cmdline())
        ]
        return found[0]

    def everything(self) -> list[psutil.Process]:
        """Every process of the federation, supervisors first."""
        folder = str(self.folder)
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.pid != os.getpid() and (
                    folder in " ".join(each.cmdline()) or folder in each.environ().get("FLWR_HOME", "")
                ):
                    found.append(each)
        return found


def _worth_reading(log: str) -> str:
    """The end of a log without the lines that come with every message."""
    lines = [line for line in log.splitlines() if "INFO" not in line]
    return "\n".join(lines)[-4000:]


def kill(*processes: psutil.Process) -> None:
    """kill -9."""
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


def until(what: Callable[[], object], seconds: float = LONGEST) -> None:
    """Wait for something to be true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
