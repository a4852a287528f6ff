"""Structured pruning: attention heads and feed-forward columns go by importance, and the matrices become smaller."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import DistillationError
from common.randomness import seeded
from server.distillation.blocks import Parts, block_list, config_of, parts_of
from server.distillation.corpus import Corpus, encode
from server.distillation.domain_model import DomainModel

__all__ = ["Importance", "head_and_column_importance", "prune"]


@dataclass(frozen=True)
class Importance:
    """How much each part matters: `heads` [layers, heads] and `columns` [layers, columns], at least 0."""

    heads: Tensor
    columns: Tensor


def head_and_column_importance(
    model: DomainModel, corpus: Corpus, *, most: int = 512, batch_size: int = 16, seed: int = 0
) -> Importance:
    """Sum of |weight x gradient| over each head's and column's way out, on at most `most` texts.

    The gradient is that of the cross-entropy to what the model itself says, so no labels are needed: with text
    classification the likeliest label, else the likeliest tag of each word or next token of each place. Michel et al.
    2019 (section 4.1) take the gradient of a gate on each head; here it is taken weight by weight, which serves heads
    and columns alike (Molchanov et al. 2019, section 3.1, the first-order expansion without the square). Batches are
    taken one by one, so signs of different batches do not cancel.
    """
    network = copy.deepcopy(model.network).eval().requires_grad_(False)
    parts = parts_of(network)
    ways_out = [weight for part in parts for weight in (part.attention_out.weight, part.out.weight)]
    for weight in ways_out:
        weight.requires_grad_(True)
    task, examples = model.task, encode(model, corpus.records)
    chosen = seeded(seed, "pruning", "texts").permutation(len(examples))[:most]
    picked = sorted((examples[index] for index in chosen), key=lambda example: len(example.tokens))
    heads = torch.zeros(len(parts), parts[0].heads)
    columns = torch.zeros(len(parts), parts[0].columns)
    for start in range(0, len(picked), batch_size):
        batch = task.collate(picked[start : start + batch_size], ways_out[0].device)
        loss = _own_answer_loss(network(**batch.inputs()), batch.targets, batch.attention_mask)
        for row, found in enumerate(torch.autograd.grad(loss, ways_out)):
            layer, weight = row // 2, ways_out[row]
            sums = (weight * found).detach().abs().sum(dim=0).cpu()
            if row % 2:
                columns[layer] += sums
            else:
                heads[layer] += sums.view(parts[layer].heads, -1).sum(dim=1)
    return Importance(heads, columns)


def _own_answer_loss(output: Any, targets: Tensor, mask: Tensor) -> Tensor:
    """Summed cross-entropy to the likeliest class; of tokens those that a tag or a next token is read from."""
    if isinstance(output, Tensor):
        return functional.cross_entropy(output, output.argmax(dim=-1), reduction="sum")
    read = targets != -100 if bool((targets != -100).any()) else mask.bool()
    logits = output.logits[read]
    return functional.cross_entropy(logits, logits.argmax(dim=-1), reduction="sum")


def prune(model: DomainModel, *, heads: int, columns: int, importance: Importance) -> DomainModel:
    """A copy that keeps the most important `heads` and `columns` of every layer, in their order.

    The result computes what the whole model would compute with the other heads' and columns' outputs at zero. Widths
    are the same in all layers, so that one number in the configuration says them; a BERT configuration has no number
    for pruned heads, a Llama or Qwen one has.

    Raises:
        DistillationError: more than there are, or none.
    """
    network = copy.deepcopy(model.network)
    parts = parts_of(network)
    for what, wanted, found in (("heads", heads, parts[0].heads), ("columns", columns, parts[0].columns)):
        if not 1 <= wanted <= found:
            raise DistillationError(f"{what} must be 1 to the {found} that a layer has, found {wanted}")
    for layer, part in enumerate(parts):
        kept_heads, kept_columns = kept(importance, layer, heads=heads, columns=columns)
        _prune_block(part, kept_heads, kept_columns)
    _tell_configuration(network, parts[0].group, heads, columns)
    return DomainModel(network, model.tokenizer, model.manifest)


def kept(importance: Importance, layer: int, *, heads: int, columns: int) -> tuple[Tensor, Tensor]:
    """Indices of the heads and columns of a layer that stay, each in rising order."""
    return (
        importance.heads[layer].topk(heads).indices.sort().values,
        importance.columns[layer].topk(columns).indices.sort().values,
    )


def _prune_block(part: Parts, heads: Tensor, columns: Tensor) -> None:
    shared = _rows(heads, part.width)
    own = _rows(heads, part.width * part.group)
    _keep_rows(part.query, own)
    _keep_rows(part.key, shared)
    _keep_rows(part.value, shared)
    _keep_columns(part.attention_out, own)
    for linear in part.into:
        _keep_rows(linear, columns)
    _keep_columns(part.out, columns)


def _rows(heads: Tensor, width: int) -> Tensor:
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    """Let a linear layer give only these of its outputs."""
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    """Let a linear layer read only these of its inputs."""
    linear.weight = nn.Parameter(linear.weight.detach()[:, columns].clone())
    linear.in_features = len(columns)


def _tell_configuration(network: nn.Module, group: int, heads: int, columns: int) -> None:
    config = config_of(network)
    config.intermediate_size = columns
    if getattr(config, "num_key_value_heads", None) is not None:
        config.head_dim = parts_of(network)[0].width
        config.num_attention_heads, config.num_key_value_heads = heads * group, heads
        return
    for block in block_list(network):
        inner = cast(Any, block).attention.self
        inner.num_attention_heads, inner.all_head_size = heads, heads * inner.attention_head_size
