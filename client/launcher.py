"""What runs in place of Flower's own commands at a site: Flower as it is, with what a coordinator could misuse closed.

    python -m client.launcher supernode ...     `flower-supernode`
    python -m client.launcher superexec ...     `flower-superexec`, which the SuperNode starts
    python -m client.launcher clientapp ...     `flwr-clientapp`, which the SuperExec starts for each message

Flower's control API lets whoever reaches it ship code to every site. Here nothing that is shipped is unpacked or run:
the bundle's digest must be that of the one bundle without code, and what runs is the installed `client.app:app`. Only
client apps are started, whatever kind of task a run asks for. What Flower would say of an error is replaced by a fixed
word. Flower's own waits are shortened, or ended by what is waited for. Each change is made to a module whose text is
pinned (`client/flower_pins.py`).
"""

import contextlib
import hashlib
import importlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from client.flower_pins import require_known_flower
from common.errors import AppRefused, CoadaptError, EnrolmentError, error_code
from common.flower import ClientApp

__all__ = ["AGREEMENT", "Waits", "admit", "agreed_digest", "main", "woken"]

# Environment variable with the path of the agreement's copy in the relay's folder.
AGREEMENT = "COADAPT_AGREEMENT"

# Flower's SuperNode waits 3 s between looks for a message. Here it looks often while a round goes on, and the longer
# nothing came the less: every look is a request that the coordinator's SuperLink must answer. It waits at most for this
# part of the time that has passed since the last message, so a message waits at most so much longer than it would.
IDLE_SECONDS, MOST_IDLE_SECONDS, IDLE_SHARE = 0.25, 3.0, 1 / 6

# It waits 0.5 s between looks for the relay's reply, which lies in its own memory.
REPLY_SECONDS = 0.05

# Environment variable with the descriptor of the pipe by which the SuperNode wakes its SuperExec.
WAKE = "COADAPT_WAKE"

# What the process of a message imports, which is done once, before it is forked.
_OF_A_MESSAGE = ("flwr.supernode.cli.flwr_clientapp", "flwr.supernode.runtime.run_clientapp", "client.app")

# What Flower may say to the coordinator of an error that is not of Coadapt's tree.
UNEXPECTED = "relay"


def agreed_digest() -> str:
    """The digest of the only bundle that may run: what the person agreed to, which must be what is installed.

    Raises:
        AppRefused: the agreement was made with another version of Coadapt.
        EnrolmentError: there is no agreement, or it is damaged.
    """
    from client.home import Agreement
    from common.app_bundle import app_digest

    path = Path(os.environ.get(AGREEMENT, ""))
    try:
        agreed = Agreement.model_validate_json(path.read_bytes()).app_sha256
    except (OSError, ValueError) as error:
        raise EnrolmentError(
            f"{path} is no agreement ({type(error).__name__}); `coadapt site join` makes it"
        ) from error
    if agreed != app_digest():
        raise AppRefused("the app bundle that was agreed to is another version's; join again with `coadapt site join`")
    return agreed


def admit(bundle: bytes, digest: str) -> None:
    """Refuse any bundle but the agreed one; nothing in it is looked at.

    Raises:
        AppRefused: it is another.
    """
    found = hashlib.sha256(bundle).hexdigest()
    if found != digest:
        raise AppRefused(f"the coordinator's app bundle {found[:16]} is not the one agreed to, {digest[:16]}")


def _clientapp() -> None:
    """One message: Flower's process, which gets the installed relay whatever the bundle says."""
    from flwr.app.error import Error
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as module

    from client.app import SOCKET
    from client.vault_client import tell_refused

    digest = agreed_digest()
    said = [UNEXPECTED]

    def install(bundle: bytes, *_: object, **__: object) -> None:
        try:
            admit(bundle, digest)
        except AppRefused as error:
            said[0] = error_code(error)
            tell_refused(Path(os.environ.get(SOCKET, "")), hashlib.sha256(bundle).hexdigest())
            raise

    def loader(*_: object, **__: object) -> Callable[[str, str, str], ClientApp]:
        def load(*_: object) -> ClientApp:
            from client.app import app

            return app

        return load

    push_output = module.push_task_output

    def push_task_output(client: Any, context: Any, sub_status: str, details: str) -> None:
        push_output(client=client, context=context, sub_status=sub_status, details=said[0] if details else "")

    _replace(
        module,
        install_from_fab=install,
        get_load_client_app_fn=loader,
        get_project_dir=lambda *_: Path(),  # only shown to the installation of dependencies, which is off
        install_app_dependencies=_no_dependencies,
        push_task_output=push_task_output,
        Error=lambda *, code, reason: Error(code=code, reason=said[0]),
    )
    flwr_clientapp()


