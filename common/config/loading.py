"""Reads a manifest: TOML in, all errors at once, with the line of the file where possible.

This file knows where a value was written and how to say what is wrong with it. What is right is in `manifest.py`,
and the words for it in `annotate.py`.
"""

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from common.config.annotate import KnownKey, known_keys, shown
from common.config.manifest import DEFAULT_BASE, Manifest
from common.config.section import Section
from common.errors import ManifestError

__all__ = ["load_document", "load_manifest"]

Document = TypeVar("Document", bound=Section)
Key = tuple[str, ...]

BASE: Key = ("model", "base")
# What the file says about its own base and would be wrong about any other.
PINS_OF_A_BASE: tuple[Key, ...] = (
    ("model", "revision"),
    ("model", "weights_sha256"),
    ("model", "tokenizer_sha256"),
    ("task", "prompt_sha256"),
)

# The tables whose settings may be others while privacy is on: how is trained and measured, not what or on which base.
DIFFER_WITH_PRIVACY = frozenset({"data", "adapter", "training", "aggregation", "evaluation"})

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_NAME = rf"""(?:{_BARE.pattern}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_DOTTED = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
# The pieces of a value in which a bracket or a newline means something, or hides: strings first, then comments.
_PIECE = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'{3}.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*|[\[\]{}\n]''', re.DOTALL
)

_TOML_HINTS = {
    "Invalid value": "; text stands in quotes, a list in [ ]",
    "Cannot overwrite a value": "; a key may be given only once",
}


def load_manifest(path: Path, overrides: Sequence[str] = ()) -> Manifest:
    """Read and check the manifest at `path`.

    Settings in `[privacy.settings]` hold instead of the file's own while privacy is on, that is while `privacy.epsilon`
    is finite; `overrides` win over both.

    Args:
        path: the TOML file. A relative directory in its `model.base` counts from the file's own folder.
        overrides: `KEY=VALUE` each, for example `training.rounds=3`, in place of what the file says. The key is
            dotted; the value is TOML, or else taken as text. A relative directory as `model.base` counts from
            the current folder. The last of several for one key holds.

    Raises:
        ManifestError: with every problem, one line each: the file cannot be read, is not TOML, or breaks a rule.
    """
    data, places = _opened(path, Manifest, "`coadapt init` writes a manifest")
    _resolve_base(data, path.parent)
    base_of_the_file = _get(data, BASE, DEFAULT_BASE)
    problems: list[str] = []
    for override in overrides:
        problems += _override(data, places, override)
    if places.is_overridden(BASE):
        _resolve_base(data, Path.cwd())
    if _get(data, BASE, DEFAULT_BASE) != base_of_the_file:
        _drop_pins_of_the_old_base(data, places)
    problems += _settle_privacy(data, places)
    return _validated(Manifest, data, places, problems)


def load_document(path: Path, document: type[Document], *, advice: str) -> Document:
    """Read and check a TOML file of another kind than a manifest; `advice` says what to do where there is none.

    Raises:
        ManifestError: with every problem, one line each.
    """
    data, places = _opened(path, document, advice)
    return _validated(document, data, places, [])


def _opened(path: Path, document: type[Section], advice: str) -> tuple[dict[str, Any], "_Places"]:
    text = _read(path, advice)
    written = {key: f"{path.name}:{line}" for key, line in _lines_of_keys(text).items()}
    return _parse(text, path.name), _Places(path.name, known_keys(document), written)


def _validated(document: type[Document], data: dict[str, Any], places: "_Places", problems: list[str]) -> Document:
    try:
        valid = document.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ManifestError([*problems, *_problems(error.errors(include_url=False), places)]) from error
    if problems:
        raise ManifestError(problems)
    return valid


@dataclass
class _Places:
    """Where each key was written: `file:line`, or the `--set` that gave it; and which keys there may be."""

    file: str
    known: Mapping[str, KnownKey]
    written: dict[Key, str]
    overridden: set[Key] = field(default_factory=set)

    def override(self, key: Key, place: str) -> None:
        """Note that `place` gave `key`, in place of all that was written in it."""
        self.written = {one: where for one, where in self.written.items() if one[: len(key)] != key} | {key: place}
        self.overridden.add(key)

    def is_overridden(self, key: Key) -> bool:
        return any(key[: len(one)] == one for one in self.overridden)

    def of(self, key: Key) -> str:
        """The place of `key`, else of the first key in it, else of the table around it, else the file."""
        above = [key[:end] for end in range(len(key), 0, -1)]
        below = [one for one in self.written if key and one[: len(key)] == key]
        return next((self.written[one] for one in above[:1] + below + above if one in self.written), self.file)


def _read(path: Path, advice: str) -> str:
    try:
        # Some editors put a byte order mark before UTF-8; TOML has none.
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        problem = f"{path}: no such file; {advice}"
        raise ManifestError([problem]) from error
    except IsADirectoryError as error:
        problem = f"{path}: is a directory; name the file in it, such as federation.toml"
        raise ManifestError([problem]) from error
    except OSError as error:
        raise ManifestError([f"{path}: cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = (
            f"{path.name}:{line}: must be UTF-8 text, found byte 0x{error.object[error.start]:02x}; save it as UTF-8"
        )
        raise ManifestError([problem]) from error


def _parse(text: str, file: str) -> dict[str, Any]:
    """The values of TOML `text` as JSON knows them; a date becomes text, since no field is a date."""
    try:
        data: dict[str, Any] = json.loads(json.dumps(tomllib.loads(text), default=str))
    except (ValueError, RecursionError) as error:  # ValueError: wrong syntax, or an integer of thousands of digits
        message, place = str(error), file
        if position := re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message):
            message = message[: position.start()] + (f" at column {position[2]}" if position[2] else "")
            place = f"{file}:{position[1] or text.rstrip().count(chr(10)) + 1}"
        hint = next((hint for words, hint in _TOML_HINTS.items() if message.startswith(words)), "")
        raise ManifestError([f"{place}: not valid TOML: {message}{hint}"]) from error
    return data


def _lines_of_keys(text: str) -> dict[Key, int]:
    """The line of every table header and key of `text`, which is valid TOML; tomllib does not tell."""
    lines: dict[Key, int] = {}
    table: Key = ()
    position, line = 0, 1
    while position < len(text):
        start = position
        if header := _HEADER.match(text, position):
            table = _names(header[1])
            lines.setdefault(table, line)
            position = header.end()
        elif assignment := _ASSIGNMENT.match(text, position):
            lines[table + _names(assignment[1])] = line
            position = assignment.end()
        position = _end_of_statement(text, position)
        line += text.count("\n", start, position)
    return lines


def _end_of_statement(text: str, position: int) -> int:
    """Behind the first newline from `position` on that is in no string, list or inline table."""
    depth = 0
    for piece in _PIECE.finditer(text, position):
        if piece[0] in "[{":
            depth += 1
        elif piece[0] in "]}":
            depth -= 1
        elif piece[0] == "\n" and depth <= 0:
            return piece.end()
    return len(text)


def _names(dotted: str) -> Key:
    """The names in a dotted key, without their quotes."""
    names: list[str] = []
    rest: Any = tomllib.loads(f"{dotted} = 0")
    while isinstance(rest, dict):
        ((name, rest),) = rest.items()
        names.append(name)
    return tuple(names)


def _dotted(key: Key) -> str:
    return ".".join(name if _BARE.fullmatch(name) else shown(name) for name in key)


def _override(data: dict[str, Any], places: _Places, override: str) -> list[str]:
    """Put one `KEY=VALUE` into `data`; the problem, if it is malformed."""
    place = f"--set {override if override.isprintable() and len(override) <= 80 else shown(override)}"
    dotted, equals, text = override.partition("=")
    key = tuple(name.strip() for name in dotted.split("."))
    if not equals or not all(map(_BARE.fullmatch, key)):
        return [f"{place}: must be KEY=VALUE with a dotted key, such as training.rounds=3"]
    if problem := _put(data, key, _value(text)):
        return [f"{place}: {problem}"]
    places.override(key, place)
    return []


def _put(data: dict[str, Any], key: Key, value: Any) -> str:
    """Set a value in nested tables; what is wrong, where a key on the way holds no table."""
    table = data
    for depth, name in enumerate(key[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            return f"{_dotted(key[:depth])} must be a table to hold {key[depth]}, found {shown(table)}"
    table[key[-1]] = value
    return ""


def _settle_privacy(data: dict[str, Any], places: _Places) -> list[str]:
    """Put `[privacy.settings]` in place, or away with the privacy table where it sets no bound; the problems."""
    privacy = data.get("privacy")
    if not isinstance(privacy, dict):
        return []
    settings = privacy.pop("settings", {})
    problems = []
    for key, value in _leaves(("privacy", "settings"), settings):
        name, place = key[2:], places.of(key)
        if len(name) < 2 or name[0] not in DIFFER_WITH_PRIVACY or _dotted(name) not in places.known:
            known = {one: known for one, known in places.known.items() if one.split(".")[0] in DIFFER_WITH_PRIVACY}
            hint = _nearest(name, known) if len(name) > 1 else "write, say, training.batch_size = 400"
            problems.append(f"{place}: {_dotted(key)} is no setting that may differ with privacy; {hint}")
        elif privacy.get("epsilon") != math.inf and not places.is_overridden(name):
            if problem := _put(data, name, value):
                problems.append(f"{place}: {problem}")
            places.written[name] = place
    if privacy.get("epsilon") == math.inf:  # no bound is no privacy
        del data["privacy"]
    return problems


def _leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """Every value below a table by its full key; a value that is no table is its own."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves((*key, name), inner)


