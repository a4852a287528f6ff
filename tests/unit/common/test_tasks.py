import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerBase

from common.config.manifest import Manifest
from common.data_files import EMPTY_WORD
from common.errors import ModelError
from common.evaluation import measure
from common.metrics import figures
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.tasks.causal_lm import BUILT_IN_PROMPT, CausalLM, prompt_digest
from common.tasks.task import IGNORED, Example, Task, make_task, pad
from common.tasks.token_classification import token_mean_losses

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]
CPU = torch.device("cpu")
WORDS = ["the", "Tenant", "shall", "rent,", "notwithstanding", "§", "12", "(b)", "indemnification", "é日本🎉", "zzq"]


def tokenizer_of(manifest: Manifest) -> PreTrainedTokenizerBase:
    return load_tokenizer(find_base(manifest.model))


def task_of(manifest: Manifest) -> Task:
    return make_task(manifest, tokenizer_of(manifest))


def model_of(manifest: Manifest) -> nn.Module:
    torch.manual_seed(0)  # the new head
    return load_task_model(find_base(manifest.model), manifest).eval()


def sentence(length: int, seed: int = 0) -> str:
    return " ".join(seeded(seed, "sentence", length).choice(WORDS, length))


def ids_of(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def records_of(kind: str, lengths: Sequence[int]) -> list[Record]:
    made: list[Record] = []
    for place, length in enumerate(lengths):
        words = sentence(length, place).split()
        tags = seeded(place, "tags").choice(["O", "B-Disease", "I-Disease"], len(words)).tolist()
        made.append(
            {
                "text-classification": TextRecord(unit="u", text=" ".join(words), label="abc"[place % 3]),
                "token-classification": TokensRecord(unit="u", tokens=tuple(words), tags=tuple(tags)),
                "causal-lm": InstructionRecord(unit="u", instruction="What?", input="", output=" ".join(words)),
            }[kind]
        )
    return made


class TestEveryTask:
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_records_are_no_examples(self, manifest_for: Manifests, kind: str) -> None:
        encoded = task_of(manifest_for(kind)).encode([])
        assert (encoded.examples, encoded.truncated) == ([], 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_record_is_encoded_as_it_is_alone(self, manifest_for: Manifests, kind: str) -> None:
        task, records = task_of(manifest_for(kind)), records_of(kind, [3, 90, 1, 40, 7])
        together = task.encode(records)
        alone = [task.encode([record]) for record in records]
        assert together.truncated == sum(one.truncated for one in alone) > 0
        for example, one in zip(together.examples, alone, strict=True):
            assert example.tokens.tolist() == one.examples[0].tokens.tolist()
            assert example.target.tolist() == one.examples[0].target.tolist()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_loss_depends_on_no_other_record(self, manifest_for: Manifests, kind: str) -> None:
        manifest = manifest_for(kind)
        task, model = task_of(manifest), model_of(manifest)
        examples = task.encode(records_of(kind, [3, 90, 1, 25, 8, 14])).examples
        with torch.no_grad():
            batch = task.collate(examples, CPU)
            together = task.losses(model(**batch.inputs()), batch)
            alone = []
            for example in examples:
                batch = task.collate([example], CPU)
                alone.append(task.losses(model(**batch.inputs()), batch))
        assert together.shape == (len(examples),)
        assert together.dtype == torch.float32
        assert together.min() > 0.1
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_batch_is_padded_on_the_right_and_never_wider_than_allowed(
        self, manifest_for: Manifests, kind: str
    ) -> None:
        manifest = manifest_for(kind, data={"max_length": 30})
        task, padding = task_of(manifest), tokenizer_of(manifest).pad_token_id
        examples = task.encode(records_of(kind, [1, 90, 2])).examples
        batch = task.collate(examples, CPU)
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, 30)
        for row, mask, example in zip(batch.input_ids, batch.attention_mask, examples, strict=True):
            length = len(example.tokens)
            assert row.tolist() == example.tokens.tolist() + [padding] * (30 - length)
            assert mask.tolist() == [1] * length + [0] * (30 - length)
        assert task.collate(examples[:1], CPU).input_ids.shape[1] % 8 == 0


class TestTextClassification:
    def test_texts_are_cut_and_cuts_counted(self, manifest_for: Manifests) -> None:
        manifest = manifest_for(data={"max_length": 12})
        tokenizer = tokenizer_of(manifest)
        records = [
            *records_of("text-classification", range(1, 14)),
            *(TextRecord(unit="u", text="the " * count, label="b") for count in (9, 10, 11, 12)),
        ]
        encoded = task_of(manifest).encode(records)
        whole = [ids_of(tokenizer, record.text) for record in records]
        assert {len(ids) for ids in whole} >= {12, 13}  # the border itself is among them
        assert encoded.truncated == sum(len(ids) > 12 for ids in whole)
        for example, ids, record in zip(encoded.examples, whole, records, strict=True):
            expected = ids if len(ids) <= 12 else [*ids[:11], tokenizer.sep_token_id]
            assert example.tokens.tolist() == expected
            assert example.target.tolist() == ["abc".index(record.label)]
            assert example.reference == record.label

    def test_counts_and_predictions(self, manifest_for: Manifests) -> None:
        task = task_of(manifest_for())
        batch = task.collate(task.encode(records_of("text-classification", [3, 4, 5])).examples, CPU)
        logits = torch.tensor([[2.0, 0, 0], [3.0, 0, 0], [0, 0, 9.0]])  # a right, b taken for a, c right
        said = task.predictions(logits, batch)
        assert (said.predicted, said.expected) == (["a", "a", "c"], ["a", "b", "c"])
        counts = task.counts(logits, batch)
        assert (counts["correct"], counts["fp/0"], counts["fn/1"], counts["records"]) == (2, 1, 1, 3)
        slow = -sum(math.log(math.exp(row[i]) / sum(map(math.exp, row))) for i, row in enumerate(logits.tolist()))
        assert counts["loss_sum"] == pytest.approx(slow, rel=1e-5)


class TestTokenClassification:
    def slow(self, manifest: Manifest, record: TokensRecord) -> tuple[list[int], list[int], list[int], bool]:
        """Tokens, targets, first positions and whether something was cut, word by word."""
        tokenizer: Any = tokenizer_of(manifest)
        longest = manifest.data.max_length
        tokens, target, first = [tokenizer.cls_token_id], [IGNORED], []
        for word, tag in zip(record.tokens, record.tags, strict=True):
            pieces = ids_of(tokenizer, word, special=False)
            first.append(len(tokens) if pieces and len(tokens) < longest - 1 else -1)
            tokens += pieces
            target += [manifest.task.tags.index(tag), *[IGNORED] * (len(pieces) - 1)][: len(pieces)]
        cut = len(tokens) > longest - 1
        return [*tokens[: longest - 1], tokenizer.sep_token_id], [*target[: longest - 1], IGNORED], first, cut

    def test_only_first_pieces_carry_tags(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("token-classification", data={"max_length": 24})
        records = records_of("token-classification", range(1, 25))
        gaps = TokensRecord(
            unit="u", tokens=(EMPTY_WORD, "pay", EMPTY_WORD, "rent"), tags=("B-Disease", "I-Disease", "O", "O")
        )
        encoded = task_of(manifest).encode([*records, gaps])
        slow = [self.slow(manifest, record) for record in [*records, gaps]]
        assert encoded.truncated == sum(cut for *_, cut in slow)
        assert 0 < encoded.truncated < len(records)
        assert any(len(tokens) > len(record.tokens) + 4 for (tokens, *_), record in zip(slow, records, strict=False))
        for example, (tokens, target, first, _), record in zip(encoded.examples, slow, [*records, gaps], strict=True):
            assert example.tokens.tolist() == tokens
            assert example.target.tolist() == target
            assert example.positions is not None
            assert example.positions.tolist() == first
            assert example.reference == record.tags
        assert encoded.examples[-1].positions.tolist() == [-1, 1, -1, 2]

    def test_words_that_were_cut_off_or_have_no_piece_count_as_o(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("token-classification", data={"max_length": 8})
        tags = ("B-Disease", "O") * 10
        records: list[Record] = [
            TokensRecord(unit="u", tokens=("shall", "the") * 10, tags=tags),
            TokensRecord(unit="u", tokens=(EMPTY_WORD, "the"), tags=("B-Disease", "B-Disease")),
        ]
        task = task_of(manifest)
        batch = task.collate(task.encode(records).examples, CPU)

        class Output:  # every token that is looked at is right, B-Disease for shall and the second record's the
            logits = torch.nn.functional.one_hot(batch.targets.clamp(min=0), 3).float()

        said = task.predictions(Output, batch)
        assert said.predicted[0] == [*tags[:6], *["O"] * 14]  # eight tokens: CLS, six words, SEP
        assert said.predicted[1] == ["O", "B-Disease"]
        assert [len(row) for row in said.expected] == [20, 2]
        counts = task.counts(Output, batch)
        assert (counts["tp"], counts["fp"], counts["fn"]) == (4, 0, 8)

    def test_token_mean_losses_equal_a_slow_loop(self) -> None:
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(4, 6, 5, generator=generator)
        targets = torch.randint(0, 5, (4, 6), generator=generator)
        targets[torch.rand(4, 6, generator=generator) < 0.4] = IGNORED
        targets[2] = IGNORED
        slow = []
        for rows, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
            terms = [
                math.log(sum(map(math.exp, row))) - row[target]
                for row, target in zip(rows, wanted, strict=True)
                if target != IGNORED
            ]
            slow.append(sum(terms) / len(terms) if terms else 0.0)
        assert slow[2] == 0.0
        torch.testing.assert_close(token_mean_losses(logits, targets), torch.tensor(slow))
        assert token_mean_losses(logits.bfloat16(), targets).dtype == torch.float32


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def asked(instruction: str = "Who pays?", context: str = "", output: str = "The tenant.") -> InstructionRecord:
    return InstructionRecord(unit="u", instruction=instruction, input=context, output=output)


class TestPrompt:
    def prompt(self, manifest: Manifest, record: InstructionRecord) -> str:
        return CausalLM(manifest, tokenizer_of(manifest)).prompt(record)

    def test_the_built_in_prompt(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        assert self.prompt(manifest, asked(context="Lease.")) == "Question: Who pays?\nLease.\nAnswer: "
        assert self.prompt(manifest, asked()) == "Question: Who pays?\nAnswer: "

    def test_a_prompt_of_ones_own(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm", task={"prompt": "{instruction}\n\nText:{input}\n\n\nSay:"})
        assert self.prompt(manifest, asked(context="Lease.")) == "Who pays?\n\nText:Lease.\n\n\nSay:"
        spaced = manifest_for("causal-lm", task={"prompt": "# Ask\n{instruction}\n\n# Say\n"})
        assert self.prompt(spaced, asked()) == "# Ask\nWho pays?\n\n# Say\n"

    def test_what_a_record_holds_is_left_as_it_is(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        record = asked("What is {input}\n\nor {instruction}?", "a {instruction}")
        assert self.prompt(manifest, record) == (
            "Question: What is {input}\n\nor {instruction}?\na {instruction}\nAnswer: "
        )
        assert self.prompt(manifest, asked("one\n\n\ntwo {input}")) == "Question: one\n\n\ntwo {input}\nAnswer: "

    def test_a_chat_template_is_used_unless_the_manifest_has_a_prompt(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        tokenizer: Any = tokenizer_of(manifest)
        tokenizer.chat_template = CHAT
        task = CausalLM(manifest, tokenizer)
        assert task.prompt(asked()) == "<|user|>Who pays?<|answer|>"
        assert task.prompt(asked(context="Lease.")) == "<|user|>Who pays?\n\nLease.<|answer|>"
        # The template writes its own special tokens; none are added to it.
        example = task.encode([asked()]).examples[0]
        prompt = ids_of(tokenizer, task.prompt(asked()), special=False)
        assert example.tokens[: len(prompt)].tolist() == prompt
        own = manifest_for("causal-lm", task={"prompt": "{instruction}:"})
        assert CausalLM(own, tokenizer).prompt(asked()) == "Who pays?:"
        first = CausalLM(own, tokenizer).encode([asked()]).examples[0].tokens[0]
        assert first == tokenizer.bos_token_id

    def test_the_template_in_force_is_pinned(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        tokenizer: Any = tokenizer_of(manifest)
        digest = hashlib.sha256(BUILT_IN_PROMPT.encode()).hexdigest()
        assert prompt_digest(manifest.task, tokenizer) == digest
        pinned = manifest_for("causal-lm", task={"prompt_sha256": digest})
        CausalLM(pinned, tokenizer)
        tokenizer.chat_template = CHAT
        assert prompt_digest(manifest.task, tokenizer) == hashlib.sha256(CHAT.encode()).hexdigest()
        with pytest.raises(ModelError, match=rf"prompt_sha256: .* the manifest wants {digest}"):
            CausalLM(pinned, tokenizer)

    def test_a_tokenizer_without_an_end_token_is_refused(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        tokenizer: Any = tokenizer_of(manifest)
        tokenizer.eos_token = None
        with pytest.raises(ModelError, match="no end token"):
            CausalLM(manifest, tokenizer)


def slow_join(prompt: list[int], answer: list[int], longest: int) -> tuple[list[int], list[int], bool]:
    """What is kept of prompt and answer (its end token included), and whether anything was lost."""
    if len(prompt) + len(answer) <= longest:
        return prompt, answer, False
    least = min(len(prompt), int(0.75 * longest))
    kept = answer[: longest - least]
    return prompt[len(prompt) - min(len(prompt), longest - len(kept)) :], kept, True


def touched_bytes(tokenizer: Any, text: str, tokens: Sequence[int]) -> int:
    """Bytes of the characters that `tokens` spell at least a part of; a byte-level token has a sign for each byte."""
    spelled = sum(len(token) for token in tokenizer.convert_ids_to_tokens(list(tokens)))
    return next(size for size in (len(text[:end].encode()) for end in range(len(text) + 1)) if size >= spelled)


class TestCausal:
    LONGEST = 40

    def test_cutting_equals_a_slow_oracle(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm", data={"max_length": self.LONGEST}, task={"prompt": "{instruction}"})
        tokenizer: Any = tokenizer_of(manifest)
        task = CausalLM(manifest, tokenizer)
        seen = set()
        records = [
            asked(sentence(asks, 1)[:characters], "", sentence(says, 2))
            for asks, characters in ((1, 1), (3, 99), (5, 99), (9, 99), (9, 30), (15, 99), (30, 999))
            for says in range(1, 16)
        ]
        encoded = task.encode(records)
        lost = 0
        for record, example in zip(records, encoded.examples, strict=True):
            prompt = ids_of(tokenizer, record.instruction)
            answer = [*ids_of(tokenizer, record.output, special=False), tokenizer.eos_token_id]
            before, after, cut = slow_join(prompt, answer, self.LONGEST)
            lost += cut
            assert example.tokens.tolist() == before + after
            assert example.target.tolist() == [IGNORED] * len(before) + after
            assert len(example.tokens) <= self.LONGEST
            whole = after == answer
            text = touched_bytes(tokenizer, record.output, after[:-1] if whole else after)
            assert example.reference == text
            seen.add((before == prompt, whole, len(answer) - len(after) == 1))
        assert encoded.truncated == lost
        # Nothing cut; the answer cut, by its end token alone too; the prompt cut; both.
        assert seen >= {
            (True, True, False),
            (True, False, False),
            (True, False, True),
            (False, True, False),
            (False, False, False),
        }

    def test_bytes_of_an_answer_that_is_cut_within_a_character(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm", data={"max_length": 16}, task={"prompt": "{instruction}"})
        tokenizer: Any = tokenizer_of(manifest)
        output = "日本🎉" * 9
        example = CausalLM(manifest, tokenizer).encode([asked("x", output=output)]).examples[0]
        kept = [int(token) for token in example.target if token != IGNORED]
        spelled = sum(len(token) for token in tokenizer.convert_ids_to_tokens(kept))
        assert spelled < example.reference < len(output.encode())  # a character counts whole from its first byte on
        assert example.reference - spelled < 4
        assert example.reference == touched_bytes(tokenizer, output, kept)

    def test_a_tokenizer_that_ends_texts_does_not_end_the_prompt(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        tokenizer: Any = tokenizer_of(manifest)
        plain = CausalLM(manifest, tokenizer).encode([asked()]).examples[0]
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ends
        )
        assert ids_of(tokenizer, "x")[-1] == tokenizer.eos_token_id
        example = CausalLM(manifest, tokenizer).encode([asked()]).examples[0]
        assert example.tokens.tolist() == plain.tokens.tolist()
        assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1

    def test_the_prompt_is_never_scored(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm")
        task, tokenizer = task_of(manifest), tokenizer_of(manifest)
        record = asked("Who pays the rent?", "Lease.", "The tenant pays.")
        batch = task.collate(task.encode([record]).examples, CPU)
        answer = [*ids_of(tokenizer, record.output, special=False), tokenizer.eos_token_id]
        length = int(batch.attention_mask.sum())
        logits = torch.zeros(*batch.input_ids.shape, len(tokenizer))

        class Output:
            pass

        output: Any = Output()
        output.logits = logits
        at_random = math.log(len(tokenizer))
        assert task.losses(output, batch).item() == pytest.approx(at_random, rel=1e-5)
        # Position p speaks of token p + 1: only the answer's predecessors matter.
        first = length - len(answer) - 1
        logits[0, :first] = torch.randn(first, len(tokenizer), generator=torch.Generator().manual_seed(0)) * 9
        logits[0, length - 1 :] = 5.0 * torch.arange(len(tokenizer))
        assert task.losses(output, batch).item() == pytest.approx(at_random, rel=1e-5)
        for offset, token in enumerate(answer):
            logits[0, first + offset, token] = 50.0
        assert task.losses(output, batch).item() < 1e-6
        said = task.predictions(output, batch)
        assert said.predicted == said.expected == ["The tenant pays."]

    def test_bits_per_byte_equals_a_slow_recomputation(self, manifest_for: Manifests) -> None:
        manifest = manifest_for("causal-lm", data={"max_length": 32})
        tokenizer: Any = tokenizer_of(manifest)
        task, model = task_of(manifest), model_of(manifest)
        records = [asked(sentence(n, 3), "", sentence(m, 4)) for n, m in ((2, 3), (1, 30), (20, 2), (5, 5), (1, 1))]
        encoded = task.encode(records)
        assert 0 < encoded.truncated < len(records)
        counts = measure(model, task, encoded.examples, batch_size=3, precision="fp32")
        nats = tokens = size = 0.0
        losses = []
        for record in records:
            prompt = ids_of(tokenizer, f"Question: {record.instruction}\nAnswer: ")
            answer = [*ids_of(tokenizer, record.output, special=False), tokenizer.eos_token_id]
            before, after, _ = slow_join(prompt, answer, 32)
            with torch.no_grad():
                words = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            terms = [-words[len(before) - 1 + place, token].item() for place, token in enumerate(after)]
            losses.append(sum(terms) / len(terms))
            nats, tokens = nats + sum(terms), tokens + len(terms)
            size += touched_bytes(tokenizer, record.output, after[:-1] if after == answer else after)
        found = figures("causal-lm", counts, ("bits_per_byte", "perplexity", "loss"))
        assert (counts["tokens"], counts["bytes"], counts["records"]) == (tokens, size, len(records))
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_pad() -> None:
    rows = [np.arange(n, dtype=np.int32) for n in (1, 8, 9)]
    assert pad(rows[:2], 7).tolist() == [[0, *[7] * 7], list(range(8))]
    assert pad(rows, -1).shape == (3, 16)
    assert pad(rows, -1, multiple=3)[2].tolist() == list(range(9))


def test_examples_of_one_class_index_are_told_apart_from_token_rows(manifest_for: Manifests) -> None:
    task = task_of(manifest_for())
    example = Example(np.asarray([2, 9, 3], np.int32), np.asarray([1], np.int32), "b")
    assert task.collate([example, example], CPU).targets.tolist() == [1, 1]
