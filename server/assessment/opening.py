"""Opens whatever a person may call a model: a run, an adapter, a model's folder, an exported file, a base.

What a path is shows in its own files, never in its name alone. This file knows how each kind is told and who reads it.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from common.config.manifest import Manifest
from common.errors import AssessmentError
from common.models import Base, find_base, load_task_model, load_tokenizer
from server.distillation.domain_model import FACTS, DomainModel, load_model

__all__ = ["Kind", "kind_of", "open_model", "stored_bytes"]

Kind = Literal["run", "adapter", "model", "onnx", "gguf", "base"]

_WEIGHTS = ("*.safetensors", "*.onnx", "*.gguf")
_KNOWN = (
    "a run's folder, an adapter's or model's folder of Coadapt, an .onnx or .gguf file of `coadapt export`, or with"
    " --manifest a base's folder"
)


def open_model(path: Path, *, base: Path | None = None, manifest: Manifest | None = None) -> DomainModel:
    """The model at `path`, ready to measure.

    Args:
        path: a run's folder, an adapter's, a model's, an .onnx or .gguf file (or a folder with one), or a base's.
        base: where the base of a run or adapter lies, if not where its manifest says.
        manifest: the task of a base, which has none of its own; for a causal base alone, since another would answer
            by a head that nobody trained. Everything else brings its own manifest.

    Raises:
        AssessmentError: the path is none of these.
        DistillationError: a model or an exported file is damaged.
        AdapterError, ModelError: an adapter is damaged or was trained on another base, or there is no such base.
    """
    kind, place = kind_of(path)
    if kind == "base":
        return _base(place, manifest)
    return _adapted(place, base) if kind in ("run", "adapter") else _READERS[kind](place)


def stored_bytes(path: Path, *, base: Path | None = None) -> int:
    """Bytes of the weights that the model at `path` needs on disk; of a run or adapter its base's too.

    Tokenizer and configuration are left out: a format that holds them, such as GGUF, counts with them all the same.
    """
    kind, place = kind_of(path)
    if kind in ("run", "adapter"):
        weights = sorted(_found_base(place, base).folder.glob("*.safetensors"))
        return sum(file.stat().st_size for file in [*weights, place / "adapter_model.safetensors"])
    if place.is_file():
        return sum(file.stat().st_size for file in (place, Path(f"{place}.data")) if file.is_file())
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


def kind_of(path: Path) -> tuple[Kind, Path]:
    """What `path` is, and the folder or file to read.

    Raises:
        AssessmentError: it is no model.
    """
    if not path.exists():
        raise AssessmentError(f"{path}: no such file or folder; a model is {_KNOWN}")
    if path.is_file():
        if path.suffix in (".onnx", ".gguf"):
            return cast(Kind, path.suffix[1:]), path
        raise AssessmentError(f"{path} is a file of another kind; a model is {_KNOWN}")
    if (path / "federation.toml").is_file() and (path / "rounds").is_dir():
        if not (path / "adapter" / FACTS).is_file():
            raise AssessmentError(
                f"{path} is a run without an adapter, so it did not finish; resume it, or give the folder of one of its"
                " rounds"
            )
        return "run", path / "adapter"
    if (path / FACTS).is_file():
        return _of_coadapt(path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "base", path
    return _exported(path)


def _of_coadapt(folder: Path) -> tuple[Kind, Path]:
    """A folder with `coadapt.json`: an adapter's names the base's weights; a model's may hold exports beside it."""
    try:
        is_adapter = "weights_sha256" in json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise AssessmentError(
            f"{folder / FACTS} cannot be read ({type(error).__name__}); restore the model from a copy"
        ) from error
    if is_adapter:
        return "adapter", folder
    exported = any(folder.glob("*.onnx")) or any(folder.glob("*.gguf"))
    return _exported(folder) if exported and not (folder / "model.safetensors").is_file() else ("model", folder)


def _exported(folder: Path) -> tuple[Kind, Path]:
    files = sorted([*folder.glob("*.onnx"), *folder.glob("*.gguf")])
    if not files:
        raise AssessmentError(f"{folder} holds no model; a model is {_KNOWN}")
    if len(files) > 1:
        raise AssessmentError(f"{folder} holds {len(files)} models; name one of them, such as {files[0]}")
    return cast(Kind, files[0].suffix[1:]), files[0]


def _found_base(adapter: Path, base: Path | None) -> Base:
    """The base that an adapter was trained on, by its manifest or where a person says that it lies."""
    try:
        facts = json.loads((adapter / FACTS).read_text(encoding="utf-8"))
        section = Manifest.model_validate_json(json.dumps(facts["manifest"])).model
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssessmentError(f"{adapter / FACTS} cannot be read ({type(error).__name__}); restore it") from error
    if base is not None:
        section = section.model_copy(update={"base": str(base), "revision": None})
    return find_base(section)


def _adapted(adapter: Path, base: Path | None) -> DomainModel:
    from common.adapters import load_adapter  # PEFT takes seconds to import, and no other kind needs it

    found = _found_base(adapter, base)
    network, manifest = load_adapter(adapter, found)
    return DomainModel(network.eval(), load_tokenizer(found), manifest)


def _base(folder: Path, manifest: Manifest | None) -> DomainModel:
    if manifest is None:
        raise AssessmentError(f"{folder} is a base, which has no task of its own; say which with --manifest")
    if manifest.task.kind != "causal-lm":
        raise AssessmentError(
            f"{folder} is a base, and its head for {manifest.task.kind} would be one that nobody trained; give a run,"
            " an adapter or a model"
        )
    section = manifest.model.model_copy(
        update={"base": str(folder), "revision": None, "weights_sha256": None, "tokenizer_sha256": None}
    )
    own = manifest.model_copy(update={"model": section})
    found = find_base(section)
    return DomainModel(load_task_model(found, own).eval(), load_tokenizer(found), own)


def _reader(module: str, name: str) -> Callable[[Path], DomainModel]:
    """The function that reads one format; its module is imported only when such a file is opened."""

    def read(path: Path) -> DomainModel:
        function: Any = getattr(importlib.import_module(f"server.distillation.{module}"), name)
        return cast(DomainModel, function(path))

    return read


_READERS: dict[str, Callable[[Path], DomainModel]] = {
    "model": load_model,
    "onnx": _reader("onnx_network", "load_onnx"),
    "gguf": _reader("gguf_export", "load_gguf"),
}
