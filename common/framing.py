"""The frame that puts whatever a program prints into JSON lines (`common/log_lines.py`), fit for syslog.

    python -P -m common.framing NAME [--private FILE] -- COMMAND...

runs a command and prints a JSON line for each line that it prints: {"time", "process", "event", ...}. What is such a
line already passes as it is. With `--private` the text of any other line goes to FILE alone, and the JSON says only
that there was some: a vault's traceback may quote a record, and what is fit for syslog may travel.

It ends when the command ends, with its status. Signals come to the whole group (from our supervisor, and from systemd
with KillMode=control-group), so none is passed on, but by the first process of a container, to which alone they come.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.log_lines import json_line
from common.supervise import Program, module_command

__all__ = ["Framer", "framed", "main"]

# RFC 5424 asks receivers of syslog to take 2,048 bytes and lets them cut what is longer.
MOST_TEXT = 1500
# More of one line than this is not kept while its end is waited for.
MOST_LINE_BYTES = 1 << 20
LAST_WORDS_SECONDS = 1.0


def framed(program: Program, *, private: Path | None = None) -> Program:
    """The program, run in the frame."""
    option = () if private is None else ("--private", str(private))
    return replace(program, command=module_command("common.framing", program.name, *option, "--", *program.command))


class Framer:
    """Puts lines into JSON, piece by piece as they are read."""

    def __init__(self, process: str, private: Path | None = None) -> None:
        self._process, self._private, self._rest = process, private, b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The JSON lines of what was read; an unfinished line waits for its end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MOST_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        yield from self._framed(lines)

    def end(self) -> Iterator[str]:
        """What is left, where the last line has no end."""
        lines, self._rest = [self._rest], b""
        yield from self._framed(lines)

    def _framed(self, lines: Sequence[bytes]) -> Iterator[str]:
        kept = 0
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if not text:
                continue
            if _is_ours(text):
                yield text
            elif self._private is not None:
                kept += _keep(self._private, line)
            else:
                shown = _shortened(text)
                cut = {"cut": True} if shown != text else {}
                yield json_line(self._process, "output", text=shown, **cut)
        if kept:
            yield json_line(self._process, "output", lines=kept, kept_in=str(self._private))


def _shortened(text: str) -> str:
    """The text, or its beginning, in at most MOST_TEXT bytes of JSON, where a letter takes up to twelve."""
    shown = text[:MOST_TEXT]
    return shown if len(json.dumps(shown)) <= MOST_TEXT + 2 else shown[: MOST_TEXT // 12]


def _is_ours(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and {"time", "process", "event"} <= found.keys()


def _keep(path: Path, line: bytes) -> int:
    """Append a line to a file that its owner alone may read; what cannot be written is lost, the process is not."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            file.write(line + b"\n")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in the frame; the status is the command's, as a shell gives it."""
    parser = argparse.ArgumentParser(prog="python -m common.framing", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the process's name in each line")
    parser.add_argument("--private", type=Path, help="file for the text of lines that are no JSON")
    parser.add_argument("command", nargs="+", help="the command and its words, after --")
    chosen = parser.parse_args(arguments)
    framer = Framer(chosen.name, chosen.private)
    pipe, end = os.pipe()
    child = subprocess.Popen(chosen.command, stdin=subprocess.DEVNULL, stdout=end, stderr=end)
    os.close(end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number) if os.getpid() == 1 else None)
    reader = threading.Thread(target=_read, args=(pipe, framer), daemon=True)
    reader.start()
    status = child.wait()
    # Whatever the command has started may hold the pipe for ever; nobody waits for it.
    reader.join(LAST_WORDS_SECONDS)
    sys.stderr.flush()
    return status if status >= 0 else 128 - status


def _read(pipe: int, framer: Framer) -> None:
    while data := os.read(pipe, 1 << 16):
        _print(framer.feed(data))
    _print(framer.end())


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
