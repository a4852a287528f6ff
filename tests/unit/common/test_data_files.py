import csv
import gzip
import json
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.manifest import Columns, DataSection, TaskSection
from common.data_files import EMPTY_WORD, Cleaning, parse_rows, read_records, read_rows, write_records
from common.errors import DataError
from common.records import InstructionRecord, Record, TextRecord, TokensRecord

TEXT = TaskSection(kind="text-classification", labels=("yes", "no", "1"))
TOKENS = TaskSection(kind="token-classification", labels=("Drug", "Dose"))
CAUSAL = TaskSection(kind="causal-lm")
DATA = DataSection()

SECRET = "SECRET-Müller"  # stands for anything that a record holds; it must be in no error
ROWS: list[dict[str, object]] = [
    {"text": "pays rent", "label": "yes", "unit": "m1", "group": "A"},
    {"text": "does, not \n pay", "label": "no", "unit": "m2", "group": "B"},
]
RECORDS = [
    TextRecord(text="pays rent", label="yes", unit="m1", group="A"),
    TextRecord(text="does, not \n pay", label="no", unit="m2", group="B"),
]


def parse(
    rows: list[dict[str, object]], task: TaskSection = TEXT, data: DataSection = DATA
) -> tuple[list[Record], Cleaning]:
    return parse_rows(rows, task=task, data=data, where="a/file.jsonl")


def json_lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_bytes(json_lines(rows))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def said(error: pytest.ExceptionInfo[DataError]) -> str:
    """What a person sees: the message, one line, and the traceback hold nothing of the record."""
    message = str(error.value)
    assert "\n" not in message
    shown = "".join(traceback.format_exception_only(error.value))
    chain = error.value.__cause__
    assert SECRET not in shown + str(chain)
    return message


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.jsonl.gz", "r.csv", "r.CSV", "r.csv.gz", "r.parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lower = write(tmp_path / f"made-{name.lower()}", ROWS)
    lower.rename(path)
    assert list(read_rows(path)) == ROWS
    assert read_records(path, task=TEXT, data=DATA) == (RECORDS, Cleaning())


def test_tokens_come_as_lists_or_as_json_in_csv(tmp_path: Path) -> None:
    lists = {"tokens": ["aspirin", "80", "mg"], "tags": ["B-Drug", "B-Dose", "I-Dose"], "unit": "p"}
    packed = {key: value if key == "unit" else json.dumps(value) for key, value in lists.items()}
    expected = [TokensRecord(tokens=("aspirin", "80", "mg"), tags=("B-Drug", "B-Dose", "I-Dose"), unit="p")]
    for path, row in ((tmp_path / "t.jsonl", lists), (tmp_path / "t.csv", packed), (tmp_path / "t.parquet", lists)):
        assert read_records(write(path, [row]), task=TOKENS, data=DATA) == (expected, Cleaning())


def test_instructions_with_and_without_input() -> None:
    rows: list[dict[str, object]] = [
        {"instruction": "Why?", "input": "Rain.", "output": "Clouds."},
        {"instruction": "Why?", "output": "Because."},
    ]
    records, _ = parse(rows, CAUSAL)
    assert [(r.input, r.output) for r in records if isinstance(r, InstructionRecord)] == [
        ("Rain.", "Clouds."),
        ("", "Because."),
    ]


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "long.csv", [{"text": "x" * 300_000, "label": "yes"}])
    assert len(next(read_rows(path))["text"]) == 300_000  # type: ignore[arg-type]


def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c", "label": "no"}, ensure_ascii=False), encoding="utf-8")
    assert list(read_rows(path)) == [{"text": "a\u2028b\x85c", "label": "no"}]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json_lines(ROWS[:1]) + b"\r\n  \n" + json_lines(ROWS[1:]))
    assert list(read_rows(path)) == ROWS


