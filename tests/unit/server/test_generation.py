"""Written answers: the library's cached loop says what the definition of greedy says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assessed import Manifests, records, tiny
from torch import Tensor, nn

from common.errors import AssessmentError
from common.records import InstructionRecord
from server.assessment.evaluation import evaluate
from server.assessment.generation import answers
from server.assessment.text_quality import pattern_check
from server.distillation.domain_model import DomainModel


@pytest.fixture
def speaking(manifest_for: Manifests) -> DomainModel:
    """A model with weights so large that it says different things of different prompts."""
    model = tiny(manifest_for("causal-lm"))
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "proj" in name:
                weight.mul_(20)
    return model


class Other(nn.Module):
    """The same network as another runtime would give it: `forward`, and nothing more."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._inner = [network]  # in a list, so that torch sees no parameters
        self.rows = list[int]()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=self._inner[0](input_ids=input_ids, attention_mask=attention_mask).logits)


def _slow(model: DomainModel, record: InstructionRecord, most: int) -> str:
    """Greedy by its definition, for one record alone."""
    task: Any = model.task
    ids = model.tokenizer(task.prompt(record))["input_ids"]
    written: list[int] = []
    while len(written) < most:
        row = torch.tensor([ids + written])
        token = int(model.network(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        written.append(token)
    return str(model.tokenizer.decode(written, skip_special_tokens=True))


def test_both_ways_write_what_greedy_means(speaking: DomainModel) -> None:
    asked = records("causal-lm", 7)

    def slow() -> list[str]:
        with torch.inference_mode():
            return [_slow(speaking, record, 12) for record in asked]  # type: ignore[arg-type]

    # The end token becomes one that some of the answers hold, so that a batch has some that end and some that go on.
    whole = slow()
    ids = [speaking.tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole]
    end = next(row[5] for row in ids if 0 < sum(row[5] in other for other in ids) < len(ids))
    speaking.tokenizer.eos_token = speaking.tokenizer.convert_ids_to_tokens(end)
    short = slow()
    assert 0 < sum(a != b for a, b in zip(whole, short, strict=True)) < len(asked)

    other = Other(speaking.network)
    plain = DomainModel(other, speaking.tokenizer, speaking.manifest)
    assert list(answers(speaking, asked, most_tokens=12, batch_size=3)) == short
    assert list(answers(plain, asked, most_tokens=12, batch_size=3)) == short
    assert max(other.rows) == 3


def test_an_answer_ends_with_the_end_token(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("causal-lm"))
    end = int(model.tokenizer.eos_token_id)
    word = model.tokenizer("liable", add_special_tokens=False)["input_ids"][0]

    class Script(nn.Module):
        """Says `word` until the text has 12 tokens, then ends it."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, len(model.tokenizer))
            place = torch.arange(input_ids.shape[1])
            logits[:, place < 11, word] = 1
            logits[:, place >= 11, end] = 1
            return SimpleNamespace(logits=logits)

    script = DomainModel(Script(), model.tokenizer, model.manifest)
    asked = [InstructionRecord(instruction="a" * size, input="", output="x", unit="u") for size in (1, 2)]
    lengths = [len(example.tokens) - 2 for example in model.task.encode(asked).examples]  # without answer and end
    found = list(answers(script, asked, most_tokens=50))
    assert [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found] == [
        12 - length if length < 12 else 0 for length in lengths
    ]


def test_a_prompt_keeps_its_end_and_leaves_room(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("causal-lm", data={"max_length": 512}))
    long = InstructionRecord(instruction="notice " * 900, input="", output="x", unit="u")
    (text,) = answers(model, [long], most_tokens=4)  # the network has 512 positions
    assert isinstance(text, str)
    with pytest.raises(AssessmentError, match="below the 512 positions"):
        list(answers(model, [long], most_tokens=512))


def test_a_network_that_cannot_read_so_much_is_one_line_without_a_text(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("causal-lm"))

    class Short(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            raise RuntimeError("Zanzibar")

    with pytest.raises(AssessmentError, match=r"cannot read \d+ tokens \(RuntimeError\)") as caught:
        list(answers(DomainModel(Short(), model.tokenizer, model.manifest), records("causal-lm", 1), most_tokens=2))
    assert "Zanzibar" not in str(caught.value)


def test_other_tasks_write_nothing(manifest_for: Manifests) -> None:
    model = tiny(manifest_for("text-classification"))
    with pytest.raises(AssessmentError, match="only a causal-lm model writes"):
        list(answers(model, [], most_tokens=2))


def test_evaluate_tells_what_the_answers_are_worth(speaking: DomainModel) -> None:
    asked: Any = records("causal-lm", 6)
    said = list(answers(speaking, asked, most_tokens=8))
    # Two of the six true answers become what the model says.
    asked = [
        InstructionRecord(instruction=r.instruction, input="", output=(text if k < 2 else r.output), unit=r.unit)
        for k, (r, text) in enumerate(zip(asked, said, strict=True))
    ]
    check = pattern_check(r"[^\s].{9,}")
    found = evaluate(speaking, asked, most_tokens=8, check=check, timed=False)
    assert found.value("exact_match") == pytest.approx(2 / 6)
    assert found.value("rouge_l") >= 2 / 6
    assert found.value("format_compliance") == pytest.approx(sum(map(check, said)) / 6)
    assert found.value("bits_per_byte") > 0
    silent = evaluate(speaking, asked, most_tokens=0, timed=False)
    assert [figure.metric for figure in silent.figures] == ["bits_per_byte", "perplexity", "loss"]
    with pytest.raises(AssessmentError, match="give --max-new-tokens"):
        evaluate(speaking, asked, most_tokens=0, check=check, timed=False)
