"""Causal language modelling: an answer after a prompt; the loss is taken on the answer alone."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest, TaskSection
from common.errors import ModelError
from common.metrics import Counts, causal_counts
from common.records import InstructionRecord, Record
from common.tasks.task import IGNORED, Batch, Encoded, Example, Predictions, pad, padded_inputs
from common.tasks.token_classification import token_mean_losses

__all__ = ["BUILT_IN_PROMPT", "CausalLM", "prompt_digest", "prompt_template"]

BUILT_IN_PROMPT = "Question: {instruction}\n{input}\nAnswer: "

# A prompt may take at most this share of the longest input, so that something of every answer is left.
PROMPT_SHARE = 0.75

_PLACES = re.compile(r"\{instruction\}|\{input\}")
_EMPTY_INPUT = re.compile(r"(\n*)\{input\}(\n*)")


def prompt_template(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in force: the manifest's, else the tokenizer's chat template (a Jinja text), else the built-in."""
    if task.prompt != "auto":
        return task.prompt
    return cast(str | None, tokenizer.chat_template) or BUILT_IN_PROMPT


def prompt_digest(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 in hex of the template in force, for `task.prompt_sha256`."""
    return hashlib.sha256(prompt_template(task, tokenizer).encode()).hexdigest()


class CausalLM:
    """Prompt and answer are encoded apart and joined, so that the border between them never moves."""

    def __init__(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        wanted = manifest.task.prompt_sha256
        found = prompt_digest(manifest.task, tokenizer)
        if wanted is not None and wanted != found:
            raise ModelError(
                f"task.prompt_sha256: the prompt template here has digest {found}, the manifest wants {wanted};"
                " use the tokenizer and template that the federation agreed on"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError("model.base: the tokenizer has no end token, which ends every answer")
        self._tokenizer = tokenizer
        self._chat = manifest.task.prompt == "auto" and bool(tokenizer.chat_template)
        self._template = prompt_template(manifest.task, tokenizer)
        self._longest = manifest.data.max_length

    def prompt(self, record: InstructionRecord) -> str:
        """The text before the answer."""
        if self._chat:
            question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
            messages = [{"role": "user", "content": question}]
            return cast(str, self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # Where there is no input its line goes too. Both are filled in at once: braces and blank lines of records stay.
        template = self._template
        if not record.input:
            template = _EMPTY_INPUT.sub(lambda lines: max(lines[1], lines[2]), template)
        values = {"{instruction}": record.instruction, "{input}": record.input}
        return _PLACES.sub(lambda place: values[place[0]], template)

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Prompt and answer as token ids; the target is the answer and the end token.

        Too long a prompt loses its beginning, too long an answer its end (and then its end token).
        """
        rows = cast(Sequence[InstructionRecord], records)
        if not rows:
            return Encoded([], 0)
        prompts = self._ids([self.prompt(record) for record in rows], special=not self._chat)
        answers = self._tokenizer(
            [record.output for record in rows], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        examples, truncated = [], 0
        for record, whole_prompt, answer, offsets in zip(
            rows, prompts, answers["input_ids"], answers["offset_mapping"], strict=True
        ):
            room = self._longest - 1 - min(len(whole_prompt), int(self._longest * PROMPT_SHARE))
            whole = len(answer) <= room
            tail = [*answer, self._tokenizer.eos_token_id] if whole else answer[: room + 1]
            prompt = whole_prompt[-(self._longest - len(tail)) :]
            truncated += not whole or len(prompt) < len(whole_prompt)
            text = record.output if whole else record.output[: offsets[len(tail) - 1][1]]
            examples.append(
                Example(
                    tokens=np.asarray([*prompt, *tail], dtype=np.int32),
                    target=np.asarray([IGNORED] * len(prompt) + tail, dtype=np.int32),
                    reference=len(text.encode()),
                )
            )
        return Encoded(examples, truncated)

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids without an end token: a tokenizer that adds one must not end the prompt with it."""
        end = self._tokenizer.eos_token_id
        ids = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return [row[:-1] if row and row[-1] == end else row for row in cast(list[list[int]], ids)]

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """A padded batch; `targets` [records, tokens] with IGNORED on prompt and padding."""
        ids, mask = padded_inputs(examples, int(cast(int, self._tokenizer.pad_token_id)), self._longest, device)
        targets = torch.from_numpy(pad([example.target for example in examples], IGNORED)[:, : self._longest])
        return Batch(ids, mask, targets.to(device), examples)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy over each answer's tokens [records]; logits [records, tokens, words] say the next one."""
        return token_mean_losses(output.logits[:, :-1], batch.targets[:, 1:])

    def counts(self, output: Any, batch: Batch) -> Counts:
        """Nats, tokens and UTF-8 bytes of the answers. The end token costs nats and has no bytes."""
        tokens = (batch.targets[:, 1:] != IGNORED).sum(dim=1).tolist()
        nll = [loss * count for loss, count in zip(self.losses(output, batch).tolist(), tokens, strict=True)]
        return causal_counts(nll, tokens, [example.reference for example in batch.examples])

    def predictions(self, output: Any, batch: Batch) -> Predictions:
        """Answers as text; the predicted one holds the likeliest token after each true beginning (teacher forcing)."""
        best, targets = output.logits[:, :-1].argmax(dim=-1), batch.targets[:, 1:]
        scored = targets != IGNORED
        return Predictions(self._texts(best, scored), self._texts(targets, scored))

    def _texts(self, ids: Tensor, keep: Tensor) -> list[str]:
        rows = zip(ids, keep, strict=True)
        return [cast(str, self._tokenizer.decode(row[kept].tolist(), skip_special_tokens=True)) for row, kept in rows]
