"""Text classification: one label for a text."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest
from common.metrics import Counts, add, text_counts
from common.records import Record, TextRecord
from common.tasks.task import Batch, Encoded, Example, Predictions, first_windows, padded_inputs

__all__ = ["TextClassification"]


class TextClassification:
    """Encodes texts with the tokenizer's own special tokens; the target is the label's place in the agreed list."""

    def __init__(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._labels = manifest.task.labels
        self._index = {label: index for index, label in enumerate(self._labels)}
        self._longest = manifest.data.max_length

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Texts as token ids with the label's index."""
        texts = cast(Sequence[TextRecord], records)
        encoding, rows, truncated = first_windows(self._tokenizer, [record.text for record in texts], self._longest)
        examples = [
            Example(
                tokens=np.asarray(encoding["input_ids"][row], dtype=np.int32),
                target=np.asarray([self._index[record.label]], dtype=np.int32),
                reference=record.label,
            )
            for row, record in zip(rows, texts, strict=True)
        ]
        return Encoded(examples, truncated)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """A padded batch; `targets` [records]."""
        ids, mask = padded_inputs(examples, int(self._tokenizer.pad_token_id), self._longest, device)
        targets = torch.tensor([int(example.target[0]) for example in examples], device=device)
        return Batch(ids, mask, targets, examples)

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each text [records] from logits [records, labels]."""
        return functional.cross_entropy(output.float(), batch.targets, reduction="none")

    def counts(self, output: Tensor, batch: Batch) -> Counts:
        """Right and wrong by label, and the summed loss."""
        loss = {"loss_sum": float(self.losses(output, batch).sum())}
        predicted = output.argmax(dim=-1).tolist()
        return add(text_counts(predicted, batch.targets.tolist(), len(self._labels)), loss)

    def predictions(self, output: Tensor, batch: Batch) -> Predictions:
        """Labels by name."""
        predicted = [self._labels[index] for index in output.argmax(dim=-1).tolist()]
        return Predictions(predicted, [example.reference for example in batch.examples])
