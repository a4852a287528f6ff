"""New terms of a finished model: only their rows move, they learn from the model before, other texts stay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vocabulary import logits, model_of
from tokenizers_of_all_kinds import clauses, tokenizer_of
from typer.testing import CliRunner

from common.config.manifest import Manifest
from common.errors import CoadaptError, DistillationError
from server.distillation.domain_model import DomainModel, load_model, save_model
from server.distillation.extend import extend
from server.distillation.pieces import Text
from server.distillation.term_lesson import Lesson, text_pairs
from server.distillation.terms import add_terms, find_terms
from simulations.commands import app

TERMS = ["in writing", "said Company"]
CASES = [
    ("text", "wordpiece"),
    ("token", "wordpiece"),
    ("tied", "byte-bpe"),
    ("untied", "byte-bpe"),
    ("tied", "unigram"),
]


def texts_for(name: str) -> list[Text]:
    return [text.split() if name == "token" else text for text in clauses()[:80]]


def terms_for(name: str) -> list[str]:
    return find_terms(texts_for(name), tokenizer_of("wordpiece"), most=3) if name == "token" else TERMS


def extended(
    name: str, kind: str, manifest_for: Callable[..., Manifest], **options: Any
) -> tuple[DomainModel, DomainModel, Any]:
    model = model_of(name, kind, manifest_for)
    return model, *extend(model, [*terms_for(name), "neverseenword"], texts_for(name), **options)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_only_the_new_rows_move_and_they_learn(name: str, kind: str, manifest_for: Callable[..., Manifest]) -> None:
    model, made, facts = extended(name, kind, manifest_for, epochs=3)
    assert set(facts["terms"]) <= set(terms_for(name))
    assert facts["not_in_corpus"] == ["neverseenword"]
    assert facts["divergence"]["end"] < facts["divergence"]["start"]
    assert facts["epochs"] > 0
    assert facts["tokens"]["after"] < facts["tokens"]["before"]
    assert facts["change_elsewhere"] == 0.0
    untrained = add_terms(model, facts["terms"]).network.state_dict()
    start, moved = len(model.tokenizer), 0
    for key, tensor in made.network.state_dict().items():
        if torch.equal(tensor, untrained[key]):
            continue
        moved += 1
        stop = start + len(facts["terms"])
        assert torch.equal(tensor[:start], untrained[key][:start])
        assert torch.equal(tensor[stop:], untrained[key][stop:])
    assert moved == (2 if name in ("tied", "untied") else 1)
    wanted = {key: parameter.requires_grad for key, parameter in model.network.named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in made.network.named_parameters()} == wanted
    # Texts without a term have the same answer, bit for bit.
    compared = 0
    for text in clauses()[100:150]:
        if any(term.lower() in text.lower() for term in facts["terms"]):
            continue
        ids = model.tokenizer(text)["input_ids"]
        assert made.tokenizer(text)["input_ids"] == ids
        width = len(model.tokenizer) if name in ("tied", "untied") else 3
        assert torch.equal(logits(made, ids)[..., :width], logits(model, ids)[..., :width])
        compared += 1
    assert compared > 10


def test_a_term_is_to_have_the_probability_of_its_pieces(manifest_for: Callable[..., Manifest]) -> None:
    model = model_of("untied", "byte-bpe", manifest_for)
    after, text = add_terms(model, ["force majeure"]), "loss by force majeure of the carrier"
    term = len(model.tokenizer)
    (pair,) = text_pairs(model, after, [text])
    said = logits(model, pair.old)[..., :term].softmax(-1)
    lesson = Lesson(model, after, 1)
    places = torch.tensor(pair.places)
    target = lesson.with_terms(said[0, places[:, 0]], said, [pair])
    at = pair.new.index(term) - 1  # the place before the term in the new pieces
    (row,) = (index for index, place in enumerate(pair.places) if place[1] == at)
    pieces = model.tokenizer(" force majeure", add_special_tokens=False)["input_ids"]
    first = pair.places[row][0]
    chance = 1.0
    for step, piece in enumerate(pieces):  # by hand, one piece after the other
        chance *= float(said[0, first + step, piece])
    assert float(target[row, term]) == pytest.approx(chance, rel=1e-4)
    assert float(target[row, pieces[0]]) == pytest.approx(float(said[0, first, pieces[0]]) - chance, rel=1e-4)
    torch.testing.assert_close(target.sum(-1), torch.ones(len(target)))
    assert float(target[:, term].sum()) == pytest.approx(chance, rel=1e-4)  # nowhere else


def test_the_places_are_the_same_borders_in_both(manifest_for: Callable[..., Manifest]) -> None:
    model = model_of("token", "wordpiece", manifest_for)
    after, words = add_terms(model, ["indemnify"]), ["to", "indemnify", "the", "Company"]
    (pair,) = text_pairs(model, after, [words])
    old = model.tokenizer(words, is_split_into_words=True).word_ids()
    new = after.tokenizer(words, is_split_into_words=True).word_ids()
    firsts = [(old.index(word), new.index(word)) for word in range(4)]
    assert set(firsts) <= set(pair.places)
    for before, here in pair.places:
        assert old[before] == new[here]


def test_equal_seeds_give_equal_rows(manifest_for: Callable[..., Manifest]) -> None:
    one, two, three = (
        extended("text", "wordpiece", manifest_for, epochs=1, seed=seed)[1].network.state_dict() for seed in (1, 1, 2)
    )
    key = "encoder.embeddings.word_embeddings.weight"
    assert torch.equal(one[key], two[key])
    assert not torch.equal(one[key], three[key])


@pytest.mark.parametrize(
    ("terms", "texts", "words"),
    [
        (["the"], ["the term"], "none of the 1 terms is new"),
        (["neverseenword"], ["the term"], "none of the 1 new terms is in the corpus of 1 texts"),
    ],
)
def test_what_cannot_be_learned_is_one_line(
    terms: list[str], texts: list[str], words: str, manifest_for: Callable[..., Manifest]
) -> None:
    with pytest.raises(DistillationError, match=words):
        extend(model_of("text", "wordpiece", manifest_for), terms, texts)


# The command.


@pytest.fixture
def finished(manifest_for: Callable[..., Manifest], tmp_path: Path) -> Path:
    save_model(tmp_path / "model", model_of("text", "wordpiece", manifest_for), {"made": "here"})
    rows = [json.dumps({"text": text, "label": "a"}) for text in clauses()[:60]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    (tmp_path / "corpus.txt").write_text("\n".join(clauses()[60:160]))
    (tmp_path / "terms.txt").write_text("\n".join(TERMS))
    return tmp_path


def command(folder: Path, **changed: str) -> list[str]:
    names = {"model": "model", "terms": "terms.txt", "corpus": "corpus.jsonl", "out": "out"} | changed
    where = {key: str(folder / name) for key, name in names.items()}
    more = ["--corpus", str(folder / "corpus.txt"), "--epochs", "1"]
    return [
        "vocabulary",
        "extend",
        where["model"],
        where["terms"],
        "--corpus",
        where["corpus"],
        "--out",
        where["out"],
        *more,
    ]


def test_the_command_writes_a_model_that_loads(finished: Path) -> None:
    said = CliRunner().invoke(app, command(finished))
    assert said.exit_code == 0, said.output
    assert "terms: 2 added, 0 were whole already, 0 are not in the corpus" in said.output
    assert "greatest change on texts without terms: 0\n" in said.output
    made = load_model(finished / "out")
    assert len(made.tokenizer) == len(load_model(finished / "model").tokenizer) + 2
    facts = json.loads((finished / "out" / "coadapt.json").read_text())["facts"]
    assert facts["made"] == "here"
    assert [entry["terms"] for entry in facts["extended"]] == [TERMS]
    again = CliRunner().invoke(app, command(finished, model="out", out="again"))
    assert "none of the 2 terms is new" in str(again.exception)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("terms.txt", "one\n\n", "terms.txt: line 2 is empty"),
        ("terms.txt", None, "terms.txt cannot be read"),
        ("corpus.jsonl", '{"body": "x"}\n', "no column 'text'"),
        ("corpus.jsonl", None, "no such file"),
        ("model/head.safetensors", "x", "was changed or is gone"),
        ("out", "x", "out exists already"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str, content: str | None, words: str, finished: Path
) -> None:
    if content is None:
        (finished / name).unlink()
    else:
        (finished / name).write_text(content)
    before = sorted(path.name for path in finished.iterdir())
    said = CliRunner().invoke(app, command(finished))
    assert isinstance(said.exception, CoadaptError)
    assert words in str(said.exception)
    assert "\n" not in str(said.exception)
    assert sorted(path.name for path in finished.iterdir()) == before
