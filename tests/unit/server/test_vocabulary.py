"""A trimmed vocabulary against the whole one: same pieces, same logits, nothing unknown that was known."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_of_all_kinds import KINDS, clauses, tokenizer_of
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.config.manifest import Manifest, ModelSection
from common.errors import DistillationError
from common.models import PooledClassifier, find_base, load_task_model, load_tokenizer
from common.randomness import seed_dropout
from server.distillation.domain_model import DomainModel, load_model, save_model
from server.distillation.pieces import Pieces
from server.distillation.vocabulary import Trimmed, apply_vocabulary, measure_coverage, trim

NETWORKS = ("text", "token", "tied", "untied")
ODD = ["Zwölf Kilogramm Eisen", "x² → H₂SO₄ 急性心肌梗死", "Zebra quixotic jazz", "ab\ncd\tef 😀", "!!!??", ""]


@functools.cache
def trimmed_of(kind: str) -> Trimmed:
    """Half of the clauses are counted; a fifth of the other half is covered, or more."""
    return trim(tokenizer_of(kind), clauses()[::2], pieces=1000, coverage=0.95)


def network_of(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    seed_dropout(0, name)
    # A few rows more than pieces, as some bases have.
    common = {"vocab_size": len(tokenizer) + 5, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    common |= {"intermediate_size": 32, "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 512}
    if name == "text":
        return PooledClassifier(BertModel(BertConfig(**common), add_pooling_layer=False), "mean", 3).eval()
    if name == "token":
        return BertForTokenClassification(BertConfig(**common, num_labels=3)).eval()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [tokenizer.eos_token_id or 0]}
    return LlamaForCausalLM(LlamaConfig(**common, **ends, tie_word_embeddings=name == "tied")).eval()


def model_of(name: str, kind: str, manifest_for: Callable[..., Manifest]) -> DomainModel:
    task = {"text": "text-classification", "token": "token-classification"}.get(name, "causal-lm")
    tokenizer = tokenizer_of(kind)
    return DomainModel(network_of(name, tokenizer), tokenizer, manifest_for(task))


def logits(model: DomainModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        output = model.network(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("kind", KINDS)
def test_covered_text_is_cut_as_before(kind: str) -> None:
    original, trimmed = tokenizer_of(kind), trimmed_of(kind)
    assert len(trimmed.tokenizer) == len(trimmed.kept) <= 1000 < len(original)
    covered = 0
    for text in clauses()[1::2] + ODD:
        before = original(text)["input_ids"]
        if set(before) <= set(trimmed.kept):
            covered += 1
            assert [trimmed.kept[index] for index in trimmed.tokenizer(text)["input_ids"]] == before
    assert covered > 100
    one, two = clauses()[0], clauses()[2]
    assert {trimmed.kept[index] for index in trimmed.tokenizer(one, two)["input_ids"]} & set(original.all_special_ids)


WORDS = sorted({word for text in clauses() for word in text.split()})
SENTENCES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_is_cut_as_before_or_smaller_and_never_unknown(kind: str) -> None:
    original, trimmed = tokenizer_of(kind), trimmed_of(kind)
    kept, unknown = set(trimmed.kept), original.unk_token_id

    @given(SENTENCES)
    @settings(max_examples=60)
    def holds(text: str) -> None:
        before = original(text)["input_ids"]
        after = [trimmed.kept[index] for index in trimmed.tokenizer(text)["input_ids"]]
        if set(before) <= kept:
            assert after == before
        if unknown is None or unknown not in before:
            assert unknown not in after
            assert trimmed.tokenizer.decode(trimmed.tokenizer(text)["input_ids"]) == original.decode(before)

    holds()


@given(st.text())
def test_bytes_come_back_whatever_the_text(text: str) -> None:
    tokenizer = trimmed_of("byte-bpe").tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize("kind", ["wordpiece", "byte-bpe", "unigram"])
@pytest.mark.parametrize("name", NETWORKS)
def test_covered_text_has_the_same_logits(name: str, kind: str, manifest_for: Callable[..., Manifest]) -> None:
    model, trimmed = model_of(name, kind, manifest_for), trimmed_of(kind)
    small = apply_vocabulary(model, trimmed)
    width = 16 * (len(tokenizer_of(kind)) + 5 - len(trimmed.kept))
    assert model.parameters - small.parameters == (2 if name == "untied" else 1) * width
    compared = 0
    for text in clauses()[1::2]:
        before = model.tokenizer(text)["input_ids"]
        if set(before) <= set(trimmed.kept):
            old, new = logits(model, before), logits(small, small.tokenizer(text)["input_ids"])
            if name in ("tied", "untied"):
                old = old[..., list(trimmed.kept)]
            torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
            compared += 1
            if compared == 6:
                break
    assert compared > 5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["wordpiece", "byte-bpe", "byte-unigram"])
def test_a_trimmed_model_comes_back_from_its_folder(
    kind: str, name: str, manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    small = apply_vocabulary(model_of(name, kind, manifest_for), trimmed_of(kind))
    save_model(tmp_path / "model", small, {})
    loaded = load_model(tmp_path / "model")
    for text in clauses()[:20] + ODD[:-1]:
        ids = small.tokenizer(text)["input_ids"]
        assert loaded.tokenizer(text)["input_ids"] == ids
        assert torch.equal(logits(loaded, ids), logits(small, ids))
    assert loaded.parameters == small.parameters
    assert loaded.tokenizer.special_tokens_map == small.tokenizer.special_tokens_map
    assert loaded.tokenizer.model_max_length == small.tokenizer.model_max_length


def test_ids_of_special_tokens_follow(manifest_for: Callable[..., Manifest]) -> None:
    model, trimmed = model_of("untied", "byte-bpe", manifest_for), trimmed_of("byte-bpe")
    small, tokenizer = apply_vocabulary(model, trimmed), trimmed.tokenizer
    assert model.tokenizer.pad_token_id != tokenizer.pad_token_id  # they moved
    config: Any = small.network.config
    ends = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert ends == (tokenizer.pad_token_id, tokenizer.bos_token_id, [tokenizer.eos_token_id])
    assert small.network.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert config.vocab_size == len(trimmed.kept) == small.network.lm_head.out_features
    assert small.network.get_input_embeddings().padding_idx == tokenizer.pad_token_id
    assert model.network.config.vocab_size == len(model.tokenizer) + 5  # the model given is as it was


def test_a_padded_backend_pads_with_the_moved_token() -> None:
    backend = Tokenizer.from_str(tokenizer_of("unigram").backend_tokenizer.to_str())
    backend.enable_padding(length=40, pad_token="<pad>", pad_id=backend.token_to_id("<pad>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    small = trim(wrapped, clauses(), pieces=700, coverage=0.9).tokenizer
    assert small.backend_tokenizer.encode("the").ids[-1] == small.pad_token_id


def test_the_default_base(manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for("text-classification", model={"base": ModelSection().base})
    base = find_base(manifest.model)
    model = DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)
    trimmed = trim(model.tokenizer, clauses(), pieces=None, coverage=0.95)
    small = apply_vocabulary(model, trimmed)
    assert measure_coverage(model.tokenizer, small.tokenizer, clauses()).identical == 1.0
    for text in clauses()[:5]:
        old, new = (each(text)["input_ids"] for each in (model.tokenizer, small.tokenizer))
        torch.testing.assert_close(logits(small, new), logits(model, old), rtol=0, atol=1e-6)
    strange = "Zwölf Ñandú 心 क h₂so₄ żółw, déjà"  # nothing of it is in the clauses
    unknown = [each(strange)["input_ids"].count(each.unk_token_id) for each in (model.tokenizer, small.tokenizer)]
    assert unknown == [0, 0]


# What a piece is made of.


def bpe(merges: list[tuple[str, str]], **options: Any) -> PreTrainedTokenizerBase:
    pieces = dict.fromkeys("abcd") | dict.fromkeys(left + right for left, right in merges)
    backend: Any = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, **options))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_piece_keeps_the_parts_of_the_way_that_bpe_takes() -> None:
    # "abc" can be merged from "a" and "bc", or from "ab" and "c"; the earlier merge "bc" decides.
    tokenizer = bpe([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("abc", "d")])
    table = Pieces(tokenizer)
    names = {table.names[index] for index in table.with_parts(table.id_of("abcd"))}
    assert names == {"a", "b", "c", "d", "bc", "abc", "abcd"}
    small = trim(tokenizer, ["abcd abcd"] * 3, pieces=7, coverage=0.9).tokenizer
    assert set(small.get_vocab()) == names
    assert small.tokenize("abcd") == ["abcd"]


@given(st.lists(st.text("abcd", min_size=1, max_size=7), min_size=2, max_size=8), st.data())
def test_bpe_of_any_merges_keeps_its_cuts(words: list[str], data: st.DataObject) -> None:
    pieces, merges = list("abcd"), []
    for _ in range(data.draw(st.integers(1, 12))):  # pieces can be reached in several ways here
        pair = (data.draw(st.sampled_from(pieces)), data.draw(st.sampled_from(pieces)))
        if pair not in merges and len("".join(pair)) < 8:
            merges.append(pair)
            pieces.append("".join(pair))
    if not merges:
        return
    tokenizer = bpe(merges)
    texts = [" ".join(words)]
    before = tokenizer.tokenize(texts[0])
    table = Pieces(tokenizer)
    kept = {part for piece in {*before, *"abcd"} for part in table.with_parts(table.id_of(piece))}
    backend, _ = table.reduced(kept)
    assert backend.encode(texts[0]).tokens == before


# How many pieces.


def test_as_many_pieces_as_reach_the_coverage() -> None:
    tokenizer, texts = tokenizer_of("byte-bpe"), clauses()[:700]
    held_out = texts[::10]
    sizes = []
    for coverage in (0.6, 0.8, 0.99):
        trimmed = trim(tokenizer, texts, pieces=None, coverage=coverage, least=0, most=1200)
        sizes.append(len(trimmed.kept))
        assert measure_coverage(tokenizer, trimmed.tokenizer, held_out).occurrences >= coverage - 0.02
    assert sizes == sorted(set(sizes))
    floor = trim(tokenizer, texts, pieces=None, coverage=0.6, least=400, most=1200)
    assert sizes[0] < len(floor.kept) < 400 + 300
    ceiling = trim(tokenizer, texts, pieces=None, coverage=1.0, least=400, most=500)
    assert len(ceiling.kept) <= 500


@pytest.mark.parametrize("kind", KINDS)
def test_general_pieces_fill_a_small_corpus_up(kind: str) -> None:
    tokenizer, texts = tokenizer_of(kind), clauses()[:40]
    seen = trim(tokenizer, texts, pieces=None, coverage=0.5, characters="seen")
    filled = trim(tokenizer, texts, pieces=None, coverage=0.5, fill=len(seen.kept) + 100, characters="seen")
    more = sorted(set(filled.kept) - set(seen.kept))
    assert len(seen.kept) + 90 <= len(filled.kept) <= len(seen.kept) + 100
    assert set(seen.kept) < set(filled.kept)
    names = tokenizer.convert_ids_to_tokens(more)
    assert all(len(name.removeprefix("##")) > 1 for name in names)
    # The first ones that were left out, but for those that need more parts than there is room for.
    left_out = [index for index in range(more[-1]) if Pieces(tokenizer).is_word(index) and index not in filled.kept]
    assert len(left_out) <= 10
    every = trim(tokenizer, texts, pieces=None, coverage=0.5, fill=10**6, characters="seen")
    assert len(every.kept) <= len(tokenizer)


def test_places_kept_free_are_no_words(manifest_for: Callable[..., Manifest]) -> None:
    tokenizer = load_tokenizer(find_base(ModelSection()))
    table = Pieces(tokenizer)
    first = [
        name for name in tokenizer.convert_ids_to_tokens(range(2100)) if table.is_word(tokenizer.get_vocab()[name])
    ]
    assert first[:4] == ["the", "of", "and", "in"]


def test_coverage_counts_what_it_says() -> None:
    original, small = tokenizer_of("wordpiece"), trimmed_of("wordpiece").tokenizer
    texts = [*clauses()[1:40:2], "Zebra quixotic jazz", "☃ snow"]
    found = measure_coverage(original, small, texts)
    before = [original.tokenize(text) for text in texts]
    after = [small.tokenize(text) for text in texts]
    every = [piece for row in before for piece in row]
    assert found.occurrences == sum(piece in small.get_vocab() for piece in every) / len(every)
    assert found.length_factor == sum(map(len, after)) / len(every)
    assert found.unknown == sum(row.count("[UNK]") for row in after) / sum(map(len, after)) > 0
    assert found.identical == sum(old == new for old, new in zip(before, after, strict=True)) / len(texts)
    assert found.pieces == len(small)


def test_what_is_left_out_is_counted_in_the_pieces_that_stand_in() -> None:
    # "##bcd" is never seen, but all words fall to it once "abcd" has no room.
    vocab = ["[UNK]", "a", "##a", "b", "##b", "c", "##c", "d", "##d", "x", "##x", "abcd", "##bcd", "xbcd", "cc"]
    backend: Any = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    texts = ["abcd"] * 9 + ["xbcd"] * 8 + ["cc"] * 10
    small = trim(tokenizer, texts, pieces=12, coverage=0.9).tokenizer
    assert small.tokenize("abcd xbcd cc") == ["a", "##bcd", "x", "##bcd", "c", "##c"]


def test_texts_to_keep_stay_whole() -> None:
    tokenizer = tokenizer_of("byte-bpe")
    texts = ["Payment is due."] * 20
    word = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.convert_tokens_to_string([word])
    small = trim(tokenizer, texts, pieces=None, coverage=0.5, keep=[text]).tokenizer
    assert small.tokenize(text) == [word]
    assert trim(tokenizer, texts, pieces=None, coverage=0.5).tokenizer.tokenize(text) != [word]


def test_words_are_counted_as_the_task_shows_them() -> None:
    tokenizer = tokenizer_of("byte-bpe")
    assert tokenizer.tokenize("of this agreement") == ["of", "Ġthis", "Ġagreement"]
    apart, joined = (
        trim(tokenizer, [text] * 20, pieces=None, coverage=0.5).tokenizer.get_vocab()
        for text in (["of", "this", "agreement"], "of this agreement")
    )
    assert "Ġagreement" in joined.keys() - apart.keys()


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {"pieces": None}, "has no text"),
        (["one text alone"], {"pieces": None}, "at least 2 texts, found 1"),
        (["Payment is due."] * 3, {"pieces": 900}, "too small for a vocabulary of 900 pieces: its 3 texts hold"),
        (["Payment."] * 3, {"pieces": 40}, "must be at least 2[0-9][0-9], .* found 40"),
        (["Zebra quixotic"] + ["Payment is due."] * 9, {"pieces": None}, r"cover .*%.* asks for 95.0%; give more text"),
    ],
)
def test_a_corpus_that_is_too_small_is_one_line(texts: list[str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(DistillationError, match=words) as caught:
        trim(tokenizer_of("byte-bpe"), texts, coverage=0.95, **options)
    assert "\n" not in str(caught.value)


def test_other_kinds_and_other_models_are_refused(manifest_for: Callable[..., Manifest]) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    with pytest.raises(DistillationError, match="this one is WordLevel"):
        trim(words, ["a"] * 5, pieces=None, coverage=0.9)
    model = model_of("text", "wordpiece", manifest_for)
    with pytest.raises(DistillationError, match="does not fit the model"):
        apply_vocabulary(model, Trimmed(model.tokenizer, (0, 10**6)))


def test_the_library_reads_the_trimmed_tokenizer(tmp_path: Path) -> None:
    trimmed_of("byte-bpe").tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(clauses()[0]) == trimmed_of("byte-bpe").tokenizer(clauses()[0])
