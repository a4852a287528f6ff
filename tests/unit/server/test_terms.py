"""Domain terms: found where they are planted, read strictly, and as tokens that leave all other text alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocabulary import logits, model_of
from tokenizers_of_all_kinds import clauses, tokenizer_of
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.randomness import seeded
from server.distillation.domain_model import load_model, save_model
from server.distillation.term_search import _association
from server.distillation.terms import add_terms, find_terms, read_terms, with_terms

TERMS = ["force majeure", "interleukin-6", "心肌梗死", "Höchstbetrag"]
KINDS = ("wordpiece", "byte-bpe", "unigram")
OTHERS = [
    "force",
    "majeures",
    "majeure force",
    "interleukin-61",
    "心肌",
    "xinterleukin-6",
    "Höchstbeträge",
    "force  majeure",
]


def cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The tokens by the names of the vocabulary, which leave out a space that a term takes in."""
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def planted() -> list[str]:
    """300 texts of random words and characters, with terms planted in 60 of them each."""
    rng = seeded(3, "planted terms")
    words = sorted({word.strip(".,;:").lower() for text in clauses()[:100] for word in text.split()} - {""})
    characters = [chr(0x4E00 + 7 * index) for index in range(60)]
    texts = []
    for number in range(300):
        row = [words[index] for index in rng.integers(len(words), size=12)]
        row.insert(int(rng.integers(12)), ("force majeure", "interleukin-6", "on the", "qzxjunk")[number % 4])
        han = [characters[index] for index in rng.integers(len(characters), size=20)]
        if number % 5 == 0:
            han.insert(int(rng.integers(20)), "心肌梗死")
        texts.append(" ".join(row) + "。" + "".join(han))
    return texts


def test_planted_terms_are_found_and_bits_of_them_are_not() -> None:
    found = find_terms(planted(), tokenizer_of("wordpiece"), most=1000, least_count=20)
    assert {"force majeure", "interleukin-6", "qzxjunk", "心肌梗死"} <= set(found)
    assert "on the" not in found  # it binds others
    assert not {"force", "majeure", "interleukin", "心肌", "肌梗", "梗死", "心肌梗", "肌梗死"} & set(found)
    assert all(cut(tokenizer_of("wordpiece"), term) != [term] for term in found)


def test_terms_that_save_most_come_first_and_count_on_their_own() -> None:
    texts = ["nephritic colitis"] * 30 + ["nephritic"] * 6 + ["edema"] * 7
    tokenizer = tokenizer_of("byte-bpe")
    counts = {"nephritic colitis": 30, "edema": 7, "nephritic": 6}  # not "colitis", which never stands alone
    saved = {term: count * (len(tokenizer.tokenize(" " + term)) - 1) for term, count in counts.items()}
    assert find_terms(texts, tokenizer, most=9) == sorted(saved, key=lambda term: -saved[term])
    assert find_terms(texts, tokenizer, most=1) == ["nephritic colitis"]


def test_words_of_a_text_given_as_words_are_not_joined() -> None:
    rows = [["force", "majeure", "interleukin-6"]] * 20
    assert "interleukin-6" in find_terms(rows, tokenizer_of("wordpiece"), most=9)
    assert not any(" " in term for term in find_terms(rows, tokenizer_of("wordpiece"), most=9))


def test_association_is_that_of_the_paper() -> None:
    # Bouma 2009: 1 where both always come together, 0 where they are independent.
    assert _association(("x", "y"), 5, {("x",): 5, ("y",): 5}, 100) == pytest.approx(1.0)
    assert _association(("x", "y"), 4, {("x",): 20, ("y",): 20}, 100) == pytest.approx(0.0)
    by_hand = (math.log(0.1) - math.log(0.2) - math.log(0.3)) / -math.log(0.1)
    counts = {("x",): 20, ("y", "z"): 30, ("x", "y"): 10, ("z",): 10}
    assert _association(("x", "y", "z"), 10, counts, 100) == pytest.approx(min(by_hand, 1.0))


# Files.


