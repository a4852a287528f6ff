"""Words in fewer dimensions: a table of narrow rows and one matrix that widens them to the network's width.

ALBERT's factorised embedding (Lan et al. 2020, section 3.1), made from a finished one instead of trained from nothing:
a small student keeps more pieces where each of them costs less.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import DistillationError
from common.models import body_of
from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import NarrowEmbedding, embedding_of, output_head_of
from server.distillation.pieces import Text, encode_all

__all__ = ["can_narrow", "narrow_words"]


def can_narrow(network: nn.Module) -> bool:
    """Whether rows are only read: a network that writes has its words in the output head too."""
    layer = cast(Any, body_of(network)).get_input_embeddings()
    return isinstance(layer, nn.Embedding) and output_head_of(network) is None


def narrow_words(model: DomainModel, rank: int, texts: Sequence[Text]) -> DomainModel:
    """A copy whose embedding [pieces, width] is a table [pieces, rank] and a matrix [width, rank].

    The matrix spans the `rank` directions in which the squared error, weighted by how often `texts` hold each piece, is
    least (Eckart and Young 1936, of the weighted table); each row is its projection on them.

    Raises:
        DistillationError: the rank is not below the width, or the network writes with the same rows.
    """
    if not can_narrow(model.network):
        raise DistillationError(
            "only a network that does not write can have narrow words; keep distillation.vocabulary"
        )
    old = embedding_of(model.network)
    if not 1 <= rank < old.embedding_dim:
        raise DistillationError(f"narrow words take 1 to {old.embedding_dim - 1} dimensions, found {rank}")
    rows = old.weight.detach().double()
    counts = _counts(model, texts, len(rows))
    # Directions of the weighted table are the eigenvectors of its Gram matrix, in rising order of the eigenvalues.
    _, directions = torch.linalg.eigh(rows.T @ (counts[:, None] * rows))
    widen = directions[:, -rank:]
    network = copy.deepcopy(model.network)
    cast(Any, body_of(network)).set_input_embeddings(
        NarrowEmbedding.of((rows @ widen).to(old.weight.dtype), widen.to(old.weight.dtype), old.padding_idx)
    )
    return DomainModel(network.eval(), model.tokenizer, model.manifest)


def _counts(model: DomainModel, texts: Sequence[Text], rows: int) -> Tensor:
    """How often each piece occurs, one more for each, so that none is left out."""
    counts = torch.ones(rows, dtype=torch.float64)
    for ids in encode_all(model.tokenizer, texts):
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=rows)
    return counts
