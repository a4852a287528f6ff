"""Every export of a model in one new folder, each compared with its source before it counts as done.

<out>/README.md             the model card
<out>/coadapt.json          manifest, digests of the files, facts: among them what was exported and how far it is from
                            its source
<out>/config.json, tokenizer.json ...
<out>/model.safetensors     format safetensors, as `save_model` writes it (head.safetensors for text classification)
<out>/model.onnx            format onnx; model.int8.onnx and model.int4.onnx for onnx-int8 and onnx-int4
<out>/model.q8_0.gguf       format gguf; model.f16.gguf and model.f32.gguf for gguf-f16 and gguf-f32
<out>/adapter/              format adapter: a run's adapter as PEFT reads it
<out>/triton/               format triton: a model repository, and the command of TensorRT

Each file of weights is a whole model with the files above it, the others may be removed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from common.config.distillation import Export
from common.durable import new_folder, write_text
from common.errors import DistillationError
from server.assessment.opening import open_model
from server.distillation.adapter_export import adapter_of, export_adapter
from server.distillation.deployment import write_repository
from server.distillation.domain_model import FACTS, DomainModel, load_model, save_model, sha256
from server.distillation.fidelity import Distance, distance, sample_of
from server.distillation.gguf_export import Precision, check_gguf, compare_vocabulary, export_gguf, load_gguf
from server.distillation.model_card import model_card
from server.distillation.onnx_export import export_onnx, quantise_int4, quantise_int8
from server.distillation.onnx_network import OnnxNetwork, load_onnx

__all__ = ["FORMATS", "TOLERANCE", "Exported", "export"]

FORMATS: tuple[str, ...] = get_args(Export)

# The largest mean distance (`fidelity.Distance.mean`) that is the rounding of the format; beyond it something is wrong.
# MiniLM with 77 labels, trained to be sure of them, is 2e-7 from its source in float32, 0.02 in int8 and 0.05 in 4 bits
# on its own domain's texts; on texts without meaning 6e-7, 0.12 and 0.18. A file that answers at random is at 0.9.
TOLERANCE: dict[str, float] = {
    "safetensors": 1e-6,
    "adapter": 1e-3,
    "onnx": 1e-3,
    "triton": 1e-3,
    "onnx-int8": 0.2,
    "onnx-int4": 0.35,
    "gguf": 0.05,
    "gguf-f16": 0.02,
    "gguf-f32": 1e-3,
}
FILES: dict[str, str] = {
    "safetensors": "model.safetensors",
    "adapter": "adapter",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "onnx-int4": "model.int4.onnx",
    "gguf": "model.q8_0.gguf",
    "gguf-f16": "model.f16.gguf",
    "gguf-f32": "model.f32.gguf",
    "triton": "triton",
}
_PRECISIONS: dict[str, Precision] = {"gguf": "q8_0", "gguf-f16": "f16", "gguf-f32": "f32"}


@dataclass(frozen=True)
class Exported:
    """One format: its file or folder, its bytes, and how far it is from its source (`fidelity.Distance`)."""

    format: str
    path: Path
    bytes: int
    difference: float
    agreement: float


def export(
    model: DomainModel,
    folder: Path,
    formats: Sequence[str],
    *,
    sample: Sequence[str] = (),
    run: Path | None = None,
    base: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    on_format: Callable[[str], None] | None = None,
    measure: Callable[[Exported, DomainModel], Mapping[str, Any]] | None = None,
) -> list[Exported]:
    """Write `model` to a new `folder` in each of `formats`; the folder appears only when all were compared.

    Args:
        model: the source, merged and in float32.
        folder: a new folder.
        formats: some of FORMATS.
        sample: texts to compare on; where there are none, `fidelity.sample_of` makes some.
        run: the run (or adapter's folder) that `model` is, for the format adapter.
        base: where that run's base lies, if not where its manifest says.
        facts: what the model card tells (`model_card.py` says which keys); stored in coadapt.json.
        on_format: called with each format before it is written.
        measure: called with each export and the model read back from it; what it gives joins the facts' steps.

    Raises:
        DistillationError: the folder exists, a format does not fit the task, a package is missing, or an export is
            further from its source than its TOLERANCE. Nothing is left behind.
    """
    wanted = list(dict.fromkeys(formats))
    _check(model, folder, wanted, run)
    texts = list(sample) or sample_of(model.tokenizer)
    done: list[Exported] = []
    steps = list((facts or {}).get("steps", []))
    with new_folder(folder) as part:
        _put_model(part, model, facts or {})
        for name in sorted(wanted, key=FORMATS.index):
            if on_format is not None:
                on_format(name)
            place = part / FILES[name]
            _write(name, part, model, run)
            _seal(part, {})
            opened = _opened(name, place, base)
            found = _compared(name, model, opened, texts)
            if name in _PRECISIONS:
                compare_vocabulary(model, place, texts)
            done.append(Exported(name, folder / FILES[name], _bytes(place), found.mean, found.agreement))
            if measure is not None:
                steps.append(dict(measure(done[-1], opened)))
        if "onnx" not in wanted:
            (part / FILES["onnx"]).unlink(missing_ok=True)
        if "safetensors" not in wanted:
            for name in ("model.safetensors", "head.safetensors"):
                (part / name).unlink(missing_ok=True)
        written = _seal(
            part, {"parameters": model.parameters, "steps": steps, "exports": [_as_fact(item) for item in done]}
        )
        write_text(part / "README.md", model_card(model, written))
    return done


def _check(model: DomainModel, folder: Path, formats: Sequence[str], run: Path | None) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        found = f"found {unknown[0]!r}" if unknown else "none is given"
        raise DistillationError(f"a format is one of {', '.join(FORMATS)}; {found}")
    if folder.exists():
        raise DistillationError(f"{folder} exists already; an export never replaces another: choose another folder")
    if _PRECISIONS.keys() & set(formats):
        check_gguf(model)
    if "adapter" in formats:
        if run is None:
            raise DistillationError(
                "the model is no run and has no adapter of its own: a compact model is merged; the format 'adapter'"
                " needs the folder of the run"
            )
        adapter_of(run)
    if isinstance(model.network, OnnxNetwork):
        raise DistillationError("an ONNX file cannot be exported again; give the folder of the model behind it")


def _put_model(part: Path, model: DomainModel, facts: Mapping[str, Any]) -> None:
    """The model's folder as `save_model` writes it, in a folder that is there already."""
    save_model(part / "model", model, facts)
    for path in (part / "model").iterdir():
        path.rename(part / path.name)
    (part / "model").rmdir()


def _write(name: str, part: Path, model: DomainModel, run: Path | None) -> None:
    place, graph = part / FILES[name], part / FILES["onnx"]
    if name.startswith("onnx") or name == "triton":
        if not graph.exists():
            export_onnx(model, graph)
        match name:
            case "onnx-int8":
                quantise_int8(graph, place)
            case "onnx-int4":
                quantise_int4(graph, place)
            case "triton":
                write_repository(model, graph, place)
    elif name in _PRECISIONS:
        export_gguf(model, place, precision=_PRECISIONS[name])
    elif name == "adapter":
        export_adapter(cast(Path, run), place)


def _opened(name: str, place: Path, base: Path | None) -> DomainModel:
    """The export as whoever gets it would open it."""
    if name in _PRECISIONS:
        return load_gguf(place)
    match name:
        case "adapter":
            return open_model(place, base=base)
        case "safetensors":
            return load_model(place.parent)
        case "triton":
            beside = load_onnx(place.parent / FILES["onnx"])
            graph = next(place.rglob("model.onnx"))
            return DomainModel(OnnxNetwork(graph).eval(), beside.tokenizer, beside.manifest)
    return load_onnx(place)


def _compared(name: str, model: DomainModel, exported: DomainModel, texts: Sequence[str]) -> Distance:
    found = distance(model, exported, texts)
    if not found.mean <= TOLERANCE[name]:  # a NaN is no distance within it
        raise DistillationError(
            f"the {name} export says something else than its source: mean distance {found.mean:.2g} where at most"
            f" {TOLERANCE[name]:g} is the format's rounding; nothing was written, export another format"
        )
    return found


def _seal(part: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write coadapt.json again, with the digests of the files that are there now; returns all facts."""
    written = cast(dict[str, Any], json.loads((part / FACTS).read_text(encoding="utf-8")))
    written["facts"] |= facts
    names = sorted(path.name for path in part.iterdir() if path.is_file() and path.name not in (FACTS, "README.md"))
    written["sha256"] = {name: sha256(part / name) for name in names}
    write_text(part / FACTS, json.dumps(written, indent=2) + "\n")
    return cast(dict[str, Any], written["facts"])


def _as_fact(item: Exported) -> dict[str, Any]:
    return {
        "format": item.format,
        "file": item.path.name,
        "bytes": item.bytes,
        "difference": item.difference,
        "tolerance": TOLERANCE[item.format],
        "agreement": item.agreement,
    }


def _bytes(place: Path) -> int:
    """Bytes of the weights: of a safetensors file with its head's, of a folder all files'."""
    if place.name == FILES["safetensors"]:
        return sum(path.stat().st_size for path in place.parent.glob("*.safetensors"))
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.is_file())
