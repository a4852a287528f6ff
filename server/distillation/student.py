"""The student: layers of the teacher, a shape for a wanted size, or a small network of random weights."""

import copy
import math
from collections.abc import Sequence
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
from common.errors import DistillationError
from common.models import PooledClassifier
from common.randomness import seed_dropout
from server.distillation.blocks import Parts, Shape, block_list, config_of, parts_of, shape_of
from server.distillation.domain_model import DomainModel

__all__ = ["Shape", "choose_layers", "cut_positions", "from_scratch", "keep_layers", "parameters_of", "shape_for"]

# Columns come in multiples of this, which matrix units like.
_STEP = 8


def choose_layers(there: int, kept: int) -> tuple[int, ...]:
    """`kept` of `there` layers: the first, the last and evenly between; of one alone the last.

    Without its last layer a fine-tuned MiniLM fell from 91.6 to 67.7 per cent on banking77.

    Raises:
        DistillationError: more than there are, or none.
    """
    if not 1 <= kept <= there:
        raise DistillationError(f"layers must be 1 to the teacher's {there}, found {kept}")
    if kept == 1:
        return (there - 1,)
    return tuple(math.floor(index * (there - 1) / (kept - 1) + 0.5) for index in range(kept))


def keep_layers(model: DomainModel, layers: Sequence[int]) -> DomainModel:
    """A copy with these of the model's layers, in this order.

    Raises:
        DistillationError: none, one twice, or one that is not there.
    """
    network = copy.deepcopy(model.network)
    blocks = block_list(network)
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < len(blocks) for layer in layers):
        raise DistillationError(f"layers must be different numbers from 0 to {len(blocks) - 1}, found {list(layers)}")
    chosen = [blocks[layer] for layer in layers]
    del blocks[len(chosen) :]
    for place, block in enumerate(chosen):
        blocks[place] = block
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = place
    config = config_of(network)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(chosen)
    if kinds is not None:
        config.layer_types = [kinds[layer] for layer in layers]
    return DomainModel(network, model.tokenizer, model.manifest)


def cut_positions(model: DomainModel, longest: int | None = None) -> DomainModel:
    """A copy whose table of positions ends at `longest` tokens, by default data.max_length, where texts are cut.

    Networks without such a table (rotary positions) come back as they are.
    """
    network = copy.deepcopy(model.network)
    for name, table in network.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(table, nn.Embedding):
            continue
        before = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's first places hold no token
        rows = before + (longest or model.manifest.data.max_length)
        if rows >= table.num_embeddings:
            continue
        around = cast(Any, network.get_submodule(name.rpartition(".")[0]))
        table.weight = nn.Parameter(table.weight.detach()[:rows].clone())
        table.num_embeddings = config_of(network).max_position_embeddings = rows
        for buffer in ("position_ids", "token_type_ids"):
            if hasattr(around, buffer):
                setattr(around, buffer, getattr(around, buffer)[:, :rows].clone())
    return DomainModel(network, model.tokenizer, model.manifest)


def parameters_of(model: DomainModel, shape: Shape) -> int:
    """How many parameters the model would have in that shape."""
    parts = parts_of(model.network)
    layer = sum(parameter.numel() for parameter in block_list(model.network)[0].parameters())
    head, column = _cost(parts[0])
    rest = model.parameters - len(parts) * layer
    shaped = layer - (parts[0].heads - shape.heads) * head - (parts[0].columns - shape.columns) * column
    return rest + shape.layers * shaped


def _cost(part: Parts) -> tuple[int, int]:
    """Parameters of one head and of one feed-forward column."""
    into_heads = (part.query, part.key, part.value)
    head = sum(linear.weight.numel() + (0 if linear.bias is None else len(linear.bias)) for linear in into_heads)
    head = (head + part.attention_out.weight.numel()) // part.heads
    column = sum(linear.in_features + (linear.bias is not None) for linear in part.into) + part.out.out_features
    return head, column


