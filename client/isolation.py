"""Two users for a site: the vault's owns everything, the relay's reads its own folder and nothing else.

    home      vault:relay 0710   the relay passes through and lists nothing
    keys, federation, runs, log, ledger, data        vault 0700
    relay     vault:relay 0750   certificate, agreement and socket: read alone
    relay/node.key        relay 0600    the node's key is the relay's own
    relay/flower          relay 0700    the only place that it writes to

The vault's process has the relay's group as its own, so the socket that it makes belongs to that group; its umask keeps
every other file to itself.
"""

import contextlib
import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from client.home import SiteHome
from client.policy import load_policy
from common.errors import CoadaptError, EnrolmentError, ServiceError
from common.supervise import User

__all__ = ["Users", "default_vault_user", "find_users", "isolate", "isolated"]

HOME_MODE = 0o710


@dataclass(frozen=True)
class Users:
    """Who the two processes of a site run as."""

    vault: User
    relay: User


def find_users(vault: str, relay: str) -> Users:
    """By name or number; a number may have no entry among the system's users, its group then has the same number.

    Raises:
        ServiceError: there is no such user, they are one, or the relay would be root.
    """
    (vault_uid, _), (relay_uid, group) = _user(vault), _user(relay)
    if vault_uid == relay_uid:
        raise ServiceError(f"vault and relay must be two users, found {vault!r} for both")
    if relay_uid == 0:
        raise ServiceError("the relay must not run as root, which may read everything; name another user")
    return Users(User(uid=vault_uid, gid=group), User(uid=relay_uid, gid=group))


def isolate(home: SiteHome, users: Users) -> None:
    """Give every file of the site to one of the two users; only root may.

    Raises:
        ServiceError: this is not root.
    """
    if os.geteuid() != 0:
        raise ServiceError("giving files to two users needs root: run it with sudo, once")
    vault, group = users.vault.uid, users.relay.gid
    flower = home.relay / "flower"
    flower.mkdir(exist_ok=True)
    for path in [home.folder, *home.folder.rglob("*")]:
        # The relay writes there: a link that it made to a file of another's must not bring it that file.
        if path.is_symlink() or path.is_relative_to(flower):
            continue
        os.chown(path, vault, group, follow_symlinks=False)
        if path.is_relative_to(home.relay):
            continue
        # What the group could read before must not become readable to the relay, whose group it now is.
        path.chmod(HOME_MODE if path == home.folder else 0o700 if path.is_dir() else 0o600)
    home.relay.chmod(0o750)
    for path in home.relay.iterdir():
        if path in {home.node_key, flower}:
            os.chown(path, users.relay.uid, group, follow_symlinks=False)
            path.chmod(0o700 if path.is_dir() else 0o600)
        elif path.is_file():
            path.chmod(0o644 if path.name == "node.pub" else 0o640)


def isolated(home: SiteHome) -> str:
    """Why vault and relay are not kept apart, in words; empty where they are."""
    with contextlib.suppress(OSError):
        owner, node = home.keys.stat(), home.node_key.stat()
        if owner.st_uid == node.st_uid:
            return (
                "not isolated: one user runs vault and relay, so what breaks into the relay reads the records; as root:"
                f" coadapt site isolate --home {home.folder} --relay-user coadapt-relay"
            )
        data = [home.policy, home.folder / "ledger"]
        with contextlib.suppress(CoadaptError):
            policy = load_policy(home.policy)
            files = (policy.data.train, policy.data.held_out, policy.data.withdrawn)
            data += [Path(policy.ledger), *(Path(name) for name in files if name)]
        for path in data:
            if path.exists() and _open_to(path, node.st_uid, home.relay.stat().st_gid):
                return f"not isolated: the relay's user may read {path}; chmod o-rwx,g-rwx {path}"
        return ""
    return "not isolated: keys or relay folder are missing"


def _open_to(path: Path, uid: int, gid: int) -> bool:
    """Whether the file's own mode lets this user read it; folders above it are not looked at."""
    found = path.stat()
    if found.st_uid == uid:
        return True
    return bool(found.st_mode & (0o040 if found.st_gid == gid else 0o004))


def _user(name: str) -> tuple[int, int]:
    try:
        if name.isdecimal():
            uid = int(name)
            with contextlib.suppress(KeyError):
                return uid, pwd.getpwuid(uid).pw_gid
            return uid, uid
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise ServiceError(f"there is no user {name!r}; make one: useradd --system --no-create-home {name}") from error
    with contextlib.suppress(KeyError):  # a group of the user's own name, where there is one
        return entry.pw_uid, grp.getgrnam(name).gr_gid
    return entry.pw_uid, entry.pw_gid


def default_vault_user(home: SiteHome) -> str:
    """The owner of the site's folder, by number.

    Raises:
        EnrolmentError: there is no site.
    """
    try:
        return str(home.policy.stat().st_uid)
    except OSError as error:
        raise EnrolmentError(f"{home.policy}: {error.strerror}; `coadapt site init` makes a site") from error
