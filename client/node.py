"""The relay's side of a site: Flower's SuperNode, started so that it can run nothing but the installed relay.

    python -m client.node HOME

Flower starts its helpers by name. Here the search path holds one folder, in which two names lead to Coadapt's launcher
and Flower's dispatcher, and every other name of Flower's to a refusal. The SuperNode itself is Flower's, but for its
pause of three seconds between two looks for a message, which is shortened.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pydantic import ValidationError

from client.app import SOCKET
from client.home import Agreement, SiteHome
from client.launcher import require_known
from common.app_bundle import app_digest
from common.errors import AppRefused, CoadaptError, EnrolmentError

__all__ = ["command", "main", "write_commands"]

# How long Flower waits after it found no message (3 s in its code), and its dispatcher for a task (1 s by default).
IDLE_SECONDS = 0.25
TASK_SECONDS = "0.05"

# A SuperLink refuses a node that it still believes to be there, for up to 60 seconds, with this exit status.
REFUSED_STATUS = 305 & 0xFF
AGAIN_SECONDS = 15.0
FIRST_AGAIN_SECONDS = 1.0
WELL_SECONDS = 120.0

_FLOWER = "--flower"

# What Flower's processes get of the environment.
_KEPT = (
    *("HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH"),
    *("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"),
)


def write_commands(folder: Path) -> None:
    """Write the only commands that the SuperNode and its children find."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    python = shlex.quote(sys.executable)
    scripts = {
        **dict.fromkeys(TASK_TYPE_TO_COMMAND.values(), "echo 'this site runs the installed relay alone' >&2\nexit 1\n"),
        "uv": "exit 1\n",
        "flwr-clientapp": f'exec {python} -P -m client.launcher "$@"\n',
        "flower-superexec": (
            f"exec {python} -P -c 'from flwr.supercore.cli import flower_superexec; flower_superexec()' \"$@\"\n"
        ),
    }
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        path.chmod(0o755)


def command(home: SiteHome, address: str) -> list[str]:
    """How the SuperNode is started."""
    certificate = home.certificate
    trusted = ["--root-certificates", str(certificate)] if certificate.exists() and certificate.stat().st_size else []
    return [
        *(sys.executable, "-P", "-m", "client.node", _FLOWER, *trusted),
        *("--superlink", address, "--host", "127.0.0.1", "--port", str(_free_port())),
        *("--auth-supernode-private-key", str(home.node_key)),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(home: SiteHome) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in _KEPT if name in os.environ},
        "PATH": str(home.relay / "commands"),
        "FLWR_HOME": str(home.relay / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_SECONDS,
        SOCKET: str(home.socket),
    }


def _keep_running(home: SiteHome) -> NoReturn:
    """Start the SuperNode, and again whenever it ends; SIGTERM ends it with all that it has started."""
    address = _agreement(home).address
    write_commands(home.relay / "commands")
    neutral = home.relay / "empty"
    neutral.mkdir(exist_ok=True)
    child: subprocess.Popen[bytes] | None = None

    def end(_number: int, _frame: FrameType | None) -> None:
        if child is not None:
            _end_group(child)
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    delay = FIRST_AGAIN_SECONDS
    while True:
        began = time.monotonic()
        child = subprocess.Popen(command(home, address), env=_environment(home), cwd=neutral, start_new_session=True)
        status = child.wait()
        _end_group(child)  # its dispatcher would look for it no more
        lasted = time.monotonic() - began
        print(f"the SuperNode ended with status {status} after {lasted:.0f} s", file=sys.stderr, flush=True)
        delay = FIRST_AGAIN_SECONDS if lasted > WELL_SECONDS else min(AGAIN_SECONDS, 2 * delay)
        time.sleep(AGAIN_SECONDS if status == REFUSED_STATUS else delay)


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _agreement(home: SiteHome) -> Agreement:
    """What was agreed, from the relay's copy, since the relay cannot read the site's own.

    Raises:
        EnrolmentError: it is missing or damaged.
        AppRefused: this version's app is not the one that was agreed to.
    """
    path = home.relay / "agreement.json"
    try:
        agreement = Agreement.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EnrolmentError(
            f"{path} cannot be used ({type(error).__name__}); `coadapt site join` writes it"
        ) from error
    if agreement.app_sha256 != app_digest():
        raise AppRefused("Coadapt was changed since this site joined, and its app with it; join again")
    return agreement


def _flower(arguments: Sequence[str]) -> None:
    """Become Flower's SuperNode, with a shorter pause.

    Raises:
        AppRefused: the installed Flower is not the one that this was written for.
    """
    require_known("flwr.supernode.start_client_internal", "flwr.supercore.superexec.executor.subprocess_executor")
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    class Clock:
        """The module `time`, with a pause of three seconds shortened."""

        def __getattr__(self, name: str) -> object:
            return getattr(time, name)

        @staticmethod
        def sleep(seconds: float) -> None:
            time.sleep(IDLE_SECONDS if seconds == 3 else seconds)

    vars(start_client_internal)["time"] = Clock()
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; it returns only where it cannot start."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == [_FLOWER]:
            _flower(given[1:])
        else:
            _keep_running(SiteHome(Path(given[0]).absolute()))
    except CoadaptError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
