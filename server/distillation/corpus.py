"""Public text of the domain to distil on: from files, unlabelled or not; a part of it is held out."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config.manifest import Manifest
from common.data_files import parse_rows, read_rows
from common.errors import DataError, DistillationError
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord

__all__ = ["FEWEST", "Corpus", "corpus_of", "read_corpus", "read_public", "texts_in"]

# With fewer texts neither a vocabulary nor a student comes of it.
FEWEST = 50

# Stand in the unit's place while a file is read.
_KNOWN, _UNKNOWN = "labelled", "unlabelled"

HELD_OUT = 0.1
MOST_HELD_OUT = 500


@dataclass(frozen=True)
class Corpus:
    """Records to distil on and records held out; `labelled` are those of `train` whose label or answer is known.

    A record without a label has the task's first one in its place, which nothing reads.
    """

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    labelled: frozenset[int] = frozenset()


def read_corpus(paths: Sequence[Path], manifest: Manifest) -> Corpus:
    """The texts of all files, cleaned, each once, split by the seed of [distillation].

    A file is one that `common.data_files` reads, in which labels, tags or answers may be missing, in every row or in
    some, or a .txt file with a text a line. Of equal texts one with a label stays.

    Raises:
        DataError: a file is missing, damaged or lacks the column of the text.
        DistillationError: fewer than FEWEST texts.
    """
    if not paths:
        raise DistillationError("there is no corpus; name files of public text with --corpus FILE")
    records, labelled = read_public(paths, manifest)
    return corpus_of(records, manifest, labelled=labelled, where=", ".join(path.name for path in paths))


def read_public(paths: Sequence[Path], manifest: Manifest) -> tuple[list[Record], list[bool]]:
    """The records of all files, cleaned, and of each whether it carries a label.

    Raises:
        DataError: a file is missing, damaged or lacks the column of the text.
    """
    records: list[Record] = []
    labelled: list[bool] = []
    for path in paths:
        found, known = _read(path, manifest)
        records += found
        labelled += known
    return records, labelled


def corpus_of(
    records: Sequence[Record], manifest: Manifest, *, labelled: Sequence[bool] | None = None, where: str = "the corpus"
) -> Corpus:
    """The records, each text once, split into what is learnt from and what is held out.

    Raises:
        DistillationError: fewer than FEWEST texts.
    """
    known = labelled or [False] * len(records)
    once: dict[str, tuple[Record, bool]] = {}
    for record, text, has_label in zip(records, texts_in(records), known, strict=True):
        key = text if isinstance(text, str) else "\x1f".join(text)
        if key not in once or (has_label and not once[key][1]):
            once[key] = (record, has_label)
    pairs = list(once.values())
    if len(pairs) < FEWEST:
        raise DistillationError(
            f"{where}: a corpus needs at least {FEWEST} different texts, found {len(pairs)}; give more public text"
        )
    order = seeded(manifest.distillation.seed, "corpus").permutation(len(pairs))
    held = set(order[: min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(pairs))))].tolist())
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return Corpus(
        tuple(record for record, _ in train),
        tuple(record for index, (record, _) in enumerate(pairs) if index in held),
        frozenset(index for index, (_, has_label) in enumerate(train) if has_label),
    )


def _read(path: Path, manifest: Manifest) -> tuple[list[Record], list[bool]]:
    """The records of one file, and of each whether it carries a label."""
    columns, task = manifest.data.columns, manifest.task
    rows = _lines(path) if path.suffix == ".txt" else [dict(row) for row in read_rows(path)]
    target = {
        "text-classification": columns.label,
        "token-classification": columns.tags,
        "causal-lm": columns.output,
    }[task.kind]
    own = {
        "text-classification": columns.text,
        "token-classification": columns.tokens,
        "causal-lm": columns.output,
    }[task.kind]
    if rows and not {own, "text"} & rows[0].keys():
        raise DataError(f"{path}: no column {own!r} and none 'text'; map it in [data.columns], or give a .txt file")
    for row in rows:
        known = row.get(target) not in (None, "")
        if not known:
            _fill(row, manifest)
        row[columns.unit] = _KNOWN if known else _UNKNOWN  # of public text nobody's
    records, _ = parse_rows(rows, task=task, data=manifest.data, where=str(path))
    return records, [record.unit == _KNOWN for record in records]


def _lines(path: Path) -> list[dict[str, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__}); check the file") from error
    return [{"text": line.strip()} for line in text.splitlines() if line.strip()]


def _fill(row: dict[str, object], manifest: Manifest) -> None:
    """Give a row without a label what the task's reader asks for; plain text becomes words, or an answer."""
    columns, task = manifest.data.columns, manifest.task
    match task.kind:
        case "text-classification":
            row[columns.text] = row.get(columns.text, row.get("text"))
            row[columns.label] = task.labels[0]
        case "token-classification":
            words = row.get(columns.tokens)
            if words is None and isinstance(row.get("text"), str):
                words = words_of(str(row["text"]))
            row[columns.tokens] = words
            row[columns.tags] = ["O"] * _length(words)
        case "causal-lm":
            row[columns.output] = row.get(columns.output, row.get("text"))
            row.setdefault(columns.instruction, "")


def _length(words: object) -> int:
    """How many words a row has; what is no list of words is told by the task's reader."""
    if isinstance(words, str):  # CSV has no lists
        with contextlib.suppress(ValueError):
            words = json.loads(words)
    return len(words) if isinstance(words, list) else 0


def words_of(text: str) -> list[str]:
    """The words of a text, parted at white space; of a script without it, such as Chinese, the characters."""
    return [
        part
        for word in text.split()
        for part in (list(word) if any("\u3040" <= sign <= "\u9fff" for sign in word) else [word])
    ]


def texts_in(records: Iterable[Record]) -> list[str | Sequence[str]]:
    """What a tokenizer reads of the records: texts, or words where the task reads words."""
    texts: list[str | Sequence[str]] = []
    for record in records:
        match record:
            case TextRecord():
                texts.append(record.text)
            case TokensRecord():
                texts.append(record.tokens)
            case InstructionRecord():
                texts.append("\n".join(part for part in (record.instruction, record.input, record.output) if part))
    return texts
