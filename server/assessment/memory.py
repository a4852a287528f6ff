"""How much memory a model needs, measured in a fresh process that opens it, runs it and does nothing else.

    python -m server.assessment.memory < request.json

reads the request of `peak_memory` and prints its answer; texts come through the pipe, never through arguments, which
other users of a machine can see.
"""

import contextlib
import importlib
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config.manifest import Manifest
from common.errors import AssessmentError

__all__ = ["PeakMemory", "peak_memory"]

MIB = 2**20
_STATUS = Path("/proc/self/status")
LONGEST = 600  # seconds that opening and running may take

# What each kind is read with, beyond what all are.
_LIBRARIES = {"run": "common.adapters", "adapter": "common.adapters", "onnx": "onnxruntime", "gguf": "gguf"}


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory in MiB: the most that the process had, and of it what came after Python and its libraries.

    A base's weights are mapped from their file, so rows of the embedding that no text asked for are not resident.
    """

    process: float
    model: float


def peak_memory(
    path: Path, texts: list[str], *, base: Path | None = None, manifest: Manifest | None = None
) -> PeakMemory:
    """The peak while the model at `path` is opened and reads `texts` one by one on one thread.

    `base` and `manifest` as `opening.open_model` takes them.

    Raises:
        AssessmentError: the process failed; it is told how, never what it printed, which could hold a text.
    """
    request = {
        "path": str(path),
        "texts": texts,
        "base": None if base is None else str(base),
        "manifest": None if manifest is None else manifest.model_dump(mode="json"),
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "server.assessment.memory"],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssessmentError(f"peak memory: the process that opens {path} took longer than {LONGEST} s") from error
    if ended.returncode:
        raise AssessmentError(f"peak memory: the process that opens {path} ended with status {ended.returncode}")
    return PeakMemory(**json.loads(ended.stdout.splitlines()[-1]))


def _measure(request: str) -> PeakMemory:
    from server.assessment.opening import kind_of, open_model
    from server.assessment.timing import latency, one_thread

    asked = json.loads(request)
    manifest = None if asked["manifest"] is None else Manifest.model_validate_json(json.dumps(asked["manifest"]))
    # Libraries load parts of themselves only when they meet a model; those are no part of it either.
    for library in ("transformers.modeling_utils", _LIBRARIES.get(kind_of(Path(asked["path"]))[0])):
        if library is not None:
            importlib.import_module(library)
    before = _now()
    with one_thread():
        model = open_model(Path(asked["path"]), base=asked["base"] and Path(asked["base"]), manifest=manifest)
        latency(model, asked["texts"], repetitions=1)
    after = _highest()
    return PeakMemory(process=after / MIB, model=(after - before) / MIB)


def _now() -> int:
    """Bytes resident now, from which the peak counts anew (Linux; elsewhere the most until now)."""
    if not _STATUS.is_file():
        return _highest()
    with contextlib.suppress(OSError):  # a kernel that refuses leaves the peak of importing in, which is small
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _from_status("VmRSS:")


def _highest() -> int:
    """The most bytes that this process had resident.

    Linux: VmHWM, which belongs to this program alone; `ru_maxrss` starts at what the parent had when it forked.
    """
    if _STATUS.is_file():
        return _from_status("VmHWM:")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _from_status(key: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(sys.stdin.read()))))
