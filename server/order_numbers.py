"""Numbers of orders, which grow for ever: over restarts, and where the clock is set back.

A number is the clock in nanoseconds, or one more than the last. So that not every order waits for the disk, the file
holds a number that none given out so far exceeds, and a new process begins above that. The clock is what helps where
the file is lost or put back from a copy; sites refuse an order whose number is not above the last (`replay`).
"""

import time
from pathlib import Path

from common.durable import write_text
from common.errors import RunError

__all__ = ["OrderNumbers"]

# The file is written once for so many: a minute of the clock.
_AHEAD = 60 * 10**9
_MOST = 2**63 - 1


class OrderNumbers:
    """The numbers of one coordinator. One process at a time uses a file.

    Raises:
        RunError: the file is damaged, cannot be written, or no number is left.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="ascii") if path.exists() else "0"
            self._last = int(text)
            if not 0 <= self._last <= _MOST:
                raise ValueError("out of range")
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} is damaged ({type(error).__name__}), so sites could take new orders for old ones; restore it"
                " from a backup, or remove it if the clock was never set back"
            ) from error
        self._written = self._last

    def next(self) -> int:
        """A number above all before it, of this process and of earlier ones."""
        number = max(self._last + 1, time.time_ns())
        if number > _MOST - _AHEAD:
            raise RunError(f"order number {number} is too large; set the clock, and restore {self._path}")
        if number > self._written:
            write_text(self._path, f"{number + _AHEAD}\n")
            self._written = number + _AHEAD
        self._last = number
        return number
