"""What a wanted size leaves for the words: how many pieces, and in how many dimensions."""

from fractions import Fraction

from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, output_head_of
from server.distillation.narrow_words import can_narrow

__all__ = ["LEAST_PIECES", "MOST_PIECES", "SIZES", "general_pieces", "most_pieces", "narrow_rank"]

LEAST_PIECES, MOST_PIECES = 5000, 8000

# What `size = "auto"` tries, the smallest first; the first that loses no more than max_loss is taken.
SIZES = (Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(1, 3))

# Rows of the embedding may take this share of the wanted parameters; the rest is layers. With half, the layers of a
# student of a tenth lost more than its words gained on banking77 (docs/lab-notes.md).
WORDS_SHARE = Fraction(2, 5)
# Where words of the network's own width would take more than this share, they are made narrow: a fifth of the teacher
# with 5,000 pieces in 128 dimensions did better on banking77 than with all 384 (docs/lab-notes.md).
WIDE_SHARE = Fraction(1, 4)
# As many dimensions as ALBERT found enough (Lan et al. 2020, table 3), or as fit into the share. Fewer than the least
# tell words apart badly; then there are fewer words.
RANK, LEAST_RANK = 128, 64
RANK_STEP = 8  # a multiple of it, which matrix units like
# Below this, texts fall apart into single characters, whatever the size.
FEWEST_PIECES = 1000


def most_pieces(model: DomainModel, ratio: Fraction) -> int:
    """How many pieces a student of `ratio` times the model's parameters can afford, from 1,000 to 8,000.

    A row for each piece, and a second one where the output head is a matrix of its own. Where words can be narrow, a
    row counts LEAST_RANK parameters.
    """
    return max(FEWEST_PIECES, min(MOST_PIECES, _afforded(model, ratio)))


def general_pieces(model: DomainModel, ratio: Fraction) -> int:
    """Up to how many pieces the words of text in general fill a small corpus' vocabulary: 5,000 if they are afforded.

    None in networks that write, where each has a row in the output head too, and layers would pay for it.
    """
    return min(LEAST_PIECES, _afforded(model, ratio)) if can_narrow(model.network) else 0


def _afforded(model: DomainModel, ratio: Fraction) -> int:
    embedding, head = embedding_of(model.network), output_head_of(model.network)
    row = embedding.embedding_dim
    if head is not None and head.weight is not embedding.weight:
        row += head.in_features
    if can_narrow(model.network):
        row = min(row, LEAST_RANK)
    return int(WORDS_SHARE * ratio * model.parameters / row)


def narrow_rank(model: DomainModel, ratio: Fraction, *, of: int) -> int | None:
    """In how many dimensions the model's words fit into a student of `ratio` times `of` parameters; None: in all.

    pieces x rank + rank x width is at most WIDE_SHARE of the student, and the rank a multiple of RANK_STEP from
    LEAST_RANK to RANK.
    """
    if not can_narrow(model.network):
        return None
    embedding = embedding_of(model.network)
    pieces, width = embedding.num_embeddings, embedding.embedding_dim
    if pieces * width <= WIDE_SHARE * ratio * of:
        return None
    fits = int(WIDE_SHARE * ratio * of / (pieces + width))
    rank = max(LEAST_RANK, min(RANK, fits - fits % RANK_STEP))
    return rank if rank < width else None
