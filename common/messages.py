"""Envelopes: what a coordinator and a site say to each other. Versioned and strict; no torch, no Flower.

An envelope is bytes: the length of its header (8 bytes, big-endian), the header as JSON, and tensors in the
safetensors format. What travels is numbers and fixed words, never text from records.
"""

import json
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from common.errors import MessageError

__all__ = [
    "Envelope",
    "Evaluate",
    "Evaluated",
    "Header",
    "Project",
    "Projected",
    "Refused",
    "RoundDone",
    "RoundStart",
    "decode",
    "encode",
]

Tensors = dict[str, npt.NDArray[np.float32]]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    version: Literal[1] = 1
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str
    round: int = Field(ge=0)
    adapter_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of the adapter that this speaks of")

    def spoken_of(self) -> dict[str, Any]:
        """What a request and its answer must have in common."""
        return self.model_dump(include={"manifest_sha256", "run_id", "round", "adapter_sha256"})


class _Request(_Header):
    """What a coordinator asks. With a secure sum `secure_sum` holds the protocol's own RoundStart, in hex, and `ranges`
    how far each summed tensor's values may go, in the unit of the values; without one both are empty. `sites` is how
    many sites' values the vector has room for; 0: as many as are invited. It is one number in all attempts at a sum,
    whoever is invited, since only the identical vector may be masked anew."""

    secure_sum: str = Field("", pattern=r"^([0-9a-f]{2})*$", max_length=65536)
    ranges: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    sites: int = Field(0, ge=0, le=2048)


class RoundStart(_Request):
    """Coordinator to site: train from the adapter in the tensors.

    `evaluate` asks the site to measure that adapter on its held-out records first. How many steps to take is agreed
    in the manifest and not the coordinator's to say. `accepted` is the number of aggregations that went into the
    adapter; what trains in the round follows from it (`common/contribution.py`).
    """

    kind: Literal["round_start"] = "round_start"
    evaluate: bool
    accepted: int = Field(ge=0)


class RoundDone(_Header):
    """Site to coordinator: what the site contributes is in the tensors (`common/contribution.py`).

    `records` is the number of training records, the weight in the mean. `loss` is the mean over the round's steps.
    `counts` are those of the received adapter on held-out records, empty if none were asked for or are held out.
    `seconds` is the time in training steps.

    With privacy nothing here is computed from records: `records` is the number of units that the site publishes,
    `examples` the number expected, `loss` is missing, `counts` are empty, and `seconds` are rounded up to whole ones.
    `noise_multiplier` and `sampling_rate` say what protects a unit; without privacy both are missing.
    """

    kind: Literal["round_done"] = "round_done"
    records: int = Field(ge=1)
    examples: int = Field(ge=0)
    loss: float | None
    counts: dict[str, float]
    seconds: float = Field(ge=0)
    noise_multiplier: float | None
    sampling_rate: float | None


class Project(_Request):
    """Coordinator to site: the round's first sum has given a basis, which is in the tensors, for its second sum."""

    kind: Literal["project"] = "project"


class Projected(_Header):
    """Site to coordinator: the products that it trained in the round, projected on the basis, are in the tensors."""

    kind: Literal["projected"] = "projected"


class Evaluate(_Request):
    """Coordinator to site: measure the adapter in the tensors on held-out records."""

    kind: Literal["evaluate"] = "evaluate"


class Evaluated(_Header):
    """Site to coordinator: counts on held-out records, empty if there are none."""

    kind: Literal["evaluated"] = "evaluated"
    counts: dict[str, float]


class Refused(_Header):
    """Site to coordinator: no answer this time; `code` is a fixed word of `common/errors.py`."""

    kind: Literal["refused"] = "refused"
    code: str = Field(pattern=r"^[A-Za-z0-9_:]{1,80}$")


Header = Annotated[
    RoundStart | RoundDone | Project | Projected | Evaluate | Evaluated | Refused, Field(discriminator="kind")
]
_HEADERS: TypeAdapter[Any] = TypeAdapter(Header)


class Envelope(BaseModel):
    """A header and the tensors that it speaks of."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    header: Header
    tensors: dict[str, Any] = Field(default_factory=dict)


def encode(envelope: Envelope) -> bytes:
    """The envelope as bytes."""
    header = envelope.header.model_dump_json().encode()
    tensors: bytes = tensors_to_bytes(envelope.tensors)
    return len(header).to_bytes(8, "big") + header + tensors


def decode(data: bytes) -> Envelope:
    """The envelope in `data`.

    Raises:
        MessageError: it is cut, of another version, has an unknown field or a tensor that is not float32.
    """
    try:
        length = int.from_bytes(data[:8], "big")
        header = _HEADERS.validate_python(json.loads(data[8 : 8 + length]))
        tensors = tensors_from_bytes(data[8 + length :])
    except (ValueError, KeyError, RecursionError, SafetensorError) as error:  # KeyError: a dtype without a numpy twin
        raise MessageError(
            f"an envelope cannot be read: {type(error).__name__}; both sides need one version"
        ) from error
    if any(array.dtype != np.float32 for array in tensors.values()):
        raise MessageError("an envelope holds a tensor that is not float32")
    return Envelope(header=header, tensors=tensors)
