"""The parts of a transformer's blocks that layer choice and pruning work on, for BERT's and Llama's family."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from common.errors import DistillationError
from common.models import body_of

__all__ = ["Parts", "Shape", "block_list", "parts_of", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """How large a transformer's inside is: layers; attention heads and feed-forward columns of each layer.

    Where several query heads share one key and value head (Ainslie et al. 2023), `heads` counts those shared ones: a
    group goes or stays as a whole.
    """

    layers: int
    heads: int
    columns: int


@dataclass(frozen=True)
class Parts:
    """The linear layers of one block. `group` query heads of `width` each share a key and value head."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_out: nn.Linear
    into: tuple[nn.Linear, ...]
    """what leads into the feed-forward layer's inside: one layer, or gate and up"""
    out: nn.Linear
    width: int
    group: int

    @property
    def heads(self) -> int:
        """Key and value heads."""
        return self.key.out_features // self.width

    @property
    def columns(self) -> int:
        """Feed-forward columns."""
        return self.out.in_features


def block_list(network: nn.Module) -> nn.ModuleList:
    """The transformer's blocks, in order: the model's longest list of modules.

    Raises:
        DistillationError: it has none.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=len, default=None)
    if not found:
        raise DistillationError("the model has no list of transformer blocks; a compact model is made of such blocks")
    return found


def parts_of(network: nn.Module) -> list[Parts]:
    """The parts of every block.

    Raises:
        DistillationError: the architecture is none that is known here.
    """
    return [_parts(block) for block in block_list(network)]


def shape_of(network: nn.Module) -> Shape:
    """The network's shape; all layers are alike, since pruning keeps them so."""
    parts = parts_of(network)
    return Shape(len(parts), parts[0].heads, parts[0].columns)


def config_of(network: nn.Module) -> Any:
    """The transformer's configuration, which changes with it."""
    return cast(Any, body_of(network)).config


def _parts(block: nn.Module) -> Parts:
    one = cast(Any, block)
    if hasattr(one, "self_attn") and hasattr(one, "mlp") and hasattr(one.mlp, "gate_proj"):
        attention, mlp = one.self_attn, one.mlp
        linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        sizes = int(attention.head_dim), int(attention.num_key_value_groups)
        return _checked(block, Parts(*linear, (mlp.gate_proj, mlp.up_proj), mlp.down_proj, *sizes))
    if hasattr(one, "attention") and hasattr(one, "intermediate") and hasattr(one.attention, "self"):
        inner = one.attention.self
        linear = (inner.query, inner.key, inner.value, one.attention.output.dense)
        width = int(inner.attention_head_size)
        return _checked(block, Parts(*linear, (one.intermediate.dense,), one.output.dense, width, 1))
    raise _unknown(block)


def _checked(block: nn.Module, parts: Parts) -> Parts:
    layers = (parts.query, parts.key, parts.value, parts.attention_out, *parts.into, parts.out)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise _unknown(block)
    return parts


def _unknown(block: nn.Module) -> DistillationError:
    return DistillationError(
        f"blocks of the kind {type(block).__name__} cannot be pruned; those of BERT, RoBERTa, Llama, Qwen and Mistral"
        " models can: make the compact model smaller by vocabulary and layers alone"
    )
