"""Scalars as files that TensorBoard reads: a folder for each run, so that their curves lie over each other.

tensorboardX writes them: it is small, and needs neither TensorBoard nor its server to write.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import RunError
from server.tracking.scalars import Scalar

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes below a folder.

    Raises:
        RunError: tensorboardX is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise RunError(
                "--log-to tensorboard needs the package tensorboardX, which is not here: pip install"
                " 'coadapt[tensorboard]'"
            ) from error
        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._folder = folder
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)

    def start(self, run_id: str, settings: Mapping[str, str], _time: float) -> None:
        """Begin a run; its settings go with it as a table."""
        rows = "".join(f"| {key} | `{value}` |\n" for key, value in settings.items())
        with self._told():
            self._writer = self._make(str(self._folder / run_id), write_to_disk=True)
            if rows:
                self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, scalars: Sequence[Scalar]) -> None:
        """Write scalars, so that a TensorBoard that looks now shows them."""
        with self._told():
            for each in scalars:
                self._writer.add_scalar(each.name, each.value, each.step, walltime=each.time)
            self._writer.flush()

    def stop(self, _status: str, _time: float) -> None:
        """End the run's file."""
        with self._told():
            self._writer.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write for TensorBoard below {self._folder}: {error.strerror}") from error
