"""The student: the teacher's own layers, fewer or narrower, or a small network of random weights."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from common.config.manifest import Manifest
from common.errors import DistillationError, SizeNotMet
from common.models import PooledClassifier
from common.randomness import seed_dropout
from server.distillation.blocks import blocks_of, config_of, parts_of
from server.distillation.domain_model import DomainModel

__all__ = ["Shape", "choose_layers", "from_scratch", "keep_layers", "keep_positions", "shape_for"]

# Of the shapes of one size the one with this many times more heads left than feed-forward columns, as shares: on
# banking77 a third of the heads beside a quarter of the columns did best (docs/lab-notes.md).
HEADS_TO_COLUMNS = 4 / 3
# Layers below this share of their heads are too narrow: a student of a tenth with four of six layers and a quarter of
# the heads did better than one with six and a sixth, in less time (docs/lab-notes.md).
LEAST_HEADS = Fraction(1, 4)
STEP = 8  # feed-forward columns are a multiple of it, which matrix units like
SCRATCH_LAYERS, SCRATCH_HEAD = 4, 32


@dataclass(frozen=True)
class Shape:
    """Layers kept, by number from 0, and groups of heads and feed-forward columns kept in each of them."""

    layers: tuple[int, ...]
    heads: int
    columns: int
    parameters: int


def choose_layers(layers: int, keep: int) -> tuple[int, ...]:
    """`keep` of `layers` by number: the first, the last, and evenly between. One alone is the last."""
    if not 1 <= keep <= layers:
        raise DistillationError(f"distillation.layers must be from 1 to the teacher's {layers}, found {keep}")
    if keep == 1:
        return (layers - 1,)
    return tuple(round(place * (layers - 1) / (keep - 1)) for place in range(keep))


def keep_layers(model: DomainModel, layers: Sequence[int]) -> DomainModel:
    """A copy with these layers alone, in their order."""
    network = copy.deepcopy(model.network)
    blocks, config = blocks_of(network), config_of(network)
    kept = [blocks[layer] for layer in layers]
    del blocks[:]
    for number, block in enumerate(kept):
        blocks.append(block)
        attention = getattr(block, "self_attn", None)
        if hasattr(attention, "layer_idx"):
            cast(Any, attention).layer_idx = number
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(kept)
    return DomainModel(network, model.tokenizer, model.manifest)


def keep_positions(model: DomainModel) -> DomainModel:
    """A copy whose table of positions ends at data.max_length, the longest input that the model ever gets."""
    network = copy.deepcopy(model.network)
    longest, config = model.manifest.data.max_length, config_of(network)
    for module in network.modules():
        table = getattr(module, "position_embeddings", None)
        if not isinstance(table, nn.Embedding):
            continue
        first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's positions begin behind padding
        rows = min(table.num_embeddings, longest + first)
        table.weight = nn.Parameter(table.weight[:rows].detach().clone(), requires_grad=False)
        table.num_embeddings = rows
        config.max_position_embeddings = rows
        for name in ("position_ids", "token_type_ids"):
            buffer = getattr(module, name, None)
            if isinstance(buffer, torch.Tensor):
                setattr(module, name, buffer[:, :rows].clone())
    return DomainModel(network, model.tokenizer, model.manifest)


def shape_for(model: DomainModel, ratio: Fraction, *, of: int, layers: int | None = None) -> Shape:
    """The largest shape of `model` with at most `ratio` times `of` parameters.

    Narrow and deep, within measure: as many layers as can keep LEAST_HEADS of their heads each, at least half of all;
    where they cannot, half of them, or else as many as keep one group of heads and some columns. `layers` chooses
    instead.

    Raises:
        SizeNotMet: not even the smallest shape is small enough; it says what is.
    """
    parts = parts_of(model.network)
    most, budget = len(parts), math.floor(ratio * of)
    if layers is not None:
        choose_layers(most, layers)
    counts = [layers] if layers is not None else range(most, 0, -1)
    smallest, fitting = model.parameters, []
    for count in counts:
        kept = choose_layers(most, count)
        costs = _Costs.of(model, kept)
        smallest = costs.parameters(1, STEP)
        if (shape := _balanced(costs, kept, budget)) is not None:
            fitting.append(shape)
    deep = [shape for shape in fitting if 2 * len(shape.layers) >= most]
    wide = [shape for shape in deep if shape.heads >= LEAST_HEADS * parts[0].groups]
    if fitting:
        return (wide or deep[-1:] or fitting)[0]
    raise SizeNotMet(
        f"distillation.size: {ratio} of the teacher's {of:,} parameters are {budget:,}, but embeddings and the smallest"
        f" layers take {smallest:,}; {math.ceil(1000 * smallest / of) / 1000} of them or more can be met; for less set"
        " distillation.vocabulary to fewer pieces"
    )


@dataclass(frozen=True)
class _Costs:
    """Parameters of a network with some of its layers: what stays, and what a group or a column takes in all layers."""

    fixed: int
    group: int
    column: int
    groups: int
    columns: int

    @classmethod
    def of(cls, model: DomainModel, layers: Sequence[int]) -> "_Costs":
        parts = [parts_of(model.network)[layer] for layer in layers]
        dropped = set(range(len(blocks_of(model.network)))) - set(layers)
        gone = sum(_count(blocks_of(model.network)[layer]) for layer in dropped)
        groups, columns = min(part.groups for part in parts), min(part.columns for part in parts)
        group = column = inside = 0
        for part in parts:
            rows = [part.queries, part.keys, part.values]
            heads = sum(_count(layer) for layer in rows) + part.out.weight.numel()
            wide = sum(_count(layer) for layer in part.up) + part.down.weight.numel()
            group, column, inside = group + heads // part.groups, column + wide // part.columns, inside + heads + wide
        return cls(model.parameters - gone - inside, group, column, groups, columns)

    def parameters(self, groups: int, columns: int) -> int:
        return self.fixed + self.group * groups + self.column * columns


def _balanced(costs: _Costs, layers: tuple[int, ...], budget: int) -> Shape | None:
    """Of the shapes that use the budget up, the one whose shares of heads and columns are in the best proportion."""
    found = []
    for groups in range(1, costs.groups + 1):
        columns = min(costs.columns, (budget - costs.parameters(groups, 0)) // costs.column)
        columns -= columns % STEP if columns < costs.columns else 0
        if columns >= min(STEP, costs.columns):
            share = (groups / costs.groups) / (columns / costs.columns)
            found.append((abs(math.log(share / HEADS_TO_COLUMNS)), groups, columns))
    if not found:
        return None
    whole = [(groups, columns) for _, groups, columns in found if (groups, columns) == (costs.groups, costs.columns)]
    groups, columns = whole[0] if whole else min(found)[1:]
    return Shape(layers, groups, columns, costs.parameters(groups, columns))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def from_scratch(manifest: Manifest, tokenizer: PreTrainedTokenizerBase, *, parameters: int) -> DomainModel:
    """A small network of seeded random weights for the manifest's task: the widest with at most `parameters`.

    An encoder for the classification tasks (read by the mean of its tokens), a decoder with tied words for causal-lm.

    Raises:
        SizeNotMet: the words alone take more than that.
    """
    best = None
    for heads in itertools.count(1):
        config = _scratch_config(manifest, tokenizer, heads)
        with torch.device("meta"):
            size = _count(_scratch_network(manifest, config))
        if size > parameters:
            break
        best = config
    if best is None:
        raise SizeNotMet(
            f"distillation.size leaves {parameters:,} parameters, and a student with {len(tokenizer):,} pieces needs"
            f" {size:,} at least; ask for a larger size or for fewer pieces"
        )
    seed_dropout(manifest.distillation.seed, "student from scratch")
    return DomainModel(_scratch_network(manifest, best), tokenizer, manifest)


def _scratch_config(manifest: Manifest, tokenizer: PreTrainedTokenizerBase, heads: int) -> Any:
    width = SCRATCH_HEAD * heads
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": SCRATCH_LAYERS,
        "num_attention_heads": heads,
        "max_position_embeddings": manifest.data.max_length,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if manifest.task.kind == "causal-lm":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return LlamaConfig(**shared, **ends, intermediate_size=3 * width, tie_word_embeddings=True)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = dict(enumerate(manifest.task.tags)) if manifest.task.kind == "token-classification" else {}
    labels = {"id2label": names, "label2id": {tag: index for index, tag in names.items()}} if names else {}
    return BertConfig(**shared, **none, **labels, intermediate_size=3 * width)


def _scratch_network(manifest: Manifest, config: Any) -> nn.Module:
    match manifest.task.kind:
        case "text-classification":
            return PooledClassifier(BertModel(config, add_pooling_layer=False), "mean", len(manifest.task.labels))
        case "token-classification":
            return cast(nn.Module, AutoModelForTokenClassification.from_config(config))
    return cast(nn.Module, LlamaForCausalLM(config))
