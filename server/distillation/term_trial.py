"""Whether whole terms pay: students with and without them learn for a while and are held against each other.

Before training terms always cost, since the mean of their pieces' rows is a poor word; what they are worth shows only
after some of it. As few passes as tell it are taken, on copies.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from common.records import Record
from server.distillation.corpus import Corpus, texts_in
from server.distillation.domain_model import DomainModel
from server.distillation.measuring import agreement, figures_of, predictions_of
from server.distillation.pieces import encode_all
from server.distillation.training import distil

__all__ = ["Trial", "try_terms"]

# Of the passes that the student gets, each side of the trial gets this part, one at least.
PART = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `measure` says of both after so many passes; a smaller cost is better. `shorter` is the share of tokens of
    held-out text that the terms save."""

    passes: int
    measure: str
    with_terms: float
    without: float
    shorter: float

    @property
    def pays(self) -> bool:
        """Whether terms cost no more than their absence; texts that become no shorter need none."""
        return self.with_terms <= self.without and self.shorter > 0

    def told(self) -> str:
        """In words, for the card."""
        return (
            f"after {self.passes} passes {self.measure} {self.with_terms:.4f} with and {self.without:.4f} without them,"
            f" {self.shorter:.1%} fewer tokens"
        )


def try_terms(
    teacher: DomainModel, with_terms: DomainModel, without: DomainModel, corpus: Corpus, dev: Sequence[Record]
) -> Trial:
    """Train copies of both for a fifth of `distillation.epochs` and compare them.

    The cost is the loss on dev records; of causal-lm, whose tokens differ, bits per byte; without dev records the share
    of held-out public text on which student and teacher disagree.
    """
    settings = with_terms.manifest.distillation
    passes = max(1, settings.epochs // PART)
    short = settings.model_copy(update={"epochs": passes})
    costs = []
    for student in (with_terms, without):
        copied = DomainModel(copy.deepcopy(student.network), student.tokenizer, student.manifest)
        costs.append(_cost(teacher, distil(teacher, copied, corpus, short), corpus, dev))
    held_out = texts_in(corpus.held_out)
    ours, theirs = (sum(map(len, encode_all(model.tokenizer, held_out))) for model in (with_terms, without))
    shorter = 1 - ours / theirs if theirs else 0.0
    return Trial(passes=passes, measure=costs[0][0], with_terms=costs[0][1], without=costs[1][1], shorter=shorter)


def _cost(teacher: DomainModel, student: DomainModel, corpus: Corpus, dev: Sequence[Record]) -> tuple[str, float]:
    if dev:
        found = figures_of(student, dev)
        name = "bits_per_byte" if "bits_per_byte" in found else "loss"
        return f"dev {name}", found[name]
    held_out = corpus.held_out
    agreed = agreement(predictions_of(student, held_out), predictions_of(teacher, held_out))
    return "share of other answers than the teacher's", 1 - (agreed or 0.0)
