"""The blocks of a transformer and the parts of each that can be made smaller: heads and feed-forward columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from common.errors import DistillationError
from common.models import body_of

__all__ = ["Parts", "blocks_of", "config_of", "parts_of"]


@dataclass(frozen=True)
class Parts:
    """The linear layers of one block.

    `queries`, `keys` and `values` have a row for each place of each head, `out` a column; `up` (one, or gate and up)
    have a row for each feed-forward column, `down` a column. A group is what keys and values share: one head, or in
    grouped-query attention (Ainslie et al. 2023) several heads with one pair of keys and values.
    """

    queries: nn.Linear
    keys: nn.Linear
    values: nn.Linear
    out: nn.Linear
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    head_width: int

    @property
    def groups(self) -> int:
        """Groups of heads that the block has now."""
        return self.keys.out_features // self.head_width

    @property
    def columns(self) -> int:
        """Feed-forward columns that the block has now."""
        return self.down.in_features


# Where the layers lie in a block: queries, keys, values, out, up, down.
_PLACES = (
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
    ),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", ("ffn.lin1",), "ffn.lin2"),
    (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
)


def config_of(network: nn.Module) -> Any:
    """The configuration of a task model's transformer."""
    return body_of(network).config


def blocks_of(network: nn.Module) -> nn.ModuleList:
    """The list of the network's transformer blocks.

    Raises:
        DistillationError: it has none that is as long as its configuration says.
    """
    wanted = config_of(network).num_hidden_layers
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise DistillationError(
        f"the base is no transformer with a list of {wanted} blocks, so layers cannot be chosen; use a BERT-like"
        " encoder or a Llama-like decoder"
    )


def parts_of(network: nn.Module) -> list[Parts]:
    """The parts of every block, first to last.

    Raises:
        DistillationError: the blocks are of a kind that is not known here.
    """
    config = config_of(network)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [_parts(block, int(width)) for block in blocks_of(network)]


def _parts(block: nn.Module, width: int) -> Parts:
    for queries, keys, values, out, up, down in _PLACES:
        found = [_linear(block, name) for name in (queries, keys, values, out, *up, down)]
        if all(found):
            layers = cast(Sequence[nn.Linear], found)
            return Parts(layers[0], layers[1], layers[2], layers[3], tuple(layers[4:-1]), layers[-1], width)
    raise DistillationError(
        f"blocks of the kind {type(block).__name__} cannot be pruned here; use a BERT-like encoder or a Llama-like"
        " decoder, or leave the step 'student' out"
    )


def _linear(block: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None
