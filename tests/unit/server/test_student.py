"""Layers, heads and columns: what is kept computes as it did, and sizes are what was promised."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import PooledClassifier, find_base, load_task_model, load_tokenizer
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from server.distillation.blocks import blocks_of, parts_of
from server.distillation.domain_model import DomainModel, load_model, save_model
from server.distillation.pruning import Importance, head_and_column_importance, prune
from server.distillation.student import choose_layers, from_scratch, keep_layers, keep_positions, shape_for

KINDS = ("text-classification", "token-classification", "causal-lm")
CLAUSE = "The Supplier shall indemnify the Customer against all claims number"


def records_of(kind: str, count: int = 20) -> list[Record]:
    texts = [f"{CLAUSE} {number} of {number % 3}" for number in range(count)]
    match kind:
        case "text-classification":
            return [TextRecord(unit=str(n), text=text, label="abc"[n % 3]) for n, text in enumerate(texts)]
        case "token-classification":
            return [
                TokensRecord(
                    unit=str(n), tokens=tuple(text.split()), tags=("B-Disease", *["O"] * (len(text.split()) - 1))
                )
                for n, text in enumerate(texts)
            ]
    return [InstructionRecord(unit=str(n), instruction="Say it.", input="", output=t) for n, t in enumerate(texts)]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, manifest_for: Callable[..., Manifest]) -> DomainModel:
    manifest = manifest_for(request.param)
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def logits(network: nn.Module) -> Tensor:
    ids = torch.arange(48).reshape(2, 24) + 5
    with torch.inference_mode():
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output if isinstance(output, Tensor) else output.logits


def random_importance(model: DomainModel, seed: int) -> Importance:
    parts = parts_of(model.network)
    torch.manual_seed(seed)
    return Importance(
        tuple(torch.rand(part.groups) for part in parts), tuple(torch.rand(part.columns) for part in parts)
    )


def masked_logits(model: DomainModel, importance: Importance, heads: int, columns: int) -> Tensor:
    """The whole model, with what pruning would take out multiplied by zero on its way out."""
    handles = []
    for layer, part in enumerate(parts_of(model.network)):
        width = part.out.in_features // part.groups
        kept = importance.heads[layer].topk(heads).indices
        by_group = torch.zeros(part.groups).index_fill(0, kept, 1.0).repeat_interleave(width)
        by_column = torch.zeros(part.columns).index_fill(0, importance.columns[layer].topk(columns).indices, 1.0)
        for linear, mask in ((part.out, by_group), (part.down, by_column)):
            handles.append(linear.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    found = logits(model.network)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("heads", "columns"), [(1, 8), (1, 40), (2, 128)])
def test_a_pruned_model_equals_the_masked_one(model: DomainModel, heads: int, columns: int) -> None:
    heads = min(heads, parts_of(model.network)[0].groups)
    importance = random_importance(model, 7)
    pruned = prune(model, heads=heads, columns=columns, importance=importance)
    torch.testing.assert_close(
        logits(pruned.network), masked_logits(model, importance, heads, columns), atol=1e-5, rtol=1e-5
    )
    assert pruned.parameters < model.parameters or (heads, columns) == (2, 128)
    assert logits(model.network).isfinite().all()  # the source is as it was


def test_a_pruned_shallow_model_is_stored_and_read_back(model: DomainModel, tmp_path: Path) -> None:
    small = keep_positions(prune(keep_layers(model, [1]), heads=1, columns=24, importance=random_importance(model, 3)))
    save_model(tmp_path / "small", small, {})
    loaded = load_model(tmp_path / "small")
    assert torch.equal(logits(loaded.network), logits(small.network))
    assert loaded.parameters == small.parameters


def test_importance_is_the_change_of_the_loss_to_first_order(model: DomainModel) -> None:
    """|w * grad| of a column is what zeroing it would change, to first order; the oracle moves it a little instead."""
    records = records_of(model.manifest.task.kind, 4)
    found = head_and_column_importance(model, records)
    assert [len(part) for part in found.columns] == [part.columns for part in parts_of(model.network)]
    assert all(
        (part >= 0).all() and part.isfinite().all() and part.sum() > 0 for part in (*found.heads, *found.columns)
    )
    assert not any(parameter.grad is not None for parameter in model.network.parameters())
    part = parts_of(model.network)[0]
    whole = found.heads[0].sum()
    examples = model.task.encode(records).examples
    batch = model.task.collate(examples, torch.device("cpu"))
    output = model.network(**batch.inputs())
    scores = output if isinstance(output, Tensor) else output.logits[batch.attention_mask.bool()]
    truth = scores.argmax(dim=-1)
    weight = part.out.weight
    weight.requires_grad_(True)
    output = model.network(**batch.inputs())
    scores = output if isinstance(output, Tensor) else output.logits[batch.attention_mask.bool()]
    loss = -torch.log_softmax(scores, dim=-1)[torch.arange(len(truth)), truth].sum()
    (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    torch.testing.assert_close((weight * gradient).abs().sum(), whole, rtol=1e-3, atol=1e-6)


def test_kept_layers_compute_as_a_loop_over_them_would(model: DomainModel) -> None:
    one = keep_layers(model, [0])
    assert len(blocks_of(one.network)) == 1
    assert len(blocks_of(model.network)) == 2
    both = keep_layers(model, [0, 1])
    assert torch.equal(logits(both.network), logits(model.network))
    assert not torch.allclose(logits(one.network), logits(model.network))


def test_positions_beyond_the_longest_input_go(model: DomainModel) -> None:
    shorter = keep_positions(model)
    assert torch.equal(logits(shorter.network), logits(model.network))
    tables = [m.position_embeddings for m in shorter.network.modules() if hasattr(m, "position_embeddings")]
    assert all(table.num_embeddings == model.manifest.data.max_length for table in tables)


@given(st.integers(1, 40), st.data())
def test_first_and_last_layer_stay_and_none_twice(layers: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, layers))
    chosen = choose_layers(layers, keep)
    assert len(set(chosen)) == keep
    assert list(chosen) == sorted(chosen)
    assert chosen[-1] == layers - 1
    assert keep == 1 or chosen[0] == 0


@pytest.mark.parametrize("keep", [0, 3])
def test_a_number_of_layers_that_is_not_there_is_refused(keep: int) -> None:
    with pytest.raises(DistillationError, match="from 1 to the teacher's 2"):
        choose_layers(2, keep)


@settings(max_examples=25)
@given(st.integers(40, 99))
def test_a_shape_has_the_parameters_that_it_says(model: DomainModel, percent: int) -> None:
    ratio = Fraction(percent, 100)
    try:
        shape = shape_for(model, ratio, of=model.parameters)
    except DistillationError as error:
        assert "can be met" in str(error)  # noqa: PT017  small ratios of a tiny base: its words alone take more
        return
    made = prune(
        keep_layers(model, shape.layers),
        heads=shape.heads,
        columns=shape.columns,
        importance=_flat(model, shape.layers),
    )
    assert made.parameters == shape.parameters <= ratio * model.parameters


def _flat(model: DomainModel, layers: tuple[int, ...]) -> Importance:
    parts = [parts_of(model.network)[layer] for layer in layers]
    return Importance(tuple(torch.ones(p.groups) for p in parts), tuple(torch.ones(p.columns) for p in parts))


def test_a_size_that_cannot_be_met_says_what_can(model: DomainModel) -> None:
    with pytest.raises(
        DistillationError, match=r"distillation.size: 1/500 .* take .*; 0\.\d+ of them or more can"
    ) as error:
        shape_for(model, Fraction(1, 500), of=model.parameters)
    least = Fraction(str(error.value).partition(" of them or more")[0].rpartition(" ")[2])
    met = shape_for(model, least, of=model.parameters)
    assert met.parameters <= least * model.parameters
    with pytest.raises(DistillationError):
        shape_for(model, least - Fraction(2, 1000), of=model.parameters)


def test_deep_students_have_a_least_width(manifest_for: Callable[..., Manifest], model: DomainModel) -> None:
    """The default base with a vocabulary of 1,781 and 64 places, as on banking77."""
    config = BertConfig(
        vocab_size=1781, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, max_position_embeddings=64
    )
    with torch.device("meta"):
        network = PooledClassifier(BertModel(config, add_pooling_layer=False), "mean", 77)
    base = DomainModel(network, model.tokenizer, manifest_for())
    assert base.parameters == 11_386_445
    teacher = 22_595_021
    found = {size: shape_for(base, Fraction(1, size), of=teacher) for size in (3, 5, 10, 20)}
    assert {size: len(shape.layers) for size, shape in found.items()} == {3: 6, 5: 6, 10: 4, 20: 3}
    for size, shape in found.items():
        assert 0.97 * teacher / size < shape.parameters <= teacher / size
        assert size == 20 or shape.heads >= 3
    assert shape_for(base, Fraction(1, 10), of=teacher, layers=6).heads == 2


def test_a_student_from_scratch_is_the_widest_that_fits(model: DomainModel, tmp_path: Path) -> None:
    made = from_scratch(model.manifest, model.tokenizer, parameters=200_000)
    again = from_scratch(model.manifest, model.tokenizer, parameters=200_000)
    assert 100_000 < made.parameters <= 200_000
    assert torch.equal(logits(made.network.eval()), logits(again.network.eval()))
    save_model(tmp_path / "made", made, {})
    assert torch.equal(logits(load_model(tmp_path / "made").network), logits(made.network))
    with pytest.raises(DistillationError, match=r"needs .* at least"):
        from_scratch(model.manifest, model.tokenizer, parameters=1000)


def test_a_grouped_decoder_says_its_heads_in_its_config(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    manifest = manifest_for("causal-lm")
    base = find_base(manifest.model)
    model = DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)
    pruned = prune(model, heads=1, columns=40, importance=random_importance(model, 1))
    save_model(tmp_path / "pruned", pruned, {})
    config: dict[str, Any] = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (2, 1, 40)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(logits(theirs), logits(pruned.network))
