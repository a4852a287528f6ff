"""New terms for a finished model: their rows alone are trained, by the model before as the teacher.

The model before reads each text in its old pieces and says what the model with the terms must answer. All other
parameters stay as they are, bit for bit, so a text without the terms gets the same answer.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from common.randomness import seeded
from server.distillation.domain_model import DomainModel
from server.distillation.pieces import Text, encode_all
from server.distillation.term_lesson import Lesson, TextPair, text_pairs
from server.distillation.terms import add_terms, new_terms, with_terms

__all__ = ["extend"]

_HELD_OUT = 5
_MOST_UNTOUCHED = 64


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
    pairs = text_pairs(model, after, list(compress(texts, hold)))
    held_out = pairs[::_HELD_OUT]
    trained = [pair for index, pair in enumerate(pairs) if index % _HELD_OUT] or pairs
    lesson = Lesson(model, after, batch_size)
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
        "change_elsewhere": lesson.change(text_pairs(model, after, untouched)),
    }
    return after, facts


def _seen(
    tokenizer: PreTrainedTokenizerBase, terms: Sequence[str], texts: Sequence[Text]
) -> tuple[list[str], list[str]]:
    """The terms that are tokens of some text, and the others."""
    ids = {index for row in encode_all(with_terms(tokenizer, terms), texts) for index in row}
    here = [len(tokenizer) + place in ids for place in range(len(terms))]
    return list(compress(terms, here)), [term for term, seen in zip(terms, here, strict=True) if not seen]


def _train(
    lesson: Lesson,
    trained: Sequence[TextPair],
    held_out: Sequence[TextPair],
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
