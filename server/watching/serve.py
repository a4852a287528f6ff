"""Serves the page of a run on this machine alone, until the person ends it."""

import contextlib
import errno
import socket
from collections.abc import Callable

import uvicorn

from common.errors import ServiceError
from server.watching.app import watching_app
from server.watching.folder import RunFolder, Spent

__all__ = ["LOOPBACK", "serve"]

LOOPBACK = "127.0.0.1"


def serve(run: RunFolder, *, port: int, spent: Spent | None, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C (or SIGTERM). `ready` gets the address once it answers; port 0 takes a free one.

    Raises:
        ServiceError: the port is in use, or not this user's to take.
    """
    listener = _bound(port)
    with contextlib.closing(listener):
        config = uvicorn.Config(
            watching_app(run, spent),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        listener.listen()
        ready(f"http://{LOOPBACK}:{listener.getsockname()[1]}/")
        # uvicorn ends in order on a signal, and then gives the signal to whoever handled it before.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _bound(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise ServiceError(f"port {port} of {LOOPBACK} {why}; --port 0 takes a free one") from error
    return listener
