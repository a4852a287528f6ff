"""What an offline bundle is, and how one is checked: a plain tar of wheels and a base model, with the digest of each.

<coadapt-VERSION>/bundle.json        what it is, for which Python and machine, and size and SHA-256 of every file; first
<coadapt-VERSION>/SHA256SUMS         the same digests as `sha256sum -c` reads them, where Coadapt is not installed yet
<coadapt-VERSION>/README.txt         how it is installed
<coadapt-VERSION>/requirements.txt   every package with version and digest, for pip
<coadapt-VERSION>/wheels/            the packages
<coadapt-VERSION>/hub/               the base as the hub's cache has it; for a base that was a directory: base/NAME/
"""

import hashlib
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import BundleError

__all__ = ["FACTS", "SUMS", "BundledBase", "BundledFile", "Facts", "Hashed", "check_bundle", "machine", "sums_of"]

FACTS = "bundle.json"
SUMS = "SHA256SUMS"
MOST_FACTS_BYTES = 8 << 20
_STEP = 1 << 20


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BundledFile(_Stored):
    """Size in bytes and digest of a file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BundledBase(_Stored):
    """The base model: as a manifest names it, the digests that a manifest pins, and the folder it lies in."""

    name: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    folder: str


class Facts(_Stored):
    """What a bundle holds. `files` are all but bundle.json and SHA256SUMS."""

    version: Literal[1] = 1
    coadapt: str = Field(pattern=r"^[A-Za-z0-9.+!-]{1,100}$")
    python: str
    platform: str
    base: BundledBase
    files: dict[str, BundledFile]

    @property
    def top(self) -> str:
        """The folder that everything lies in."""
        return f"coadapt-{self.coadapt}"


def machine() -> tuple[str, str]:
    """This Python and this platform: what wheels depend on."""
    return f"{sys.version_info.major}.{sys.version_info.minor}", sysconfig.get_platform()


def sums_of(digests: Mapping[str, str]) -> str:
    """The lines of `sha256sum`, sorted by path."""
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))


class Hashed:
    """A file that is read or written from begin to end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def write(self, data: bytes) -> int:
        """Append bytes."""
        self._sha256.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """SHA-256 of what went through."""
        return self._sha256.hexdigest()


def check_bundle(path: Path) -> tuple[Facts, str]:
    """What a bundle holds, every byte of it compared with its digests, and the digest of the whole file.

    It is read once and never held in memory. That the digests are those of the bundle's maker shows the digest of the
    whole alone, which people compare.

    Raises:
        BundleError: it is none, or a file is missing, changed, there twice or not listed.
    """
    try:
        with path.open("rb") as plain:
            file = Hashed(plain)
            with tarfile.open(fileobj=file, mode="r|", bufsize=_STEP) as tar:  # type: ignore[call-overload]  # it reads
                facts = _compared(tar, path)
            while file.read(_STEP):
                pass
            return facts, file.hexdigest()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise BundleError(f"{path} cannot be read as a bundle: {error}; it was cut or is none") from error


def _compared(tar: tarfile.TarFile, path: Path) -> Facts:
    facts: Facts | None = None
    wanted: dict[str, str] = {}
    for member in tar:
        content = tar.extractfile(member) if member.isreg() else None
        if content is None:
            raise BundleError(f"{path}: {member.name} is no plain file; a bundle holds nothing else")
        if facts is None:
            data = content.read(MOST_FACTS_BYTES)
            facts = _facts(member, data, path)
            digests = {name: file.sha256 for name, file in facts.files.items()}
            digests[FACTS] = hashlib.sha256(data).hexdigest()
            wanted = {f"{facts.top}/{name}": digest for name, digest in digests.items() if name != FACTS}
            wanted[f"{facts.top}/{SUMS}"] = hashlib.sha256(sums_of(digests).encode()).hexdigest()
            continue
        digest = wanted.pop(member.name, None)
        if digest is None:
            raise BundleError(f"{path}: {member.name} is not listed in its {FACTS}, or is there twice")
        found = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # an IO[bytes] is one
        if found != digest:
            raise BundleError(f"{path}: {member.name} was changed: its SHA-256 is {found}, listed is {digest}")
    if facts is None or wanted:
        raise BundleError(f"{path}: {next(iter(sorted(wanted)), FACTS)} is missing; the file was cut, copy it again")
    return facts


def _facts(member: tarfile.TarInfo, data: bytes, path: Path) -> Facts:
    try:
        facts = Facts.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(
            f"{path} is no bundle that this version reads: it does not begin with a {FACTS} of its own"
        ) from error
    if member.name != f"{facts.top}/{FACTS}":
        raise BundleError(f"{path} is no bundle: it begins with {member.name}")
    return facts
