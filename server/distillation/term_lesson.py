"""What the model before new terms teaches the one with them: texts in the pieces of both, and the loss of answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.models import PooledClassifier, pool
from common.tasks.task import pad
from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, output_head_of
from server.distillation.pieces import Text

__all__ = ["Lesson", "TextPair", "text_pairs"]


@dataclass(frozen=True)
class TextPair:
    """One text for both models: ids, and the positions whose answers belong together.

    `chains[i]` are the old positions of the further pieces of the term that follows place i, with the first piece's id
    and the term's id before them; empty where no term follows.
    """

    old: list[int]
    new: list[int]
    places: list[tuple[int, int]]
    chains: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)


def text_pairs(before: DomainModel, after: DomainModel, texts: Sequence[Text]) -> list[TextPair]:
    """Each text that has a piece, in the pieces of both models, cut to the manifest's longest input."""
    start, causal = len(before.tokenizer), before.manifest.task.kind == "causal-lm"
    pairs = []
    for text in texts:
        old, new = _encoded(before, text), _encoded(after, text)
        by_border = {border: place for place, border in _borders(old, text, ends=causal)}
        places = [
            (by_border[border], place) for place, border in _borders(new, text, ends=causal) if border in by_border
        ]
        pair = TextPair(old["input_ids"], new["input_ids"], places)
        if causal:
            for at, (here, there) in enumerate(pairwise(places)):
                term = pair.new[there[1]]
                if there[1] == here[1] + 1 and term >= start:
                    pair.chains[at] = (pair.old[here[0] + 1], term, list(range(here[0] + 1, there[0])))
        if places:
            pairs.append(pair)
    return pairs


def _encoded(model: DomainModel, text: Text) -> Any:
    return model.tokenizer(
        text if isinstance(text, str) else list(text),
        is_split_into_words=not isinstance(text, str),
        truncation=True,
        max_length=model.manifest.data.max_length,
        return_offsets_mapping=True,
        verbose=False,
    )


def _borders(encoding: Any, text: Text, *, ends: bool) -> Iterator[tuple[int, tuple[int, int]]]:
    """Position of each piece with the word of `text` (0 in a plain text) and the character where it ends or starts.

    The space before a word is no part of a piece here: tokenizers differ in whose it is.
    """
    for place, (word, (left, right)) in enumerate(zip(encoding.word_ids(), encoding["offset_mapping"], strict=True)):
        if word is None or left == right:
            continue
        row, body = (0, text) if isinstance(text, str) else (word, text[word])
        if ends:
            yield place, (row, right)
        else:
            piece = body[left:right]
            yield place, (row, right - len(piece.lstrip()))


class Lesson:
    """Teacher and student, and the loss between them. The student's parameters are frozen but for its new rows."""

    def __init__(self, before: DomainModel, after: DomainModel, batch_size: int) -> None:
        self.kind = before.manifest.task.kind
        self.before, self.after, self.batch_size = before, after, batch_size
        self.start, self.stop = len(before.tokenizer), len(after.tokenizer)
        head = output_head_of(after.network)
        tensors = [embedding_of(after.network).weight, *([] if head is None else [head.weight])]
        self.tables = list({id(tensor): tensor for tensor in tensors}.values())

    def rows(self) -> list[Tensor]:
        """Copies of the rows of the terms."""
        return [table.detach()[self.start : self.stop].clone() for table in self.tables]

    def put(self, rows: Sequence[Tensor]) -> None:
        """Put rows back."""
        with torch.no_grad():
            for table, row in zip(self.tables, rows, strict=True):
                table[self.start : self.stop] = row

    def loss(self, pairs: Sequence[TextPair]) -> tuple[Tensor, int, int]:
        """Mean loss of the places of a batch, how many they are, and at how many both give the same answer."""
        with torch.no_grad():
            told, vector = self._answers(self.before, [pair.old for pair in pairs])
        said, own = self._answers(self.after, [pair.new for pair in pairs])
        if self.kind == "causal-lm":  # rows of the base that no piece has say nothing
            told, said = told[..., : self.start], said[..., : self.stop]
        if self.kind == "text-classification":
            target = told.softmax(-1)
        else:
            places = [(row, *place) for row, pair in enumerate(pairs) for place in pair.places]
            rows, olds, news = torch.tensor(places).reshape(-1, 3).unbind(1)
            probabilities = told.softmax(-1)
            target, said = probabilities[rows, olds], said[rows, news]
            if self.kind == "causal-lm":
                target = self.with_terms(target, probabilities, pairs)
        loss = functional.kl_div(said.log_softmax(-1), target, reduction="batchmean")
        if vector is not None and own is not None:
            loss = loss + ((own - vector).square().sum(-1) / vector.square().sum(-1)).mean()
        return loss, len(target), int((said.argmax(-1) == target.argmax(-1)).sum())

    def measure(self, pairs: Sequence[TextPair]) -> tuple[float, float]:
        """Loss and share of equal answers over `pairs`."""
        total, places, same = 0.0, 0, 0
        with torch.no_grad():
            for start in range(0, len(pairs), self.batch_size):
                loss, count, equal = self.loss(pairs[start : start + self.batch_size])
                total, places, same = total + float(loss) * count, places + count, same + equal
        return total / max(places, 1), same / max(places, 1)

    def change(self, pairs: Sequence[TextPair]) -> float:
        """Greatest difference of an output, of the pieces that both have, on texts without terms."""
        worst = 0.0
        with torch.no_grad():
            for pair in pairs:
                old, new = (self._answers(model, [pair.old])[0] for model in (self.before, self.after))
                shared = self.start if self.kind == "causal-lm" else old.shape[-1]
                worst = max(worst, float((old[..., :shared] - new[..., :shared]).abs().max()))
        return worst

    def _answers(self, model: DomainModel, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Logits, and the pooled vectors [texts, width] where texts are classified."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        ids = torch.from_numpy(pad(arrays, int(cast(Any, model.tokenizer).pad_token_id or 0), multiple=1))
        mask = torch.from_numpy(pad([np.ones_like(row) for row in arrays], 0, multiple=1))
        network, device = model.network, self.tables[0].device
        ids, mask = ids.to(device), mask.to(device)
        if isinstance(network, PooledClassifier):
            hidden = network.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            vector = pool(hidden, mask, network.pooling)
            return network.head(vector), vector
        return cast(Any, network(input_ids=ids, attention_mask=mask)).logits, None

    def with_terms(self, target: Tensor, said: Tensor, pairs: Sequence[TextPair]) -> Tensor:
        """The teacher's probabilities [places, old pieces] over the new vocabulary [places, new pieces].

        A term takes from its first piece the probability of all its pieces in a row.
        """
        target = functional.pad(target, (0, self.stop - self.start))
        at = 0
        for row, pair in enumerate(pairs):
            for place, (first, term, between) in pair.chains.items():
                chance = target[at + place, first].clone()
                for position in between:
                    chance = chance * said[row, position, pair.old[position + 1]]
                target[at + place, first] -= chance
                target[at + place, term] += chance
            at += len(pair.places)
        return target