def shape_for(
    model: DomainModel, ratio: Fraction | float, *, of: int | None = None, layers: int | None = None
) -> Shape:
    """The shape in which the model has at most `ratio` x `of` parameters, and as many of them as possible.

    `of` is the number that the ratio speaks of, the teacher's where the vocabulary was trimmed before; by default the
    model's own. All layers stay unless `layers` says otherwise or their number alone is too many: narrow and deep
    students did better than few wide layers. Heads and columns shrink alike.

    Raises:
        DistillationError: the rest, embeddings above all, is larger than that; it says what can be met.
    """
    full = shape_of(model.network)
    budget = math.floor(Fraction(ratio) * (model.parameters if of is None else of))
    for count in [layers] if layers is not None else range(full.layers, 0, -1):
        fitting = [
            shape
            for heads in range(1, full.heads + 1)
            if (shape := _widest(model, Shape(count, heads, full.columns), budget)) is not None
        ]
        if fitting:
            return min(fitting, key=lambda shape: _imbalance(shape, full))
    smallest = parameters_of(model, Shape(layers or 1, 1, min(_STEP, full.columns)))
    whole = model.parameters if of is None else of
    raise DistillationError(
        f"size: {ratio} of {whole:,} parameters are {budget:,}, and what lies outside the layers with one narrow layer"
        f" takes {smallest:,}; {smallest / whole:.3f} or more can be met, or less with fewer pieces in the vocabulary"
    )


def _widest(model: DomainModel, shape: Shape, budget: int) -> Shape | None:
    """The shape with as many columns as the budget allows, in whole steps; None where one step is too much."""
    step = min(_STEP, shape.columns)
    one = parameters_of(model, Shape(shape.layers, shape.heads, step))
    if one > budget:
        return None
    _, column = _cost(parts_of(model.network)[0])
    columns = step + (budget - one) // (column * shape.layers)
    return Shape(shape.layers, shape.heads, min(shape.columns, columns - columns % step))


def _imbalance(shape: Shape, full: Shape) -> float:
    """How unlike the shares of heads and of columns that stay are."""
    return abs(math.log(shape.heads / full.heads) - math.log(shape.columns / full.columns))


def from_scratch(
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parameters: int,
    layers: int = 4,
    longest: int | None = None,
    seed: int = 0,
) -> DomainModel:
    """A student of random weights with at most `parameters` of them: like BERT for the two tasks of classification,
    like Llama for causal-lm. Its width is a multiple of 32, and each head has 32 of it; `longest` is its longest input
    in tokens, by default the manifest's.

    Raises:
        DistillationError: even the narrowest has more.
    """
    length = longest or manifest.data.max_length
    seed_dropout(seed, "student from scratch")  # torch draws the first weights
    with torch.device("meta"):
        fitting = [
            width
            for width in range(32, 1025, 32)
            if sum(p.numel() for p in _fresh(manifest, tokenizer, width, layers, length).parameters()) <= parameters
        ]
    if not fitting:
        raise DistillationError(
            f"size: {parameters:,} parameters do not hold {len(tokenizer):,} pieces and {layers} layers, of 32 numbers"
            " each; allow more, or make a smaller vocabulary"
        )
    network = _fresh(manifest, tokenizer, fitting[-1], layers, length)
    return DomainModel(network.eval(), tokenizer, manifest)


def _fresh(manifest: Manifest, tokenizer: PreTrainedTokenizerBase, width: int, layers: int, longest: int) -> nn.Module:
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": longest,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if manifest.task.kind == "causal-lm":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return cast(
            nn.Module,
            LlamaForCausalLM(LlamaConfig(**common, **ends, intermediate_size=2 * width, tie_word_embeddings=True)),
        )
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**common, **still, intermediate_size=2 * width)
    if manifest.task.kind == "text-classification":
        return PooledClassifier(BertModel(config, add_pooling_layer=False), "mean", len(manifest.task.labels))
    tags = manifest.task.tags
    config.id2label, config.label2id = dict(enumerate(tags)), {tag: index for index, tag in enumerate(tags)}
    return cast(nn.Module, AutoModelForTokenClassification.from_config(config))