def test_a_file_gives_its_terms_in_order(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_bytes("\ufeffforce majeure\r\n 心肌梗死\ninterleukin-6".encode())
    assert read_terms(path) == ["force majeure", "心肌梗死", "interleukin-6"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\n\ntwo\n", "line 2 is empty"),
        (b"one\n  \t\n", "line 2 is empty"),
        (b"one\ntwo\none\n", "line 3 repeats the term 'one' of line 1"),
        (b"", "holds no term"),
        (b"caf\xe9\n", "is not UTF-8 .byte 3."),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_file_of_terms_is_one_line(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DistillationError, match=words) as caught:
        read_terms(path)
    assert "\n" not in str(caught.value)


# Tokens.


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_one_token_wherever_it_stands(kind: str) -> None:
    plain, tokenizer = tokenizer_of(kind), with_terms(tokenizer_of(kind), TERMS)
    for index, term in enumerate(TERMS, start=len(plain)):
        for text in (term, f"of {term} and", f"({term}), {term}.", f"the {term}"):
            assert tokenizer(text)["input_ids"].count(index) == text.count(term)
    assert cut(tokenizer, "急性心肌梗死的").count("心肌梗死") == 1
    sentence = "payment of interleukin-6 and is due"
    old, new = cut(plain, sentence), cut(tokenizer, sentence)
    at = new.index("interleukin-6")  # on both sides of the term the pieces are those of before
    assert new[:at] == old[:at]
    assert new[-2:] == old[-2:]
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == sentence


WORDS = sorted({word for text in clauses()[:200] for word in text.split()}) + OTHERS
SENTENCES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_is_cut_as_before(kind: str) -> None:
    plain, tokenizer = tokenizer_of(kind), with_terms(tokenizer_of(kind), TERMS)
    without = [text for text in clauses() + OTHERS if not any(term.lower() in text.lower() for term in TERMS)]
    assert len(without) > 1000
    for text in [*without, "interleukin-61", "xinterleukin-6", "force majeures"]:
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]

    @given(SENTENCES)
    @settings(max_examples=60)
    def holds(text: str) -> None:
        if not any(term.lower() in text.lower() for term in TERMS):
            assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]

    holds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["text", "token", "tied", "untied"])
def test_rows_are_means_and_all_others_stay(
    name: str, kind: str, manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    model = model_of(name, kind, manifest_for)
    grown = add_terms(model, [*TERMS, "the"])  # "the" is one piece already
    before, after = len(model.tokenizer), len(grown.tokenizer)
    assert after == before + len(TERMS)
    tables = [(model.network.get_parameter(path), grown.network.get_parameter(path)) for path in paths(name)]
    lead = "" if kind == "wordpiece" else " "
    for old, new in tables:
        assert torch.equal(new[:before], old[:before])
        for place, term in enumerate(TERMS):
            text = term if term == "心肌梗死" else lead + term
            pieces = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(new[before + place], old[pieces].mean(dim=0))
    text = clauses()[0]
    ids = model.tokenizer(text)["input_ids"]
    assert torch.equal(logits(grown, ids)[..., :before], logits(model, ids)[..., :before])
    save_model(tmp_path / "model", grown, {})
    loaded = load_model(tmp_path / "model")
    for other in [text, "of force majeure, 心肌梗死"]:
        ids = grown.tokenizer(other)["input_ids"]
        assert loaded.tokenizer(other)["input_ids"] == ids
        assert torch.equal(logits(loaded, ids), logits(grown, ids))


def paths(name: str) -> list[str]:
    encoder = "embeddings.word_embeddings.weight"
    return {
        "text": [f"encoder.{encoder}"],
        "token": [f"bert.{encoder}"],
        "tied": ["model.embed_tokens.weight", "lm_head.weight"],
        "untied": ["model.embed_tokens.weight", "lm_head.weight"],
    }[name]


def test_nothing_new_gives_the_model_back(manifest_for: Callable[..., Manifest]) -> None:
    model: Any = model_of("text", "wordpiece", manifest_for)
    assert add_terms(model, ["the"]) is model
    assert len(add_terms(model, ["Force Majeure", "force majeure"]).tokenizer) == len(model.tokenizer) + 1
    with pytest.raises(DistillationError, match="without white space around it, found ' term'"):
        add_terms(model, [" term"])
