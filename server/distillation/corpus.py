"""The corpus: public text of the domain that a teacher is listened to on; labels are used where there are any.

A text without a label becomes a record of the task with a stand-in, the first label or the tag O, that nothing reads.
The private records of a federation have no place here.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from common.config.manifest import Manifest
from common.data_files import parse_rows, read_rows
from common.errors import DataError, DistillationError
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.tasks.causal_lm import CausalLM
from common.tasks.task import IGNORED, Example
from server.distillation.domain_model import DomainModel

__all__ = ["Corpus", "encode", "read_corpus", "words_of", "write_corpus"]

# Chinese, Japanese and Korean characters stand alone, since no space parts their words; so do signs.
_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_EAST}]|[^\W{_EAST}]+|[^\w\s]")

_LABELLED, _PLAIN = "labelled", "plain"


@dataclass(frozen=True)
class Corpus:
    """Different texts as records of the task; `labelled[i]` says whether record i has a label of its own."""

    records: tuple[Record, ...]
    labelled: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def texts(self) -> list[str | tuple[str, ...]]:
        """The texts alone, to count pieces and terms in; of token classification the words."""
        return [_text(record) for record in self.records]

    def split(self, share: float = 0.1, *, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """A seeded part for training and one held out, of `share` of the texts and at least one."""
        order = seeded(seed, "corpus", "held out").permutation(len(self))
        cut = max(1, round(len(self) * share))
        return self._part(np.sort(order[cut:])), self._part(np.sort(order[:cut]))

    def _part(self, rows: Sequence[int] | np.ndarray) -> "Corpus":
        return Corpus(tuple(self.records[row] for row in rows), tuple(self.labelled[row] for row in rows))


def read_corpus(paths: Sequence[Path], manifest: Manifest, *, least: int = 20) -> Corpus:
    """The different texts of all files, in order: .jsonl, .ndjson, .csv (each also .gz), .parquet, or .txt.

    A .txt file has a text a line. In the others the manifest's columns are read: text and, if it is there and not
    empty, label; tokens (or text, parted at white space, signs and Chinese characters) and, if it is there, tags;
    instruction, input and output (or text, which is learnt as it is, without a prompt). Of equal texts the first
    stays, one with a label before one without.

    Raises:
        DataError: a file cannot be read or a row breaks a rule.
        DistillationError: fewer than `least` different texts.
    """
    found: dict[Any, tuple[Record, bool]] = {}
    for path in paths:
        records, _ = parse_rows(
            _filled_in(_rows(path, manifest), manifest, path), task=manifest.task, data=manifest.data, where=str(path)
        )
        for record in records:
            key, labelled = _key(record), record.unit == _LABELLED
            if key not in found or (labelled and not found[key][1]):
                found[key] = (record, labelled)
    if len(found) < least:
        raise DistillationError(
            f"the corpus has {len(found)} different texts, at least {least} are needed to learn from; give more public"
            " text of the domain with --corpus"
        )
    return Corpus(tuple(record for record, _ in found.values()), tuple(labelled for _, labelled in found.values()))


def _rows(path: Path, manifest: Manifest) -> Iterator[dict[str, object]]:
    if path.suffix.lower() != ".txt":
        yield from read_rows(path)
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    for line in lines:
        yield {manifest.data.columns.text: line}


def _filled_in(rows: Iterator[dict[str, object]], manifest: Manifest, path: Path) -> Iterator[Mapping[str, object]]:
    """Rows with all columns that the task needs; the unit column says whether the label is the row's own."""
    columns, kind = manifest.data.columns, manifest.task.kind
    for number, row in enumerate(rows, start=1):
        text = row.get(columns.text)
        plain: dict[str, object] = {}
        if kind == "text-classification":
            if row.get(columns.label) in (None, ""):
                plain = {columns.label: manifest.task.labels[0]}
        elif kind == "token-classification":
            if columns.tokens not in row and isinstance(text, str):
                plain = {columns.tokens: words_of(text), columns.tags: []}
            if plain or row.get(columns.tags) in (None, "", []):
                tokens = plain.get(columns.tokens, row.get(columns.tokens))
                plain |= {columns.tags: ["O"] * _length(tokens, f"{path}: row {number}, column {columns.tokens!r}")}
        elif columns.output not in row and isinstance(text, str):
            plain = {columns.instruction: "", columns.input: "", columns.output: text}
        own = not plain or kind == "causal-lm"  # a text says its own next tokens
        yield {**row, **plain, columns.unit: _LABELLED if own else _PLAIN}


def _length(tokens: object, where: str) -> int:
    try:
        found = json.loads(tokens) if isinstance(tokens, str) else tokens  # CSV has no lists
    except ValueError:
        found = None
    if not isinstance(found, list | tuple):
        raise DataError(f"{where}: must be a list; in CSV write it as JSON")
    return len(found)


def words_of(text: str) -> list[str]:
    """Words of plain text for token classification: parted at white space, signs and Chinese characters alone."""
    return _WORD.findall(text)


def _key(record: Record) -> Any:
    match record:
        case TextRecord():
            return record.text
        case TokensRecord():
            return record.tokens
        case InstructionRecord():
            return record.instruction, record.input, record.output
    return record


