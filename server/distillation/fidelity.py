"""How far an exported model is from its source, on texts that both read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel

__all__ = ["Distance", "distance", "sample_of"]

BATCH = 8


@dataclass(frozen=True)
class Distance:
    """`mean`: total variation between what source and export say, averaged over texts (over tokens where each has an
    answer), in [0, 1]: by so much the chance of any answer differs at most. `agreement`: share of equal first answers.
    """

    mean: float
    agreement: float


def distance(source: DomainModel, exported: DomainModel, texts: Sequence[str]) -> Distance:
    """Compare on `texts`, one alone and the others in batches of different length.

    Total variation is half the summed difference of two softmax distributions.

    Raises:
        DistillationError: there is no text to compare on, or the tokenizers do not agree on one.
    """
    longest = source.manifest.data.max_length
    rows = _ids(source.tokenizer, texts, longest)
    if rows != _ids(exported.tokenizer, texts, longest):
        raise DistillationError("the exported tokenizer reads sample texts in another way than the source's")
    rows = [row for row in rows if row]
    if not rows:
        raise DistillationError("there is no text to compare an export with its source on; give some with --texts")
    total, same, count = 0.0, 0, 0
    for batch in [rows[:1], *(rows[start : start + BATCH] for start in range(1, len(rows), BATCH))]:
        ids, mask = _padded(batch, int(cast(Any, source.tokenizer.pad_token_id)))
        theirs, ours = (_logits(model.network, ids, mask) for model in (source, exported))
        if theirs.shape != ours.shape:
            raise DistillationError(f"the export gives {tuple(ours.shape)} logits, its source {tuple(theirs.shape)}")
        if theirs.ndim == 3:
            theirs, ours = theirs[mask.bool()], ours[mask.bool()]
        total += float((theirs.softmax(-1) - ours.softmax(-1)).abs().sum()) / 2
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        count += len(theirs)
    return Distance(total / count, same / count)


def sample_of(tokenizer: PreTrainedTokenizerBase, *, texts: int = 33, pieces: int = 24) -> list[str]:
    """Texts of words taken evenly from the vocabulary, for a model that comes without any: 1 to `pieces` words long,
    without meaning. The same vocabulary gives the same texts.
    """
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in special]
    lengths = [1 + (number * 7) % pieces for number in range(texts)]
    total = sum(lengths)
    chosen = [ids[place * len(ids) // total] for place in range(total)]
    words = iter(cast(str, tokenizer.decode([index])).replace("##", "").strip() for index in chosen)
    return [" ".join(itertools.islice(words, length)) for length in lengths]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> list[list[int]]:
    if not texts:
        return []
    return cast(list[list[int]], tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"])


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _logits(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        output = network(input_ids=ids, attention_mask=mask)
    return cast(Tensor, output if isinstance(output, Tensor) else output.logits).double()
