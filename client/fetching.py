"""`coadapt site fetch RUN`: bring a finished run's result through the gate, and verify it before it is there.

<home>/fetched/RUN/adapter/         the run's adapter
<home>/fetched/RUN/compact/         its compact model, once it is published
<home>/fetched/RUN/listing.signed   what the coordinator signed

A part appears whole, when every file of it has the size and SHA-256 that the coordinator signed, or not at all. What
is here already is compared with what is signed now and not brought again. Both ends are in the audit log.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from client.audit_log import AuditLog
from client.gate_client import GateClient
from client.home import SiteHome
from client.policy import load_policy
from client.run_folder import Claim
from common.durable import new_folder, write_bytes
from common.errors import (
    ContentRefused,
    EnrolmentError,
    PolicyBreach,
    ReleaseError,
    RosterRefused,
    RunError,
    WrongContext,
    error_code,
)
from common.identity import Identity
from common.private_files import private_folder
from common.release import LISTING, PARTS, RUN_ID, Listed, Listing, open_listing
from common.roster import Roster, SignedRoster

__all__ = ["Fetched", "fetch"]

Gates = Callable[..., GateClient]


@dataclass(frozen=True)
class Fetched:
    """A part of a run: where it lies, its bytes, and whether it was brought now."""

    part: str
    folder: Path
    size: int
    brought: bool


def fetch(home: SiteHome, run_id: str, *, gates: Gates = GateClient) -> list[Fetched]:
    """Bring what is published of a run.

    Raises:
        EnrolmentError: this site has joined nothing, or the coordinator does not know it.
        ReleaseError: the run is not published, or not for this site.
        ContentRefused: a file is not what the coordinator signed; nothing of its part is kept.
        SignatureRefused, MalformedMessage: the list is not the coordinator's, or names a file as none may be named.
        WrongContext: the run is of another federation, or under another manifest than this site agreed to.
        PolicyBreach: it is larger than `limits.fetch_bytes`.
        ServiceError: the gate cannot be reached.
    """
    if not re.fullmatch(RUN_ID, run_id):
        raise ReleaseError(f"{run_id!r} is no run's name: letters, digits, '.', '_' and '-', 100 at most")
    identity, audit = home.identity(), AuditLog(home.audit)
    try:
        listing, found = _fetch(home, identity, run_id, gates)
    except Exception as error:
        audit.add("refused", kind="fetch", run_id=run_id, code=error_code(error))
        raise
    else:
        for each in found:
            digest, size = _digest(listing.part(each.part)), each.size if each.brought else 0
            audit.add("note", kind="fetch", run_id=run_id, payload=digest, size=size, code=each.part)
    finally:
        audit.close()
    return found


def _fetch(home: SiteHome, identity: Identity, run_id: str, gates: Gates) -> tuple[Listing, list[Fetched]]:
    policy, agreement, roster = load_policy(home.policy), home.agreement(), _roster(home)
    client = gates(
        agreement.address,
        home.certificate.read_bytes() if home.certificate.exists() else b"",
        identity=identity,
        federation=roster.federation.hex(),
        run_id=run_id,
    )
    try:
        signed = client.listing()
        listing = open_listing(roster.coordinator, signed)
        _require_ours(home, listing, run_id, roster)
        if listing.size > policy.limits.fetch_bytes:
            raise PolicyBreach(f"limits.fetch_bytes: asked {listing.size}, allowed {policy.limits.fetch_bytes}")
        folder = home.fetched / run_id
        private_folder(home.fetched)
        private_folder(folder)
        found = [_part(client, folder / part, listing.part(part)) for part in PARTS if listing.part(part)]
        write_bytes(folder / LISTING, signed)
    finally:
        client.close()
    return listing, found


def _roster(home: SiteHome) -> Roster:
    """The roster that was agreed to; its signatures were verified when this site joined."""
    try:
        roster = SignedRoster.from_json(home.roster.read_bytes()).roster
    except OSError as error:
        raise EnrolmentError(f"{home.roster} cannot be read: {error.strerror}; join again") from error
    if roster.digest().hex() != home.agreement().roster_sha256:
        raise RosterRefused(f"{home.roster} is not the roster that was agreed to; join again with `coadapt site join`")
    return roster


def _require_ours(home: SiteHome, listing: Listing, run_id: str, roster: Roster) -> None:
    if listing.federation != roster.federation.hex():
        raise WrongContext(f"run {run_id} is of another federation than the one that this site joined")
    if listing.run_id != run_id:
        raise WrongContext(f"run {run_id} was asked for, and the coordinator signed a list of run {listing.run_id}")
    if listing.epoch > roster.epoch:
        raise WrongContext(
            f"run {run_id} was made under the roster of epoch {listing.epoch}, this site joined that of {roster.epoch};"
            " join with the newest invitation"
        )
    if listing.manifest_sha256 not in {home.agreement().manifest_sha256, _taken_part(home, run_id)}:
        raise WrongContext(
            f"run {run_id} was made under manifest {listing.manifest_sha256}, which this site neither agreed to nor"
            " trained under"
        )


def _taken_part(home: SiteHome, run_id: str) -> str:
    """The digest of the manifest under which this site took part in a run; empty where it did not."""
    try:
        return Claim.model_validate_json((home.runs / run_id / "run.json").read_bytes()).manifest_sha256
    except (OSError, ValidationError):
        return ""


def _part(client: GateClient, folder: Path, files: tuple[Listed, ...]) -> Fetched:
    size = sum(file.size for file in files)
    if folder.exists():
        _require_same(folder, files)
        return Fetched(folder.name, folder, size, brought=False)
    if (free := shutil.disk_usage(folder.parent).free) < size:
        raise RunError(f"{folder} needs {size} bytes and {free} are free; nothing was brought")
    with new_folder(folder) as beside:
        for file in files:
            _bring(client, file, beside.joinpath(*file.path.split("/")[1:]))
    return Fetched(folder.name, folder, size, brought=True)


def _bring(client: GateClient, file: Listed, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x+b") as target:
        offset = 0
        while offset < file.size:
            offset += client.piece(file.path, offset, size=file.size, into=target)
        target.flush()
        target.seek(0)
        found = hashlib.file_digest(target, "sha256").hexdigest()
    if found != file.sha256:
        raise ContentRefused(
            f"{file.path} has SHA-256 {found}, and the coordinator signed {file.sha256}: it was changed since; nothing"
            " of this part was kept"
        )


def _require_same(folder: Path, files: tuple[Listed, ...]) -> None:
    for file in files:
        path = folder.joinpath(*file.path.split("/")[1:])
        try:
            with path.open("rb") as stored:
                found = hashlib.file_digest(stored, "sha256").hexdigest()
        except OSError:
            found = "none"
        if found != file.sha256:
            raise ContentRefused(
                f"{path} is not what the coordinator signed (SHA-256 {found}, signed {file.sha256}); move {folder} away"
                " and fetch again"
            )


def _digest(files: tuple[Listed, ...]) -> str:
    """One digest of a part, for the audit log: of the lines 'SHA-256  path', as sha256sum writes them."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.path}\n" for file in files).encode()).hexdigest()
