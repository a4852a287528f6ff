"""An adapter's state: PEFT's tensor names to float32 arrays, head included; canonical order is the sorted names."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["AdapterState", "state_digest"]

AdapterState = dict[str, npt.NDArray[np.float32]]


def state_digest(state: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """SHA-256 in hex over names, shapes and values in canonical order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name], dtype="<f4")
        digest.update(json.dumps([name, list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
