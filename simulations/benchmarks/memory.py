"""Peak memory of this process and all below it, by looking several times a second."""

import contextlib
import threading
from types import TracebackType
from typing import Self

import psutil

from simulations.resources import family

__all__ = ["PeakMemory"]

EVERY_SECONDS = 0.2


class PeakMemory:
    """While it is entered it looks; `bytes` is the largest sum of resident sizes that was seen.

    What processes share counts in each of them, so figures compare with each other and not with the machine's memory.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def look(self) -> None:
        """Look once more."""
        total = 0
        for process in family():
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += process.memory_info().rss
        self.bytes = max(self.bytes, total)

    def _look(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self.look()
