"""A study's cells: each is trained once, its result written at once, and what is finished is skipped the next time.

Results lie in a JSON Lines file, one object a line. A cell is known by its name and by the digest of its manifest, so
that results of other settings are never taken for it. A cell is not begun where it would, by the slowest one of its
kind so far, end after the time limit.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CoadaptError, RunError

__all__ = ["Cell", "Row", "finished", "run_cells"]

Row = dict[str, Any]

# How every line begins: what has no end but begins so is a line that a crash cut.
BEGINNING = b'{"cell": '


@dataclass(frozen=True)
class Cell:
    """A point of a study: its name, its kind (cells of one kind take about as long), and what says which settings."""

    name: str
    kind: str
    digest: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a results file; a last line that was cut by a crash is left out.

    Raises:
        RunError: a line is no result.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; name a file of results, or a new one") from error
    cut = lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _ = row["cell"], row["digest"], row["status"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}:{number}: is no result of a study; name another file") from error
        yield row
    if not (cut.startswith(BEGINNING) or BEGINNING.startswith(cut)):
        raise RunError(f"{path}:{len(lines) + 1}: is no result of a study; name another file")


def finished(path: Path, cells: Sequence[Cell]) -> dict[str, Row]:
    """The finished cells' rows by name; rows of other settings, and failed ones, are left out."""
    wanted = {(cell.name, cell.digest) for cell in cells}
    rows = (row for row in read_rows(path) if row["status"] == "finished")
    return {row["cell"]: row for row in rows if (row["cell"], row["digest"]) in wanted}


def run_cells(
    cells: Sequence[Cell],
    path: Path,
    work: Callable[[Cell], Mapping[str, Any]],
    *,
    seconds: float,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Row]:
    """Do the cells that are not done, in order, while there is time; the finished rows by name.

    `work` gives a cell's figures with "status": "finished", or another word to stop for. A cell that fails is noted
    with its error and tried again the next time.

    Raises:
        RunError: the results file cannot be read or written.
    """
    began, longest = clock(), dict[str, float]()
    done = finished(path, cells)
    for row in done.values():
        longest[row["kind"]] = max(longest.get(row["kind"], 0.0), float(row["seconds"]))
    for cell in cells:
        if cell.name in done:
            continue
        if clock() - began + longest.get(cell.kind, 0.0) >= seconds:
            tell(f"{cell.name}: no time left in this call")
            continue
        tell(f"{cell.name}: begins")
        at = clock()
        try:
            figures = dict(work(cell))
        except CoadaptError as error:
            figures = {"status": "failed", "reason": str(error)}
        row = {"cell": cell.name, "kind": cell.kind, "digest": cell.digest, "seconds": clock() - at, **figures}
        if figures["status"] == "interrupted":
            tell(f"{cell.name}: interrupted, nothing is written")
            break
        _append(path, row)
        tell(f"{cell.name}: {row['status']} after {row['seconds']:.0f} s")
        if row["status"] == "finished":
            done[cell.name] = row
            longest[cell.kind] = max(longest.get(cell.kind, 0.0), row["seconds"])
    return done


def _append(path: Path, row: Row) -> None:
    try:
        data = path.read_bytes() if path.exists() else b""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if data and not data.endswith(b"\n"):  # a crash cut the last line
                file.truncate(data.rfind(b"\n") + 1)
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; the rows before are whole") from error
