"""The only file that imports Flower (simulations add its engine), and how an envelope travels in its messages."""

import os

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a future default

import io
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from common.errors import MessageError

__all__ = [
    "SMALL_BYTES",
    "UNREADABLE",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Grid",
    "Message",
    "RecordDict",
    "ServerApp",
    "pack",
    "quiet",
    "unpack",
]

ENVELOPE = "envelope"

# An envelope of at most so many bytes travels as one value of Flower's, a larger one as an array, which Flower cuts up.
# Flower carries every nested object in a request of its own, through every process on the way: an array in its
# chunk, its array, its record and its message are five, a value three.
SMALL_BYTES = 1 << 20

# What Flower raises where it cannot build a message from what the other side wrote. A SuperLink that is gone is another
# kind of error.
UNREADABLE: tuple[type[Exception], ...] = (
    UnexpectedObjectContentError,
    DecodeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
)


def pack(data: bytes) -> RecordDict:
    """An envelope as a Flower record: one value, or where it is large one array of bytes, which Flower cuts up."""
    if len(data) <= SMALL_BYTES:
        return RecordDict({ENVELOPE: ConfigRecord({ENVELOPE: data})})
    return RecordDict({ENVELOPE: ArrayRecord({ENVELOPE: Array(np.frombuffer(data, dtype=np.uint8))})})


def unpack(content: RecordDict) -> bytes:
    """The envelope in a Flower record, which anybody may have written.

    Raises:
        MessageError: there is none.
    """
    small = content.config_records.get(ENVELOPE)
    if small is not None:
        value = small.get(ENVELOPE)
        if not isinstance(value, bytes):
            raise MessageError("a Flower message carries no envelope")
        return value
    try:
        written = io.BytesIO(content.array_records[ENVELOPE][ENVELOPE].data)
        # numpy.load would take other formats too, and allocate what a header asks for before it looks for the bytes.
        if np.lib.format.read_magic(written) != (1, 0):
            raise ValueError("not the version that Flower writes")
        shape, _, dtype = np.lib.format.read_array_header_1_0(written)
        data = written.read()
        if dtype != np.uint8 or shape != (len(data),):
            raise ValueError("not an array of so many bytes")
    except (KeyError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise MessageError("a Flower message carries no envelope") from error
    return data


def quiet(level: int = logging.ERROR) -> None:
    """Leave the terminal to the run's own view; Flower's errors still show."""
    logging.getLogger("flwr").setLevel(level)
