"""The only file that imports Flower (simulations add its engine), and how an envelope travels in its messages.

Flower reports to its makers and looks for updates by default; both are switched off before it is imported.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a future default

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.errors import MessageError

__all__ = [
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


def pack(data: bytes) -> RecordDict:
    """An envelope as a Flower record: one array of bytes, which Flower sends in pieces when it is large."""
    return RecordDict({ENVELOPE: ArrayRecord({ENVELOPE: Array(np.frombuffer(data, dtype=np.uint8))})})


def unpack(content: RecordDict) -> bytes:
    """The envelope in a Flower record.

    Raises:
        MessageError: there is none.
    """
    try:
        return content.array_records[ENVELOPE][ENVELOPE].numpy().tobytes()
    except (KeyError, ValueError) as error:
        raise MessageError("a Flower message carries no envelope") from error


def quiet(level: int = logging.ERROR) -> None:
    """Leave the terminal to the run's own view; Flower's errors still show."""
    logging.getLogger("flwr").setLevel(level)
