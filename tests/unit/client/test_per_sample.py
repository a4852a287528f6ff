"""Per-record gradients against one backward pass for each record, and against Opacus' hooks."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from client.resident import Resident, resident
from client.training.per_sample import per_sample_gradients
from common.adapters import get_state, set_state
from common.config.manifest import Manifest
from common.errors import PrivacyError
from common.records import InstructionRecord, TextRecord, TokensRecord
from common.tasks.task import Example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]


def records(kind: str, count: int) -> list[Any]:
    """Records of different lengths."""
    words = [f"w{place} of the term" * (1 + place % 3) for place in range(count)]
    if kind == "text-classification":
        return [TextRecord(text=text, label="abc"[place % 3], unit=str(place)) for place, text in enumerate(words)]
    if kind == "token-classification":
        split = [text.split() for text in words]
        return [
            TokensRecord(tokens=tuple(w), tags=("B-Disease", *["O"] * (len(w) - 1)), unit=str(place))
            for place, w in enumerate(split)
        ]
    return [InstructionRecord(instruction=t, input="", output=t[::-1], unit=str(p)) for p, t in enumerate(words)]


def ready(manifest: Manifest, kind: str, count: int = 5) -> tuple[Resident, list[Example]]:
    """A resident with an adapter that is nowhere zero, and examples."""
    model = resident(manifest)
    rng = np.random.Generator(np.random.PCG64(3))
    state = get_state(model.model)
    set_state(model.model, {n: rng.normal(0, 0.2, a.shape).astype(np.float32) for n, a in sorted(state.items())})
    model.model.train()
    return model, model.task.encode(records(kind, count)).examples


def trained(model: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model: Resident, examples: list[Example], half: bool = False) -> dict[str, Tensor]:
    """The oracle: a backward pass for each record."""
    found: dict[str, list[Tensor]] = {name: [] for name in trained(model.model)}
    for example in examples:
        batch = model.task.collate([example], model.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model.model(**batch.inputs())
        parameters = trained(model.model)
        grads = torch.autograd.grad(model.task.losses(output, batch).sum(), list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            found[name].append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def ours(model: Resident, examples: list[Example], half: bool = False) -> dict[str, Tensor]:
    with per_sample_gradients(model.model):
        batch = model.task.collate(examples, model.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model.model(**batch.inputs())
        model.task.losses(output, batch).sum().backward()
        assert all(p.grad is None for p in model.model.parameters())
        return {name: p.grad_sample.clone() for name, p in trained(model.model).items()}


def off(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> float:
    assert found.keys() == oracle.keys()
    return max(float((found[n] - oracle[n]).abs().max() / oracle[n].abs().max().clamp(min=1e-12)) for n in oracle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_equal_a_backward_pass_for_each_record(manifest_for: Manifests, kind: str, checkpointing: bool) -> None:
    model, examples = ready(manifest_for(kind, training={"gradient_checkpointing": checkpointing}), kind)
    oracle = one_by_one(model, examples)
    found = ours(model, examples)
    assert all(len(gradients) == len(examples) for gradients in found.values())
    assert off(found, oracle) < 1e-5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_those_of_opacus(manifest_for: Manifests, kind: str) -> None:
    model, examples = ready(manifest_for(kind), kind)
    found = ours(model, examples)
    wrapped = GradSampleModule(model.model, loss_reduction="sum", strict=False)
    batch = model.task.collate(examples, model.device)
    model.task.losses(wrapped(**batch.inputs()), batch).sum().backward()
    oracle = {name: p.grad_sample.clone() for name, p in trained(model.model).items()}
    wrapped.zero_grad()
    wrapped.to_standard_module()
    assert off(found, oracle) < 1e-5


def test_in_bf16_they_are_float32_and_near(manifest_for: Manifests) -> None:
    model, examples = ready(manifest_for(), "text-classification")
    found = ours(model, examples, half=True)
    assert {gradients.dtype for gradients in found.values()} == {torch.float32}
    oracle = one_by_one(model, examples, half=True)
    difference = math.sqrt(sum(float((found[name] - oracle[name]).square().sum()) for name in oracle))
    # bf16 keeps 8 bits; single small values may be far off, the whole is not.
    assert difference < 0.02 * math.sqrt(sum(float(gradient.square().sum()) for gradient in oracle.values()))


def test_a_record_alone_has_the_gradient_it_has_among_others(manifest_for: Manifests) -> None:
    for kind in KINDS:
        model, examples = ready(manifest_for(kind), kind)
        together = ours(model, examples)
        alone = ours(model, examples[2:3])
        assert off({n: g[2:3] for n, g in together.items()}, alone) < 1e-5


def test_a_layer_that_is_used_twice_gives_the_sum(manifest_for: Manifests) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), torch.linspace(-1, 1, 12).view(3, 4)
    with per_sample_gradients(model):
        model(x).sum().backward()
        found = {name: p.grad_sample for name, p in model.named_parameters()}
    for place in range(3):
        oracle = torch.autograd.grad(model(x[place : place + 1]).sum(), list(model.parameters()))
        for (name, gradients), expected in zip(found.items(), oracle, strict=True):
            torch.testing.assert_close(gradients[place], expected, msg=name)


def test_the_model_is_as_before_afterwards(manifest_for: Manifests) -> None:
    model, examples = ready(manifest_for(), "text-classification")
    ours(model, examples)
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.model.parameters())
    batch = model.task.collate(examples, model.device)
    model.task.losses(model.model(**batch.inputs()), batch).sum().backward()
    assert all(p.grad is not None for p in trained(model.model).values())
    model.model.zero_grad()


def test_a_batch_normalised_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(PrivacyError, match="1 is a batch normalisation"), per_sample_gradients(model):
        pass


def test_the_engine_for_layers_refuses_other_parameters_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    with pytest.raises(PrivacyError, match=r"'layers' gives no per-record gradients of 1\.weight"):
        per_sample_gradients(model, "layers").__enter__()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norms_give_the_gradients_of_each_record(bias: bool, half: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, bias=bias), nn.Linear(4, 4), nn.LayerNorm(4, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 5, 6)

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(rows).float().square().sum()

    with per_sample_gradients(model, "layers"):
        loss(x).backward()
        found = {name: p.grad_sample.clone() for name, p in model.named_parameters()}
    for place in range(3):
        oracle = torch.autograd.grad(loss(x[place : place + 1]), list(model.parameters()))
        for (name, gradients), expected in zip(found.items(), oracle, strict=True):
            difference = float((gradients[place] - expected).norm())
            assert difference <= (0.02 if half else 1e-5) * float(expected.norm()) + 1e-6, name
