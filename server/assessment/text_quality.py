"""Answers that a model wrote against the true ones: ROUGE-L, exact match, and whether they have a wanted form."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import AssessmentError

__all__ = ["Check", "exact_match", "pattern_check", "rouge_l", "schema_check", "units"]

Check = Callable[[str], bool]

# A Chinese character, Japanese syllable or Korean block is a unit of its own, since such text has no spaces; elsewhere
# a unit is a run of letters, digits and underscores.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def units(text: str) -> list[str]:
    """Words in lower case, and Chinese characters one by one; punctuation is left out."""
    return _UNIT.findall(text.casefold())


def rouge_l(predicted: str, expected: str) -> float:
    """ROUGE-L of one answer, 0 to 1: F of the longest common subsequence of units (Lin 2004, section 3.1, beta = 1).

    With m and n units and a subsequence of l, recall is l / n, precision l / m, and F is 2 l / (m + n). Two answers
    without any unit are equal: 1.
    """
    ours, theirs = units(predicted), units(expected)
    if not ours and not theirs:
        return 1.0
    return 2 * _common(ours, theirs) / (len(ours) + len(theirs))


def exact_match(predicted: str, expected: str) -> bool:
    """Whether both are the same text; how white space is spent does not count."""
    return predicted.split() == expected.split()


def pattern_check(pattern: str) -> Check:
    """Whether all of an answer, without white space around it, matches a regular expression; '.' matches line ends.

    Raises:
        AssessmentError: the pattern is none.
    """
    try:
        wanted = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise AssessmentError(f"--pattern: no regular expression: {error}") from error
    return lambda answer: wanted.fullmatch(answer.strip()) is not None


def schema_check(path: Path) -> Check:
    """Whether an answer is JSON that fits the schema in a file (its own "$schema" says which draft).

    Raises:
        AssessmentError: the file cannot be read, holds no schema, or the library that checks is not installed.
    """
    try:
        schema: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssessmentError(f"--schema: {path} cannot be read as JSON ({type(error).__name__})") from error
    try:
        library: Any = importlib.import_module("jsonschema")
    except ImportError as error:
        raise AssessmentError("--schema needs the library jsonschema: pip install jsonschema") from error
    kind = library.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except library.exceptions.SchemaError as error:
        raise AssessmentError(f"--schema: {path} is no JSON schema: {error.message}") from error
    validator = kind(schema)

    def fits(answer: str) -> bool:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return bool(validator.is_valid(value))

    return fits


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one bit a unit (Hyyrö 2004, "Bit-parallel LCS-length").

    After each unit of `second`, bit i of `open_` is 0 where the subsequence of first[:i + 1] is longer than that of
    first[:i]; so the zeros are the length.
    """
    places: dict[str, int] = {}
    for index, unit in enumerate(first):
        places[unit] = places.get(unit, 0) | 1 << index
    whole = (1 << len(first)) - 1
    open_ = whole
    for unit in second:
        met = open_ & places.get(unit, 0)
        open_ = ((open_ + met) | (open_ - met)) & whole
    return len(first) - open_.bit_count()
