"""What a run uses of its machine: processors, memory and GPUs of its processes, looked at every few seconds."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import psutil

from common.progress import EventSink, ResourcesUsed

__all__ = ["ResourceWatch", "family"]

EVERY_SECONDS = 5.0

# Seconds that nvidia-smi gets; it comes with the driver and knows what torch only tells with another package.
PATIENCE = 5.0
ASK = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")


def family() -> Iterator[psutil.Process]:
    """This process and all below it."""
    here = psutil.Process()
    yield here
    yield from here.children(recursive=True)


class ResourceWatch:
    """While it is entered it reports `ResourcesUsed`, from a thread of its own."""

    def __init__(self, report: EventSink, *, gpus: bool, every: float = EVERY_SECONDS) -> None:
        self._report, self._every = report, every
        self._gpus = gpus and shutil.which(ASK[0]) is not None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="resources", daemon=True)
        self._spent: dict[tuple[int, float], float] = {}
        self._looked = 0.0

    def __enter__(self) -> None:
        self.used()  # processor time counts from here
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self._every):
            self._report(self.used())

    def used(self) -> ResourcesUsed:
        """What is used now; processors since the last call."""
        now, memory, busy = time.monotonic(), 0, 0.0
        before, self._spent = self._spent, {}
        for process in family():
            with contextlib.suppress(psutil.Error):  # it has just ended
                with process.oneshot():
                    key, times = (process.pid, process.create_time()), process.cpu_times()
                    memory += process.memory_info().rss
                self._spent[key] = times.user + times.system
                busy += self._spent[key] - before.get(key, 0.0)
        seconds, self._looked = now - self._looked, now
        share = min(1.0, busy / (seconds * (os.cpu_count() or 1)))
        gpus = _gpus() if self._gpus else []
        return ResourcesUsed(
            processors=round(share, 4),
            memory=memory,
            gpus=tuple(part for part, _ in gpus),
            gpu_memory=tuple(size for _, size in gpus),
        )


def _gpus() -> list[tuple[float, int]]:
    """The busy share and used bytes of every GPU of the machine; nothing where the driver does not say."""
    try:
        said = subprocess.run(ASK, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        lines = [line.split(",") for line in said.splitlines() if line.strip()]
        return [(float(part) / 100, int(size) * 2**20) for part, size in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
