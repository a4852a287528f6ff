"""Keys and other files that one user alone may read: made with their modes at once, and never overwritten."""

import os
import stat
from pathlib import Path

from common.errors import EnrolmentError, RunError

__all__ = ["private_folder", "require_private", "write_key"]

# What the file's owner may do; everybody else may nothing.
OWNER = 0o700


def write_key(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a new file; nobody but the owner can read it at any moment, unless `mode` says so.

    Raises:
        EnrolmentError: there is one already.
        RunError: the disk refuses.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise EnrolmentError(f"{path} exists already; a key is never overwritten: move it away first") from error
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was left there") from error


def private_folder(path: Path, *, mode: int = 0o700) -> None:
    """Make a folder with this mode, whatever the umask; one that is there keeps its owner and gets the mode.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode & OWNER)
        path.chmod(mode)
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror}") from error


def require_private(path: Path, *, most: int = 0o600) -> None:
    """Refuse a file or folder that more people may use than `most` allows.

    Raises:
        EnrolmentError: it is missing, a link, or its mode is looser.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise EnrolmentError(f"{path}: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise EnrolmentError(f"{path} is a link; put the file itself there")
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~most:
        raise EnrolmentError(f"{path} has mode {mode:04o} and may have at most {most:04o}: chmod {most:o} {path}")
