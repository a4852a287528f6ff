"""The site's own log of errors, which stays at the site: text of an error may hold what comes from a record."""

import contextlib
import traceback
from pathlib import Path

__all__ = ["note"]


def note(log: Path, error: BaseException) -> None:
    """Write an error with its traceback to the site's own log; what cannot be written is lost, the run is not."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)) + "\n")
