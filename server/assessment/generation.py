"""Answers that a causal model writes itself: greedy, by its own tokenizer and the manifest's prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from common.errors import AssessmentError
from common.records import InstructionRecord, Record
from common.tasks.task import IGNORED
from server.distillation.domain_model import DomainModel

__all__ = ["answers"]


def answers(model: DomainModel, records: Sequence[Record], *, most_tokens: int, batch_size: int = 16) -> Iterator[str]:
    """What the model answers to each record, in order, without special tokens.

    Each answer is the likeliest next token again and again (no sampling), until the end token or `most_tokens`. A
    prompt too long for the network loses its beginning. A network of the transformers library keeps its cache; any
    other, such as an ONNX file, reads the whole text again for every token, to the same end.

    Raises:
        AssessmentError: the model's task is another than causal-lm, or its network has too few positions.
    """
    if model.manifest.task.kind != "causal-lm":
        raise AssessmentError(f"only a causal-lm model writes answers, and this one does {model.manifest.task.kind}")
    prompts = _prompts(model, cast(Sequence[InstructionRecord], records), most_tokens)
    # Neighbours in length share a batch, so that little is padded; what comes out is put back in order.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    written: dict[int, list[int]] = {}
    network = model.network.eval()
    write = _with_cache if hasattr(network, "generate") and hasattr(network, "generation_config") else _plain
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = write(model, [prompts[place] for place in places], most_tokens)
            written.update(zip(places, rows, strict=True))
    for place in range(len(prompts)):
        yield cast(str, model.tokenizer.decode(written[place], skip_special_tokens=True))


def _prompts(model: DomainModel, records: Sequence[InstructionRecord], most_tokens: int) -> list[list[int]]:
    """Token ids before the answer, exactly those that the model was trained with."""
    examples = model.task.encode([replace(record, output="") for record in records]).examples
    positions = getattr(getattr(model.network, "config", None), "max_position_embeddings", None)
    if positions is not None and most_tokens >= int(positions):
        raise AssessmentError(
            f"--max-new-tokens must be below the {positions} positions that the network has, found {most_tokens}"
        )
    room = None if positions is None else int(positions) - most_tokens
    prompts = []
    for example in examples:
        ids = [int(token) for token, target in zip(example.tokens, example.target, strict=True) if target == IGNORED]
        prompts.append(ids if room is None else ids[-room:])
    return prompts


def _with_cache(model: DomainModel, prompts: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
    """The library's own loop; prompts are filled up on the left, so that all answers start at one place."""
    pad, end = int(cast(int, model.tokenizer.pad_token_id)), int(cast(int, model.tokenizer.eos_token_id))
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=_device(model))
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=_device(model)
    )
    network = cast(Any, model.network)
    made: Tensor = network.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=end,
    )
    return [_until(row, end) for row in made[:, longest:].tolist()]


def _plain(model: DomainModel, prompts: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
    """Greedy by the definition: the whole text through the network for every token."""
    pad, end = int(cast(int, model.tokenizer.pad_token_id)), int(cast(int, model.tokenizer.eos_token_id))
    rows = [list(prompt) for prompt in prompts]
    going = set(range(len(rows)))
    for _ in range(most_tokens):
        if not going:
            break
        places = sorted(going)
        longest = max(len(rows[place]) for place in places)
        ids = torch.tensor([rows[place] + [pad] * (longest - len(rows[place])) for place in places])
        mask = torch.tensor([[1] * len(rows[place]) + [0] * (longest - len(rows[place])) for place in places])
        try:
            output = cast(Any, model.network)(input_ids=ids.to(_device(model)), attention_mask=mask.to(_device(model)))
        except Exception as error:  # another runtime's own classes; a file does not tell how much it can read
            raise AssessmentError(
                f"the network cannot read {longest} tokens ({type(error).__name__}); give a smaller --max-new-tokens"
            ) from error
        logits = output.logits
        for row, place in enumerate(places):
            token = int(logits[row, len(rows[place]) - 1].argmax())
            rows[place].append(token)
            if token == end:
                going.discard(place)
    return [_until(row[len(prompt) :], end) for row, prompt in zip(rows, prompts, strict=True)]


def _until(row: Sequence[int], end: int) -> list[int]:
    return list(row[: row.index(end)]) if end in row else list(row)


def _device(model: DomainModel) -> torch.device:
    parameter = next(model.network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
