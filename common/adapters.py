"""Adapters: attached to a task model, read, swapped and stored.

An adapter's *state* is a dictionary from tensor names to float32 arrays; the task's head is part of it. The names are
PEFT's own where PEFT has a file format for the method, else the places in the task model. States are what sites train,
send and receive; their order is the sorted order of the names.
"""

import contextlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional

from common.adapter_methods import Prompted, add_adapter
from common.codec.state import AdapterState
from common.config.manifest import AdapterSection, Manifest
from common.errors import AdapterError, ModelError
from common.factors import below, depth, factor_of, is_head, newest, pairs_of
from common.models import Base, load_task_model
from common.randomness import seeded

__all__ = [
    "attach",
    "first_state",
    "get_state",
    "is_head",
    "load_adapter",
    "save_adapter",
    "set_state",
    "train_head_alone",
    "train_only",
    "trained_parameters",
]


def attach(model: nn.Module, section: AdapterSection) -> nn.Module:
    """The task model with the manifest's adapter; adapter and head train, all else is frozen.

    Raises:
        AdapterError: the base has nothing that the method could train, or lacks a target.
    """
    adapted = add_adapter(model, section)
    trained_parameters(adapted)  # they are what trains now, also while a round trains the head alone
    return adapted


def get_state(model: nn.Module) -> AdapterState:
    """A copy of the adapter and head, by PEFT's names in sorted order; of stacked pairs the newest alone."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in trained_parameters(model).items()
    }


def set_state(model: nn.Module, state: Mapping[str, npt.NDArray[np.float32]], *, any_rank: bool = False) -> None:
    """Put an adapter and head into the model, which keeps its base.

    Low-rank pairs may be stacks, of a rank that is a multiple of the model's (with `any_rank`, any larger one): their
    newest part goes into the model's own pairs, which train, and the rest computes beside them.

    Raises:
        AdapterError: a tensor is missing, unknown or of another shape.
    """
    parameters = trained_parameters(model)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    rank = next((shape[0] for name, shape in expected.items() if factor_of(name) == "A"), 0)
    under: AdapterState = {}
    with contextlib.suppress(AdapterError):  # where these are no stacks, what is wrong is said below
        if rank and expected.keys() == state.keys():
            if not any_rank:
                depth({name: array.shape for name, array in state.items()}, rank)
            under = below(state, rank)
            state = newest(state, rank)
    found = {name: tuple(array.shape) for name, array in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise AdapterError(
            f"the adapter does not fit the model: {wrong} has shape {found.get(wrong, 'none')},"
            f" the model needs {expected.get(wrong, 'none')}"
        )
    _set_stack(model, under)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(state[name])))  # a copy: it may be read-only


def _set_stack(model: nn.Module, under: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Let every low-rank layer add what the pairs below its own compute; none where there are none."""
    if not under and model not in _stacking:
        return
    parameters = trained_parameters(model)
    lora = [cast(Any, layer) for layer in model.modules() if hasattr(layer, "lora_A")]
    layers = {id(layer.lora_A["default"].weight): layer for layer in lora}
    for pair in pairs_of(parameters):
        layer = layers[id(parameters[pair.a])]
        if model not in _stacking:
            layer.register_forward_hook(_through_stack)
        device = parameters[pair.a].device
        tensors = [torch.from_numpy(np.array(under[name])).to(device) for name in pair] if under else None
        layer.pairs_below = tensors
    _stacking[model] = True


