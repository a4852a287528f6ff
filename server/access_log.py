"""The gate's access log: a JSON line for each request, which says who asked for what, and never what was in it.

Strangers can send thousands of requests a second that are refused at once. Of refused ones a few lines a second are
printed, and the next such line says how many were left out: nobody outside fills the disk.
"""

import time
from collections.abc import Callable, Mapping

from common.log_lines import json_line

__all__ = ["AccessLog"]

REFUSED_A_SECOND = 10


class AccessLog:
    """Takes the facts of each request when it is over. `clock` tells seconds, and never goes back."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._second, self._printed, self._left_out = clock, 0, 0, 0

    def __call__(self, facts: Mapping[str, object]) -> None:
        """Print the request's line, unless it was refused and enough such lines were printed in this second."""
        status = facts.get("status")
        if isinstance(status, int) and 200 <= status < 400:
            print(json_line("gate", "request", **facts), flush=True)
            return
        now = int(self._clock())
        if now != self._second:
            self._second, self._printed = now, 0
        if self._printed >= REFUSED_A_SECOND:
            self._left_out += 1
            return
        self._printed += 1
        before = {"left_out": self._left_out} if self._left_out else {}
        self._left_out = 0
        print(json_line("gate", "refused", **facts, **before), flush=True)
