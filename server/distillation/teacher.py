"""The teacher: a run's base and adapter, merged into one model."""

from pathlib import Path

from common.adapters import adapter_facts, load_adapter, merge_adapter
from common.errors import DistillationError
from common.models import find_base, load_tokenizer
from server.distillation.domain_model import DomainModel

__all__ = ["MERGED_METHODS", "load_teacher", "merge_stored"]

# Methods whose adapter becomes part of the base's own weights, or is part of them from the start.
MERGED_METHODS = ("lora", "qlora", "rslora", "dora", "ia3", "full", "bitfit", "head")


def load_teacher(run: Path, *, base: Path | None = None) -> DomainModel:
    """The merged model of a finished run's folder, on the CPU in float32; `base` is where the base lies here.

    An adapter of method qlora is added to the base in full precision: rounding the sum to four bits again would lose
    what the adapter says. It was trained beside the rounded base, so the merged model is not exactly the trained one.

    Raises:
        DistillationError: the folder holds no run, the run is not finished, or its method cannot be merged.
        ModelError: the base is not here, or is another one than the adapter was trained on.
        AdapterError: the stored adapter cannot be read or does not fit.
    """
    if not (run / "federation.toml").is_file() or not (run / "rounds").is_dir():
        raise DistillationError(f"{run} holds no run: it has no federation.toml and rounds/; give a run's folder")
    if not (run / "adapter").is_dir():
        raise DistillationError(f"the run in {run} is not finished: it has no adapter/ yet; resume it, or wait for it")
    return merge_stored(run / "adapter", base=base)


def merge_stored(folder: Path, *, base: Path | None = None) -> DomainModel:
    """The merged model of an adapter's folder; see `load_teacher`."""
    manifest, _ = adapter_facts(folder)
    method = manifest.adapter.method
    if method not in MERGED_METHODS:
        raise DistillationError(
            f"adapter.method: {method!r} cannot be merged into the base, since it computes beside the weights; methods"
            f" that can: {', '.join(MERGED_METHODS)}"
        )
    section = manifest.model if base is None else manifest.model.model_copy(update={"base": str(base)})
    found = find_base(section)
    model, manifest = load_adapter(folder, found, full_precision=True)
    network = merge_adapter(model).eval().requires_grad_(True)
    return DomainModel(network, load_tokenizer(found), manifest)
