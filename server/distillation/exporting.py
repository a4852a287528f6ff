"""From a path that a person names to its exports: opens the model, gathers its facts, and hands both on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import DistillationError
from server.distillation.domain_model import FACTS, DomainModel
from server.distillation.exports import Exported, export
from server.distillation.federation_facts import federation_facts
from server.distillation.teacher import load_teacher

__all__ = ["export_path"]


def export_path(
    path: Path,
    out: Path,
    formats: Sequence[str],
    *,
    texts: Path | None = None,
    base: Path | None = None,
    license_name: str | None = None,
    on_format: Callable[[str], None] | None = None,
) -> list[Exported]:
    """Export the run, adapter or compact model at `path` to the new folder `out`.

    `formats` empty: those of the manifest's [distillation]. `texts` is a file with one text a line to compare on.

    Raises:
        DistillationError: as `exports.export`, or `texts` cannot be read.
        AssessmentError, AdapterError, ModelError: `path` is no model, or cannot be opened.
    """
    sample = _lines(texts) if texts is not None else []
    model = load_teacher(path, base=base)
    is_run = (path / "federation.toml").is_file() or (path / "adapter_model.safetensors").is_file()
    facts = _facts(path, model)
    if license_name is not None:
        facts["license"] = license_name
    return export(
        model,
        out,
        formats or model.manifest.distillation.exports,
        sample=sample,
        run=path if is_run else None,
        base=base,
        facts=facts,
        on_format=on_format,
    )


def _facts(path: Path, model: DomainModel) -> dict[str, Any]:
    """What is known of the model: of a run its summary, of a compact model what was stored with it."""
    if (path / "summary.json").is_file():
        federation = federation_facts(path)
        made = "Base and adapter of the run were merged in float32; nothing else was done."
        step = {"name": "the run's model", "parameters": model.parameters, "figures": federation.get("figures")}
        return {"federation": federation, "made": [made], "steps": [step] if federation.get("figures") else []}
    try:
        written = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return dict(written.get("facts", {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DistillationError(f"{path} cannot be read as text in UTF-8 ({type(error).__name__})") from error
    found = [line for line in lines if line]
    if not found:
        raise DistillationError(f"{path} holds no text; write one text on each line")
    return found
