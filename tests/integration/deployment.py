"""A federation of real processes on loopback: four sites and a coordinator, set up by the commands a person types."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner

from client.audit_log import AuditLine, read_audit
from client.home import SiteHome
from client.ledger import Ledger
from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import CoadaptError
from common.models import find_base
from common.progress import Event, read_events
from common.randomness import seeded
from common.records import TextRecord
from common.supervise import states
from simulations.commands import app

ROOT = Path(__file__).parents[2]
SITES = ("north", "south", "east", "west")
WORDS = {
    "a": ("indemnify", "liability", "damages"),
    "b": ("terminate", "notice", "days"),
    "c": ("law", "court", "state"),
}
LONGEST = 400  # seconds; a run of four rounds takes about a minute on an idle machine


def records(name: str, count: int) -> list[TextRecord]:
    """Clauses whose label shows in their words; a record a unit."""
    rng = seeded(0, "clauses", name)
    labels = [("a", "b", "c")[number % 3] for number in range(count)]
    texts = [" ".join(map(str, rng.choice(WORDS[label], 4))) for label in labels]
    return [
        TextRecord(text=text, label=label, unit=f"{name} {number}")
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """Folders and processes of a federation; what is started is stopped at the end."""

    def __init__(self, folder: Path, manifest: Manifest, **policy: Any) -> None:
        self.folder, self.policy = folder, policy
        self.coordinator = folder / "c"
        # One thread a process: four vaults that train with all cores each would be slower by far.
        self.environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        base = find_base(manifest.model)
        pins = {"weights_sha256": base.weights_sha256, "tokenizer_sha256": base.tokenizer_sha256}
        self.manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update=pins)})
        (folder / "federation.toml").write_text(annotated(self.manifest))

    def type(self, *words: object, fails: bool = False) -> str:
        """A `coadapt` command; what it printed. Its errors end as in a terminal: one line and a status."""
        lines: list[str] = []
        with contextlib.chdir(self.folder):
            result = CliRunner().invoke(app, [str(word) for word in words], env=self.environment)
        if isinstance(result.exception, CoadaptError):
            lines.append(f"error: {result.exception}")
        assert (result.exit_code != 0) == fails, f"{words}: {result.output}\n{result.exception!r}\n{self.logs()}"
        return "\n".join([result.output, *lines])

    def enrol(self) -> None:
        """Everything that comes before the processes, in the order of docs/operations.md."""
        port, type_ = free_port(), self.type
        listen = f"127.0.0.1:{port}"
        type_(
            "coordinator",
            "init",
            "--home",
            "c",
            "--address",
            listen,
            "--listen",
            listen,
            "--superlink-port",
            free_port(),
        )
        self.set(
            self.coordinator / "coordinator.toml", poll_seconds=0.2, requests_per_second=500.0, phase_seconds=120.0
        )
        for name in SITES:
            type_(
                *(
                    "site",
                    "init",
                    "--home",
                    name,
                    "--name",
                    name,
                    "--train",
                    "records.jsonl",
                    "--population",
                    "patients",
                ),
                *("--units", 120, "--epsilon", 100, "--delta", 1e-3, "--yes"),
            )
            self.set(self.folder / name / "site.toml", **self.policy)
            write_records(self.folder / name / "records.jsonl", records(name, 120), Columns())
            type_("site", "enroll", "--home", name, "--into", ".")
            type_("coordinator", "admit", f"{name}.enrolment.json", "--home", "c", "--yes")
        type_("coordinator", "roster", "federation.toml", "--home", "c")
        for name in SITES:
            type_("site", "join", "c/invitation.json", "--home", name, "--yes", "--into", ".")
        type_("coordinator", "consent", *(f"{name}.consent.json" for name in SITES), "--home", "c")
        for name in SITES:
            assert "joined" in type_("site", "join", "c/invitation.json", "--home", name)

    @staticmethod
    def set(path: Path, **values: object) -> None:
        """Change settings of an annotated file, as a person with an editor would."""
        lines = path.read_text().splitlines()
        for key, value in values.items():
            (place,) = (n for n, line in enumerate(lines) if line.split("=")[0].strip("# ") == key and "=" in line)
            lines[place] = f"{key} = {json.dumps(value)}"
        path.write_text("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Coordinator and sites started as a person would; all stopped at the end."""
        try:
            self.start()
            yield
        finally:
            self.stop()

    def start(self) -> None:
        self.type("coordinator", "start", "--home", "c")
        for name in SITES:
            self.type("site", "start", "--home", name)

    def stop(self) -> None:
        for name in SITES:
            self.type("site", "stop", "--home", name)
        self.type("coordinator", "stop", "--home", "c")

    def begin(self, *words: object) -> "subprocess.Popen[str]":
        """`coadapt run` in the background."""
        code = "from simulations.commands import main; main()"
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, "run", "--home", "c", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            cwd=self.folder,
        )

    def run(self, *words: object, fails: bool = False) -> str:
        return self.type("run", "--home", "c", *words, fails=fails)

    def summary(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.coordinator / "runs" / run_id / "summary.json").read_bytes())
        return found

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


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's may have 103 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
