"""An exported file's own facts, from the `coadapt.json` beside it: its manifest, and that no byte of it changed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.manifest import Manifest
from common.errors import DistillationError
from server.distillation.domain_model import FACTS, sha256

__all__ = ["WEIGHTS", "ExportFacts", "read_facts"]

# Endings of the files of which a folder may hold several, each a whole model; the rest belongs to all of them.
WEIGHTS = (".onnx", ".gguf", ".safetensors")


@dataclass(frozen=True)
class ExportFacts:
    """What `coadapt.json` tells of an exported file."""

    manifest: Manifest
    facts: dict[str, Any]


def read_facts(path: Path) -> ExportFacts:
    """The facts beside an exported file, after the file and all that it needs were compared with their digests.

    Weights in other formats may be missing: a person who copies one of them leaves the others behind.

    Raises:
        DistillationError: there are no such facts, or a file was changed or is gone.
    """
    folder = path.parent
    try:
        written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        manifest = Manifest.model_validate_json(json.dumps(written["manifest"]))
        digests: dict[str, str] = dict(written["sha256"])
        facts: dict[str, Any] = dict(written["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillationError(
            f"{path} cannot be opened without the {FACTS} that `coadapt export` wrote beside it, which cannot be read"
            f" ({type(error).__name__})"
        ) from error
    if path.name not in digests:
        raise DistillationError(f"{path} is not among the files that {folder / FACTS} tells of; export it again")
    for name, digest in digests.items():
        wanted = name == path.name or not name.endswith(WEIGHTS)
        if wanted and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise DistillationError(f"{folder / name} was changed or is gone since it was exported; export it again")
    return ExportFacts(manifest, facts)
