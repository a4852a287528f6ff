"""The only code that writes files that must survive: whole or not at all.

A file is written beside its target, flushed to the disk, and renamed over it; the directory is flushed too.
A crash or a full disk leaves the old file, or none. A folder is built beside its target and renamed.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import RunError

__all__ = ["new_file", "new_folder", "write_bytes", "write_text"]


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` with `data`, whole or not at all; a RunError says what the disk refused.

    A `private` file is its owner's alone (0600) before anything is in it.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            if private:
                beside.chmod(0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed there") from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill piece by piece; it appears as `path` only when the block ends well. `path` must not exist."""
    if path.exists():
        raise RunError(f"{path} exists already; finished files are never overwritten: remove it or choose another name")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears as `path` only when the block ends well. `path` must not exist."""
    if path.exists():
        raise RunError(f"{path} exists already; finished files are never overwritten: remove it or choose another name")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush_folder(beside)
        beside.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        _flush(path)
