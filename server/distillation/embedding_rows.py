"""The same network for another vocabulary: rows of its embedding and, where it writes, of its output head change."""

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from common.errors import DistillationError
from common.models import body_of

__all__ = ["NarrowEmbedding", "embedding_of", "output_head_of", "with_rows"]


class NarrowEmbedding(nn.Module):
    """An embedding of narrow rows, `table` [pieces, rank], and the matrix `widen` [width, rank] behind it."""

    def __init__(self, pieces: int, rank: int, width: int, padding_idx: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(pieces, rank, padding_idx=padding_idx)
        self.widen = nn.Linear(rank, width, bias=False)

    @classmethod
    def of(cls, table: Tensor, widen: Tensor, padding_idx: int | None) -> "NarrowEmbedding":
        """One with these values."""
        made = cls(len(table), table.shape[1], len(widen), padding_idx)
        made.table.weight = nn.Parameter(table.contiguous(), requires_grad=False)
        made.widen.weight = nn.Parameter(widen.contiguous(), requires_grad=False)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [..., width] of the pieces `ids` [...]."""
        return cast(Tensor, self.widen(self.table(ids)))


def embedding_of(network: nn.Module) -> nn.Embedding:
    """The layer that token ids enter by: the table, where a matrix widens its rows.

    Raises:
        DistillationError: the network has none that is a table of rows.
    """
    body = cast(Any, body_of(network))
    layer = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    if isinstance(layer, NarrowEmbedding):
        return layer.table
    if not isinstance(layer, nn.Embedding):
        raise DistillationError(
            f"the vocabulary of {type(body).__name__} cannot change: its input layer is a"
            f" {type(layer).__name__}, an Embedding is needed; set distillation.vocabulary = 'keep'"
        )
    return layer


def output_head_of(network: nn.Module) -> nn.Linear | None:
    """The layer that gives a logit for each piece, None where the network does not write."""
    body = cast(Any, body_of(network))
    layer = body.get_output_embeddings() if hasattr(body, "get_output_embeddings") else None
    rows = embedding_of(network).num_embeddings
    return layer if isinstance(layer, nn.Linear) and layer.out_features == rows else None


def with_rows(network: nn.Module, change: Callable[[Tensor], Tensor], new_id: Callable[[int], int | None]) -> nn.Module:
    """A copy with `change` applied to the embedding [pieces, width], the output head's weight and its bias [pieces].

    `change` works on the first axis. Tied tensors stay tied: they are changed once. `new_id` gives the new id of an
    old one for the special tokens of the configuration.
    """
    embedding, head = embedding_of(network), output_head_of(network)
    old: list[Any] = [embedding.weight]
    if head is not None:
        old += [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    # copy.deepcopy takes what its memo holds instead of copying: wherever the old tensor hung, the new one hangs.
    memo: dict[int, Any] = {}
    for tensor in old:
        if id(tensor) not in memo:
            memo[id(tensor)] = nn.Parameter(change(tensor.detach()).contiguous(), requires_grad=tensor.requires_grad)
    made = copy.deepcopy(network, memo)
    layer = embedding_of(made)
    rows = len(layer.weight)
    layer.num_embeddings = rows
    _renumber_positions(made, new_id)
    if layer.padding_idx is not None:
        layer.padding_idx = new_id(layer.padding_idx)
    if head is not None:
        cast(Any, body_of(made)).get_output_embeddings().out_features = rows
    config = cast(Any, body_of(made).config)
    config.vocab_size = rows
    for settings in (config, getattr(body_of(made), "generation_config", None)):
        if settings is not None:
            _renumber_settings(settings, new_id)
    return made


def _renumber_settings(settings: Any, new_id: Callable[[int], int | None]) -> None:
    for name, value in list(vars(settings).items()):
        if not name.endswith("_token_id"):
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(settings, name, new_id(value))
        elif isinstance(value, list):
            setattr(settings, name, [found for item in value if (found := new_id(item)) is not None])


def _renumber_positions(network: nn.Module, new_id: Callable[[int], int | None]) -> None:
    """RoBERTa counts positions from the padding token's id on; its padding token may not move."""
    for name, module in network.named_modules():
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        if name.endswith("position_embeddings") and padding is not None and new_id(padding) != padding:
            raise DistillationError(
                f"the vocabulary cannot be trimmed: positions are counted from the padding token's id ({padding}),"
                f" which would become {new_id(padding)}; set distillation.vocabulary = 'keep'"
            )
