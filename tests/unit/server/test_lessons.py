"""What a teacher says: places that mean the same, lessons against a plain forward pass, and text of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord
from server.distillation import lessons as lessons_file
from server.distillation.alignment import Pairs, all_pairs, matched, shared_pieces
from server.distillation.blocks import blocks_of
from server.distillation.corpus import FEWEST, texts_in
from server.distillation.domain_model import DomainModel
from server.distillation.lessons import Lessons, in_parts
from server.distillation.vocabulary import apply_vocabulary, trim
from server.distillation.written import _drawn, write_texts
from tests.unit.server.test_student import KINDS, records_of

Manifests = Callable[..., Manifest]
PIECES = st.lists(st.sampled_from("abcd"), max_size=9)


def model_of(manifest: Manifest) -> DomainModel:
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def trimmed(model: DomainModel, kind: str) -> DomainModel:
    """The same function with a vocabulary that cuts many words into more pieces."""
    few = texts_in(records_of(kind, 3))
    found = trim(model.tokenizer, few, pieces=None, coverage=0.5, least=1, characters="seen")
    return apply_vocabulary(model, found)


@given(PIECES, PIECES)
def test_matched_places_hold_equal_pieces_in_rising_order(one: list[str], other: list[str]) -> None:
    first, second = matched(one, other)
    assert [one[i] for i in first] == [other[j] for j in second]
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()
    assert len(first) >= longest_common_run(one, other)
    if one == other:
        assert first.tolist() == list(range(len(one)))


def longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    runs = {tuple(one[i:j]) for i in range(len(one)) for j in range(i, len(one) + 1)}
    return max(
        (j - i for i in range(len(other)) for j in range(i, len(other) + 1) if tuple(other[i:j]) in runs), default=0
    )


def test_inserted_and_split_pieces_leave_the_rest_in_pairs() -> None:
    first, second = matched(["[CLS]", "my", "##ocard", "pain", "[SEP]"], ["[CLS]", "m", "y", "pain", "[SEP]"])
    assert first.tolist() == [0, 3, 4]
    assert second.tolist() == [0, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_two_tokenizers_read_the_same_text(kind: str, manifest_for: Manifests) -> None:
    teacher = model_of(manifest_for(kind))
    student = trimmed(teacher, kind)
    records = records_of(kind)
    theirs, ours = (model.task.encode(records).examples for model in (teacher, student))
    pairs = all_pairs((theirs, teacher.tokenizer), (ours, student.tokenizer), kind=kind)
    assert not all(pair.same for pair in pairs)  # or nothing is tested
    for pair, their, our in zip(pairs, theirs, ours, strict=True):
        names = (
            teacher.tokenizer.convert_ids_to_tokens(their.tokens[pair.teacher].tolist()),
            student.tokenizer.convert_ids_to_tokens(our.tokens[pair.student].tolist()),
        )
        if kind == "token-classification":
            assert len(pair.scored_teacher) == len(their.positions)
            assert pair.scored_teacher.tolist() == their.positions.tolist()
            assert pair.scored_student.tolist() == our.positions.tolist()
        else:
            assert [name.lstrip("#Ġ") for name in names[0]] == [name.lstrip("#Ġ") for name in names[1]]
        if kind == "causal-lm":
            assert (our.target[pair.scored_student + 1] >= 0).all()
            assert (their.target[pair.scored_teacher + 1] >= 0).all()
    columns = shared_pieces(teacher.tokenizer, student.tokenizer)
    assert len(columns[0]) == len(student.tokenizer)
    assert teacher.tokenizer.convert_ids_to_tokens(columns[0].tolist()) == student.tokenizer.convert_ids_to_tokens(
        columns[1].tolist()
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lesson_is_what_a_plain_forward_pass_says(
    kind: str, kept: bool, manifest_for: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(lessons_file, "MOST_BYTES", 0)
    teacher = model_of(manifest_for(kind))
    examples = teacher.task.encode(records_of(kind, 5)).examples
    pairs = all_pairs((examples, teacher.tokenizer), (examples, teacher.tokenizer), kind=kind)
    pairs[2] = Pairs(pairs[2].teacher[1:4], pairs[2].student[1:4], False, *[pairs[2].scored_teacher[:2]] * 2)
    block = blocks_of(teacher.network)[1]
    lessons = Lessons(teacher, examples, pairs, blocks=[block], columns=None, half=False)
    for _ in range(2):
        found = lessons.of([4, 2])
        for text, lesson in zip([4, 2], found, strict=True):
            seen: list[Any] = []
            hook = block.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
            batch = teacher.task.collate([examples[text]], torch.device("cpu"))
            with torch.no_grad():
                output = teacher.network(**batch.inputs())
            hook.remove()
            state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            answers = output if isinstance(output, Tensor) else output.logits[0, pairs[text].scored_teacher]
            torch.testing.assert_close(lesson.answers.float(), answers, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(lesson.states[0].float(), state[0, pairs[text].teacher], atol=2e-2, rtol=1e-2)
            assert (lesson.whole is not None) == (kind == "text-classification" and text == 2)


def test_parts_hold_every_text_once_and_fit(manifest_for: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model_of(manifest_for("causal-lm"))
    examples = teacher.task.encode(records_of("causal-lm", 9)).examples
    longest = max(len(example.tokens) for example in examples)
    monkeypatch.setattr(lessons_file, "MOST_LOGITS", 2 * longest * teacher.network.config.vocab_size)
    parts = list(in_parts(range(9), examples, teacher))
    assert [list(part) for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert list(in_parts([], examples, teacher)) == []


def test_a_teacher_writes_different_texts_again_and_again_the_same(manifest_for: Manifests) -> None:
    teacher = model_of(manifest_for("causal-lm"))
    first, again = (write_texts(teacher, 70, longest=24, seed=3) for _ in range(2))
    assert first == again
    assert len({record.output for record in first}) == len(first) == 70
    assert {record.output for record in write_texts(teacher, 70, longest=24, seed=4)} != {r.output for r in first}
    for record in first[:8]:
        assert isinstance(record, InstructionRecord)
        assert len(teacher.task.encode([record]).examples[0].tokens) <= 64


def test_tokens_are_drawn_as_often_as_the_teacher_says(manifest_for: Manifests) -> None:
    """First tokens of many texts against the softmax: within four standard errors for the three likeliest."""
    teacher = model_of(manifest_for("causal-lm"))
    with torch.no_grad():
        teacher.network.lm_head.weight[300:303] *= 40  # three words that are said often, as far as the state allows
    start = teacher.task.encode([InstructionRecord(unit="", instruction="", input="", output="?")]).examples[0]
    prompt = torch.from_numpy(start.tokens[start.target < 0].astype(np.int64))[None]
    with torch.no_grad():
        chance = (teacher.network(input_ids=prompt).logits[0, -1].double() / 0.5).softmax(dim=-1)
    rows = []
    generator = seeded(0, "test")
    for _ in range(20):
        rows += _drawn(teacher, prompt[0].tolist(), prompt.shape[1] + 1, 0.5, generator)
    counts = np.bincount([row[0] for row in rows if row], minlength=len(chance))
    for token in chance.topk(3).indices.tolist():
        if token == teacher.tokenizer.eos_token_id:
            continue
        p, n = float(chance[token]), len(rows)
        assert abs(counts[token] / n - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1 / n


def test_a_classifier_writes_nothing_and_a_teacher_of_one_text_is_refused(manifest_for: Manifests) -> None:
    with pytest.raises(DistillationError, match="writes no text"):
        write_texts(model_of(manifest_for()), 10)
    with pytest.raises(DistillationError, match=f"at least {FEWEST} are needed; raise the temperature above 1e-06"):
        write_texts(model_of(manifest_for("causal-lm")), 60, temperature=1e-6, longest=20)
