"""Token classification: an IOB2 tag for each word, read and scored at the word's first piece."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest
from common.metrics import Counts, add, entity_counts
from common.records import Record, TokensRecord
from common.tasks.iob2 import decode
from common.tasks.task import IGNORED, Batch, Encoded, Example, Predictions, first_windows, pad, padded_inputs

__all__ = ["TokenClassification"]


class TokenClassification:
    """Words are cut into pieces; the first piece of a word carries its tag, the others take no part in the loss."""

    def __init__(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tags = manifest.task.tags
        self._index = {tag: index for index, tag in enumerate(self._tags)}
        self._longest = manifest.data.max_length
        self._cut_off = np.where(np.array(self._tags) == "O", 0.0, -np.inf)

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Words as token ids with a tag index at each word's first piece."""
        sentences = cast(Sequence[TokensRecord], records)
        words = [list(record.tokens) for record in sentences]
        encoding, rows, truncated = first_windows(self._tokenizer, words, self._longest, is_split_into_words=True)
        examples = []
        for row, record in zip(rows, sentences, strict=True):
            tokens = np.asarray(encoding["input_ids"][row], dtype=np.int32)
            first = _first_pieces(encoding.word_ids(row), len(record.tokens))
            target = np.full(len(tokens), IGNORED, dtype=np.int32)
            for word, position in enumerate(first):
                if position >= 0:
                    target[position] = self._index[record.tags[word]]
            examples.append(
                Example(
                    tokens=tokens,
                    target=target,
                    reference=record.tags,
                    positions=np.asarray(first, dtype=np.int32),
                )
            )
        return Encoded(examples, truncated)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """A padded batch; `targets` [records, tokens] with IGNORED where nothing is scored."""
        ids, mask = padded_inputs(examples, int(self._tokenizer.pad_token_id), self._longest, device)
        targets = torch.from_numpy(pad([example.target for example in examples], IGNORED)[:, : self._longest])
        return Batch(ids, mask, targets.to(device), examples)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy over the words of each sentence [records] from logits [records, tokens, tags]."""
        return token_mean_losses(output.logits, batch.targets)

    def counts(self, output: Any, batch: Batch) -> Counts:
        """Entities right, invented and missed; words that were cut off count as O, so their entities are missed."""
        said = self.predictions(output, batch)
        loss = {"loss_sum": float(self.losses(output, batch).sum())}
        return add(entity_counts(said.predicted, said.expected), loss)

    def predictions(self, output: Any, batch: Batch) -> Predictions:
        """The likeliest valid tags of each sentence, as many as its words; words that were cut off are O."""
        logits = output.logits.float().cpu().numpy()
        predicted = []
        for row, example in zip(logits, batch.examples, strict=True):
            first = cast(Any, example.positions)
            scores = np.where(first[:, None] >= 0, row[first], self._cut_off)
            predicted.append(decode(scores, self._tags))
        return Predictions(predicted, [list(example.reference) for example in batch.examples])


def _first_pieces(word_ids: Sequence[int | None], words: int) -> list[int]:
    """For each word the position of its first piece; -1 where it was cut off or has no piece."""
    first = [-1] * words
    for position, word in enumerate(word_ids):
        if word is not None and first[word] < 0:
            first[word] = position
    return first


def token_mean_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each record [records], averaged over its own scored tokens; 0 where none is scored.

    `logits` is [records, tokens, classes], `targets` [records, tokens] with IGNORED gaps.
    """
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    ).view(targets.shape)
    return flat.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)
