"""Between two steps of training: whoever started it hears how far it is, and may break it off. No torch."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["Cancelled", "heard", "tick"]


class Cancelled(BaseException):  # no Exception: it must pass those who turn errors into answers
    """Nobody waits for this training any more."""


_LISTENER: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def heard(listener: Callable[[int], None]) -> Iterator[None]:
    """While the block lasts, `listener` gets the number of every step (in the whole run, from 0) before it is taken. It
    may raise `Cancelled`."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tick(step: int) -> None:
    """A step is about to be taken."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(step)
