"""A tokenizer of the domain's own: every text comes back, nothing is unknown, special tokens are those of another."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_all_kinds import clauses, tokenizer_of
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import DistillationError
from common.randomness import seeded
from server.distillation.fresh_tokenizer import train_tokenizer

FORMULA = "H₂SO₄ → x² ≥ 5 µg"
WORDS = ["急性", "心肌梗死", "患者", "签署", "知情同意书", "年龄", "不限", "妊娠", "哺乳期", "妇女", "治疗", "糖尿病"]


@functools.cache
def fresh(kind: str, like: str) -> PreTrainedTokenizerBase:
    return train_tokenizer(clauses()[:400], kind=kind, pieces=800, terms=["force majeure"], like=tokenizer_of(like))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_text_comes_back(kind: str) -> None:
    tokenizer = fresh(kind, "byte-bpe")

    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
    @settings(max_examples=150)
    def holds(text: str) -> None:
        wanted = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A unigram model of words writes the first one with the space that the others have, and takes it off again.
        assert tokenizer.decode(ids) == (wanted if kind == "bpe" else wanted.removeprefix(" "))

    holds()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("like", ["wordpiece", "byte-bpe", "unigram"])
def test_formulas_are_no_unknown_pieces(kind: str, like: str) -> None:
    tokenizer = fresh(kind, like)
    ids = tokenizer(FORMULA, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == FORMULA
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert len(tokenizer) == 800


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("like", ["wordpiece", "byte-bpe"])
def test_special_tokens_stand_where_they_stood(kind: str, like: str) -> None:
    made, other = fresh(kind, like), tokenizer_of(like)
    assert made.special_tokens_map == other.special_tokens_map
    for texts in (("a clause",), ("a clause", "another")):
        said = [
            [index for index in each(*texts)["input_ids"] if index in each.all_special_ids] for each in (made, other)
        ]
        assert made.convert_ids_to_tokens(said[0]) == other.convert_ids_to_tokens(said[1])
    assert made("of force majeure here")["input_ids"].count(made.convert_tokens_to_ids("force majeure")) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_chinese(kind: str) -> None:
    rng = seeded(5, "chinese")
    texts = ["".join(WORDS[index] for index in rng.integers(len(WORDS), size=9)) for _ in range(200)]
    tokenizer = train_tokenizer(texts, kind=kind, pieces=None, terms=["心肌梗死"], like=tokenizer_of("wordpiece"))
    text = "妊娠妇女签署知情同意书"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(tokenizer("龘", add_special_tokens=False)["input_ids"]) == "龘"  # never seen


def test_it_is_saved_and_read_back(tmp_path: pytest.TempPathFactory) -> None:
    for kind in ("bpe", "unigram"):
        made = fresh(kind, "wordpiece")
        made.save_pretrained(tmp_path / kind)
        for text in (FORMULA, clauses()[3], "of force majeure"):
            assert AutoTokenizer.from_pretrained(tmp_path / kind)(text)["input_ids"] == made(text)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "texts", "pieces", "words"),
    [
        ("bpe", [], 800, "has no text"),
        ("bpe", ["a b"] * 9, 800, "too small for a tokenizer of 800 pieces: its 9 texts give 2"),
        ("unigram", ["the term"] * 9, 8000, "too small for a tokenizer of 8000 pieces: its 9 texts give"),
        ("bpe", ["a b"], 200, "must be above 259, which special tokens and bytes take, found 200"),
        ("unigram", ["a b"], 200, "must be above 26"),
    ],
)
def test_too_little_text_or_room_is_one_line(kind: str, texts: list[str], pieces: int, words: str) -> None:
    with pytest.raises(DistillationError, match=words) as caught:
        train_tokenizer(texts, kind=kind, pieces=pieces, like=tokenizer_of("byte-bpe"))
    assert "\n" not in str(caught.value)
