"""Every adapter method on every task: it trains, travels, and its per-record gradients are right, or it is refused.

The table of docs/adapters.md is written from what is found here:  python tests/unit/client/test_methods.py
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from client.protection import Mechanism
from client.resident import Resident, resident
from client.sampling import batches
from client.training.loop import train
from client.training.per_sample import engine_of, per_sample_gradients
from client.training.preflight import check_gradients, check_moved
from client.training.private import train_private
from common.adapters import (
    first_state,
    get_state,
    load_adapter,
    save_adapter,
    set_state,
    train_head_alone,
    trained_parameters,
)
from common.config.manifest import AdapterMethod, Manifest
from common.errors import AdapterError, ManifestError
from common.evaluation import measure
from common.randomness import SystemRandomness
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.tasks.task import Example
from simulations.tiny_base import make_causal, make_encoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
METHODS = get_args(AdapterMethod)
ROOT = Path(__file__).resolve().parents[3]

# Task and kind of base of each column of the table.
COLUMNS = {
    "text, encoder": ("text-classification", "encoder"),
    "text, decoder": ("text-classification", "decoder"),
    "tokens, encoder": ("token-classification", "encoder"),
    "tokens, decoder": ("token-classification", "decoder"),
    "causal": ("causal-lm", "decoder"),
}
RECORDS: dict[str, list[Record]] = {
    "text-classification": [
        TextRecord(text="the term of this agreement" + " and the notice" * number, label="abc"[number % 3], unit="u")
        for number in range(4)
    ],
    "token-classification": [
        TokensRecord(tokens=("the", "fever", *["went"] * n), tags=("O", "B-Disease", *["O"] * n), unit="u")
        for n in range(4)
    ],
    "causal-lm": [
        InstructionRecord(instruction="what is fever" * (1 + n), input="", output="a sign" + " of it" * n, unit="u")
        for n in range(4)
    ],
}
SMALL = {"rank": 4, "alpha": 4.0, "virtual_tokens": 3}


def ready(manifest: Manifest) -> tuple[Resident, list[Example]]:
    model = resident(manifest)
    set_state(model.model, first_state(model.model, 0))
    train_head_alone(model.model, False)
    model.model.eval()
    return model, list(model.task.encode(RECORDS[manifest.task.kind]).examples)


def moved(model: Resident, by: float = 0.05) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    state = get_state(model.model)
    set_state(model.model, {n: a + rng.normal(0, by, a.shape).astype(np.float32) for n, a in state.items()})


def gradients(model: Resident, examples: list[Example], engine: Any = None) -> dict[str, torch.Tensor]:
    with per_sample_gradients(model.model, engine) as engine_in_force:
        engine_in_force(model.task, examples, "fp32")
        return {n: p.grad_sample.clone() for n, p in model.model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]


def engine_error(manifest: Manifest) -> tuple[str, float]:
    """The engine in force and how far its gradients are from those of single backward passes, by the largest."""
    model, examples = ready(manifest)
    moved(model)
    found, oracle = gradients(model, examples), gradients(model, examples, "single")
    assert found.keys() == oracle.keys()
    largest = max(float(g.abs().max()) for g in oracle.values())
    return engine_of(model.model), max(float((found[n] - oracle[n]).abs().max()) for n in oracle) / largest


def case(method: str, column: str, bases: Mapping[str, Path], **tables: Any) -> Manifest:
    kind, base = COLUMNS[column]
    labels = {"text-classification": ["a", "b", "c"], "token-classification": ["Disease"], "causal-lm": []}[kind]
    values = {
        "version": 1,
        "name": "test",
        "task": {"kind": kind, "labels": labels},
        "model": {"base": str(bases[base])},
        "data": {"max_length": 48},
        "training": {
            "precision": "fp32",
            "warmup_steps": 0,
            "batch_size": 4,
            "learning_rate": 0.01,
            "adam_epsilon": 1e-2,
            "rounds": 2,
        },
    }
    values["adapter"] = {"method": method, **SMALL}
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}  # type: ignore[dict-item]
    return Manifest.model_validate_json(json.dumps(values))


def outcome(method: str, column: str, bases: Mapping[str, Path]) -> str:
    """What the table says: the engine that makes the method private, or no."""
    try:
        engine, error = engine_error(case(method, column, bases))
    except AdapterError:
        return "no"
    assert error < 1e-5, (method, column, error)
    return engine


def table(bases: Mapping[str, Path]) -> str:
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| `{m}` | {' | '.join(outcome(m, column, bases) for column in COLUMNS)} |" for m in METHODS]
    return "\n".join(lines) + "\n"


def with_table(document: str, rows: str) -> str:
    start, end = "<!-- table -->\n", "<!-- end of table -->"
    before, rest = document.split(start)
    return before + start + "\n" + rows + "\n" + end + rest.split(end)[1]


@pytest.fixture(scope="module")
def bases(encoder: Path, causal: Path) -> dict[str, Path]:
    return {"encoder": encoder, "decoder": causal}


def test_the_table_in_the_docs_is_what_happens(bases: dict[str, Path]) -> None:
    written = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert written == with_table(written, table(bases))
    assert all(f"`{method}`" in written.split("<!-- table -->")[0] for method in METHODS)


COMBINATIONS = [
    (method, column)
    for method in METHODS
    for column in COLUMNS
    if not (method == "head" and column == "causal") and not (method == "bitfit" and "encoder" not in column)
]


@pytest.mark.parametrize(("method", "column"), COMBINATIONS)
def test_it_trains_with_and_without_privacy(bases: dict[str, Path], method: str, column: str) -> None:
    manifest = case(method, column, bases)
    model, examples = ready(manifest)
    start = get_state(model.model)
    before = measure(model.model, model.task, examples, batch_size=4, precision="fp32")["loss_sum"]
    endless = batches(4, 4, seed=0, site="s", cursor=0)
    options: dict[str, Any] = {"first_step": 0, "steps": 12, "total_steps": 24, "precision": "fp32"}
    train(model.model, model.task, examples, endless, manifest.training, **options)
    after = measure(model.model, model.task, examples, batch_size=4, precision="fp32")["loss_sum"]
    assert after < before
    assert {n: a.shape for n, a in get_state(model.model).items()} == {n: a.shape for n, a in start.items()}

    set_state(model.model, start)
    units = [[example] for example in examples]
    check_gradients(model.model, model.task, units, "fp32")
    how = Mechanism(noise_multiplier=1e-6, clip=100.0, sampling_rate=1.0, expected_units=4.0, records_per_unit=1)
    train_private(model.model, model.task, units, manifest.training, how, SystemRandomness(), **options)
    assert all(not np.array_equal(array, start[name]) for name, array in get_state(model.model).items())
    check_moved(start, get_state(model.model))
    assert measure(model.model, model.task, examples, batch_size=4, precision="fp32")["loss_sum"] < before


@pytest.mark.parametrize(("method", "column"), COMBINATIONS)
def test_it_survives_storing(bases: dict[str, Path], tmp_path: Path, method: str, column: str) -> None:
    manifest = case(method, column, bases)
    model, examples = ready(manifest)
    moved(model)
    expected = measure(model.model, model.task, examples, batch_size=4, precision="fp32")
    save_adapter(tmp_path, model.model, get_state(model.model), model.base, manifest)
    loaded, again = load_adapter(tmp_path, model.base)
    assert again.adapter == manifest.adapter
    found = measure(loaded, model.task, examples, batch_size=4, precision="fp32")
    assert math.isclose(found["loss_sum"], expected["loss_sum"], rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["text, encoder", "causal"])
def test_qlora_gradients_equal_those_of_the_dequantised_twin(bases: dict[str, Path], kind: str) -> None:
    quantised, examples = ready(case("qlora", kind, bases))
    moved(quantised)
    state = get_state(quantised.model)
    assert any(isinstance(module, Linear4bit) for module in quantised.model.modules())
    # Measured before it trains, as in every round: the library must not repack the weights then.
    measure(quantised.model, quantised.task, examples, batch_size=4, precision="fp32")
    found = gradients(quantised, examples)
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in quantised.model.named_modules()
        if isinstance(module, Linear4bit)
    }
    twin, examples = ready(case("lora", kind, bases))
    set_state(twin.model, state)
    with torch.no_grad():
        for name, module in twin.model.named_modules():
            if name in weights:
                module.weight.copy_(weights[name])  # type: ignore[union-attr, operator]
    oracle = gradients(twin, examples, "single")
    largest = max(float(g.abs().max()) for g in oracle.values())
    assert max(float((found[name] - oracle[name]).abs().max()) for name in oracle) < 1e-5 * largest


def test_a_quantised_base_takes_less_memory_and_leaves_the_head_alone(bases: dict[str, Path]) -> None:
    for column in COLUMNS:
        four, _ = ready(case("qlora", column, bases))
        own = [p for n, p in four.model.named_parameters() if p.requires_grad or "lm_head" in n]
        assert {p.dtype for p in own} == {torch.float32}
        layers = [m for m in four.model.modules() if isinstance(m, Linear4bit)]
        assert {m.quant_state.quant_type for m in layers} == {"nf4"}
        assert all(m.quant_state.nested for m in layers)  # double quantisation


@pytest.mark.parametrize("method", METHODS)
def test_the_first_adapter_depends_on_base_and_seed_alone(bases: dict[str, Path], method: str) -> None:
    model, _examples = ready(case(method, "text, encoder", bases))
    first = first_state(model.model, 0)
    moved(model, 1.0)
    again, other = first_state(model.model, 0), first_state(model.model, 1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


UNCHANGED = ["lora", "rslora", "dora", "ia3", "adapter", "full", "bitfit", "head"]


@pytest.mark.parametrize("method", UNCHANGED)
def test_the_first_adapter_changes_nothing(bases: dict[str, Path], method: str) -> None:
    plain, examples = ready(case("head", "text, encoder", bases))
    expected = measure(plain.model, plain.task, examples, batch_size=4, precision="fp32")["loss_sum"]
    heads = {n.rsplit("head.", 1)[1]: a for n, a in get_state(plain.model).items()}
    model, examples = ready(case(method, "text, encoder", bases))
    state = get_state(model.model)
    set_state(model.model, {n: heads[n.rsplit("head.", 1)[1]] if ".head." in f".{n}" else a for n, a in state.items()})
    found = measure(model.model, model.task, examples, batch_size=4, precision="fp32")["loss_sum"]
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_while_the_head_trains_alone_nothing_else_moves(bases: dict[str, Path]) -> None:
    manifest = case("lora", "text, encoder", bases)
    model, examples = ready(manifest)
    start = get_state(model.model)
    train_head_alone(model.model, True)
    options: dict[str, Any] = {"first_step": 0, "steps": 2, "total_steps": 2, "precision": "fp32"}
    endless = batches(4, 4, seed=0, site="s", cursor=0)
    train(model.model, model.task, examples, endless, manifest.training, **options)
    how = Mechanism(noise_multiplier=1.0, clip=1.0, sampling_rate=0.9, expected_units=3.6, records_per_unit=1)
    units = [[example] for example in examples]
    train_private(model.model, model.task, units, manifest.training, how, SystemRandomness(), **options)
    changed = {name for name, array in get_state(model.model).items() if not np.array_equal(array, start[name])}
    assert changed == {name for name in start if ".head." in name}
    train_head_alone(model.model, False)
    assert all(p.requires_grad for p in trained_parameters(model.model).values())


def test_where_a_model_cannot_be_mapped_single_takes_its_place(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = ready(case("prompt", "text, encoder", bases))
    oracle = gradients(model, examples, "single")
    encoder = model.model.encoder.prompted.base_model.encoder.layer[0]  # type: ignore[union-attr, index]
    forward = encoder.forward  # type: ignore[union-attr]

    def looks(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return forward(x if bool(x.sum() > -1e9) else -x, *args, **options)

    monkeypatch.setattr(encoder, "forward", looks)
    found = gradients(model, examples, "vmap")
    assert all(torch.allclose(found[name], oracle[name], atol=1e-7) for name in oracle)


def test_with_checkpointing_no_mapping_is_tried(bases: dict[str, Path]) -> None:
    manifest = case("prompt", "text, encoder", bases, training={"gradient_checkpointing": True})
    assert engine_error(manifest) == ("single", 0.0)


def test_virtual_tokens_take_places_of_the_longest_input(bases: dict[str, Path]) -> None:
    longest = resident(case("lora", "text, encoder", bases)).model.config.max_position_embeddings  # type: ignore[union-attr]
    fits = case("prompt", "text, encoder", bases, data={"max_length": longest - 3})
    assert ready(fits)
    with pytest.raises(Exception, match=rf"data\.max_length must be at most {longest - 3}, .* less 3 virtual tokens"):
        resident(case("prompt", "text, encoder", bases, data={"max_length": longest - 2}))


@pytest.mark.parametrize(
    ("method", "tables", "message"),
    [
        ("prefix", {"training": {"gradient_checkpointing": True}}, "must be false with a prefix"),
        ("lora", {"training": {"head_rounds": 3}}, "head_rounds must be at most rounds 2"),
        ("lora", {"privacy": {"epsilon": 8, "head_clip": 1.0}}, "head_clip must be below clip 1, found 1"),
        ("lora", {"aggregation": {"average_last": 3}}, "average_last must be at most the 2 rounds after"),
        (
            "lora",
            {"training": {"head_rounds": 1}, "aggregation": {"average_last": 2}},
            "average_last must be at most the 1 rounds after",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    bases: dict[str, Path], method: str, tables: dict[str, Any], message: str
) -> None:
    with pytest.raises((ManifestError, ValueError), match=message):
        case(method, "text, encoder", bases, **tables)


@pytest.mark.parametrize(
    ("method", "column", "message"),
    [
        ("bitfit", "causal", "this base has none; choose lora"),
        ("bitfit", "tokens, decoder", "this base has none; choose lora"),
        ("head", "causal", "a causal model has none; choose lora"),
    ],
)
def test_a_base_without_what_the_method_trains_is_refused(
    bases: dict[str, Path], method: str, column: str, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        resident(case(method, column, bases))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny = {
            "encoder": make_encoder(Path(folder) / "encoder"),
            "decoder": make_causal(Path(folder) / "causal", width=64, layers=2),
        }
        page = ROOT / "docs" / "adapters.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), table(tiny)), encoding="utf-8")
