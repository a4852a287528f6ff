"""A site's keys and folders, made once by `coadapt site init`, and the modes they must keep."""

import secrets
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.home import SiteHome
from common.errors import EnrolmentError
from common.identity import Identity
from common.private_files import private_folder, require_private, write_key

__all__ = ["loose_places", "make_folders", "make_keys", "node_public", "require_private_keys"]

RELAY_FOLDER = 0o750
OWN_FOLDER = 0o700


def make_folders(home: SiteHome) -> None:
    """Every folder of a site with its mode; the relay's alone is open to the relay's group."""
    for folder in (home.keys, home.federation, home.runs, home.log.parent):
        private_folder(folder, mode=OWN_FOLDER)
    private_folder(home.relay, mode=RELAY_FOLDER)


def make_keys(home: SiteHome) -> None:
    """Draw the three keys from the operating system.

    Raises:
        EnrolmentError: one is there already.
    """
    write_key(home.signing_key, Identity.generate().private_bytes().hex().encode() + b"\n")
    write_key(home.rounding_key, secrets.token_hex(32).encode() + b"\n")
    node = ec.generate_private_key(ec.SECP384R1())
    private = node.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_key(home.node_key, private)
    write_key(_node_public_file(home), public + b"\n", mode=0o644)


def node_public(home: SiteHome) -> str:
    """The OpenSSH line of the node's key.

    Raises:
        EnrolmentError: it is missing or none.
    """
    path = _node_public_file(home)
    try:
        return " ".join(path.read_text(encoding="ascii").split()[:2])
    except (OSError, ValueError) as error:
        raise EnrolmentError(f"{path} cannot be read; `coadapt site init` makes a site's keys") from error


def require_private_keys(home: SiteHome) -> None:
    """Refuse keys and folders that others may use.

    Raises:
        EnrolmentError: with the first one and what to do.
    """
    for problem in loose_places(home):
        raise EnrolmentError(problem)


def loose_places(home: SiteHome) -> Iterator[str]:
    """What is wrong with the modes of keys and folders, a line each."""
    places: list[tuple[Path, int]] = [
        (home.keys, OWN_FOLDER),
        (home.signing_key, 0o600),
        (home.rounding_key, 0o600),
        (home.relay, RELAY_FOLDER),
        (home.node_key, 0o600),
        (home.federation, OWN_FOLDER),
        (home.runs, OWN_FOLDER),
        (home.log.parent, OWN_FOLDER),
    ]
    for path, most in places:
        try:
            require_private(path, most=most)
        except EnrolmentError as error:
            yield str(error)


def _node_public_file(home: SiteHome) -> Path:
    return home.relay / "node.pub"