def _value(text: str) -> Any:
    try:
        parsed = _parse(f"value = {text}", "")
    except ManifestError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _get(data: dict[str, Any], key: Key, default: Any = None) -> Any:
    table, name = key
    inner = data.get(table)
    return inner.get(name, default) if isinstance(inner, dict) else default


def _resolve_base(data: dict[str, Any], folder: Path) -> None:
    """Make a local base absolute, so that it is found from every folder; a hub id stays as it is."""
    base = _get(data, BASE)
    if isinstance(base, str) and base and os.path.isdir(folder / base):
        data["model"]["base"] = os.path.abspath(folder / base)


def _drop_pins_of_the_old_base(data: dict[str, Any], places: _Places) -> None:
    """Forget the file's revision and digests, since an override chose another base.

    They would refuse the new base for not being the old one. Those that an override gives are kept.
    """
    for table, name in PINS_OF_A_BASE:
        if isinstance(data.get(table), dict) and not places.is_overridden((table, name)):
            data[table].pop(name, None)


def _problems(errors: list[ErrorDetails], places: _Places) -> list[str]:
    """One line for each unknown key, missing key, broken rule between keys, and key with a wrong value."""
    lines: list[str] = []
    wrong_values: dict[str, ErrorDetails] = {}
    for error in errors:
        key = tuple(piece for piece in error["loc"] if isinstance(piece, str))
        if error["type"] == "extra_forbidden":
            lines.append(f"{places.of(key)}: {_dotted(key)} is not a known key; {_nearest(key, places.known)}")
        elif error["type"] == "missing":
            lines += [f"{places.of(key)}: {problem}" for problem in _missing(".".join(key), places.known)]
        elif error["type"] == "value_error":
            named, problem = _broken_rule(key, str(error["ctx"]["error"]), places.known)
            lines.append(f"{places.of(named)}: {problem}")
        else:
            # Each kind of value that a key may have reports for itself; the one that got furthest tells most.
            name = next((one for end in range(len(key), 0, -1) if (one := ".".join(key[:end])) in places.known), "")
            if name not in wrong_values or len(error["loc"]) > len(wrong_values[name]["loc"]):
                wrong_values[name] = error
    for name, error in wrong_values.items():
        if not name:  # not about a key: JSON that cannot hold the values
            lines.append(f"{places.file}: {error['msg']}")
            continue
        index = next((piece for piece in error["loc"] if isinstance(piece, int)), None)
        found = shown(error["input"]) + ("" if index is None else f" as item {index + 1}")
        lines.append(f"{places.of(tuple(name.split('.')))}: {name} must be {places.known[name].rule}, found {found}")
    return lines


