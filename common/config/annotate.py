"""Writes a manifest or another document with every field explained, and keeps the words for each field's rule.

Meanings, ranges, choices and defaults all come from the document's JSON schema, so the comment in a written file,
the error line of a broken rule (`loading.py`) and the check itself cannot disagree.
"""

import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, get_args

import tomli_w

from common.config.distillation import Share
from common.config.manifest import Manifest
from common.config.section import Address, Commit, ImportPath, Name, Section, Sha256

__all__ = ["KnownKey", "annotated", "annotated_document", "known_keys", "shown"]

COLUMNS = 100
HEADER = """\
What all sides of this federation agree on; every side must hold the same.
A key that is left out has its default. An optional key without a value is written behind a '#':
take the '#' away and put the value in to set it."""

# A table that is no part of what sides agree on need not be shown where there is none.
LEFT_OUT = frozenset({"simulation"})

_PATTERN_IN_WORDS = {
    get_args(kind)[1].pattern: words
    for kind, words in (
        (Sha256, "text of 64 hex digits in lower case"),
        (Commit, "text of 40 hex digits in lower case"),
        (ImportPath, "text 'module:function', an import path"),
        (Share, "text '1/N', N from 1 to 999"),
        (Address, "text 'HOST:PORT'"),
        (Name, "text of 1 to 64 letters, digits, '.', '_' or '-' that begins with a letter or digit"),
    )
}


@dataclass(frozen=True, kw_only=True)
class KnownKey:
    """A key or table of the manifest in words.

    Attributes:
        description: what it means, with its unit.
        rule: ends the sentence "it must be ...", for example "an integer of at least 1".
        default: what it is where the file does not say, as JSON would hold it; None: it then has no value.
        required: whether the file must give it.
        is_table: whether it holds other keys.
        placeholder: TOML text to stand for a value that is still to be chosen.
    """

    description: str
    rule: str
    default: Any
    required: bool
    is_table: bool
    placeholder: str


@cache
def known_keys(document: type[Section] = Manifest) -> Mapping[str, KnownKey]:
    """Every key of a document by its dotted name, in the order of a file: a table, its keys, then its tables."""
    schema = document.model_json_schema()
    return MappingProxyType(dict(_keys_below("", schema, schema.get("$defs", {}))))


def shown(value: object) -> str:
    """`value` for a person, on one line of at most 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def annotated(manifest: Manifest) -> str:
    """The TOML text of `manifest`, every key under a comment with its meaning, rule and default.

    `load_manifest` of the text gives an equal manifest. Keys without a value stand behind a '#', and so does a whole
    table that the manifest has not; the `simulation` table is left out then.
    """
    return annotated_document(manifest, HEADER, left_out=LEFT_OUT)


def annotated_document(document: Section, header: str, *, left_out: Collection[str] = ()) -> str:
    """The TOML text of any document, as above, under a `header` for its reader.

    Tables named in `left_out` are not shown where the document has none.
    """
    dumped = document.model_dump(mode="json")
    lines = _comment(header)
    for dotted, key in known_keys(type(document)).items():
        *tables, name = dotted.split(".")
        table: Any = dumped
        for step in tables:
            table = table[step] if table is not None else None
        absent = table is None or (key.is_table and table[name] is None)
        if absent and dotted.split(".")[0] in left_out:
            continue
        if absent and key.is_table:
            lines += ["", "", *_comment(key.description), f"# [{dotted}]"]
        elif absent:
            value = key.placeholder if key.default is None else _toml(key.default)
            lines += ["", *_explanation(key), f"# {name} = {value}"]
        elif key.is_table:
            lines += ["", "", *_comment(key.description), f"[{dotted}]"]
        elif table[name] is None:
            lines += ["", *_explanation(key), f"# {name} = {key.placeholder}"]
        else:
            lines += ["", *_explanation(key), f"{name} = {_toml(table[name])}"]
    return "\n".join(lines) + "\n"


def _keys_below(prefix: str, table: dict[str, Any], definitions: dict[str, Any]) -> Iterator[tuple[str, KnownKey]]:
    """Plain keys come before tables: behind the header of an inner table TOML would read them as its keys."""
    inner: list[tuple[str, KnownKey, dict[str, Any]]] = []
    for name, field in table["properties"].items():
        kind = _alternatives(field)[0]
        definition = definitions[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else None
        key = KnownKey(
            description=(definition or field).get("description", ""),
            rule=_rule(field),
            default=field.get("default"),
            required=name in table.get("required", ()),
            is_table=definition is not None,
            placeholder='"..."' if kind.get("type") == "string" else str(kind.get("minimum", 0)),
        )
        if definition is None:
            yield prefix + name, key
        else:
            inner.append((prefix + name, key, definition))
    for dotted, key, definition in inner:
        yield dotted, key
        yield from _keys_below(f"{dotted}.", definition, definitions)


def _alternatives(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The kinds of value that a field takes; TOML has no null, so None is not one of them."""
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]


def _rule(field: dict[str, Any]) -> str:
    """What `field`, a JSON schema, allows, in words that end the sentence "it must be ..."."""
    return " or ".join(_rule_of_kind(kind) for kind in _alternatives(field))


def _rule_of_kind(kind: dict[str, Any]) -> str:
    match kind:
        case {"const": choice}:
            words = repr(choice)
        case {"enum": [*others, last]}:
            words = f"{', '.join(map(repr, others))} or {last!r}"
        case {"type": "boolean"}:
            words = "true or false"
        case {"type": "integer"}:
            words = f"an integer{_range(kind)}"
        case {"type": "number"}:
            words = f"a{'' if 'maximum' in kind or 'exclusiveMaximum' in kind else ' finite'} number{_range(kind)}"
        case {"type": "array", "items": items}:
            words = "a list of texts" if _rule(items) == "text" else f"a list, each item {_rule(items)}"
        case {"type": "string", "pattern": pattern}:
            words = _PATTERN_IN_WORDS.get(pattern, f"text of the pattern {pattern}")
        case {"type": "string"}:
            words = "text that is not empty" if kind.get("minLength") else "text"
        case _:
            words = "a table"
    return words


def _range(kind: dict[str, Any]) -> str:
    if "minimum" in kind and "maximum" in kind:
        return f" from {kind['minimum']:.12g} to {kind['maximum']:.12g}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{word} {kind[name]:.12g}" for name, word in words.items() if name in kind]
    return " " + " and ".join(limits) if limits else ""


def _explanation(key: KnownKey) -> list[str]:
    absent = "required" if key.required else "optional" if key.default is None else f"default {shown(key.default)}"
    return [*_comment(key.description), *_comment(f"{key.rule}; {absent}", mark="#   ")]


def _comment(text: str, mark: str = "# ") -> list[str]:
    """`text` as comment lines of at most `COLUMNS`; a newline in it begins a new line."""
    wrapper = textwrap.TextWrapper(
        COLUMNS, initial_indent=mark, subsequent_indent=mark, break_long_words=False, break_on_hyphens=False
    )
    return [line for paragraph in text.splitlines() for line in wrapper.wrap(paragraph)]


def _toml(value: Any) -> str:
    """`value` as TOML text; lists on one line where they fit, texts with newlines between triple quotes."""
    if isinstance(value, list):
        items = [_toml(item) for item in value]
        line = f"[{', '.join(items)}]"
        return line if len(line) <= COLUMNS else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    # Between triple quotes a reader may turn \r\n into \n, so a text that holds \r stays on one line, escaped.
    multiline = isinstance(value, str) and "\r" not in value
    return tomli_w.dumps({"x": value}, multiline_strings=multiline).removeprefix("x = ").removesuffix("\n")
