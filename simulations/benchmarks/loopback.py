"""A federation of real processes on this machine's loopback, set up by the commands a person types."""

import contextlib
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import CoadaptError, RunError
from common.models import find_base
from common.randomness import seeded
from common.records import TextRecord

__all__ = ["Loopback", "free_port", "records", "short_folder"]

WORDS = {
    "a": ("indemnify", "liability", "damages"),
    "b": ("terminate", "notice", "days"),
    "c": ("law", "court", "state"),
}
UNITS = 120

# One thread a process: vaults that train with all cores each would be slower by far.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


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
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Loopback:
    """Folders and processes of a federation of `sites` and a coordinator; what is started is stopped at the end.

    `settings` are changed in `coordinator.toml`, `policy` in every site's `site.toml`.

    Raises:
        RunError: a command did not end as it should.
        BaseModelError: the manifest's base is not here.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        sites: Sequence[str],
        settings: Mapping[str, object],
        policy: Mapping[str, object],
    ) -> None:
        self.folder, self.sites = folder, tuple(sites)
        self.settings, self.policy = dict(settings), dict(policy)
        self.coordinator = folder / "c"
        base = find_base(manifest.model)
        pins = {"weights_sha256": base.weights_sha256, "tokenizer_sha256": base.tokenizer_sha256}
        self.manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update=pins)})
        (folder / "federation.toml").write_text(annotated(self.manifest), encoding="utf-8")

    def type(self, *words: object, fails: bool = False) -> str:
        """A `coadapt` command; what it printed. Its errors end as in a terminal: one line and a status."""
        from simulations.commands import app

        lines: list[str] = []
        with contextlib.chdir(self.folder):
            result = CliRunner().invoke(app, [str(word) for word in words], env=ENVIRONMENT)
        if isinstance(result.exception, CoadaptError):
            lines.append(f"error: {result.exception}")
        if (result.exit_code != 0) != fails:
            said = " ".join([result.output, repr(result.exception)])
            raise RunError(f"`coadapt {' '.join(map(str, words))}` ended with {result.exit_code}: {said}")
        return "\n".join([result.output, *lines])

    def enrol(self) -> None:
        """Everything that comes before the processes, in the order of docs/operations.md."""
        listen = f"127.0.0.1:{free_port()}"
        self.type(
            *("coordinator", "init", "--home", "c", "--address", listen, "--listen", listen),
            *("--superlink-port", free_port()),
        )
        self.set(self.coordinator / "coordinator.toml", **self.settings)
        for name in self.sites:
            self.type(
                *("site", "init", "--home", name, "--name", name, "--train", "records.jsonl"),
                *("--population", "patients", "--units", UNITS, "--epsilon", 100, "--delta", 1e-3, "--yes"),
            )
            self.set(self.folder / name / "site.toml", **self.policy)
            write_records(self.folder / name / "records.jsonl", records(name, UNITS), Columns())
            self.type("site", "enroll", "--home", name, "--into", ".")
            self.type("coordinator", "admit", f"{name}.enrolment.json", "--home", "c", "--yes")
        self.type("coordinator", "roster", "federation.toml", "--home", "c")
        for name in self.sites:
            self.type("site", "join", "c/invitation.json", "--home", name, "--yes", "--into", ".")
        self.type("coordinator", "consent", *(f"{name}.consent.json" for name in self.sites), "--home", "c")
        for name in self.sites:
            if "joined" not in self.type("site", "join", "c/invitation.json", "--home", name):
                raise RunError(f"{name} did not join")

    @staticmethod
    def set(path: Path, **values: object) -> None:
        """Change settings of an annotated file, as a person with an editor would."""
        lines = path.read_text(encoding="utf-8").splitlines()
        for key, value in values.items():
            (place,) = (n for n, line in enumerate(lines) if line.split("=")[0].strip("# ") == key and "=" in line)
            lines[place] = f"{key} = {json.dumps(value)}"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[None]:
        """Coordinator (with `words` as options) and sites started as a person would; all stopped at the end."""
        try:
            self.start(*words)
            yield
        finally:
            self.stop()

    def start(self, *words: str) -> None:
        """Start all processes."""
        self.type("coordinator", "start", "--home", "c", *words)
        for name in self.sites:
            self.type("site", "start", "--home", name)

    def stop(self) -> None:
        """Stop whatever runs."""
        for name in self.sites:
            self.type("site", "stop", "--home", name)
        self.type("coordinator", "stop", "--home", "c")

    def run(self, *words: object, fails: bool = False) -> str:
        """`coadapt run` to its end."""
        return self.type("run", "--home", "c", *words, fails=fails)

    def summary(self, run_id: str) -> dict[str, Any]:
        """A run's summary."""
        found: dict[str, Any] = json.loads((self.coordinator / "runs" / run_id / "summary.json").read_bytes())
        return found


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path, removed at the end: a Unix socket's may have 103 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
