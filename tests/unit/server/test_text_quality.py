"""Answers against true ones: ROUGE-L by a slow obvious version, and forms that an answer must have."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AssessmentError
from server.assessment.text_quality import exact_match, pattern_check, rouge_l, schema_check, units

words = st.lists(st.sampled_from("abcd"), max_size=7)


def slow_rouge_l(predicted: list[str], expected: list[str]) -> float:
    """The longest of all subsequences that the other has too."""
    if not predicted and not expected:
        return 1.0
    longest = max(
        size
        for size in range(len(predicted) + 1)
        for part in combinations(predicted, size)
        if _is_within(list(part), expected)
    )
    return 2 * longest / (len(predicted) + len(expected))


def _is_within(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(unit in rest for unit in part)


@given(words, words)
def test_rouge_l_is_the_longest_of_all_common_subsequences(ours: list[str], theirs: list[str]) -> None:
    found = rouge_l(" ".join(ours), " ".join(theirs))
    assert found == pytest.approx(slow_rouge_l(ours, theirs), abs=1e-12)
    assert found == rouge_l(" ".join(theirs), " ".join(ours))
    assert 0 <= found <= 1
    assert (found == 1) == (ours == theirs)


def test_the_examples_of_lin() -> None:
    # Lin 2004, section 3.1: S1 is the reference; S2 shares 3 of 4 words in order, S3 shares 2.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_l("the gunman police killed", "police killed the gunman") == 0.5


def test_long_answers_take_no_time() -> None:
    long = " ".join(str(number) for number in range(20_000))
    assert rouge_l(long, f"x {long} y") == pytest.approx(40_000 / 40_002)


def test_chinese_is_compared_by_character() -> None:
    assert units("患者有2型糖尿病, BMI 27") == [*"患者有", "2", *"型糖尿病", "bmi", "27"]
    assert rouge_l("急性心肌梗死", "心肌梗死") == pytest.approx(2 * 4 / 10)
    assert rouge_l("心 肌 梗 死", "心肌梗死") == 1


def test_case_and_punctuation_do_not_count_in_rouge_and_white_space_not_in_exact_match() -> None:
    assert rouge_l("Aspirin, twice.", "aspirin twice") == 1
    assert rouge_l("?!", "") == 1
    assert rouge_l("", "one") == 0
    assert exact_match(" one\n two ", "one two")
    assert not exact_match("One two", "one two")


def test_a_pattern_must_match_the_whole_answer() -> None:
    check = pattern_check(r"ICD-10: [A-Z]\d{2}(\.\d)?.*")
    assert check("  ICD-10: I21.4\nfurther lines\n")
    assert not check("the code is ICD-10: I21")
    assert not check("ICD-10: 21")
    with pytest.raises(AssessmentError, match="--pattern: no regular expression"):
        pattern_check("(")


def test_an_answer_must_fit_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    schema = {
        "type": "object",
        "required": ["code"],
        "properties": {"code": {"type": "string"}, "age": {"minimum": 0}},
    }
    path.write_text(json.dumps(schema), encoding="utf-8")
    check = schema_check(path)
    assert check('{"code": "I21", "age": 3}')
    assert not check('{"code": "I21", "age": -3}')
    assert not check('{"age": 3}')
    assert not check("I21")
    assert not check("[" * 100_000)


def test_a_schema_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    with pytest.raises(AssessmentError, match="cannot be read as JSON"):
        schema_check(path)
    for text in ('{"type": 7}', '{"properties": []}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(AssessmentError, match=r"is no JSON schema") as caught:
            schema_check(path)
        assert "\n" not in str(caught.value)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(AssessmentError, match=r"is no JSON schema"):
        schema_check(path)


def test_without_the_library_a_schema_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schema.json"
    path.write_text("{}", encoding="utf-8")
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    with pytest.raises(AssessmentError, match="pip install jsonschema"):
        schema_check(path)
