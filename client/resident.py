"""The base model that stays in memory: loaded once in a process, adapters are swapped."""

import threading
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from common.adapters import attach
from common.config.manifest import Manifest
from common.models import Base, find_base, load_task_model, load_tokenizer, precision
from common.tasks.task import Task, make_task

__all__ = ["Resident", "resident"]


@dataclass(frozen=True)
class Resident:
    """A base with an adapter attached, on its device, and the task that goes with it. One training at a time."""

    base: Base
    model: nn.Module
    task: Task
    device: torch.device
    precision: str


_lock = threading.Lock()
_loaded: dict[str, Resident] = {}


def resident(manifest: Manifest) -> Resident:
    """The resident of this manifest; the first call in a process loads it, a call for another manifest replaces it."""
    key = manifest.digest()
    with _lock:
        if key not in _loaded:
            _loaded.clear()
            _loaded[key] = _load(manifest)
        return _loaded[key]


def _load(manifest: Manifest) -> Resident:
    base = find_base(manifest.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_task_model(base, manifest)  # first: it says best whether the base fits the task
    task = make_task(manifest, load_tokenizer(base))
    if manifest.training.gradient_checkpointing:
        # Non-reentrant: it needs no gradient at the input, which a frozen embedding does not give.
        options = {"use_reentrant": False}
        cast(Any, getattr(model, "encoder", model)).activation_checkpointing_enable(options)
    adapted = attach(model.to(device), manifest.adapter).to(device)
    return Resident(base, adapted, task, device, precision(manifest.training.precision, device))