def _missing(name: str, known: Mapping[str, KnownKey]) -> list[str]:
    """A problem for the key, or for each key that a missing table must hold."""
    within = [one for one, key in known.items() if one.startswith(f"{name}.") and key.required]
    return [f"{one} is missing: {known[one].description}; it must be {known[one].rule}" for one in within or [name]]


def _broken_rule(table: Key, text: str, known: Mapping[str, KnownKey]) -> tuple[Key, str]:
    """The key that a validator's own `text` begins with, else the table it checked; and the text with its full name."""
    prefix = ".".join(table)
    if named := re.match(r"([\w.]+)(?= must |: )", text):
        name = f"{prefix}.{named[1]}" if prefix else named[1]
        if name in known:
            return tuple(name.split(".")), f"{name}{text[named.end() :]}"
    return table, f"{prefix}: {text}" if prefix else text


def _nearest(key: Key, keys: Mapping[str, KnownKey]) -> str:
    """What an unknown `key` may have meant: its name in another table, else one like it beside it, else elsewhere."""
    table, name = ".".join(key[:-1]), key[-1]
    names = {known: known.rpartition(".")[2] for known in keys}
    beside = [known for known in names if known.rpartition(".")[0] == table]
    like_beside = difflib.get_close_matches(name, [names[known] for known in beside], n=1)
    like = difflib.get_close_matches(name, names.values(), n=1, cutoff=0.75)
    meant = (
        [known for known in names if names[known] == name]
        or [known for known in beside if names[known] in like_beside]
        or [known for known in names if names[known] in like]
    )
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    return f"known keys {f'of {table}' if table else 'outside tables'}: {', '.join(names[known] for known in beside)}"
