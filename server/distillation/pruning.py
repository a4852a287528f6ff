"""Structured pruning: heads and feed-forward columns that matter least are taken out, and matrices get really smaller.

Importance of a unit is the sum of |weight x gradient| over what leads out of it, the gradient being that of the
cross-entropy to the model's own likeliest answer on unlabelled text (Michel et al. 2019, section 4; Molchanov et al.
2019, equation 8, the first-order term).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import DistillationError
from common.records import Record
from server.distillation.blocks import Parts, blocks_of, config_of, parts_of
from server.distillation.domain_model import DomainModel

__all__ = ["Importance", "head_and_column_importance", "prune"]

BATCH = 16


@dataclass(frozen=True)
class Importance:
    """For every layer the importance of its groups of heads [groups] and of its feed-forward columns [columns]."""

    heads: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]


def head_and_column_importance(model: DomainModel, records: Sequence[Record]) -> Importance:
    """Importance of every group and column, summed over batches of the records; labels are not read."""
    if not records:
        raise DistillationError("importance is measured on at least one text, found none; give a larger corpus")
    network, task = model.network, model.task
    parts = parts_of(network)
    watched = [weight for part in parts for weight in (part.out.weight, part.down.weight)]
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    heads = [torch.zeros(part.groups) for part in parts]
    columns = [torch.zeros(part.columns) for part in parts]
    examples = sorted(task.encode(records).examples, key=lambda example: len(example.tokens))
    network.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in watched:
            weight.requires_grad_(True)
        for start in range(0, len(examples), BATCH):
            batch = task.collate(examples[start : start + BATCH], torch.device("cpu"))
            output = network(**batch.inputs())
            loss = _own_answer_loss(output, batch.attention_mask)
            grads = torch.autograd.grad(loss, watched)
            for layer, part in enumerate(parts):
                out, down = grads[2 * layer], grads[2 * layer + 1]
                by_place = (part.out.weight * out).abs().sum(dim=0).detach()
                heads[layer] += by_place.view(part.groups, -1).sum(dim=1)
                columns[layer] += (part.down.weight * down).abs().sum(dim=0).detach()
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
    return Importance(tuple(heads), tuple(columns))


def _own_answer_loss(output: Any, mask: Tensor) -> Tensor:
    """Summed cross-entropy to the model's own likeliest answers; padding takes no part."""
    logits = output if isinstance(output, Tensor) else output.logits[mask.bool()]
    return functional.cross_entropy(logits, logits.argmax(dim=-1).detach(), reduction="sum")


def prune(model: DomainModel, *, heads: int, columns: int, importance: Importance) -> DomainModel:
    """A copy in which every layer keeps its `heads` most important groups and `columns` feed-forward columns.

    Raises:
        DistillationError: a layer has fewer.
    """
    network = copy.deepcopy(model.network)
    parts = parts_of(network)
    for layer, part in enumerate(parts):
        for what, wanted, there in (("heads", heads, part.groups), ("columns", columns, part.columns)):
            if not 1 <= wanted <= there:
                raise DistillationError(
                    f"layer {layer} has {there} {what}; from 1 to {there} can be kept, not {wanted}"
                )
        _keep_groups(part, _best(importance.heads[layer], heads))
        _keep_columns(part, _best(importance.columns[layer], columns))
    _tell_config(network, heads, columns)
    return DomainModel(network, model.tokenizer, model.manifest)


def _best(importance: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest, in ascending order."""
    return importance.topk(count).indices.sort().values


def _keep_groups(part: Parts, groups: Tensor) -> None:
    shared = part.head_width
    together = part.queries.out_features // part.groups
    own, kept = _places(groups, together), _places(groups, shared)
    _keep_rows(part.queries, own)
    _keep_rows(part.keys, kept)
    _keep_rows(part.values, kept)
    _keep_inputs(part.out, own)


def _keep_columns(part: Parts, columns: Tensor) -> None:
    for layer in part.up:
        _keep_rows(layer, columns)
    _keep_inputs(part.down, columns)


def _places(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _keep_rows(layer: nn.Linear, rows: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[rows].detach().clone(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows].detach().clone(), requires_grad=False)
    layer.out_features = len(rows)


def _keep_inputs(layer: nn.Linear, columns: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, columns].detach().clone(), requires_grad=False)
    layer.in_features = len(columns)


def _tell_config(network: nn.Module, groups: int, columns: int) -> None:
    """What a configuration can say: the feed-forward width always, heads where it has a `head_dim` of its own.

    Elsewhere the width of a head is derived from their number, so the number stays and the shapes speak.
    """
    config = config_of(network)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = columns
    if hasattr(config, "hidden_dim") and not hasattr(config, "intermediate_size"):
        config.hidden_dim = columns
    if getattr(config, "head_dim", None) and hasattr(config, "num_key_value_heads"):
        width = int(config.head_dim)
        config.num_key_value_heads = groups
        config.num_attention_heads = parts_of(network)[0].queries.out_features // width
    for block in blocks_of(network):
        mlp = cast(Any, getattr(block, "mlp", None))
        if mlp is not None and hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = columns
