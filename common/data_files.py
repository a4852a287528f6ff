"""Data files to records: read, map columns, clean, check.

The text of a record must never leave a site, and an error may. So an error here names the file, the row and the
column, and never a value: a label that the manifest does not know is record content too. Rows are counted from 1,
without a CSV header and without blank lines.
"""

import contextlib
import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config.manifest import Columns, DataSection, TaskSection
from common.durable import write_bytes
from common.errors import DataError
from common.records import InstructionRecord, Record, TextRecord, TokensRecord

__all__ = [
    "EMPTY_WORD",
    "Cleaning",
    "clean_name",
    "parse_rows",
    "read_records",
    "read_rows",
    "require_digest",
    "write_records",
]

Form = Literal["NFC", "NFKC", "none"]

# Stands for a word of which cleaning leaves nothing. Dropping the word would shift the tags, and a real character
# would invent content. BERT's tokenizers make no piece of it, so whoever aligns tags must bear a word without pieces.
EMPTY_WORD = "\ufffd"

# Control characters that part words (a page break in a contract, the line end of another system) become line ends.
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1f\x85]")
# The other control characters, byte order mark, zero-width space, word joiner, and halves of surrogate pairs, which
# no encoder accepts. The zero-width joiner and non-joiner stay: Indic and Persian spelling needs them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\u200b\u2060\ud800-\udfff]")

_NEEDED = {
    "text-classification": ("text", "label"),
    "token-classification": ("tokens", "tags"),
    "causal-lm": ("instruction", "output"),
}
# A CSV file without a header has a record where names should be, so longer "names" are never shown.
_LONGEST_SHOWN_NAME = 40
_FORMATS = ".jsonl, .ndjson or .csv (each also with .gz), or .parquet"


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What cleaning did, in records: the first two count changed records that stayed, the others removed records.

    All are zero exactly when every text was clean already.
    """

    normalised: int = 0
    """records whose text changed by Unicode normalisation, by stripping white space, or by filling an empty word"""
    control_characters: int = 0
    """records in which control or zero-width characters were removed or became line ends"""
    duplicates: int = 0
    """records removed because their unit holds an equal one, label or tags included"""
    empty: int = 0
    """records removed because no text (causal-lm: no output) was left"""

    def __add__(self, other: "Cleaning") -> "Cleaning":
        return Cleaning(
            normalised=self.normalised + other.normalised,
            control_characters=self.control_characters + other.control_characters,
            duplicates=self.duplicates + other.duplicates,
            empty=self.empty + other.empty,
        )


def read_records(
    path: Path, *, task: TaskSection, data: DataSection, need_unit: bool = False
) -> tuple[list[Record], Cleaning]:
    """The clean records of a file and what cleaning did; a DataError where the file breaks a rule or has no record."""
    records, cleaning = parse_rows(read_rows(path), task=task, data=data, where=str(path), need_unit=need_unit)
    if not records:
        found = f"all {cleaning.empty} rows have an empty text" if cleaning.empty else "the file has no rows"
        raise DataError(f"{path}: no records: {found}; give a file with at least one record")
    return records, cleaning


def require_digest(path: Path, sha256: str, *, what: str) -> None:
    """Refuse a file that is not the one that was agreed on; `what` is the setting that names it.

    Raises:
        DataError: it is missing, or its SHA-256 (of the file as it lies there, hex) is another.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{what}: {path} cannot be read ({error.strerror}); put the agreed file there") from error
    if found != sha256:
        raise DataError(f"{what}: {path} has the SHA-256 {found}, and {sha256} was agreed on; put that file there")


def read_rows(path: Path) -> Iterator[dict[str, object]]:
    """The rows of a .jsonl, .ndjson, .csv (each also .gz) or .parquet file, one at a time, as column -> value.

    Text is UTF-8, with or without a byte order mark. A file that is missing, of another kind, damaged or cut off
    raises a DataError, the last two only when reading comes to that place.
    """
    name = path.name.lower()
    reader = _READERS.get(Path(name.removesuffix(".gz")).suffix)
    if reader is None or name.endswith(".parquet.gz"):
        raise DataError(f"{path}: unknown kind of data file; give {_FORMATS}")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give one data file, {_FORMATS}")
    return reader(path)


