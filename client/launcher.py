"""What runs as `flwr-clientapp` at a site: Flower's own client process, held to the one app that is installed here.

Flower would unpack whatever bundle a coordinator sends and run it. Here the bundle's SHA-256 is compared with the one
that this version generates itself, and it is not unpacked even then: the app comes from the installed package. Since
this replaces functions of Flower, everything is refused where Flower's source is not the one that it was written for.
"""

import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from common.app_bundle import app_digest
from common.errors import AppRefused

__all__ = ["KNOWN", "fit", "main", "source_digest"]

# SHA-256 of the source of what is relied on, in flwr 1.41.0. `python -m client.launcher --sources` prints those found.
KNOWN: dict[str, str] = {
    "flwr.supernode.runtime.run_clientapp": "fa6612aaeda9cd398de69199b0cf264a38f72c1b9cfdc53644c8d6dab0b70eb6",
    "flwr.supernode.cli.flwr_clientapp": "e87dccf7a82b0447c6dac323c6bbfc1ffd2e70e7837d7f5c39b18b86b7b39c98",
    "flwr.supernode.start_client_internal": "d6342f743fdf768f63305b88414ae2654e9a21bda153739da19c608e8d375067",
    "flwr.supercore.superexec.executor.subprocess_executor": (
        "8fca14d06c1531f0895952719e9194a3f62e9cd0de4148a6d2cdd5cdaf051f39"
    ),
}

# What Flower may say about a failure here: the text of an exception could hold anything.
_REFUSED = "refused: this app bundle is not the one that is installed at the site"
_FAILED = "failed at the site"


def source_digest(module: str) -> str:
    """SHA-256 in hex of a module's source."""
    __import__(module)
    return hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()


def require_known(*modules: str) -> None:
    """Refuse a Flower that is not the one that this was written for.

    Raises:
        AppRefused: the source of one of the modules is another.
    """
    for module in modules:
        if source_digest(module) != KNOWN[module]:
            raise AppRefused(
                f"the installed Flower's {module} is not that of flwr 1.41.0, and nothing of it is run; install the"
                " pinned version"
            )


def fit(module: Any, note: Callable[[str], None]) -> None:
    """Replace what would unpack, install and load a bundle in Flower's client. `note` is told of refused ones."""

    def admit(content: bytes, *_: Any, **__: Any) -> None:
        found = hashlib.sha256(content).hexdigest()
        if found != app_digest():
            note(found)
            raise AppRefused(_REFUSED)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AppRefused("a site installs nothing that a coordinator asks for")

    def installed(**_: Any) -> Callable[..., Any]:
        def load(*_: Any) -> Any:
            from client.app import app

            return app

        return load

    flower_error = module.Error

    def error(*, code: int, reason: str) -> Any:
        return flower_error(code=code, reason=_REFUSED if _REFUSED in reason else _FAILED)

    module.install_from_fab = admit
    module.install_app_dependencies = refuse
    module.get_load_client_app_fn = installed
    module.Error = error


def _note(digest: str) -> None:
    """Leave word of a refused bundle for the vault's audit log."""
    from pathlib import Path

    from client.app import SOCKET
    from client.vault_client import tell_refused

    socket = os.environ.get(SOCKET)
    if socket:
        tell_refused(Path(socket), digest)


def main() -> None:
    """Flower's client process, fitted."""
    if sys.argv[1:] == ["--sources"]:
        for name in KNOWN:
            print(f'    "{name}": "{source_digest(name)}",')
        return
    require_known("flwr.supernode.runtime.run_clientapp", "flwr.supernode.cli.flwr_clientapp")
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    fit(run_clientapp, _note)
    flwr_clientapp()


if __name__ == "__main__":
    main()
