"""What exporting needs beyond the core: packages of the extra `compact`, and quiet while they work."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator

from common.errors import DistillationError

__all__ = ["need", "quiet"]


def need(what: str, *packages: str) -> None:
    """Check that `packages` can be imported.

    Raises:
        DistillationError: one is missing; the line names the command that brings it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DistillationError(
                f"{what} needs the package {package}, which is not here: pip install 'coadapt[compact]'"
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' prints, warnings and logs off the terminal; errors still rise."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # progress bars
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
