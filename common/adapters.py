"""Low-rank adapters through PEFT: attached to a task model, read, swapped and stored.

An adapter's *state* is a dictionary from PEFT's own tensor names to float32 arrays; the task's head is part of it.
States are what sites train, send and receive; their order is the sorted order of the names.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes
from torch import nn

from common.codec.state import AdapterState
from common.config.manifest import AdapterSection, Manifest
from common.errors import AdapterError, ModelError
from common.models import Base, head_name, load_task_model
from common.randomness import seeded

__all__ = [
    "attach",
    "first_state",
    "get_state",
    "linear_targets",
    "load_adapter",
    "save_adapter",
    "set_state",
    "trained_parameters",
]

# Linear layers that are no part of the residual network: the head of a task and the output embedding.
NOT_TARGETED = frozenset({"head", "classifier", "score", "lm_head", "embed_out"})


def linear_targets(model: nn.Module) -> list[str]:
    """Names (last part of the path, sorted) of all linear layers of the base, without heads."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(names - NOT_TARGETED)


def attach(model: nn.Module, section: AdapterSection) -> PeftModel:
    """The task model with a LoRA adapter (Hu et al. 2021, section 4.1) on its linear layers, and its head trainable.

    Raises:
        AdapterError: a target names no linear layer of the model.
    """
    known = linear_targets(model)
    targets = known if section.targets == "auto" else list(section.targets)
    paths = [f".{name}" for name, _ in model.named_modules()]
    unknown = [
        name
        for name in targets
        if name.rsplit(".", 1)[-1] not in known or not any(path.endswith(f".{name}") for path in paths)
    ]
    if unknown or not targets:
        raise AdapterError(
            f"adapter.targets: {unknown[0] if unknown else 'auto'!r} is no linear layer of the base;"
            f" it has {', '.join(known) or 'none'}"
        )
    head = head_name(model)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        modules_to_save=[head] if head else None,
        bias="none",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    with warnings.catch_warnings():
        # PEFT asks for a property by a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return cast(PeftModel, get_peft_model(model, config))


def get_state(model: PeftModel) -> AdapterState:
    """A copy of the adapter and head, by PEFT's names in sorted order."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in trained_parameters(model).items()
    }


def set_state(model: PeftModel, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Put an adapter and head into the model, which keeps its base.

    Raises:
        AdapterError: a tensor is missing, unknown or of another shape.
    """
    parameters = trained_parameters(model)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(array.shape) for name, array in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise AdapterError(
            f"the adapter does not fit the model: {wrong} has shape {found.get(wrong, 'none')},"
            f" the model needs {expected.get(wrong, 'none')}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(state[name])))  # a copy: it may be read-only


def trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of adapter and head by PEFT's names, sorted; PEFT takes its time, so it is asked once a model."""
    if model not in _named:
        by_place = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        named = {name: by_place[tensors[name].data_ptr()] for name in sorted(tensors)}
        shipped = {id(parameter) for parameter in named.values()}
        if any(parameter.requires_grad and id(parameter) not in shipped for parameter in model.parameters()):
            raise AdapterError("the model trains parameters that its adapter does not hold, so they would be lost")
        _named[model] = named
    return _named[model]


_named: WeakKeyDictionary[PeftModel, dict[str, nn.Parameter]] = WeakKeyDictionary()


def first_state(model: PeftModel, seed: int) -> AdapterState:
    """The adapter that a run starts from: a function of the shapes and the agreed seed alone.

    A and the head's weight are uniform with the bounds of Kaiming's method for a linear layer (a = sqrt(5), so
    1/sqrt(inputs)); B and the head's bias are zero, so the untrained adapter changes nothing.
    """
    state = get_state(model)
    for name, array in state.items():
        if name.endswith("lora_B.weight") or array.ndim < 2:
            array[...] = 0.0
        else:
            bound = 1 / math.sqrt(array.shape[1])
            array[...] = seeded(seed, "first adapter", name).uniform(-bound, bound, array.shape)
    return state


def save_adapter(folder: Path, model: PeftModel, state: AdapterState, base: Base, manifest: Manifest) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `coadapt.json` into an existing folder.

    `PeftModel.from_pretrained(load_task_model(base, manifest), folder)` reads it; `load_adapter` does both.
    """
    config = model.peft_config["default"]
    values = {**config.to_dict(), "base_model_name_or_path": base.name, "revision": manifest.model.revision}
    values["inference_mode"] = True
    (folder / "adapter_config.json").write_text(
        json.dumps(values, indent=2, sort_keys=True, default=_plain) + "\n", encoding="utf-8"
    )
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, metadata={"format": "pt"}))
    agreed = manifest.model_dump(mode="json", exclude={"simulation"})
    (folder / "coadapt.json").write_text(
        json.dumps({"manifest": agreed, "weights_sha256": base.weights_sha256}, indent=2) + "\n", encoding="utf-8"
    )


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return getattr(value, "value", str(value))


def load_adapter(folder: Path, base: Base) -> tuple[PeftModel, Manifest]:
    """The task model of a stored adapter, ready to measure or serve, and the manifest it was made under.

    Raises:
        AdapterError: the folder holds no adapter of Coadapt, or it does not fit.
        ModelError: the base is another one than the adapter was trained on.
    """
    try:
        facts = json.loads((folder / "coadapt.json").read_text(encoding="utf-8"))
        manifest = Manifest.model_validate_json(json.dumps(facts["manifest"]))
        trained_on = facts["weights_sha256"]
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(f"{folder} holds no adapter of Coadapt: {type(error).__name__}") from error
    if trained_on != base.weights_sha256:
        raise ModelError(f"{folder} was trained on weights {trained_on}, found {base.weights_sha256}")
    model = attach(load_task_model(base, manifest), manifest.adapter)
    set_state(model, state)
    model.eval()
    return model, manifest
