"""`coadapt init`: an annotated manifest from a few choices, with digests and labels filled in.

Labels come from what a person names, a public list or a public file: nothing that the sides agree on may be derived
from private records.
"""

import contextlib
import json
import sys
from pathlib import Path

import typer

from common.config.annotate import annotated
from common.config.loading import load_manifest
from common.config.manifest import DEFAULT_BASE, METRICS
from common.data_files import read_rows
from common.durable import write_text
from common.errors import DataError, RunError
from simulations.pinning import pinned

__all__ = ["write_manifest"]


def write_manifest(
    path: Path,
    *,
    name: str | None,
    task: str | None,
    labels: str | None,
    labels_from: Path | None,
    base: str | None,
    revision: str | None,
    train: str | None,
    sites: int,
) -> None:
    """Write `path`. What is None is asked for on a terminal, and has a default or is refused elsewhere.

    Raises:
        RunError: the file exists, or something needed is missing and nobody can be asked.
        CoadaptError: the choices make no valid manifest, or the base cannot be found.
    """
    if path.exists():
        raise RunError(f"{path} exists already; remove it or name another file")
    name = name or _ask("Name of the federation", path.parent.resolve().name or "federation")
    task = task or _ask(f"Task ({', '.join(METRICS)})", "text-classification")
    base = base or _ask("Base model (local directory or hub id)", DEFAULT_BASE)
    chosen: list[str] = []
    if task != "causal-lm":
        chosen = _labels(task, labels, labels_from)
    values: dict[str, object] = {
        "version": 1,
        "name": name,
        "task": {"kind": task, "labels": chosen},
        "model": {"base": base, **({"revision": revision} if revision else {})},
    }
    if train:
        values["simulation"] = {"train": train, "sites": sites}
    write_text(path, annotated(pinned(_validated(path, values), pinning=True)))


def _validated(path: Path, values: dict[str, object]):  # type: ignore[no-untyped-def]  # a Manifest
    """The choices as a manifest, checked by the loader itself so that errors read as they always do."""
    import tempfile

    import tomli_w

    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(tomli_w.dumps(values), encoding="utf-8")
        return load_manifest(draft)


def _ask(question: str, default: str) -> str:
    if not sys.stdin.isatty():
        return default
    return str(typer.prompt(question, default=default))


def _labels(task: str, labels: str | None, labels_from: Path | None) -> list[str]:
    if labels is None and labels_from is None:
        if not sys.stdin.isatty():
            raise RunError(f"{task} needs labels: give --labels a,b,c or --labels-from FILE")
        labels = str(typer.prompt("Labels in their order, parted by commas"))
    if labels is not None:
        return [label.strip() for label in labels.split(",") if label.strip()]
    source = Path(str(labels_from))
    if source.suffix == ".txt":
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"{source}: {error.strerror}; give a file with a label a line") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: must be UTF-8 text; save it as UTF-8") from error
        return [line.strip() for line in lines if line.strip()]
    column = "tags" if task == "token-classification" else "label"
    found: set[str] = set()
    for row in read_rows(source):
        if column not in row:
            raise DataError(f"{source}: no column {column!r}; found {', '.join(map(str, row))}")
        if column == "label":
            found.add(str(row[column]))
        else:
            found.update(tag[2:] for tag in _tags(source, row[column]) if tag != "O")
    return sorted(found)


def _tags(source: Path, value: object) -> list[str]:
    if isinstance(value, str):  # CSV has no lists
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise DataError(f"{source}: column 'tags' must hold lists; in CSV write them as JSON")
    return [str(tag) for tag in value]
