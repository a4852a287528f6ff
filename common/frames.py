"""Frames: what a coordinator and a vault sign and send each other in the field, around the messages of a round.

An order goes from the coordinator to one site, an answer comes back. Each is bytes: the length of its header (8 bytes,
big-endian), the header as JSON, the payload, and an Ed25519 signature (64 bytes) over all of it. The payload of an
order is an envelope (`common/messages.py`) or a message of the secure sum; that of an answer likewise.

A site answers one payload once: an order that is sent again, by a coordinator that was restarted too, gets the answer
that was made then. While a site still works on a payload it says so, and is asked again with a `poll`.
"""

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import MalformedMessage
from common.identity import SIGNATURE_BYTES, Identity, verify
from common.ledger_statement import STATEMENT_BYTES

__all__ = ["Answer", "Order", "OrderKind", "open_frame", "payload_digest", "seal_frame"]

MOST_HEADER_BYTES = 65_536
_LENGTH_BYTES = 8

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A `LedgerStatement` in hex, or nothing.
Statement = Annotated[str, Field(pattern=rf"^([0-9a-f]{{{2 * STATEMENT_BYTES}}})?$")]


OrderKind = Literal["hello", "request", "message", "poll", "cancel"]


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    federation: str = Field(pattern=r"^[0-9a-f]{32}$", description="the roster's federation")
    epoch: int = Field(ge=0, lt=2**32, description="the roster's epoch")
    manifest_sha256: Digest
    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    site: int = Field(ge=0, lt=2048, description="the site's number in the roster")


class Order(_Frame):
    """Coordinator to site.

    `hello` asks who is there. `request` carries an envelope, `message` a message of the secure sum. `poll` asks for the
    answer to a payload that came before, `cancel` says that nobody waits for it any more; both name it in `about`.
    `sequence` grows from order to order, over restarts too (nanoseconds of the clock, or one more than the last).
    `seen` is this site's own newest statement of its ledger's end that the coordinator was told.
    """

    kind: OrderKind
    sequence: int = Field(ge=0, lt=2**63)
    about: Digest | Literal[""] = ""
    seen: Statement = ""


class Answer(_Frame):
    """Site to coordinator.

    `message` carries the answer to a payload, `working` says how far it is (0 to 1), `done` answers a hello, a cancel,
    or a payload that wants no answer. `refused` says why in a fixed word; `reason` may add settings and numbers, and
    never what comes from a record. `to` is the order's sequence, `about` the digest of the payload that is answered,
    `ledger` the site's statement of its ledger's end.
    """

    kind: Literal["message", "working", "done", "refused"]
    to: int = Field(ge=0, lt=2**63)
    about: Digest | Literal[""] = ""
    code: str = Field("", pattern=r"^[A-Za-z0-9_:]{0,80}$")
    reason: str = Field("", max_length=1000)
    progress: float = Field(0.0, ge=0, le=1)
    ledger: Statement = ""


_LABELS: dict[type[Order | Answer], bytes] = {Order: b"coadapt order 1", Answer: b"coadapt answer 1"}
Header = TypeVar("Header", Order, Answer)


def seal_frame(identity: Identity, header: Order | Answer, payload: bytes = b"") -> bytes:
    """The signed frame as bytes."""
    text = header.model_dump_json().encode()
    data = len(text).to_bytes(_LENGTH_BYTES, "big") + text + payload
    return data + identity.sign(_LABELS[type(header)], data)


def open_frame(kind: type[Header], public: bytes, data: bytes) -> tuple[Header, bytes]:
    """Header and payload of a frame that `public` signed; nothing in it is looked at before.

    Raises:
        SignatureRefused: it is not signed by that key as this kind of frame.
        MalformedMessage: it is cut, of another version, or has an unknown field.
    """
    if len(data) < _LENGTH_BYTES + SIGNATURE_BYTES:
        raise MalformedMessage(f"a frame of {len(data)} bytes is cut")
    signed, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    verify(public, _LABELS[kind], signed, signature)
    length = int.from_bytes(signed[:_LENGTH_BYTES], "big")
    if not 0 < length <= min(MOST_HEADER_BYTES, len(signed) - _LENGTH_BYTES):
        raise MalformedMessage("a frame's header is longer than the frame, or than a header may be")
    end = _LENGTH_BYTES + length
    try:
        header = kind.model_validate(json.loads(signed[_LENGTH_BYTES:end]))
    except (ValidationError, ValueError, RecursionError) as error:
        raise MalformedMessage(
            f"a frame's header cannot be read ({type(error).__name__}); both sides need one version of Coadapt"
        ) from error
    return header, signed[end:]


def payload_digest(payload: bytes) -> str:
    """SHA-256 in hex, by which a payload is asked about."""
    return hashlib.sha256(payload).hexdigest()
