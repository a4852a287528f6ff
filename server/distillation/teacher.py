"""The teacher: a run's base with its adapter merged in, a plain network again."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch import nn

from common.adapters import attach, set_state
from common.errors import DistillationError
from common.models import find_base, load_task_model
from server.assessment.opening import open_model
from server.distillation.domain_model import DomainModel

__all__ = ["load_teacher", "merged"]

# What these add is computed beside the base's weights, so no weight can hold it.
UNMERGED = ("prompt", "p-tuning", "prefix", "lora+prompt", "adapter")


def load_teacher(path: Path, *, base: Path | None = None) -> DomainModel:
    """The model of a finished run, or of an adapter's or model's folder, as one plain network in float32.

    A QLoRA adapter is merged into its base in full precision: the federation trained it beside the base in four bits,
    so the teacher is a little other, and mostly better, than what the run measured.

    Raises:
        DistillationError: the adapter's method adds what cannot be merged.
        CoadaptError: of its tree what `open_model` raises.
    """
    model = open_model(path, base=base)
    method = model.manifest.adapter.method
    if isinstance(model.network, PeftModel) and method == "qlora":
        model = _in_full_precision(model, path / "adapter" if (path / "adapter").is_dir() else path, base)
    return merged(model)


def merged(model: DomainModel) -> DomainModel:
    """The same function without an adapter beside it; a plain network is given back as it is.

    Raises:
        DistillationError: the adapter's method adds what cannot be merged.
    """
    network, method = model.network, model.manifest.adapter.method
    if isinstance(network, PeftModel):
        network = copy.deepcopy(network)
        _fold_pairs_below(network)
        network = cast(nn.Module, cast(Any, network).merge_and_unload())
    elif method in UNMERGED and any("bottleneck" in name or "prompted" in name for name, _ in network.named_modules()):
        raise DistillationError(
            f"an adapter of the method {method!r} cannot be merged into its base, which a compact model is copied from;"
            " the low-rank methods, ia3, bitfit, full and head can"
        )
    network.requires_grad_(False)
    return DomainModel(network.eval(), model.tokenizer, model.manifest)


def _fold_pairs_below(network: nn.Module) -> None:
    """Add scale B A of the pairs that `set_state` keeps beside a layer's own to the layer's weight."""
    for module in network.modules():
        pairs = getattr(module, "pairs_below", None)
        if pairs is None:
            continue
        layer, (a, b) = cast(Any, module), pairs
        weight = layer.get_base_layer().weight
        update = (b @ a) * layer.scaling["default"]
        with torch.no_grad():
            weight += (update.T if layer.fan_in_fan_out else update).to(weight.dtype)
        layer.pairs_below = None


def _in_full_precision(model: DomainModel, adapter: Path, base: Path | None) -> DomainModel:
    section = model.manifest.adapter.model_copy(update={"method": "lora"})
    manifest = model.manifest.model_copy(update={"adapter": section})
    place = manifest.model
    if base is not None:
        place = place.model_copy(update={"base": str(base), "revision": None})
    network = attach(load_task_model(find_base(place), manifest), section)
    set_state(network, load_file(adapter / "adapter_model.safetensors"))
    return DomainModel(network.eval(), model.tokenizer, manifest)
