"""The app bundle that Flower carries to the sites: a generated pyproject and nothing else.

It names code that is installed at each side and brings none. Both sides of one version make the same bytes, so a site
knows the digest of the only bundle that it lets Flower run without asking anybody.
"""

import hashlib
import importlib.metadata
from functools import cache

__all__ = ["APP_NAME", "PUBLISHER", "app_bundle", "app_digest", "app_files"]

PUBLISHER = "coadapt"
APP_NAME = "coadapt-field"

_PYPROJECT = """\
[project]
name = "{name}"
version = "{version}"

[tool.flwr.app]
publisher = "{publisher}"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run = ""
"""


def app_files() -> dict[str, bytes]:
    """The bundle's files by path: one."""
    text = _PYPROJECT.format(name=APP_NAME, version=importlib.metadata.version("coadapt"), publisher=PUBLISHER)
    return {"pyproject.toml": text.encode()}


@cache
def app_bundle() -> bytes:
    """The bundle as Flower packs it."""
    from flwr.cli.build import build_fab_from_files  # late: it imports Flower's command line

    return build_fab_from_files(app_files())[0]


def app_digest() -> str:
    """SHA-256 of the bundle in hex, by which Flower names it too."""
    return hashlib.sha256(app_bundle()).hexdigest()
