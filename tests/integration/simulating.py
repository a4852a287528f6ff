"""Simulations through the real command, in processes and folders of their own: what their tests share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from peft import PeftModel
from safetensors.numpy import load_file

from common.adapters import get_state
from common.codec.state import AdapterState, state_digest
from common.config.loading import load_manifest
from common.models import find_base, load_task_model
from common.progress import Event, read_events
from common.randomness import seeded
from simulations.commands import main
from simulations.summary import RunSummary

SECRET = "Zanzibar"  # stands in every record, and must be in nothing that a run leaves

LONGEST_RUN = 400  # seconds; about 20 on an idle machine, many times that beside other heavy work


@dataclass(frozen=True)
class World:
    """A folder to work in, and one for temporary files. The latter's path is short: Ray puts sockets there."""

    folder: Path
    temporary: Path

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "FLWR_HOME": str(self.temporary / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `coadapt` as the leader of a session of its own, as a shell does."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("coadapt")), *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self, run_id: str) -> list[Event]:
        path = self.folder / "runs" / run_id / "events.jsonl"
        return list(read_events(path)) if path.exists() else []

    def leftovers(self) -> list[str]:
        return [path.name for path in self.temporary.glob("coadapt*")]


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    rc: int
    out: str
    err: str
    run: Path

    @property
    def summary(self) -> RunSummary:
        return RunSummary.model_validate_json((self.run / "summary.json").read_bytes())

    def said_everywhere(self) -> str:
        """All text of the run's folder but the sites' own logs, and what was printed."""
        files = [path for path in self.run.rglob("*") if path.suffix in {".json", ".jsonl", ".html", ".toml"}]
        return "".join([self.out, self.err, *(path.read_text(encoding="utf-8") for path in files)])


def wait_for(process: subprocess.Popen[str], run: Path, seconds: float = LONGEST_RUN) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {seconds} s\n{out}\n{err}")
    return Ended(process.returncode, out, err, run)


def still_there(session: int, seconds: float = 10.0) -> list[str]:
    """Names of the processes of a session that do not end within some seconds."""
    until = time.monotonic() + seconds
    while True:
        names = []
        for process in psutil.process_iter(["pid", "name", "status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    names.append(process.info["name"])
            except ProcessLookupError:
                pass
        if not names or time.monotonic() > until:
            return names
        time.sleep(0.2)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WORDS = {
    "a": ("indemnify", "liability", "damages", "losses", "claims"),
    "b": ("terminate", "notice", "breach", "days", "expiry"),
    "c": ("governing", "law", "court", "state", "courts"),
}

FILL = ("the", "shall", "party", "of", "and", "to", "any", "agreement")

# Nobody sees all three labels, so nobody alone, and no adapter of one site, can tell more than two apart.
SKEW = {"north": "aab", "south": "bbc", "west": "cca"}


def clauses(split: str, count: int, labels: dict[str, str]) -> list[dict[str, Any]]:
    """`count` records of each site, whose label shows in its words."""
    rng, rows = seeded(0, "toy", split), []
    for site, own in labels.items():
        for number in range(count):
            label = own[number % len(own)]
            words = [*rng.choice(WORDS[label], 4), *rng.choice(FILL, 4)]
            text = " ".join([*map(str, rng.permutation(words)), SECRET])
            rows.append({"text": text, "label": label, "unit": f"{SECRET}-{split}-{site}-{number}", "group": site})
    return rows


def write_manifest(folder: Path, base: Path, **tables: Any) -> None:
    values: dict[str, Any] = {
        "version": 1,
        "name": "toy",
        "task": {"kind": "text-classification", "labels": ["a", "b", "c"]},
        "model": {"base": str(base)},
        "data": {"max_length": 16},
        "training": {
            "rounds": 3,
            "local_steps": 4,
            "batch_size": 8,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "precision": "fp32",
        },
        "simulation": {"train": "train.jsonl", "sites": list(SKEW), "partitioner": "natural", "workers": 1},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    (folder / "federation.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


def stored_states(run: Path) -> list[AdapterState]:
    """Adapters of all rounds, after a check that PEFT puts the very tensors into a model of the base."""
    manifest = load_manifest(run / "federation.toml")
    base = find_base(manifest.model)
    states = []
    for folder in sorted((run / "rounds").iterdir()):
        state: AdapterState = load_file(folder / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(load_task_model(base, manifest), folder)
        assert state_digest(get_state(model)) == state_digest(state)
        assert json.loads((folder / "round.json").read_text())["adapter_sha256"] == state_digest(state)
        states.append(state)
    return states


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object that a command prints which ends well."""
    monkeypatch.setattr(sys, "argv", ["coadapt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def sentences(count: int) -> list[dict[str, Any]]:
    rng, rows = seeded(0, "toy sentences"), []
    for number in range(count):
        tokens = [str(word) for word in rng.choice(FILL, 6)]
        tags = ["O"] * 6
        place = int(rng.integers(5))
        tokens[place : place + 2] = [str(rng.choice(WORDS["a"])), "agreement"]
        tags[place : place + 2] = ["B-Harm", "I-Harm"]
        rows.append({"tokens": tokens, "tags": tags, "unit": f"u{number}"})
    return rows


TOKENS = {
    "task": {"kind": "token-classification", "labels": ["Harm"]},
    "simulation": {"sites": ["one", "two", "three"], "partitioner": "iid"},
}

GOOD_ROWS = [{"text": f"text {number}", "label": "abc"[number % 3], "group": "g"} for number in range(30)]

THREE_SITES = {"sites": 3, "partitioner": "iid"}


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and the one line of a command that must end in one."""
    monkeypatch.setattr(sys, "argv", ["coadapt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert SECRET not in printed.err + printed.out
    return int(str(ended.value.code)), printed.err.rstrip()
