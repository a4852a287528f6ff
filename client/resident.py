"""The base model that stays in memory: loaded once in a process, adapters are swapped."""

import math
import threading
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from common.adapters import attach, get_state, set_state
from common.codec.state import AdapterState
from common.config.manifest import MIXED_RANKS, AdapterSection, Manifest
from common.errors import AdapterError
from common.factors import below, scale, stacked, turned
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
    rank: int | None = None
    """Rank of the pairs that train here, where it is smaller than the manifest's."""

    def take(self, adapter: AdapterState) -> None:
        """Put a federation's adapter into the model. Where the own rank is smaller, the first columns of B and rows of
        A train, the best pair of that rank (`common/low_rank.py`), and the others compute beside them.

        Raises:
            AdapterError: it does not fit the model.
        """
        if self.rank is None:
            set_state(self.model, adapter)
        else:
            set_state(self.model, turned(adapter, self.rank), any_rank=True)

    def made_of(self, adapter: AdapterState) -> AdapterState:
        """What training made of `adapter`, which was taken before. Where the own rank is smaller, columns and rows are
        in another order, which changes no product."""
        after = get_state(self.model)
        return after if self.rank is None else stacked(below(turned(adapter, self.rank), self.rank), after)


_lock = threading.Lock()
_loaded: dict[tuple[str, int | None], Resident] = {}


def resident(manifest: Manifest, rank: int | None = None) -> Resident:
    """The resident of this manifest, for a site that trains pairs of another `rank` than the manifest's.

    The first call in a process loads it, a call for another manifest replaces it. Each rank has a base of its own.

    Raises:
        AdapterError: the rank is larger than the manifest's, or its aggregation wants one rank at all sites.
    """
    most = manifest.adapter.rank
    if rank == most:
        rank = None
    if rank is not None and (rank > most or manifest.aggregation_method not in MIXED_RANKS):
        raise AdapterError(
            f"this site would train rank {rank}, the manifest's adapter.rank is {most}, and a smaller one needs"
            f" aggregation.method {' or '.join(MIXED_RANKS)}, found {manifest.aggregation_method!r}"
        )
    key = (manifest.digest(), rank)
    with _lock:
        if key not in _loaded:
            for other in [known for known in _loaded if known[0] != key[0]]:
                del _loaded[other]
            _loaded[key] = _load(manifest, rank)
        return _loaded[key]


def _load(manifest: Manifest, rank: int | None) -> Resident:
    base = find_base(manifest.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_task_model(base, manifest)  # first: it says best whether the base fits the task
    task = make_task(manifest, load_tokenizer(base))
    if manifest.training.gradient_checkpointing:
        # Non-reentrant: it needs no gradient at the input, which a frozen embedding does not give.
        options = {"use_reentrant": False}
        cast(Any, getattr(model, "encoder", model)).activation_checkpointing_enable(options)
    adapted = attach(model.to(device), _of_rank(manifest.adapter, rank)).to(device)
    return Resident(base, adapted, task, device, precision(manifest.training.precision, device), rank)


def _of_rank(section: AdapterSection, rank: int | None) -> AdapterSection:
    """The section with another rank and the same factor before B A: one factor stands before all parts of a product."""
    if rank is None:
        return section
    alpha = scale(section) * (math.sqrt(rank) if section.method == "rslora" else rank)
    return section.model_copy(update={"rank": rank, "alpha": alpha})