GOOD_LINE = json_lines([{"text": "fine", "label": "yes"}])
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "not json": ("r.jsonl", GOOD_LINE + b'{"text": "SECRET-M\xc3\xbcller"', "line 2 is not JSON"),
    "not an object": ("r.jsonl", b'["SECRET"]\n', "line 1 is not a JSON object"),
    "nested too deep": ("r.jsonl", b"[" * 200_000 + b"\n", "line 1 is not JSON"),
    "not utf-8": ("r.jsonl", GOOD_LINE + '{"text": "SECRET-Müller"}'.encode("latin-1"), "line 2 is not UTF-8"),
    "csv not utf-8": ("r.csv", "text,label\nSECRET-Müller,yes\n".encode("latin-1"), "not UTF-8"),
    "csv more fields": (
        "r.csv",
        b"text,label\nSECRET,Mueller,yes\n",
        "line 2 ends a row of 3 fields, the header has 2",
    ),
    "csv fewer fields": ("r.csv", b"text,label\nSECRET\n", "line 2 ends a row of 1 fields, the header has 2"),
    "csv open quote": ("r.csv", b'text,label\n"SECRET,yes\n', "quotes of line 2"),
    "csv same names": ("r.csv", b"text,text\na,b\n", "two columns have the same name"),
    "gz cut off": ("r.jsonl.gz", gzip.compress(GOOD_LINE * 50)[:-12], "cut off or damaged"),
    "gz damaged": ("r.jsonl.gz", gzip.compress(GOOD_LINE * 50)[:-8] + b"12345678", "cut off or damaged"),
    "gz garbage": ("r.csv.gz", b"SECRET", "cut off or damaged"),
    "parquet garbage": ("r.parquet", b"SECRET" * 100, "damaged Parquet data after row 0"),
    "parquet empty": ("r.parquet", b"", "damaged Parquet data"),
    "unknown kind": ("r.xlsx", b"SECRET", "unknown kind of data file; give .jsonl"),
    "parquet.gz": ("r.parquet.gz", b"SECRET", "unknown kind of data file"),
    "no rows": ("r.jsonl", b"\n", "no records: the file has no rows"),
    "no csv": ("r.csv", b"", "no records: the file has no rows"),
    "all empty": ("r.jsonl", json_lines([{"text": " ", "label": "yes"}]), "no records: all 1 rows have an empty text"),
}


@pytest.mark.parametrize(("name", "content", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_records(path, task=TEXT, data=DATA)
    assert said(error).startswith(str(path))
    assert problem in said(error)
    assert "SECRET" not in said(error)


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [{"text": SECRET * 20, "label": "yes"}] * 50)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert "damaged Parquet data" in said(error)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="not a file"):
        read_rows(tmp_path / "folder.csv")


BAD_ROWS: dict[str, tuple[TaskSection, dict[str, object], str]] = {
    "label": (TEXT, {"text": SECRET, "label": SECRET, "unit": "u"}, "row 2, column 'label': not one of task.labels"),
    "no label": (TEXT, {"text": SECRET, "label": None, "unit": "u"}, "row 2, column 'label': must not be empty"),
    "label type": (TEXT, {"text": SECRET, "label": 1.0, "unit": "u"}, "text or a whole number, found float"),
    "label bool": (TEXT, {"text": SECRET, "label": True, "unit": "u"}, "text or a whole number, found bool"),
    "text type": (TEXT, {"text": [SECRET], "label": "yes", "unit": "u"}, "column 'text': must be text, found list"),
    "unit": (TEXT, {"text": SECRET, "label": "yes", "unit": "  "}, "row 2, column 'unit': must not be empty"),
    "no unit": (TEXT, {"text": SECRET, "label": "yes"}, "row 2, column 'unit': must not be empty"),
    "unit type": (TEXT, {"text": "a", "label": "yes", "unit": {SECRET: 1}}, "text or a whole number, found dict"),
    "tag": (TOKENS, {"tokens": [SECRET], "tags": [f"B-{SECRET}"], "unit": "u"}, "row 2, column 'tags': tag 1 is not"),
    "tags short": (TOKENS, {"tokens": [SECRET, "b"], "tags": ["O"], "unit": "u"}, "has 1 tags for 2 tokens"),
    "no list": (TOKENS, {"tokens": SECRET, "tags": ["O"], "unit": "u"}, "column 'tokens': must be a list"),
    "bad word": (TOKENS, {"tokens": [[SECRET]], "tags": ["O"], "unit": "u"}, "found list"),
    "output": (CAUSAL, {"instruction": "a", "output": 3, "unit": "u"}, "column 'output': must be text, found int"),
}
FIRST_ROWS: dict[str, dict[str, object]] = {
    "text-classification": {"text": "a", "label": "yes", "unit": "v"},
    "token-classification": {"tokens": ["a"], "tags": ["O"], "unit": "v"},
    "causal-lm": {"instruction": "a", "output": "b", "unit": "v"},
}


