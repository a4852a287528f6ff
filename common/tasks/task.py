"""What every task does, and the choice between the three. One file for each task lies beside this one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest
from common.metrics import Counts
from common.records import Record

__all__ = ["Batch", "Encoded", "Example", "Predictions", "Task", "make_task", "pad"]

# What cross-entropy leaves out: padding, later pieces of a word, the prompt.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A record as numbers. `target` is a class index [1], or a label for each token [tokens] with IGNORED gaps.

    `reference` is what measuring compares with: a label, the words' tags, or the number of bytes of the answer.
    """

    tokens: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    reference: Any
    positions: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples in the records' order, and how many of them were cut to the longest input."""

    examples: list[Example]
    truncated: int


@dataclass(frozen=True, slots=True)
class Batch:
    """`input_ids` and `attention_mask` are [records, tokens]; `targets` [records] or [records, tokens]."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    examples: Sequence[Example]

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model said and what was right, in the words of the task, for a person's own metrics."""

    predicted: list[Any]
    expected: list[Any]


class Task(Protocol):
    """A task of one manifest and one tokenizer; holds no state."""

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Records as examples; too long ones are cut and counted."""

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Examples as one padded batch."""

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Loss of each record [records], float32, never a mean over the tokens of the whole batch.

        A record's loss depends on no other record: with a token mean over the batch, one long record would change
        the gradients of the others, and clipping them would not bound what one record does.
        """

    def counts(self, output: Any, batch: Batch) -> Counts:
        """Additive counts of the batch (`common/metrics.py`)."""

    def predictions(self, output: Any, batch: Batch) -> Predictions:
        """What the model said and what was right, for a person's own metrics."""


def make_task(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The manifest's task for this tokenizer."""
    from common.tasks.causal_lm import CausalLM
    from common.tasks.text_classification import TextClassification
    from common.tasks.token_classification import TokenClassification

    kinds: dict[str, Any] = {
        "text-classification": TextClassification,
        "token-classification": TokenClassification,
        "causal-lm": CausalLM,
    }
    task: Task = kinds[manifest.task.kind](manifest, tokenizer)
    return task


def first_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Any, longest: int, **options: Any
) -> tuple[Any, list[int], int]:
    """Each text cut to its first `longest` tokens.

    Returns the encoding, the row of each text in it, and how many texts were cut. (A cut text has further rows in
    the encoding, which are left alone: counting them is how a cut is noticed without encoding twice.)
    """
    if not texts:  # the tokenizers fail on an empty list
        return {}, [], 0
    encoding = tokenizer(texts, truncation=True, max_length=longest, return_overflowing_tokens=True, **options)
    owners = encoding["overflow_to_sample_mapping"]
    rows = [index for index, owner in enumerate(owners) if index == 0 or owners[index - 1] != owner]
    return encoding, rows, len({owner for before, owner in itertools.pairwise(owners) if before == owner})


def pad(rows: Sequence[npt.NDArray[np.int32]], value: int, *, multiple: int = 8) -> npt.NDArray[np.int64]:
    """Rows of different length as one array [rows, tokens], filled on the right.

    The width is a multiple of eight, which matrix units and memory allocators like.
    """
    longest = max(len(row) for row in rows)
    width = -(-longest // multiple) * multiple
    array = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def padded_inputs(
    examples: Sequence[Example], pad_token: int, longest: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` of a batch, never wider than the longest allowed input."""
    ids = pad([example.tokens for example in examples], pad_token)[:, :longest]
    mask = pad([np.ones(len(example.tokens), dtype=np.int32) for example in examples], 0)[:, :longest]
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
