"""Four institutions and a coordinator as real processes on loopback, set up and run by the commands a person types."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.records import write_records
from common.adapters import load_adapter
from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.models import find_base
from common.randomness import seeded
from common.records import TextRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

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
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        base = find_base(manifest.model)
        pins = {"weights_sha256": base.weights_sha256, "tokenizer_sha256": base.tokenizer_sha256}
        self.manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update=pins)})
        (folder / "federation.toml").write_text(annotated(self.manifest))

    def type(self, *words: object, fails: bool = False, timeout: float = LONGEST) -> str:
        """A `coadapt` command in a process of its own; what it printed."""
        code = "import sys; from simulations.commands import main; sys.argv[0] = 'coadapt'; main()"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *map(str, words)],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            timeout=timeout,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def enrol(self) -> None:
        """Everything that comes before the processes, in the order of docs/operations.md."""
        port, type_ = free_port(), self.type
        listen = f"127.0.0.1:{port}"
        type_("coordinator", "init", "--home", "c", "--address", listen, "--listen", listen, "--superlink-port", free_port())
        settings = self.coordinator / "coordinator.toml"
        text = settings.read_text()
        for key, value in {"poll_seconds": 0.2, "requests_per_second": 500.0, "phase_seconds": 120.0}.items():
            text = "\n".join(f"{key} = {value}" if line.startswith(f"{key} = ") else line for line in text.splitlines())
        settings.write_text(text + "\n")
        for name in SITES:
            type_(
                *("site", "init", "--home", name, "--name", name, "--train", "records.jsonl", "--population", "patients"),
                *("--units", 120, "--epsilon", 100, "--delta", 1e-3, "--yes"),
            )
            write_records(self.folder / name / "records.jsonl", records(name, 120), Columns())
            type_("site", "enroll", "--home", name, "--into", ".")
            type_("coordinator", "admit", f"{name}.enrolment.json", "--home", "c", "--yes")
        type_("coordinator", "roster", "federation.toml", "--home", "c")
        for name in SITES:
            type_("site", "join", "c/invitation.json", "--home", name, "--yes", "--into", ".")
        type_("coordinator", "consent", *(f"{name}.consent.json" for name in SITES), "--home", "c")
        for name in SITES:
            assert "joined" in type_("site", "join", "c/invitation.json", "--home", name)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Coordinator and sites started as a person would; all stopped at the end."""
        try:
            self.type("coordinator", "start", "--home", "c")
            for name in SITES:
                self.type("site", "start", "--home", name)
            yield
        finally:
            for name in SITES:
                self.type("site", "stop", "--home", name)
            self.type("coordinator", "stop", "--home", "c")

    def run(self, *words: object, fails: bool = False) -> str:
        return self.type("run", "--home", "c", *words, fails=fails)

    def summary(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.coordinator / "runs" / run_id / "summary.json").read_bytes())
        return found

    def logs(self) -> str:
        paths = [path for path in self.folder.rglob("*.log") if "runs" not in path.parts]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Path]:
    """A folder with a short path: a Unix socket's may have 103 bytes."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def private(manifest_for: Callable[..., Manifest]) -> Manifest:
    return manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={"rounds": 4, "local_steps": 4, "batch_size": 40, "learning_rate": 0.03, "adam_epsilon": 1e-3},
        privacy={"epsilon": 50.0, "delta": 1e-3, "clip": 1.0},
        secure_sum={"enabled": True, "min_sites": 3},
    )


def test_four_institutions_train_together(short: Path, manifest_for: Callable[..., Manifest]) -> None:
    it = Deployment(short, private(manifest_for))
    it.enrol()
    began = time.monotonic()
    with it.running():
        print(f"started after {time.monotonic() - began:.1f} s")
        printed = it.run("--run-id", "first")
        print(printed)
        print(f"over after {time.monotonic() - began:.1f} s")
    summary = it.summary("first")
    assert summary["status"] == "finished"
    assert summary["first_line"].startswith("The coordinator learned sums over the sites and nothing of a single one.")
    assert [each["answered"] for each in summary["rounds"][1:]] == [sorted(SITES)] * 4
    base = find_base(it.manifest.model)
    model, manifest = load_adapter(it.coordinator / "runs" / "first" / "adapter", base)
    assert manifest.digest() == it.manifest.digest()