@pytest.mark.parametrize(("task", "row", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_and_not_quoted(task: TaskSection, row: dict[str, object], problem: str) -> None:
    with pytest.raises(DataError) as error:
        parse([FIRST_ROWS[task.kind], row], task)
    assert said(error).startswith("a/file.jsonl: row 2")
    assert problem in said(error)


def test_a_missing_column_names_the_found_ones_and_the_nearest() -> None:
    with pytest.raises(DataError) as error:
        parse([{"Text": SECRET, "labels": "yes"}])
    assert "no column 'text'; columns found: 'Text', 'labels'; map it in [data.columns]" in said(error)
    assert 'perhaps text = "Text"' in said(error)
    with pytest.raises(DataError) as error:
        parse([{"text": SECRET, "labels": "yes"}])
    assert (
        "no column 'label'; columns found: 'text', 'labels'; map it in [data.columns], perhaps label = \"labels\""
        in said(error)
    )


def test_a_csv_file_without_header_does_not_show_its_first_record(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f"The patient {SECRET} came in with a fever and a cough,yes\nB,no\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_records(path, task=TEXT, data=DATA)
    assert "columns found: '(" in said(error)


def test_columns_are_mapped() -> None:
    columns = Columns(text="body", label="class", unit="patient", group="ward")
    records, _ = parse([{"body": "a", "class": 1, "patient": 7, "ward": 3}], data=DataSection(columns=columns))
    assert records == [TextRecord(text="a", label="1", unit="7", group="3")]


def test_without_unit_column_each_row_is_a_unit_of_its_file() -> None:
    records, cleaning = parse([{"text": "a", "label": "yes"}, {"text": "a", "label": "yes", "group": " "}])
    assert [(r.unit, r.group) for r in records] == [("file.jsonl:row-1", None), ("file.jsonl:row-2", None)]
    assert cleaning == Cleaning()


def test_a_mapped_unit_column_must_be_there() -> None:
    # Otherwise a mistyped name would quietly protect records in place of patients.
    data = DataSection(columns=Columns(unit="patient"))
    with pytest.raises(DataError, match="no column 'patient'"):
        parse([{"text": "a", "label": "yes", "patients": "p"}], data=data)


def test_a_unit_column_that_only_later_rows_have_is_refused() -> None:
    with pytest.raises(DataError, match="row 2, column 'unit': row 1 has no such column"):
        parse([{"text": "a", "label": "yes"}, {"text": "b", "label": "yes", "unit": "p"}])


def test_cleaning_counts_what_it_does() -> None:
    rows: list[dict[str, object]] = [
        {"text": "cafe\u0301", "label": "yes", "unit": "u"},  # decomposed
        {"text": "  spaces ", "label": "yes", "unit": "u"},
        {"text": "\ufeffpage 1\x0cpage\u200b 2\r\n\x00end", "label": "yes", "unit": "u"},
        {"text": "caf\u00e9", "label": "yes", "unit": "u"},  # a duplicate once both are composed
        {"text": "caf\u00e9", "label": "no", "unit": "u"},  # another label
        {"text": "caf\u00e9", "label": "yes", "unit": "v"},  # another unit
        {"text": "\u200b \n", "label": "yes", "unit": "u"},
        {"text": None, "label": "yes", "unit": "u"},
    ]
    records, cleaning = parse(rows)
    assert [r.text for r in records if isinstance(r, TextRecord)] == [
        "café",
        "spaces",
        "page 1\npage 2\nend",
        "café",
        "café",
    ]
    assert cleaning == Cleaning(normalised=2, control_characters=1, duplicates=1, empty=2)
    assert cleaning + cleaning == Cleaning(normalised=4, control_characters=2, duplicates=2, empty=4)


def test_joiners_and_tabs_stay() -> None:
    text = "\u0645\u06cc\u200c\u062e क्\u200dष\ta\nb"  # Persian with a non-joiner, Hindi with a joiner
    records, cleaning = parse([{"text": text, "label": "yes"}])
    assert records[0] == TextRecord(text=text, label="yes", unit="file.jsonl:row-1")
    assert cleaning == Cleaning()


@pytest.mark.parametrize(("form", "expected"), [("NFC", "ﬁ é"), ("NFKC", "fi é"), ("none", "ﬁ e\u0301")])
def test_unicode_form_is_the_manifests(form: str, expected: str) -> None:
    data = DataSection.model_validate({"unicode": form})
    records, _ = parse([{"text": "ﬁ e\u0301", "label": "yes"}], data=data)
    assert records[0] == TextRecord(text=expected, label="yes", unit="file.jsonl:row-1")


def test_a_label_in_another_unicode_form_is_the_manifests_label() -> None:
    task = TaskSection(kind="text-classification", labels=("cafe\u0301", "m\u00b2", "m2"))
    data = DataSection(unicode="NFKC")
    rows: list[dict[str, object]] = [{"text": "a", "label": label} for label in ("caf\u00e9", " m2", "m\u00b2")]
    records, _ = parse(rows, task, data)
    assert [r.label for r in records if isinstance(r, TextRecord)] == ["cafe\u0301", "m2", "m\u00b2"]


def test_names_are_compared_in_their_clean_form() -> None:
    # One patient must not become two by the byte order mark or spelling of one export.
    rows: list[dict[str, object]] = [
        {"text": text, "label": "yes\u200b", "unit": unit, "group": " g"}
        for text, unit in (("a", "Zoe\u0308"), ("b", "\ufeffZo\u00eb "))
    ]
    records, _ = parse(rows)
    assert {(r.unit, r.group) for r in records} == {("Zo\u00eb", "g")}


def test_half_a_surrogate_pair_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00", "label": "yes"}')
    records, cleaning = read_records(path, task=TEXT, data=DATA)
    assert records == [TextRecord(text="ab \U0001f600", label="yes", unit="r.jsonl:row-1")]
    assert cleaning == Cleaning(control_characters=1)


def test_an_emptied_word_keeps_its_place() -> None:
    rows: list[dict[str, object]] = [
        {"tokens": ["a", "\u200b", "b"], "tags": ["O", "B-Drug", "I-Drug"]},
        {"tokens": [" ", "\x00"], "tags": ["O", "O"]},
        {"tokens": [], "tags": []},
    ]
    records, cleaning = parse(rows, TOKENS)
    expected = TokensRecord(tokens=("a", EMPTY_WORD, "b"), tags=("O", "B-Drug", "I-Drug"), unit="file.jsonl:row-1")
    assert records == [expected]
    assert cleaning == Cleaning(normalised=1, control_characters=1, empty=2)


def test_writing_is_repeatable_and_only_json_lines(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    write_records(first, RECORDS, Columns())
    write_records(second, RECORDS, Columns())
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # RFC 1952: no time of writing
    with pytest.raises(DataError, match="JSON Lines"):
        write_records(tmp_path / "a.csv", RECORDS, Columns())
    with pytest.raises(DataError, match="no file format for records of type Record"):
        write_records(first, [Record(unit="u")], Columns())


# All of Unicode, with surrogates and with what cleaning is about made likely.
CHARACTERS = st.one_of(
    st.characters(), st.sampled_from("\x00\t\n\r\x0b\x85\u00a0\u200b\u200d\ufeff\u0301e\u1100\u1161\u00a8\ud800")
)
WILD = st.text(CHARACTERS, max_size=12)
UNIT = st.sampled_from(["u", "v", 3])
TEXT_ROWS = st.fixed_dictionaries({"text": WILD, "label": st.sampled_from(["yes", "no", 1]), "unit": UNIT})
TOKEN_ROWS = st.lists(st.tuples(WILD, st.sampled_from(TOKENS.tags)), max_size=4).map(
    lambda pairs: {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]}
)
CAUSAL_ROWS = st.fixed_dictionaries({"instruction": WILD, "input": WILD, "output": WILD, "group": st.just("g")})


@pytest.mark.parametrize(("task", "row"), [(TEXT, TEXT_ROWS), (TOKENS, TOKEN_ROWS), (CAUSAL, CAUSAL_ROWS)])
def test_cleaning_twice_is_cleaning_once(
    tmp_path_factory: pytest.TempPathFactory, task: TaskSection, row: st.SearchStrategy[dict[str, object]]
) -> None:
    folder = tmp_path_factory.mktemp("written")

    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(row, min_size=1, max_size=6), form=st.sampled_from(["NFC", "NFKC", "none"]))
    def check(rows: list[dict[str, object]], form: str) -> None:
        data = DataSection.model_validate({"unicode": form})
        records, cleaning = parse(rows, task, data)
        assert len(records) + cleaning.duplicates + cleaning.empty == len(rows)
        path = folder / "r.jsonl.gz"
        write_records(path, records, data.columns)
        again, nothing = parse_rows(read_rows(path), task=task, data=data, where="b")
        assert (again, nothing) == (records, Cleaning())

    check()