def _through_stack(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """output + scale x B (A x): a hook, and not one more adapter of PEFT's, of which a base has one head each."""
    pairs = cast(list[Tensor] | None, layer.pairs_below)
    if pairs is None:
        return output
    a, b = pairs
    inner = functional.linear(inputs[0].to(a.dtype), a)
    scaling = cast(dict[str, float], layer.scaling)["default"]
    return output + (functional.linear(inner, b.to(inner.dtype)) * scaling).to(output.dtype)


_stacking: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapter and head by name, sorted; PEFT takes its time, so it is asked once a model."""
    if model not in _named:
        by_place = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        if isinstance(model, PeftModel):
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
            named = {name: by_place[tensors[name].data_ptr()] for name in sorted(tensors)}
        else:
            named = dict(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))
        shipped = {id(parameter) for parameter in named.values()}
        if any(parameter.requires_grad and id(parameter) not in shipped for parameter in model.parameters()):
            raise AdapterError("the model trains parameters that its adapter does not hold, so they would be lost")
        _named[model] = named
        _as_loaded[model] = {n: p.detach().to("cpu", torch.float32, copy=True).numpy() for n, p in named.items()}
    return _named[model]


_named: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()
_as_loaded: WeakKeyDictionary[nn.Module, AdapterState] = WeakKeyDictionary()


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Let the adapter's tensors of these names train, and freeze the others."""
    for name, parameter in trained_parameters(model).items():
        parameter.requires_grad_(name in names)


def train_head_alone(model: nn.Module, alone: bool) -> None:
    """Freeze what is trained but the task's head, or let all of it train again."""
    train_only(model, [name for name in trained_parameters(model) if not alone or is_head(name)])


def first_state(model: nn.Module, seed: int) -> AdapterState:
    """The adapter that a run starts from: a function of the base, the shapes and the agreed seed alone.

    What comes from the base stays as it is. What is new starts so that it changes nothing, where the method can: A
    and a head's weight are uniform with the bounds of Kaiming's method for a linear layer (a = sqrt(5), so
    1/sqrt(inputs)); B, what leads out of a bottleneck and new biases are zero. Virtual tokens of prompt tuning start
    as words drawn from the vocabulary (Lester et al. 2021, section 3.2).
    """
    state = {}
    for name, array in _as_loaded_state(model).items():
        generator = seeded(seed, "first adapter", name)
        if not _NEW.search(name):
            state[name] = array.copy()
        elif _ZERO.search(name) or array.ndim < 2:
            state[name] = np.zeros_like(array)
        elif name.endswith("prompt_encoder.default.embedding.weight") and (words := _words(model, array.shape[1])):
            chosen = generator.integers(0, len(words[0]), len(array))
            state[name] = words[0][chosen].detach().to("cpu", torch.float32).numpy()
        else:
            bound = 1 / math.sqrt(array.shape[1])
            state[name] = generator.uniform(-bound, bound, array.shape).astype(np.float32)
    return state


_NEW = re.compile(r"(^|\.)(lora_[AB]|prompt_encoder|bottleneck|head|classifier|score)\.")
_ZERO = re.compile(r"\.(lora_B|bottleneck\.up)\.")


def _as_loaded_state(model: nn.Module) -> AdapterState:
    trained_parameters(model)
    return _as_loaded[model]


def _words(model: nn.Module, width: int) -> list[torch.Tensor]:
    """The word embeddings [words, width] before which virtual tokens stand; none for a prefix, which is wider."""
    found = [m.prompted.word_embeddings.weight for m in model.modules() if isinstance(m, Prompted)]
    return [weight for weight in found if weight.shape[1] == width]


def save_adapter(folder: Path, model: nn.Module, state: AdapterState, base: Base, manifest: Manifest) -> None:
    """Write `adapter_model.safetensors` and `coadapt.json` into an existing folder, for PEFT `adapter_config.json` too.

    Stacked pairs are stored as one pair of the rank of all together, with the same factor before B A.
    `load_adapter` reads every method's; `PeftModel.from_pretrained(load_task_model(base, manifest), folder)` those that
    have PEFT's file: the low-rank methods and IA3.
    """
    if isinstance(model, PeftModel):
        config = model.peft_config["default"]
        values = {**config.to_dict(), "base_model_name_or_path": base.name, "revision": manifest.model.revision}
        values["inference_mode"] = True
        parts = depth({name: array.shape for name, array in state.items()}, manifest.adapter.rank)
        if parts > 1:
            root = math.sqrt(parts) if manifest.adapter.method == "rslora" else parts
            values |= {"r": manifest.adapter.rank * parts, "lora_alpha": manifest.adapter.alpha * root}
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


def load_adapter(folder: Path, base: Base) -> tuple[nn.Module, Manifest]:
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