def parse_rows(
    rows: Iterable[Mapping[str, object]],
    *,
    task: TaskSection,
    data: DataSection,
    where: str,
    need_unit: bool = False,
) -> tuple[list[Record], Cleaning]:
    """Clean records of the manifest's task, in order, and what cleaning did; `where` names the rows in errors.

    Texts lose control and zero-width characters and surrounding white space and get the manifest's Unicode form;
    units, groups, labels and tags are compared in that form. Without a unit column each row is a unit of its own,
    named after the last part of `where` and its row, so that files do not share such units; a unit column under a
    name of one's own must be there, and any with `need_unit`. Cleaning twice is cleaning once. A DataError names the
    first row and column that break a rule.
    """
    form, columns = data.unicode, data.columns
    known = _names_by_spelling(task.tags if task.kind == "token-classification" else task.labels, form)
    records: list[Record] = []
    seen: set[Record] = set()
    counts: Counter[str] = Counter()
    has_unit = False
    for number, values in enumerate(rows, start=1):
        if number == 1:
            _check_columns(values, task=task, columns=columns, where=where, need_unit=need_unit)
            has_unit = columns.unit in values
        row = _Row(values, f"{where}: row {number}", form)
        if has_unit:
            unit = row.name(columns.unit)
        elif columns.unit in values:
            raise row.error(columns.unit, "row 1 has no such column; give every row its unit")
        else:
            unit = f"{Path(where).name}:row-{number}"
        group = row.name_or_none(columns.group)
        record = _record(row, task.kind, columns=columns, known=known, unit=unit, group=group)
        if record is None:
            counts["empty"] += 1
        elif record in seen:
            counts["duplicates"] += 1
        else:
            seen.add(record)
            records.append(record)
            counts.update(row.changes)
    return records, Cleaning(**counts)


def write_records(path: Path, records: Iterable[Record], columns: Columns) -> None:
    """Write JSON Lines that `read_records` reads back as equal records; gzip if the name ends in .gz.

    Equal records give equal bytes. A DataError refuses other names; a RunError says what the disk refused.
    """
    name = path.name.lower()
    if not name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        raise DataError(f"{path}: records are written as JSON Lines; choose a name in .jsonl or .jsonl.gz")
    lines = (json.dumps(_as_row(record, columns), ensure_ascii=False) + "\n" for record in records)
    data = "".join(lines).encode()
    write_bytes(path, gzip.compress(data, mtime=0) if name.endswith(".gz") else data)


def _as_row(record: Record, columns: Columns) -> dict[str, object]:
    row: dict[str, object] = {columns.unit: record.unit}
    if record.group is not None:
        row[columns.group] = record.group
    match record:
        case TextRecord():
            return {columns.text: record.text, columns.label: record.label, **row}
        case TokensRecord():
            return {columns.tokens: record.tokens, columns.tags: record.tags, **row}
        case InstructionRecord():
            question = {columns.instruction: record.instruction, columns.input: record.input}
            return {**question, columns.output: record.output, **row}
    raise DataError(f"no file format for records of type {type(record).__name__}")


def clean_name(name: str, form: Form) -> str:
    """The name of a unit or group in the form in which records have it."""
    return _clean(name, form)


class _Row:
    """The values of one row, checked and cleaned one by one; its errors say where they are, never what they hold."""

    def __init__(self, values: Mapping[str, object], where: str, form: Form) -> None:
        self.values, self.where, self.form = values, where, form
        self.changes: set[str] = set()

    def error(self, column: str, problem: str) -> DataError:
        return DataError(f"{self.where}, column {column!r}: {problem}")

    def text(self, column: str) -> str:
        """Clean text; a null or a column that only this row lacks is an empty one."""
        value = self.values.get(column)
        if value is not None and not isinstance(value, str):
            raise self.error(column, f"must be text, found {type(value).__name__}; write it as text")
        return self._clean([value or ""])[0]

    def words(self, column: str) -> tuple[str, ...]:
        """Clean words, as many as the row has."""
        clean = self._clean(self.raw_list(column))
        if "" in clean:
            self.changes.add("normalised")
        return tuple(word or EMPTY_WORD for word in clean)

    def name(self, column: str) -> str:
        """A clean name (unit or group), never empty; whole numbers are read as their digits."""
        name = self.name_or_none(column)
        if name is None:
            raise self.error(column, "must not be empty; fill it in or remove the row")
        return name

    def name_or_none(self, column: str) -> str | None:
        """A clean name, None where there is none."""
        value = self.values.get(column)
        return (_clean(self.raw_name(column, value), self.form) or None) if value is not None else None

    def one_of(self, column: str, known: Mapping[str, str]) -> str:
        """A label, spelled as in the manifest."""
        name = self._known(column, self.values.get(column), known)
        if name is None:
            raise self.error(column, "not one of task.labels; correct it, or list it in the manifest")
        return name

    def all_of(self, column: str, known: Mapping[str, str]) -> tuple[str, ...]:
        """Tags, spelled as in the manifest."""
        names = []
        for place, value in enumerate(self.raw_list(column), start=1):
            name = self._known(column, value, known)
            if name is None:
                raise self.error(column, f"tag {place} is not O, B-x or I-x with x one of task.labels; correct it")
            names.append(name)
        return tuple(names)

    def raw_name(self, column: str, value: object) -> str:
        if value is None:
            raise self.error(column, "must not be empty; fill it in or remove the row")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(column, f"must be text or a whole number, found {type(value).__name__}; write it as text")
        return str(value)

    def raw_list(self, column: str) -> list[str]:
        value = self.values.get(column)
        if isinstance(value, str):  # CSV has no lists
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value is None:
            value = []
        if not isinstance(value, list | tuple):
            raise self.error(column, "must be a list; in CSV write it as JSON")
        return [self.raw_name(column, item) for item in value]

    def _known(self, column: str, value: object, known: Mapping[str, str]) -> str | None:
        raw = self.raw_name(column, value)
        return known.get(raw, known.get(_clean(raw, self.form)))

    def _clean(self, texts: Sequence[str]) -> list[str]:
        visible = [_without_controls(text) for text in texts]
        clean = [_clean(text, self.form) for text in visible]
        self.changes |= {"control_characters"} if visible != texts else set()
        self.changes |= {"normalised"} if clean != visible else set()
        return clean


