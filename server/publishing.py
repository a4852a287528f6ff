"""Publish a finished run: copy its adapter, and its compact model where there is one, and sign what they are.

<published>/RUN/adapter/         the selected adapter
<published>/RUN/compact/         the compact model, where there is one
<published>/RUN/roster.json      the roster under which the run was made: its institutions may fetch it
<published>/RUN/listing.signed   every file with size and SHA-256, signed (`common/release.py`); written last

This needs the coordinator's key; the gate, which serves these files, never reads it. A part is published once: it may
be added later, and is never replaced.
"""

import hashlib
import re
import shutil
from pathlib import Path

from common.durable import new_folder, write_bytes, write_text
from common.errors import RosterRefused, RunError
from common.release import LISTING, MOST_LISTING_BYTES, RUN_ID, Listed, Listing, file_name, seal
from common.roster import SignedRoster
from server.field_summary import FieldSummary
from server.home import CoordinatorHome
from server.submission import summary_of

__all__ = ["publish"]

_FACTS = "coadapt.json"  # every adapter and every model of Coadapt has it


def publish(home: CoordinatorHome, run_id: str, *, compact: Path | None = None) -> Listing:
    """Publish a run's adapter, and its compact model: `compact`, or the run's own `compact/` where there is one.

    Again, it adds what is new, and else changes nothing.

    Raises:
        RunError: the run has not finished, a folder holds no model, or what was published is another.
        RosterRefused: the run's roster is not here any more.
    """
    summary = _finished(home, run_id)
    roster = _roster(home, summary)
    own = home.runs / run_id / "compact"
    sources = {"adapter": home.runs / run_id / "adapter"}
    if compact is not None or own.is_dir():
        sources["compact"] = own if compact is None else compact
    folder = home.published / run_id
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; nothing was published") from error
    before = folder / "compact"
    if "compact" not in sources and before.is_dir():
        sources["compact"] = before
    files = [file for part, source in sources.items() for file in _part(folder, part, source)]
    listing = Listing(
        federation=roster.roster.federation.hex(),
        epoch=roster.roster.epoch,
        roster_sha256=summary.roster_sha256,
        manifest_sha256=summary.manifest_sha256,
        run_id=run_id,
        files=tuple(files),
    )
    signed = seal(home.identity(), listing)
    if len(signed) > MOST_LISTING_BYTES:
        raise RunError(f"{run_id} has too many files to be published: {len(files)}")
    write_text(folder / "roster.json", roster.to_json() + "\n")
    write_bytes(folder / LISTING, signed)
    return listing


def _finished(home: CoordinatorHome, run_id: str) -> FieldSummary:
    summary = summary_of(home.runs / run_id) if re.fullmatch(RUN_ID, run_id) else None
    if summary is None:
        raise RunError(f"there is no finished run {run_id!r} in {home.runs}; `coadapt coordinator status` shows runs")
    if summary.status != "finished" or not (home.runs / run_id / "adapter").is_dir():
        raise RunError(
            f"run {run_id} has not finished ({summary.status}), and only a finished one is published; go on with"
            f" coadapt run --resume {run_id}"
        )
    return summary


def _roster(home: CoordinatorHome, summary: FieldSummary) -> SignedRoster:
    """The run's own roster: of now, or the one that it was published with before."""
    for path in (home.published / summary.run_id / "roster.json", home.roster):
        if path.exists():
            signed = SignedRoster.from_json(path.read_bytes())
            if signed.roster.digest().hex() == summary.roster_sha256:
                return signed
    raise RosterRefused(
        f"run {summary.run_id} was made under a roster that is not the present one of {home.roster}; put that one back"
        " to publish it, and then the present one again"
    )


def _part(folder: Path, part: str, source: Path) -> list[Listed]:
    """Copy a part where it is new; its files, sorted."""
    target = folder / part
    if not (source / _FACTS).is_file():
        raise RunError(f"{source} holds no {part} of Coadapt: {_FACTS} is not there; give a folder that Coadapt wrote")
    found = _files(source, part)
    if not target.exists():
        with new_folder(target) as copy:
            for file in found:
                place = copy.joinpath(*file.path.split("/")[1:])
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.joinpath(*file.path.split("/")[1:]), place)
    if _files(target, part) != found:
        raise RunError(
            f"{target} is not {source}: what was published once is never replaced, since sites may have it; begin"
            " another run, or restore what was changed"
        )
    return found


def _files(folder: Path, part: str) -> list[Listed]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = f"{part}/{path.relative_to(folder).as_posix()}"
        try:
            if path.is_symlink() or not path.is_file():
                raise ValueError("it is a link or no file")
            file_name(name)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append(Listed(path=name, size=file.tell(), sha256=digest))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be published: {error}") from error
    return found
