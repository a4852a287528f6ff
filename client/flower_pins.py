"""The sources of Flower that Coadapt's launcher relies on or changes, by digest; it fails closed where they differ.

These are no public interfaces of Flower, so a name that is still there says nothing. What the launcher was written and
tested against is the text of the modules of one version; another version is looked at by a person first
(`python -m client.flower_pins` prints the table).
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from common.errors import AppRefused

__all__ = ["FLOWER_VERSION", "PINNED", "module_digest", "require_known_flower"]

FLOWER_VERSION = "1.41.0"

# fmt: off
PINNED: Mapping[str, str] = {
    "flwr.supernode.cli.flower_supernode": "e637b07a731536a63cb3d4e7d9293fef613c425b65363c4c64840aad263de1d9",
    "flwr.supernode.cli.flwr_clientapp": "e87dccf7a82b0447c6dac323c6bbfc1ffd2e70e7837d7f5c39b18b86b7b39c98",
    "flwr.supernode.start_client_internal": "d6342f743fdf768f63305b88414ae2654e9a21bda153739da19c608e8d375067",
    "flwr.supernode.fleet_http_connection": "8b90826f407ab5d30564379fd1d475f66565b87547ff612eb5672277e92a33c8",
    "flwr.supernode.runtime.run_clientapp": "fa6612aaeda9cd398de69199b0cf264a38f72c1b9cfdc53644c8d6dab0b70eb6",
    "flwr.clientapp.client_app": "ed9bd6f65b8df8378fed7e78930fbbac61c3e16bcadade06d8cd44e6a215194d",
    "flwr.clientapp.utils": "3cc5d1a346a1fc84711ad0aa4173e81ae43d8d707d159b0843e41080251da111",
    "flwr.supercore.app_utils": "3f9e7c0ceaf96b850fc8e7510b16c342e79017e2fe91273aab3a2e3cfbaa8f45",
    "flwr.supercore.cli.flower_superexec": "1fae6c298bca26a7a8b478a48a33f6125c15c08503bd609cdf2075a0e298cbbd",
    "flwr.supercore.constant": "c9cf0b41ac90fed34dbae7a06bc90f49e82fbff3815270cf62f6c2962966b3ce",
    "flwr.supercore.superexec.run_superexec": "6b4855d76940ae0f257555b6e0e9894cc46b1ee9d5675092b0e16a5053e4b2fa",
    "flwr.supercore.superexec.executor.subprocess_executor": "8fca14d06c1531f0895952719e9194a3f62e9cd0de4148a6d2cdd5cdaf051f39",  # noqa: E501
    "flwr.supercore.superexec.plugin.base_exec_plugin": "08ee26c9a9addcac0c0c4ae54094b59ba92e8a2c8b4648e739792e8780390114",  # noqa: E501
}
# fmt: on


def module_digest(module: str) -> str:
    """SHA-256 of a module's source in hex, found without running it.

    Raises:
        AppRefused: there is no such module.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AppRefused(f"Flower has no module {module}; the launcher was written for flwr {FLOWER_VERSION}")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def require_known_flower(pinned: Mapping[str, str] = PINNED) -> None:
    """Refuse a Flower whose modules are not the ones that the launcher was written for.

    Raises:
        AppRefused: a module is gone or its text is another.
    """
    for module, wanted in pinned.items():
        found = module_digest(module)
        if found != wanted:
            raise AppRefused(
                f"{module} is not that of flwr {FLOWER_VERSION} (found {found[:12]}, wanted {wanted[:12]});"
                f" install flwr {FLOWER_VERSION}, or a Coadapt that was written for this Flower"
            )


if __name__ == "__main__":
    for name in PINNED:
        print(f'    "{name}": "{module_digest(name)}",')
