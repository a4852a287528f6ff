"""What a wanted size leaves for the words: the planner's first choice, made before anything is trained."""

from fractions import Fraction

from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, output_head_of

__all__ = ["LEAST_PIECES", "MOST_PIECES", "most_pieces"]

LEAST_PIECES, MOST_PIECES = 5000, 8000

# Rows of the embedding may take this share of the wanted parameters; the rest is layers. With half, the layers of a
# student of a tenth lost more than its words gained on banking77 (docs/lab-notes.md).
WORDS_SHARE = Fraction(2, 5)
# Below this, texts fall apart into single characters, whatever the size.
FEWEST_PIECES = 1000


def most_pieces(model: DomainModel, ratio: Fraction) -> int:
    """How many pieces a student of `ratio` times the model's parameters can afford, from 1,000 to 8,000.

    A row for each piece, and a second one where the output head is a matrix of its own.
    """
    embedding, head = embedding_of(model.network), output_head_of(model.network)
    row = embedding.embedding_dim
    if head is not None and head.weight is not embedding.weight:
        row += head.in_features
    afforded = int(WORDS_SHARE * ratio * model.parameters / row)
    return max(FEWEST_PIECES, min(MOST_PIECES, afforded))
