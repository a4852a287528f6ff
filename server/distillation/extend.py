"""New terms for a finished model: their rows alone are trained, by the model before as the teacher.

The model before reads each text in its old pieces and says what the model with the terms must answer. All other
parameters stay as they are, bit for bit, so a text without the terms gets the same answer.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from common.models import PooledClassifier, pool
from common.randomness import seeded
from common.tasks.task import pad
from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, output_head_of
from server.distillation.pieces import Text, encode_all
from server.distillation.terms import add_terms, new_terms, with_terms

__all__ = ["extend"]

_HELD_OUT = 5
_MOST_UNTOUCHED = 64


@dataclass(frozen=True)
class _Pair:
    """One text for both models: ids, and the positions whose answers belong together.

    `chains[i]` are the old positions of the further pieces of the term that follows place i, with the first piece's id
    and the term's id before them; empty where no term follows.
    """

    old: list[int]
    new: list[int]
    places: list[tuple[int, int]]
    chains: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)


def extend(
    model: DomainModel,
    terms: Sequence[str],
    texts: Sequence[Text],
    *,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> tuple[DomainModel, dict[str, Any]]:
    """The model with those of `terms` that `texts` hold as single tokens, and facts of what changed.

    The new rows start as the means of their pieces' rows and are trained on the texts with terms by AdamW;
    `learning_rate` counts in root mean squares of the embedding, so that it fits every model. Every fifth such text is
    held out; of all epochs, the start among them, the one that does best on those stays. The loss is the divergence
    KL(before || after) of the answers: of the class; of the tag at each word's first piece; of the next piece at each
    border of pieces that both share, a term having the product of the probabilities of its pieces. A classifier of
    texts is also held to the pooled vector, by the squared distance relative to its own square.

    Facts: terms added; those that are whole already or not in the texts; texts trained and held out; divergence and
    agreement of the likeliest answer on held-out texts, at the start and in the end; tokens of a text with terms before
    and after; and the greatest change of an output on texts without terms.

    Raises:
        DistillationError: no term is new, or no text holds one.
    """
    fresh = new_terms(model.tokenizer, terms)
    if not fresh:
        raise DistillationError(
            f"none of the {len(terms)} terms is new: the model's tokenizer has each as one token; give other terms"
        )
    found, unseen = _seen(model.tokenizer, fresh, texts)
    if not found:
        raise DistillationError(
            f"none of the {len(fresh)} new terms is in the corpus of {len(texts)} texts; give text that uses them"
        )
    after = add_terms(model, found)
    start = len(model.tokenizer)
    hold = [max(row, default=0) >= start for row in encode_all(after.tokenizer, texts)]
    pairs = _pairs(model, after, list(compress(texts, hold)))
    held_out = pairs[::_HELD_OUT]
    trained = [pair for index, pair in enumerate(pairs) if index % _HELD_OUT] or pairs
    lesson = _Lesson(model, after, batch_size)
    first = lesson.measure(held_out)
    best = _train(lesson, trained, held_out, epochs=epochs, learning_rate=learning_rate, seed=seed)
    last = lesson.measure(held_out)
    untouched = [text for text, held in zip(texts, hold, strict=True) if not held][:_MOST_UNTOUCHED]
    facts = {
        "terms": found,
        "whole_already": [term for term in terms if term not in fresh],
        "not_in_corpus": unseen,
        "texts_with_terms": len(pairs),
        "held_out": len(held_out),
        "epochs": best,
        "divergence": {"start": first[0], "end": last[0]},
        "agreement": {"start": first[1], "end": last[1]},
        "tokens": {
            "before": sum(len(pair.old) for pair in pairs) / len(pairs),
            "after": sum(len(pair.new) for pair in pairs) / len(pairs),
        },
        "change_elsewhere": lesson.change(_pairs(model, after, untouched)),
    }
    return after, facts


def _seen(
    tokenizer: PreTrainedTokenizerBase, terms: Sequence[str], texts: Sequence[Text]
) -> tuple[list[str], list[str]]:
    """The terms that are tokens of some text, and the others."""
    ids = {index for row in encode_all(with_terms(tokenizer, terms), texts) for index in row}
    here = [len(tokenizer) + place in ids for place in range(len(terms))]
    return list(compress(terms, here)), [term for term, seen in zip(terms, here, strict=True) if not seen]


def _pairs(before: DomainModel, after: DomainModel, texts: Sequence[Text]) -> list[_Pair]:
    start, causal = len(before.tokenizer), before.manifest.task.kind == "causal-lm"
    pairs = []
    for text in texts:
        old, new = _encoded(before, text), _encoded(after, text)
        by_border = {border: place for place, border in _borders(old, text, ends=causal)}
        places = [
            (by_border[border], place) for place, border in _borders(new, text, ends=causal) if border in by_border
        ]
        pair = _Pair(old["input_ids"], new["input_ids"], places)
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


class _Lesson:
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

    def loss(self, pairs: Sequence[_Pair]) -> tuple[Tensor, int, int]:
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
                target = self._with_terms(target, probabilities, pairs)
        loss = functional.kl_div(said.log_softmax(-1), target, reduction="batchmean")
        if vector is not None and own is not None:
            loss = loss + ((own - vector).square().sum(-1) / vector.square().sum(-1)).mean()
        return loss, len(target), int((said.argmax(-1) == target.argmax(-1)).sum())

    def measure(self, pairs: Sequence[_Pair]) -> tuple[float, float]:
        """Loss and share of equal answers over `pairs`."""
        total, places, same = 0.0, 0, 0
        with torch.no_grad():
            for start in range(0, len(pairs), self.batch_size):
                loss, count, equal = self.loss(pairs[start : start + self.batch_size])
                total, places, same = total + float(loss) * count, places + count, same + equal
        return total / max(places, 1), same / max(places, 1)

    def change(self, pairs: Sequence[_Pair]) -> float:
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

    def _with_terms(self, target: Tensor, said: Tensor, pairs: Sequence[_Pair]) -> Tensor:
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


def _train(
    lesson: _Lesson,
    trained: Sequence[_Pair],
    held_out: Sequence[_Pair],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> int:
    """Train the rows, leave the best ones in, and say after how many epochs that was."""
    network = lesson.after.network
    wanted = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    network.requires_grad_(False)
    hooks = []
    for table in lesson.tables:
        table.requires_grad_(True)
        hooks.append(cast(Any, table).register_hook(lambda gradient: _only(gradient, lesson.start, lesson.stop)))
    others = [copy.deepcopy(table.detach()) for table in lesson.tables]
    # Zero gradients move nothing in AdamW without decay: its steps are a mean of gradients over their own size.
    scale = float(lesson.tables[0].detach().square().mean().sqrt())
    optimizer = torch.optim.AdamW(lesson.tables, lr=learning_rate * scale, weight_decay=0.0)
    order = seeded(seed, "extend", "order")
    best, best_rows, best_epoch = lesson.measure(held_out)[0], lesson.rows(), 0
    steps = epochs * -(-len(trained) // lesson.batch_size)
    step = 0
    for epoch in range(1, epochs + 1):
        for batch in _batches(order.permutation(len(trained)), lesson.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale * (1 - step / steps)
            optimizer.zero_grad()
            lesson.loss([trained[index] for index in batch])[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        reached = lesson.measure(held_out)[0]
        if reached < best:
            best, best_rows, best_epoch = reached, lesson.rows(), epoch
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for table, other in zip(lesson.tables, others, strict=True):
            table.copy_(other)
    lesson.put(best_rows)
    optimizer.zero_grad()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(wanted[name])
    return best_epoch


def _only(gradient: Tensor, start: int, stop: int) -> Tensor:
    masked = torch.zeros_like(gradient)
    masked[start:stop] = gradient[start:stop]
    return masked


def _batches(order: Any, size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield [int(index) for index in order[start : start + size]]