def _record(
    row: _Row, kind: str, *, columns: Columns, known: Mapping[str, str], unit: str, group: str | None
) -> Record | None:
    """The record of one row, or None where it has no text."""
    if kind == "text-classification":
        label, text = row.one_of(columns.label, known), row.text(columns.text)
        return TextRecord(text=text, label=label, unit=unit, group=group) if text else None
    if kind == "token-classification":
        tokens, tags = row.words(columns.tokens), row.all_of(columns.tags, known)
        if len(tokens) != len(tags):
            raise row.error(columns.tags, f"has {len(tags)} tags for {len(tokens)} tokens; give each token one tag")
        blank = all(token == EMPTY_WORD for token in tokens)
        return None if blank else TokensRecord(tokens=tokens, tags=tags, unit=unit, group=group)
    ask, extra, output = row.text(columns.instruction), row.text(columns.input), row.text(columns.output)
    return InstructionRecord(instruction=ask, input=extra, output=output, unit=unit, group=group) if output else None


def _names_by_spelling(names: Sequence[str], form: Form) -> dict[str, str]:
    """The manifest's name by its clean spelling and, which wins, by its exact one."""
    return {_clean(name, form): name for name in names} | {name: name for name in names}


def _without_controls(text: str) -> str:
    return _INVISIBLE.sub("", _BREAKS.sub("\n", text))


def _clean(text: str, form: Form) -> str:
    # Controls go first: what they kept apart may compose. White space goes last: NFKC makes spaces of other characters.
    text = _without_controls(text)
    if form != "none":
        text = unicodedata.normalize(form, text)
    return text.strip()


def _check_columns(
    row: Mapping[str, object], *, task: TaskSection, columns: Columns, where: str, need_unit: bool
) -> None:
    needed = [*_NEEDED[task.kind]]
    # A unit column under a name of one's own was meant to be there. To take its absence for "none" would protect
    # records where persons should be.
    if need_unit or columns.unit != Columns().unit:
        needed.append("unit")
    for key in needed:
        column = getattr(columns, key)
        if column not in row:
            found = [name if len(name) <= _LONGEST_SHOWN_NAME else f"({len(name)} characters)" for name in row]
            near = difflib.get_close_matches(column, found, n=1)
            hint = f", perhaps {key} = {json.dumps(near[0])}" if near else ""
            raise DataError(
                f"{where}: no column {column!r}; columns found: {', '.join(map(repr, found)) or 'none'};"
                f" map it in [data.columns]{hint}"
            )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The file's bytes, unpacked; every failure of disk or gzip becomes a DataError."""
    try:
        with path.open("rb") as packed:
            if path.name.lower().endswith(".gz"):
                with gzip.open(packed) as file:
                    yield file
            else:
                yield packed
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: the gzip data are cut off or damaged; copy the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the file and its permissions") from error


# Decoding errors carry the record's text with them, so they are never chained: `from None`.


def _json_rows(path: Path) -> Iterator[dict[str, object]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else {}
            except UnicodeDecodeError:
                raise DataError(f"{path}: line {number} is not UTF-8; save the file as UTF-8") from None
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is not JSON; write one JSON object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is not a JSON object; write one JSON object a line")
            if text:
                yield row


def _csv_rows(path: Path) -> Iterator[dict[str, object]]:
    csv.field_size_limit(2**31 - 1)  # the default, 131072 characters, is less than a long contract
    with _opened(path) as file:
        lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) != len(names):
                raise DataError(f"{path}: two columns have the same name; rename one")
            for values in lines:
                if values and len(values) != len(names):
                    raise DataError(
                        f"{path}: line {lines.line_num} ends a row of {len(values)} fields, the header has"
                        f" {len(names)}; quote fields that hold commas"
                    )
                if values:
                    yield dict(zip(names, values, strict=True))
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 after line {lines.line_num}; save the file as UTF-8") from None
        except csv.Error:
            raise DataError(f"{path}: the quotes of line {lines.line_num} do not match; save it as CSV again") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = 0
    with _opened(path) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                rows = batch.to_pylist()
                yield from rows
                done += len(rows)
        except (pa.ArrowException, OSError, ValueError):  # an OSError of Arrow's is damaged data too
            raise DataError(f"{path}: damaged Parquet data after row {done}; copy or write the file again") from None


_READERS: dict[str, Callable[[Path], Iterator[dict[str, object]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
