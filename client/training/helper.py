"""A further process of a vault, for one more card: it sums its part of every step's gradient.

    python -m client.training.helper DESCRIPTOR

The vault starts it and speaks with it over a pair of sockets that no other process has. When the vault's end closes,
however the vault ended, the process is gone at once. Nothing heavy is imported before that is sure.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from client.training.orders import Failed
from common.errors import OutOfMemory, error_code
from common.supervise import module_command

__all__ = ["main", "start_helper"]


def start_helper(environment: dict[str, str]) -> "tuple[subprocess.Popen[bytes], Connection]":
    """A new process and the vault's end of the pair; it waits for its set-up. `environment` is added to the own."""
    ours, theirs = Pipe()
    root = str(Path(__file__).resolve().parents[2])
    try:
        process = subprocess.Popen(
            module_command("client.training.helper", str(theirs.fileno())),
            env={**os.environ, "PYTHONPATH": root, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _end_with_the_vault(descriptor: int) -> None:
    """Wait until the other end is closed, and end: in the middle of a step, a collective or an import."""
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is told whether it is asked for or not
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll()):
        pass
    os._exit(0)


def main() -> None:
    """The process. An error is told to the vault, which notes it in the site's log, and printed nowhere."""
    descriptor = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the vault decides when this ends
    threading.Thread(target=_end_with_the_vault, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        set_up = connection.recv()
        from client.training.part import serve

        serve(connection, set_up)
    except BaseException as error:
        # Torch has a class of its own for devices; where it is met outside of a step nobody has translated it.
        scarce = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        code = OutOfMemory.code if scarce else error_code(error)
        with contextlib.suppress(OSError):  # the vault is gone
            connection.send(Failed(code, str(error)))
        os._exit(1)  # without a word of torch's about the group that is left


if __name__ == "__main__":
    main()
