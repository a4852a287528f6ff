"""Text that a causal teacher writes itself, where there is no public text of the domain."""

from typing import Any, cast

import numpy as np
import torch

from common.errors import DistillationError
from common.randomness import seeded
from common.records import InstructionRecord
from server.distillation.corpus import FEWEST
from server.distillation.domain_model import DomainModel

__all__ = ["write_texts"]

# So many times more texts are drawn than wanted, since some are written twice.
MOST_TRIES = 2
BATCH = 32


def write_texts(
    teacher: DomainModel, count: int, *, temperature: float = 1.0, longest: int | None = None, seed: int = 0
) -> list[InstructionRecord]:
    """Up to `count` different answers to an empty question, each drawn token by token at `temperature`.

    An answer ends at the end token, or where prompt and answer have `longest` tokens (default: data.max_length). Equal
    seeds give equal texts on the same machine. What a model writes may repeat what it was trained on: these texts are
    as private as the adapter that wrote them, no more and no less.

    Raises:
        DistillationError: the teacher does another task, or wrote too few different texts.
    """
    if teacher.manifest.task.kind != "causal-lm":
        raise DistillationError(
            f"a teacher of {teacher.manifest.task.kind} writes no text; name files of public text with --corpus FILE"
        )
    if temperature <= 0:
        raise DistillationError(f"the temperature of writing must be above 0, found {temperature:g}")
    start = _start(teacher)
    length = longest or teacher.manifest.data.max_length
    generator = seeded(seed, "distillation", "written")
    texts: dict[str, None] = {}
    for _ in range(-(-MOST_TRIES * count // BATCH)):
        for ids in _drawn(teacher, start, length, temperature, generator):
            if text := cast(str, teacher.tokenizer.decode(ids, skip_special_tokens=True)).strip():
                texts.setdefault(text)
        if len(texts) >= count:
            break
    if len(texts) < min(count, FEWEST):
        raise DistillationError(
            f"the teacher wrote {len(texts)} different texts, at least {FEWEST} are needed; raise the temperature above"
            f" {temperature:g}, or name files of public text with --corpus FILE"
        )
    return [
        InstructionRecord(unit=f"written-{number}", instruction="", input="", output=text)
        for number, text in enumerate([*texts][:count])
    ]


def _start(teacher: DomainModel) -> list[int]:
    """The prompt of an empty question as token ids; at least one."""
    empty = InstructionRecord(unit="", instruction="", input="", output="?")
    example = teacher.task.encode([empty]).examples[0]
    ids = example.tokens[example.target < 0].tolist()
    return ids or [cast(int, teacher.tokenizer.eos_token_id)]


def _drawn(
    teacher: DomainModel, start: list[int], longest: int, temperature: float, generator: np.random.Generator
) -> list[list[int]]:
    """BATCH continuations of `start`, without it; each token by the inverse of its distribution function."""
    network, end = cast(Any, teacher.network), teacher.tokenizer.eos_token_id
    ids = torch.tensor([start] * BATCH)
    written: list[torch.Tensor] = []
    ended, memory = torch.zeros(BATCH, dtype=torch.bool), None
    with torch.inference_mode():
        while len(start) + len(written) < longest and not bool(ended.all()):
            output = network(input_ids=ids, past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            mass = (output.logits[:, -1].double() / temperature).softmax(dim=-1).cumsum(dim=-1)
            drawn = torch.from_numpy(generator.random(BATCH))[:, None] * mass[:, -1:]
            ids = torch.searchsorted(mass, drawn, right=True).clamp(max=mass.shape[1] - 1)
            written.append(ids)
            ended |= ids[:, 0] == end
    rows = torch.cat(written, dim=1).tolist() if written else [[] for _ in range(BATCH)]
    return [row[: row.index(end)] if end in row else row for row in rows]