def _text(record: Record) -> str | tuple[str, ...]:
    if isinstance(record, InstructionRecord):
        return "\n".join(filter(None, _key(record)))
    return cast(str | tuple[str, ...], _key(record))


def encode(model: DomainModel, records: Sequence[Record]) -> list[Example]:
    """Examples of the records, in order; a causal record without a question is learnt as it is, from its start."""
    if model.manifest.task.kind != "causal-lm":
        return model.task.encode(records).examples
    plain = [
        not (cast(InstructionRecord, record).instruction or cast(InstructionRecord, record).input) for record in records
    ]
    asked = iter(
        model.task.encode([record for record, is_plain in zip(records, plain, strict=True) if not is_plain]).examples
    )
    return [
        _plain_example(model, cast(InstructionRecord, record).output) if is_plain else next(asked)
        for record, is_plain in zip(records, plain, strict=True)
    ]


def _plain_example(model: DomainModel, text: str) -> Example:
    """A text and the end token; all but the first token is learnt."""
    tokenizer, longest = model.tokenizer, model.manifest.data.max_length
    end = cast(int, tokenizer.eos_token_id)
    ids = cast(list[int], tokenizer(text, verbose=False)["input_ids"])
    ids = (ids if ids and ids[-1] == end else [*ids, end])[:longest]
    tokens = np.asarray(ids, dtype=np.int32)
    return Example(tokens, np.concatenate([[IGNORED], tokens[1:]]).astype(np.int32), len(text.encode()))


def write_corpus(
    teacher: DomainModel,
    count: int,
    *,
    temperature: float = 1.0,
    longest: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    least: int = 20,
) -> Corpus:
    """`count` texts that a causal teacher writes itself, or as many different ones as it comes to in twice as many.

    Each begins where the task's prompt begins and is drawn token by token from the teacher's distribution at
    `temperature`; it ends at the end token or after `longest` tokens (default: data.max_length). Equal seeds give equal
    texts on the same machine. What a model writes tells what it learnt: the texts are as private as its adapter.

    Raises:
        DistillationError: the teacher does not write (another task), or wrote fewer than `least` different texts.
    """
    if teacher.manifest.task.kind != "causal-lm":
        raise DistillationError(
            f"a teacher of {teacher.manifest.task.kind} writes no text; give files of public text with --corpus"
        )
    start = _start(teacher)
    length = longest or teacher.manifest.data.max_length
    generator = seeded(seed, "corpus", "written")
    texts: dict[str, None] = {}
    for _ in range(-(-2 * count // batch_size)):
        for ids in _sampled(teacher, start, batch_size, length, temperature, generator):
            if text := cast(str, teacher.tokenizer.decode(ids, skip_special_tokens=True)).strip():
                texts[text] = None
        if len(texts) >= count:
            break
    if len(texts) < least:
        raise DistillationError(
            f"the teacher wrote {len(texts)} different texts, at least {least} are needed; raise the temperature above"
            f" {temperature:g}, or give files of public text with --corpus"
        )
    records = (InstructionRecord(instruction="", input="", output=text, unit=_PLAIN) for text in [*texts][:count])
    return Corpus(tuple(records), (False,) * min(count, len(texts)))


def _start(teacher: DomainModel) -> list[int]:
    """Token ids up to where a prompt's question stands; at least one."""
    mark = "\ue000"
    task = cast(CausalLM, teacher.task)
    before = task.prompt(InstructionRecord(instruction=mark, input="", output="", unit="")).split(mark)[0].rstrip(" ")
    ids = cast(list[int], teacher.tokenizer(before, verbose=False)["input_ids"])
    end = cast(int, teacher.tokenizer.eos_token_id)
    while len(ids) > 1 and ids[-1] == end:
        ids = ids[:-1]
    return ids or [end]


def _sampled(
    teacher: DomainModel, start: list[int], rows: int, longest: int, temperature: float, generator: np.random.Generator
) -> list[list[int]]:
    """`rows` continuations of `start`, each drawn with the inverse of its distribution function."""
    network = cast(Any, teacher.network)
    end = teacher.tokenizer.eos_token_id
    device = next(teacher.network.parameters()).device
    ids = torch.tensor([start] * rows, device=device)
    written, ended, memory = ids, torch.zeros(rows, dtype=torch.bool, device=device), None
    with torch.inference_mode():
        while written.shape[1] < longest and not bool(ended.all()):
            output = network(input_ids=ids, past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            mass = (output.logits[:, -1].double() / temperature).softmax(dim=-1).cumsum(dim=-1)
            drawn = torch.from_numpy(generator.random(rows)).to(device)[:, None] * mass[:, -1:]
            ids = torch.searchsorted(mass, drawn, right=True).clamp(max=mass.shape[1] - 1)
            written = torch.cat([written, ids], dim=1)
            ended |= ids[:, 0] == end
    return [_until(row, end, len(start)) for row in written.tolist()]


def _until(ids: list[int], end: int | None, start: int) -> list[int]:
    """The ids before the first end token that was written."""
    return ids[: ids.index(end, start)] if end in ids[start:] else ids
