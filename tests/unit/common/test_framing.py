"""Whatever a program prints comes out as JSON lines; what may quote a record stays in a file of the site's own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.framing import MOST_TEXT, Framer, framed
from common.log_lines import json_line
from common.supervise import Program, launch, stop

TALKER = (
    "import os, sys; print('to out'); print('Traceback: Jane Doe', file=sys.stderr);"
    "os.write(1, b'\\xff\\x00 odd\\n' + b'x' * 5000 + b'\\n'); os.write(2, b'no end'); sys.exit(7)"
)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def run(program: Program) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(program.command, capture_output=True, text=True, timeout=60, check=False)


def test_every_line_is_framed_and_the_status_is_the_programs_own() -> None:
    found = run(framed(Program(name="relay", command=(sys.executable, "-uc", TALKER))))
    assert (found.returncode, found.stdout) == (7, "")
    lines = lines_of(found.stderr)
    assert {(line["process"], line["event"]) for line in lines} == {("relay", "output")}
    texts = [line["text"] for line in lines]
    assert texts == ["to out", "Traceback: Jane Doe", "\ufffd\x00 odd", "x" * MOST_TEXT, "no end"]
    assert [line.get("cut", False) for line in lines] == [False, False, False, True, False]
    assert "\x00" not in found.stderr


def test_what_may_quote_a_record_is_kept_in_a_file_and_not_printed(tmp_path: Path) -> None:
    private = tmp_path / "log" / "vault.log"
    own = json_line("vault", "ready", socket="s")
    code = f"{TALKER.replace('sys.exit(7)', '')}\nprint(); print({own!r})"
    found = run(framed(Program(name="vault", command=(sys.executable, "-uc", code)), private=private))
    assert found.returncode == 0
    assert "Jane" not in found.stderr
    assert "Jane Doe" in private.read_text(errors="replace")
    assert private.stat().st_mode & 0o777 == 0o600
    lines = lines_of(found.stderr)
    assert [line for line in lines if line["event"] == "ready"] == [json.loads(own)]
    kept = [line for line in lines if line["event"] == "output"]
    assert sum(line["lines"] for line in kept) == len(private.read_bytes().splitlines()) == 5
    assert {line["kept_in"] for line in kept} == {str(private)}


def test_a_program_that_is_killed_ends_its_frame_with_the_status_of_a_shell() -> None:
    found = run(framed(Program(name="one", command=(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))))
    assert found.returncode == 128 + signal.SIGKILL


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 40))
def test_how_the_text_is_cut_into_pieces_changes_nothing(texts: list[bytes], size: int) -> None:
    data = b"\n".join(texts)
    framer, found = Framer("one"), list[str]()
    for start in range(0, len(data), size):
        found += framer.feed(data[start : start + size])
    found += framer.end()
    whole = [line.decode("utf-8", "replace").rstrip() for line in data.split(b"\n")]
    assert [line["text"] for line in lines_of("\n".join(found))] == [line for line in whole if line]


def test_the_supervisor_and_its_programs_log_json(tmp_path: Path) -> None:
    code = "import time; print('hello', flush=True); time.sleep(1000)"
    folder, logs = tmp_path / "run", tmp_path / "log"
    launch([framed(Program(name="one", command=(sys.executable, "-c", code)))], folder, logs, log_json=True)
    try:
        deadline = time.monotonic() + 20
        while not (logs / "one.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (line,) = lines_of((logs / "one.log").read_text())
        assert line["text"] == "hello"
        os.kill(json.loads((folder / "one.pid").read_text())["pid"], signal.SIGKILL)
        while not (logs / "supervisor.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (line,) = lines_of((logs / "supervisor.log").read_text())
        assert (line["process"], line["event"], line["program"], line["status"]) == ("supervisor", "ended", "one", -9)
        assert "again_in" in line
    finally:
        assert stop(folder)


@pytest.mark.parametrize("text", ["a" * 9000, "\U0001f600" * 9000, "\x00" * 9000, '"' * 1499])
def test_a_line_is_short_enough_for_syslog(text: str) -> None:
    (line,) = Framer("one").feed(text.encode() + b"\n")
    assert len(line.encode()) < 2048
    found = json.loads(line)
    assert text.startswith(found["text"])
    assert found["cut"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"time": 1}', "null"])
def test_what_only_looks_like_a_line_is_framed(text: str) -> None:
    (line,) = Framer("one").feed(text.encode() + b"\n")
    assert json.loads(line)["text"] == text
