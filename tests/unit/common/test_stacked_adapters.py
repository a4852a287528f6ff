"""Stacked pairs in a real model: the function, gradients, files, and the way back to one pair."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from common.adapters import attach, get_state, load_adapter, save_adapter, set_state, trained_parameters
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import AdapterError
from common.factors import newest, pairs_of, stacked
from common.models import find_base, load_task_model
from common.randomness import seeded
from server.aggregation.ffa import begun_anew

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
RANK = 2


def manifest_of(manifest_for: Manifests, kind: str = "text-classification", method: str = "lora") -> Manifest:
    return manifest_for(kind, adapter={"rank": RANK, "alpha": 8.0, "method": method})


def model_of(manifest: Manifest) -> torch.nn.Module:
    return attach(load_task_model(find_base(manifest.model), manifest), manifest.adapter)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(10, 50).view(2, 20)
    output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output if isinstance(output, torch.Tensor) else output.logits


def drawn(model: torch.nn.Module, seed: int) -> AdapterState:
    rng = seeded(seed, "stack")
    return {n: rng.normal(0, 0.3, a.shape).astype(np.float32) for n, a in get_state(model).items()}


CASES = [
    ("text-classification", "lora"),
    ("text-classification", "rslora"),
    ("token-classification", "lora"),
    ("causal-lm", "lora"),
    ("text-classification", "lora+prompt"),
    ("text-classification", "qlora"),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_refresh_does_not_change_the_function(manifest_for: Manifests, kind: str, method: str) -> None:
    model = model_of(manifest_of(manifest_for, kind, method))
    one = drawn(model, 1)
    set_state(model, one)
    wanted = logits(model).detach()
    two = begun_anew(one, RANK, 0)
    for state in (two, begun_anew(two, RANK, 0)):
        set_state(model, state)
        torch.testing.assert_close(logits(model).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_a_stack_computes_what_one_pair_of_its_rank_does_and_peft_loads_that_pair(
    manifest_for: Manifests, tmp_path: Path, method: str
) -> None:
    manifest = manifest_of(manifest_for, method=method)
    base, model = find_base(manifest.model), model_of(manifest)
    parts = [drawn(model, seed) for seed in range(3)]
    state = stacked(stacked(parts[0], parts[1]), parts[2])
    set_state(model, state)
    found = logits(model).detach()
    save_adapter(tmp_path, model, state, base, manifest)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3 * RANK
    loaded = PeftModel.from_pretrained(load_task_model(base, manifest), tmp_path)
    torch.testing.assert_close(logits(loaded).detach(), found, rtol=1e-5, atol=1e-5)
    assert {name: array.shape for name, array in get_state(loaded).items()} == {n: a.shape for n, a in state.items()}
    ours, agreed = load_adapter(tmp_path, base)
    assert agreed == manifest
    torch.testing.assert_close(logits(ours).detach(), found, rtol=1e-5, atol=1e-5)
    # Each part counts.
    for part in parts:
        set_state(model, part)
        assert not torch.allclose(logits(model), found, atol=1e-3)


def test_only_the_newest_pair_is_the_models_and_a_plain_adapter_takes_the_stack_away(manifest_for: Manifests) -> None:
    model = model_of(manifest_of(manifest_for))
    one, two = drawn(model, 1), drawn(model, 2)
    set_state(model, one)
    alone = logits(model).detach()
    set_state(model, stacked(two, one))
    for name, array in get_state(model).items():
        np.testing.assert_array_equal(array, one[name])
    assert not torch.allclose(logits(model), alone, atol=1e-3)
    set_state(model, one)
    torch.testing.assert_close(logits(model).detach(), alone)


def test_gradients_are_those_of_the_pair_in_a_model_of_the_whole_rank(manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = manifest_of(manifest_for)
    base, model = find_base(manifest.model), model_of(manifest)
    state = stacked(drawn(model, 1), drawn(model, 2))
    set_state(model, state)
    logits(model).square().sum().backward()
    save_adapter(tmp_path, model, state, base, manifest)
    whole = PeftModel.from_pretrained(load_task_model(base, manifest), tmp_path, is_trainable=True)
    logits(whole).square().sum().backward()
    found = {name: p.grad.numpy() for name, p in trained_parameters(model).items()}
    wanted = newest({name: p.grad.numpy() for name, p in trained_parameters(whole).items()}, RANK)
    assert pairs_of(found)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max())


def uneven(state: AdapterState, **other: Any) -> AdapterState:
    name = next(name for name in sorted(state) if "lora_A" in name)
    return {**state, name: np.vstack([state[name], state[name]])}


def test_an_uneven_stack_is_refused_and_the_model_keeps_what_it_has(manifest_for: Manifests) -> None:
    model = model_of(manifest_of(manifest_for))
    one = stacked(drawn(model, 1), drawn(model, 2))
    set_state(model, one)
    before = logits(model).detach()
    with pytest.raises(AdapterError, match="does not fit the model"):
        set_state(model, uneven(drawn(model, 3)))
    torch.testing.assert_close(logits(model).detach(), before)