def _no_dependencies(*_: object, **__: object) -> None:
    raise AppRefused("a run asked for the installation of packages; a site installs none")


def _superexec() -> None:
    """Flower's starter of processes, which is told that it knows client apps alone.

    It has everything imported that a message's process needs, and forks: starting Python anew for each message costs
    a second and a half of computing at every site, five times a round.
    """
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supercore.superexec.plugin import AutoExecPlugin

    _replace(AutoExecPlugin, supported_task_types=frozenset({TaskType.CLIENT_APP}))
    _replace(
        subprocess_executor,
        TASK_TYPE_TO_COMMAND={TaskType.CLIENT_APP: TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]},
        subprocess=SimpleNamespace(Popen=_forked, DEVNULL=subprocess.DEVNULL),
    )
    if wake := os.environ.pop(WAKE, ""):
        _replace(run_superexec, time=SimpleNamespace(sleep=woken(int(wake))))
    for module in _OF_A_MESSAGE:
        importlib.import_module(module)
    agreed_digest()  # remembers the bundle that it makes
    flower_superexec()


def woken(pipe: int) -> Callable[[float], None]:
    """A sleep that ends when something is written to the pipe; where nobody can write to it any more, a plain one."""
    closed = False

    def sleep(seconds: float) -> None:
        nonlocal closed
        if closed:
            time.sleep(seconds)
        elif select.select([pipe], [], [], seconds)[0]:
            closed = not os.read(pipe, 4096)

    return sleep


def _forked(command: list[str], **_: Any) -> None:
    """Let a child of this process be `flwr-clientapp`, and wait for it in the background, so that none is left over."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        threading.Thread(target=os.waitpid, args=(child, 0), daemon=True).start()
        return
    status = 1
    try:
        sys.argv = command
        _clientapp()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # the child must not go on as its parent
        print(f"the relay's process ended: {error_code(error)}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _supernode() -> None:
    """Flower's resident node: it looks into no bundle, asks for client apps alone, and ends with its SuperExec."""
    from flwr.supercore.constant import TaskType
    from flwr.supernode import start_client_internal as module
    from flwr.supernode.cli import flower_supernode

    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def wake() -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it is awake, or has ended and is missed elsewhere
            os.write(writes, b"!")

    def started(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, WAKE: str(reads)}
        process = subprocess.Popen(command, env=environment, pass_fds=(reads,), **options)
        threading.Thread(target=_end_with, args=(process,), daemon=True).start()
        return process

    _replace(
        module,
        # A run of Flower's agents would otherwise start `flwr-agentapp`, and no other message would be taken till then.
        TaskType=SimpleNamespace(AGENT_APP=TaskType.CLIENT_APP, CLIENT_APP=TaskType.CLIENT_APP),
        get_fused_config_from_fab=lambda *_: {},  # it would unzip the bundle here, before anyone admitted it
        time=SimpleNamespace(sleep=Waits(wake).sleep),
        subprocess=SimpleNamespace(Popen=started),
    )
    flower_supernode()


class Waits:
    """The SuperNode's sleeps, by which alone it can be told what it is at: before a long one it looked for a message in
    vain, before a short one for the answer to a message. `wake` is called once for each message, when its task is there
    for the SuperExec. `clock` is in seconds."""

    def __init__(
        self,
        wake: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self._wake, self._clock, self._rest = wake, clock, rest
        self._busy, self._last = False, clock()

    def sleep(self, seconds: float) -> None:
        """In place of `time.sleep` in Flower's loop."""
        if seconds < 1:
            if not self._busy:
                self._wake()
            self._busy, self._last = True, self._clock()
            self._rest(REPLY_SECONDS)
            return
        self._busy = False
        since = self._clock() - self._last
        self._rest(min(MOST_IDLE_SECONDS, max(IDLE_SECONDS, IDLE_SHARE * since)))


def _end_with(process: "subprocess.Popen[bytes]") -> None:
    """A SuperNode without its SuperExec takes messages and never answers; its supervisor starts both anew."""
    process.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _replace(place: object, **values: object) -> None:
    for name, value in values.items():
        if not hasattr(place, name):
            raise AppRefused(
                f"Flower's {getattr(place, '__name__', place)} has no {name}; the launcher does not know it"
            )
        setattr(place, name, value)


COMMANDS: Mapping[str, Callable[[], None]] = {
    "supernode": _supernode,
    "superexec": _superexec,
    "clientapp": _clientapp,
}


def main(arguments: list[str]) -> int:
    """Run one of Flower's commands with the rest of the arguments, or end with 78 (a wrong set-up) and a line."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"one of {', '.join(COMMANDS)} is wanted, found {arguments[:1]}", file=sys.stderr)
        return 64
    sys.argv = arguments
    try:
        require_known_flower()
        COMMANDS[arguments[0]]()
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
