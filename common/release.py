"""What a finished run gives to its institutions: a signed list of files, and the signed requests for them.

    Listing   run, manifest, roster, and every file with size and SHA-256; signed by the roster's coordinator
    Fetch     a site's request for the list or for a piece of a file; signed by the site
    Refusal   why the gate does not answer a request of a site that it knows; a fixed word, not signed

Listing and Fetch are bytes: JSON, and an Ed25519 signature (64 bytes) over it. A Fetch names the random number that the
gate drew when it was started, and a time later than that of every request of this site before, so none serves twice.
"""

import re
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import MalformedMessage
from common.identity import SIGNATURE_BYTES, Identity, verify

__all__ = [
    "LISTING",
    "MOST_FETCH_BYTES",
    "MOST_LISTING_BYTES",
    "PARTS",
    "PIECE_BYTES",
    "RELEASE_PATH",
    "RUN_ID",
    "WINDOW_SECONDS",
    "Fetch",
    "Listed",
    "Listing",
    "Refusal",
    "file_name",
    "open_fetch",
    "open_listing",
    "seal",
]

RELEASE_PATH = "/coadapt/v1/release"
LISTING = "listing.signed"
"""Name of the listing's file, on both sides."""
PIECE_BYTES = 8 << 20
"""Most that one request brings; at the gate's limit of 300 seconds a line of 28 KB/s is fast enough."""
MOST_FETCH_BYTES = 4096
MOST_LISTING_BYTES = 1 << 20
WINDOW_SECONDS = 300
"""How far the clocks of site and gate may be apart; Flower asks for the same."""

PARTS = ("adapter", "compact")
RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
# Tensors, tables and texts; nothing that is run or unpickled when it is loaded.
KINDS = (".safetensors", ".onnx", ".gguf", ".data", ".json", ".jinja", ".txt", ".model", ".md")
_FILE = re.compile(r"(?:adapter|compact)(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){1,3}")
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Random = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]


def file_name(path: str) -> str:
    """The path, if a published file may have it: adapter/NAME or compact/NAME, without a step out of the folder.

    Raises:
        ValueError: it may not.
    """
    if not _FILE.fullmatch(path):
        raise ValueError("a file's path must be adapter/NAME or compact/NAME, of letters, digits, '.', '_' and '-'")
    if not path.endswith(KINDS):
        raise ValueError(f"a file's name must end in one of {' '.join(KINDS)}")
    return path


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1


class Listed(BaseModel):
    """One file: `path` begins with its part, `size` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, AfterValidator(file_name)]
    size: int = Field(ge=0, lt=2**50)
    sha256: _Digest


class Listing(_Paper):
    """Everything that is published of a run. A later listing may add a part; no file is ever another."""

    federation: str = Field(pattern=r"^[0-9a-f]{32}$")
    epoch: int = Field(ge=0, lt=2**32)
    roster_sha256: _Digest
    manifest_sha256: _Digest
    run_id: str = Field(pattern=RUN_ID)
    files: tuple[Listed, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        # Without case, for disks that know none.
        names = {file.path.casefold() for file in self.files}
        folders = {name[:place] for name in names for place, letter in enumerate(name) if letter == "/"}
        if len(names) != len(self.files) or names & folders:
            raise ValueError("two files have one path, or one file is another's folder")
        return self

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)

    def part(self, name: str) -> tuple[Listed, ...]:
        """The files of a part, 'adapter' or 'compact'; none where it was not published."""
        return tuple(file for file in self.files if file.path.startswith(f"{name}/"))

    def file(self, path: str) -> Listed | None:
        """The file of this very path."""
        return next((file for file in self.files if file.path == path), None)


class Fetch(_Paper):
    """A request for `PIECE_BYTES` of a file from `offset` on, or for the listing where `path` is empty.

    `gate` is the number that the gate said (empty: not known yet), `time` nanoseconds since 1970.
    """

    federation: str = Field(pattern=r"^[0-9a-f]{32}$")
    run_id: str = Field(pattern=RUN_ID)
    public_key: _Digest
    gate: _Random
    time: int = Field(ge=0, lt=2**63)
    path: str = Field("", max_length=400)
    offset: int = Field(0, ge=0, lt=2**50)


class Refusal(_Paper):
    """`gate`: name this number; `clock`: too far from `time` (seconds since 1970); `replay`: not later than one before;
    `unpublished`, `roster`, `federation`, `file`: there is nothing for this site by that name."""

    code: Literal["gate", "clock", "replay", "unpublished", "roster", "federation", "file"]
    gate: _Random
    time: int


_LABELS: dict[type[Listing | Fetch], bytes] = {Listing: b"coadapt listing 1", Fetch: b"coadapt fetch 1"}
Signed = TypeVar("Signed", Listing, Fetch)


def seal(identity: Identity, paper: Listing | Fetch) -> bytes:
    """The signed paper as bytes."""
    data = paper.model_dump_json().encode()
    return data + identity.sign(_LABELS[type(paper)], data)


def open_listing(coordinator: bytes, data: bytes) -> Listing:
    """The listing that `coordinator` signed; nothing in it is looked at before.

    Raises:
        SignatureRefused: it is not signed by that key.
        MalformedMessage: it is too long, of another version, or names a file as none may be named.
    """
    if not SIGNATURE_BYTES < len(data) <= MOST_LISTING_BYTES:
        raise MalformedMessage(f"a list of published files has {MOST_LISTING_BYTES} bytes at most, found {len(data)}")
    verify(coordinator, _LABELS[Listing], data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:])
    return _read(Listing, data)


def open_fetch(data: bytes) -> Fetch:
    """The request, signed by the key that it names; whose key that is, is for the caller to know.

    Raises:
        SignatureRefused: it is not signed by that key.
        MalformedMessage: it is too long, of another version, or has an unknown field.
    """
    if not SIGNATURE_BYTES < len(data) <= MOST_FETCH_BYTES:
        raise MalformedMessage(f"a request has {MOST_FETCH_BYTES} bytes at most, found {len(data)}")
    asked = _read(Fetch, data)
    verify(bytes.fromhex(asked.public_key), _LABELS[Fetch], data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:])
    return asked


def _read(kind: type[Signed], data: bytes) -> Signed:
    try:
        return kind.model_validate_json(data[:-SIGNATURE_BYTES])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise MalformedMessage(f"a {kind.__name__.lower()} cannot be read: {place}: {first['msg']}") from error
