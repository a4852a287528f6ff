"""Distillation: its losses against formulas, its teacher against base and adapter, and students that learn."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn

from common.adapters import attach, first_state, save_adapter, set_state
from common.config.manifest import Manifest
from common.errors import AdapterError, CoadaptError, DataError, DistillationError, NotFiniteLoss
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from server.distillation.blocks import blocks_of
from server.distillation.corpus import FEWEST, Corpus, corpus_of, read_corpus, words_of
from server.distillation.domain_model import DomainModel
from server.distillation.losses import hidden_distance, soft_cross_entropy
from server.distillation.measuring import agreement, predictions_of
from server.distillation.student import from_scratch, keep_layers
from server.distillation.teacher import load_teacher
from server.distillation.term_search import find_terms
from server.distillation.terms import add_terms
from server.distillation.training import Progress, distil
from server.distillation.vocabulary import apply_vocabulary, trim
from tests.unit.server.test_student import KINDS, logits

WORDS = ("payment", "notice", "assignment", "warranty", "audit", "insurance", "renewal", "licence", "claim", "party")
MERGED = ("lora", "rslora", "dora", "ia3", "bitfit", "full", "head")


def texts(count: int) -> list[str]:
    rng = seeded(1, "texts of a test")
    return [" ".join(WORDS[place] for place in rng.integers(len(WORDS), size=12)) for _ in range(count)]


def public(kind: str, count: int = 240) -> list[Record]:
    match kind:
        case "text-classification":
            return [TextRecord(unit=str(n), text=text, label="a") for n, text in enumerate(texts(count))]
        case "token-classification":
            return [
                TokensRecord(unit=str(n), tokens=tuple(text.split()), tags=("O",) * len(text.split()))
                for n, text in enumerate(texts(count))
            ]
    return [InstructionRecord(unit=str(n), instruction="", input="", output=t) for n, t in enumerate(texts(count))]


def teacher_of(manifest: Manifest) -> DomainModel:
    """A tiny base whose head or words were made decided: an untrained one says almost the same of every text."""
    base = find_base(manifest.model)
    network = load_task_model(base, manifest).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("head.", "classifier.")):
                parameter.copy_(torch.randn_like(parameter))
    return DomainModel(network, load_tokenizer(base), manifest)


@given(st.floats(0.5, 8.0), st.integers(0, 2**31))
def test_softened_answers_cost_what_the_formula_says(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = soft_cross_entropy(student, teacher, temperature)
    for row in range(3):
        p = [math.exp(float(v) / temperature) for v in teacher[row]]
        q = [math.exp(float(v) / temperature) for v in student[row]]
        expected = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        assert float(found[row]) == pytest.approx(expected * temperature**2, rel=1e-3, abs=1e-5)
    assert soft_cross_entropy(teacher, teacher, temperature).abs().max() < 1e-5


def test_hidden_distance_is_in_units_of_the_teachers_spread() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 6), torch.randn(5, 6)
    spread = sum((float(v) - float(teacher.mean())) ** 2 for v in teacher.flatten()) / 29
    far = sum((float(a) - float(b)) ** 2 for a, b in zip(teacher.flatten(), student.flatten(), strict=True)) / 30
    found = hidden_distance([student, teacher], [teacher, teacher])
    assert float(found) == pytest.approx(far / spread / 2, rel=1e-5)
    torch.testing.assert_close(hidden_distance([3 * student, teacher], [3 * teacher, teacher]), found)
    assert hidden_distance([teacher[:0]], [teacher[:0]]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_to_say_what_its_teacher_says(kind: str, manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(
        kind, distillation={"epochs": 12, "batch_size": 16, "learning_rate": 4e-3, "label_weight": 0.0}
    )
    teacher = teacher_of(manifest)
    corpus = corpus_of(public(kind, 100), manifest)
    before = logits(teacher.network)
    said = predictions_of(teacher, corpus.held_out)
    student = shaken(keep_layers(teacher, [1]))
    start = distance(student, teacher, corpus)
    passes: list[Progress] = []
    student = distil(teacher, student, corpus, manifest.distillation, listen=passes.append)
    assert distance(student, teacher, corpus) < 0.5 * start
    assert passes[-1].loss < 0.8 * passes[0].loss
    assert [progress.epoch for progress in passes] == list(range(1, 13))
    assert predictions_of(teacher, corpus.held_out) == said
    assert torch.equal(logits(teacher.network), before)


def shaken(student: DomainModel) -> DomainModel:
    """The student with other numbers in its block: an untrained one computes much the same with and without it."""
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in blocks_of(student.network)[0].parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return student


def distance(student: DomainModel, teacher: DomainModel, corpus: Corpus) -> float:
    """Mean squared difference of logits on held-out text, which both cut alike."""
    batch = teacher.task.collate(teacher.task.encode(corpus.held_out).examples, torch.device("cpu"))
    found = []
    for model in (student, teacher):
        with torch.inference_mode():
            output = model.network(**batch.inputs())
        read = batch.targets >= 0 if teacher.manifest.task.kind == "token-classification" else batch.attention_mask > 0
        found.append(output if isinstance(output, Tensor) else output.logits[read])
    return float((found[0] - found[1]).square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_where_both_cut_texts_differently(kind: str, manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(kind, distillation={"epochs": 2, "batch_size": 16, "learning_rate": 2e-3})
    teacher = teacher_of(manifest)
    corpus = corpus_of(public(kind, 90), manifest)
    words = texts(60)
    trimmed = trim(teacher.tokenizer, words, pieces=None, coverage=0.5, least=1, characters="seen")
    student = apply_vocabulary(teacher, trimmed)
    student = add_terms(student, find_terms(words, student.tokenizer, most=3) or ["payment notice"])
    assert len(student.tokenizer) > len(trimmed.tokenizer)
    passes: list[Progress] = []
    distil(teacher, student, corpus, manifest.distillation, listen=passes.append)
    assert passes[-1].loss < passes[0].loss


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_another_width_are_compared_through_a_map(kind: str, manifest_for: Callable[..., Manifest]) -> None:
    """With hidden states alone to learn from, a narrower network of random weights still learns, and keeps no map."""
    settings = {"epochs": 4, "batch_size": 16, "learning_rate": 4e-3, "label_weight": 0.0, "temperature": 1.0}
    manifest = manifest_for(kind, distillation={**settings, "hidden_weight": 50.0})
    teacher = teacher_of(manifest)
    corpus = corpus_of(public(kind, 90), manifest)
    student = from_scratch(manifest, teacher.tokenizer, parameters=120_000)
    assert student.network.config.hidden_size < teacher.network.config.hidden_size
    names = list(student.network.state_dict())
    passes: list[Progress] = []
    made = distil(teacher, student, corpus, manifest.distillation, listen=passes.append)
    assert passes[-1].loss < 0.8 * passes[0].loss
    assert list(made.network.state_dict()) == names


def test_equal_seeds_give_equal_students(manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(distillation={"epochs": 1})
    teacher = teacher_of(manifest)
    corpus = corpus_of(public("text-classification", 80), manifest)
    first, second = (distil(teacher, keep_layers(teacher, [1]), corpus, manifest.distillation) for _ in range(2))
    assert torch.equal(logits(first.network), logits(second.network))


def test_few_labels_help_where_the_teacher_is_wrong(manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(distillation={"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, "label_weight": 5.0})
    teacher = teacher_of(manifest)
    rows = [TextRecord(unit=str(n), text=text, label="ab"[text.split()[0] < "m"]) for n, text in enumerate(texts(400))]
    known = corpus_of(rows, manifest, labelled=[True] * len(rows))
    unknown = replace(known, labelled=frozenset())
    right = []
    for corpus in (known, unknown):
        student = distil(teacher, keep_layers(teacher, [0, 1]), corpus, manifest.distillation)
        said = predictions_of(student, corpus.held_out)
        right.append(agreement(said, [record.label for record in corpus.held_out if isinstance(record, TextRecord)]))
    assert right[0] is not None
    assert right[1] is not None
    assert right[0] > right[1] + 0.15


def test_a_loss_that_is_no_number_is_told(manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(distillation={"epochs": 1})
    teacher = teacher_of(manifest)
    with torch.no_grad():
        teacher.network.head.weight.fill_(math.inf)
    with pytest.raises(NotFiniteLoss, match=r"step 1; lower distillation.learning_rate"):
        distil(
            teacher,
            keep_layers(teacher_of(manifest), [1]),
            corpus_of(public("text-classification", 60), manifest),
            manifest.distillation,
        )


def test_teacher_and_student_of_two_tasks_are_refused(manifest_for: Callable[..., Manifest]) -> None:
    text, tokens = teacher_of(manifest_for()), teacher_of(manifest_for("token-classification"))
    corpus = corpus_of(public("text-classification", 60), text.manifest)
    with pytest.raises(DistillationError, match="both must do the same"):
        distil(text, tokens, corpus, text.manifest.distillation)


def moved(state: dict, seed: int) -> dict:
    rng = seeded(seed, "moved")
    return {name: array + rng.normal(0, 0.05, array.shape).astype("float32") for name, array in state.items()}


def stored(manifest: Manifest, folder: Path) -> nn.Module:
    """Write an adapter with every value moved; give the model of base and adapter."""
    base = find_base(manifest.model)
    model = attach(load_task_model(base, manifest), manifest.adapter)
    state = moved(first_state(model, 0), 2)
    set_state(model, state)
    folder.mkdir()
    save_adapter(folder, model, state, base, manifest)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", MERGED)
def test_merged_equals_base_and_adapter(
    kind: str, method: str, manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    adapter = {"method": method}
    if method == "ia3":
        adapter |= {"targets": ["query", "value"] if kind != "causal-lm" else ["q_proj", "v_proj"]}
    try:
        manifest = manifest_for(kind, adapter=adapter)
        beside = stored(manifest, tmp_path / "adapter")
    except AdapterError:
        assert (kind, method) in {("causal-lm", "bitfit"), ("causal-lm", "head")}
        return
    teacher = load_teacher(tmp_path / "adapter")
    torch.testing.assert_close(logits(teacher.network), logits(beside), atol=1e-5, rtol=1e-5)
    assert not any("lora" in name or "ia3" in name for name, _ in teacher.network.named_parameters())


def test_pairs_stacked_below_are_merged_too(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = manifest_for(adapter={"rank": 2, "alpha": 4.0})
    wide = manifest_for(adapter={"rank": 6, "alpha": 12.0})
    base = find_base(manifest.model)
    model = attach(load_task_model(base, manifest), manifest.adapter)
    state = moved(first_state(attach(load_task_model(base, wide), wide.adapter), 0), 3)
    set_state(model, state)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, model, state, base, manifest)
    teacher = load_teacher(folder)
    torch.testing.assert_close(logits(teacher.network), logits(model.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter"])
def test_what_no_weight_can_hold_is_refused(method: str, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    stored(manifest_for(adapter={"method": method}), tmp_path / "adapter")
    with pytest.raises(DistillationError, match="cannot be merged"):
        load_teacher(tmp_path / "adapter")


def test_a_four_bit_adapter_is_merged_in_full_precision(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    stored(manifest_for("causal-lm", adapter={"method": "qlora"}), tmp_path / "adapter")
    teacher = load_teacher(tmp_path / "adapter")
    assert {parameter.dtype for parameter in teacher.network.parameters()} == {torch.float32}
    plain = teacher.manifest.model_copy(
        update={"adapter": teacher.manifest.adapter.model_copy(update={"method": "lora"})}
    )
    base = find_base(plain.model)
    model = attach(load_task_model(base, plain), plain.adapter)
    set_state(model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(teacher.network), logits(model.eval()), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_base_and_a_folder_of_nothing_are_refused(
    manifest_for: Callable[..., Manifest], causal: Path, tmp_path: Path
) -> None:
    stored(manifest_for(), tmp_path / "adapter")
    with pytest.raises(CoadaptError) as caught:
        load_teacher(tmp_path / "adapter", base=causal)
    assert "\n" not in str(caught.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CoadaptError, match="nothing"):
        load_teacher(tmp_path / "nothing")


class TestCorpus:
    def test_texts_of_all_kinds_of_file_are_read_once_each(
        self, manifest_for: Callable[..., Manifest], tmp_path: Path
    ) -> None:
        lines = texts(80)
        (tmp_path / "a.txt").write_text("\n".join([*lines, "", lines[0]]), encoding="utf-8")
        (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{text} more"}}\n' for text in lines))
        corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], manifest_for())
        found = {record.text for record in (*corpus.train, *corpus.held_out) if isinstance(record, TextRecord)}
        assert found == {*lines, *(f"{text} more" for text in lines)}
        assert not corpus.labelled
        assert len(corpus.held_out) == round(0.1 * 160)

    def test_labels_are_known_where_every_row_has_one(
        self, manifest_for: Callable[..., Manifest], tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{t}", "label": "b"}}\n' for t in texts(60)))
        (tmp_path / "b.txt").write_text("\n".join(f"{t} more" for t in texts(60)))
        corpus = read_corpus([tmp_path / "a.jsonl", tmp_path / "b.txt"], manifest_for())
        known = {index for index, r in enumerate(corpus.train) if isinstance(r, TextRecord) and r.label == "b"}
        assert corpus.labelled == known

    def test_a_file_may_have_labels_in_some_rows(self, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
        rows = [
            f'{{"text": "{t}"{", " if n % 10 == 0 else ""}' + ('"label": "b"}' if n % 10 == 0 else "}")
            for n, t in enumerate(texts(100))
        ]
        (tmp_path / "a.txt").write_text("\n".join(texts(30)))
        (tmp_path / "b.jsonl").write_text("\n".join(rows))
        corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], manifest_for())
        both = [*corpus.train, *corpus.held_out]
        assert len(both) == 100
        assert sum(isinstance(r, TextRecord) and r.label == "b" for r in both) == 10  # also of texts seen before
        known = {index for index, r in enumerate(corpus.train) if isinstance(r, TextRecord) and r.label == "b"}
        assert corpus.labelled == known
        assert known

    def test_words_without_tags_are_read_from_csv(self, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
        rows = "".join('"[""' + '"", ""'.join(t.split()) + '""]"\n' for t in texts(60))
        (tmp_path / "a.csv").write_text("tokens\n" + rows)
        corpus = read_corpus([tmp_path / "a.csv"], manifest_for("token-classification"))
        found = {r.tokens for r in (*corpus.train, *corpus.held_out) if isinstance(r, TokensRecord)}
        assert found == {tuple(t.split()) for t in texts(60)}
        assert not corpus.labelled

    def test_plain_text_becomes_words_and_answers(self, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\n".join(texts(60)), encoding="utf-8")
        words = read_corpus([tmp_path / "a.txt"], manifest_for("token-classification"))
        assert all(isinstance(r, TokensRecord) and len(r.tokens) == 12 for r in words.train)
        answers = read_corpus([tmp_path / "a.txt"], manifest_for("causal-lm"))
        assert all(isinstance(r, InstructionRecord) and r.output and not r.instruction for r in answers.train)
        assert words_of("急性心梗 and more") == ["急", "性", "心", "梗", "and", "more"]

    def test_too_little_text_is_one_line(self, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\n".join(texts(FEWEST - 1)), encoding="utf-8")
        with pytest.raises(DistillationError, match=rf"at least {FEWEST} different texts, found {FEWEST - 1}"):
            read_corpus([tmp_path / "a.txt"], manifest_for())
        with pytest.raises(DistillationError, match="--corpus"):
            read_corpus([], manifest_for())
        (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
        with pytest.raises(DataError, match=r"no column 'text'"):
            read_corpus([tmp_path / "b.jsonl"], manifest_for())
        with pytest.raises(DataError, match="gone"):
            read_corpus([tmp_path / "gone.txt"], manifest_for())


def test_agreement_counts_words_of_tagged_sentences() -> None:
    assert agreement([["O", "B-x"], ["O"]], [["O", "O"], ["O"]]) == pytest.approx(2 / 3)
    assert agreement(["a", "b"], ["a", "c"]) == 0.5
    assert agreement([], []) is None
