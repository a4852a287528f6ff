"""What a private training step costs: ours and Opacus' engines over the plain PEFT step, in one process.

The same batch, the same adapter and the same AdamW for all; the private ones clip, add noise and step. Engines run in
turn, A B C ... A B C ..., and medians are compared. Memory is the process's peak above what it held before the step.
The error is the largest difference of a clipped sum from the sum of clipped gradients of single records.
"""

import copy
import ctypes
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from client.protection import Mechanism
from client.training.per_sample import per_sample_gradients
from client.training.private import NoisedOptimizer
from common.randomness import SystemRandomness, seed_dropout, seeded

__all__ = ["measure_dp_step"]

BATCH, LENGTH, RANK, VOCABULARY = 16, 128, 8, 8192
CLIP, NOISE = 1.0, 1.0
ENGINES = ("ours", "hooks", "functorch", "ghost")

Step = Callable[[], None]


def measure_dp_step(*, repetitions: int) -> dict[str, float]:
    """The figures of `coadapt bench dp-step`."""
    figures: dict[str, float] = {}
    for name, make in (("bert", _bert), ("llama", _llama)):
        seed_dropout(0, "dp step", name)
        with warnings.catch_warnings():
            # PEFT asks for a property by a name that transformers is giving up; Opacus' hooks meet frozen inputs.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            model = make()
            ids = torch.from_numpy(seeded(0, "dp step", name).integers(1, VOCABULARY, (BATCH, LENGTH)))
            figures |= {f"{name}_{key}": value for key, value in _measured(model, ids, repetitions).items()}
    return figures


def _bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return _adapted(BertForSequenceClassification(config), ["query", "key", "value", "dense"], ["classifier"])


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return _adapted(LlamaForCausalLM(config), targets, None)


def _adapted(model: Any, targets: list[str], heads: list[str] | None) -> nn.Module:
    if heads:  # the pooler is a dense layer of the head and not of the residual network
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets and "pooler" not in name
        ]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, modules_to_save=heads)
    adapted: nn.Module = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, with which the gradient of A would be zero too
            nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def _losses(model: Any, ids: Tensor) -> Tensor:
    """A loss for each record, which depends on it alone."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if logits.dim() == 2:
        return functional.cross_entropy(logits, ids[:, 0] % logits.shape[1], reduction="none")
    loss = functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none")
    return loss.view(len(ids), -1).mean(1)


def _measured(model: nn.Module, ids: Tensor, repetitions: int) -> dict[str, float]:
    _give_large_blocks_back()
    oracle = _oracle(model, ids)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *ENGINES)}
    memory: dict[str, list[float]] = {name: [] for name in ("plain", *ENGINES)}
    with _ours(copy.deepcopy(model), ids) as ours:
        engines = {
            "ours": ours,
            "hooks": _hooks(copy.deepcopy(model), ids, functorch=False),
            "functorch": _hooks(copy.deepcopy(model), ids, functorch=True),
            "ghost": _ghost(copy.deepcopy(model), ids),
        }
        figures = {f"{name}_error": _off(clipped(), oracle) for name, (_, clipped) in engines.items()}
        steps = {"plain": _plain(copy.deepcopy(model), ids)} | {name: step for name, (step, _) in engines.items()}
        for _ in range(repetitions):
            for name, step in steps.items():
                taken, peak = _timed(step)
                seconds[name].append(taken)
                memory[name].append(peak)
    for name in ENGINES:
        ratios = [own / other for own, other in zip(seconds[name], seconds["plain"], strict=True)]
        figures[f"{name}_time"] = statistics.median(ratios)
        figures[f"{name}_memory"] = statistics.median(memory[name]) / statistics.median(memory["plain"])
    figures["plain_seconds"] = statistics.median(seconds["plain"])
    figures["plain_mebibytes"] = statistics.median(memory["plain"]) / 2**20
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def _trained(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _oracle(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Sum of the clipped gradients of single records, one backward pass for each."""
    parameters = _trained(model)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for place in range(len(ids)):
        gradients = torch.autograd.grad(_losses(model, ids[place : place + 1]).sum(), parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for tensor, gradient in zip(total, gradients, strict=True):
            tensor.add_(gradient * min(1.0, CLIP / float(norm)))
    return total


def _off(found: list[Tensor], oracle: list[Tensor]) -> float:
    scale = max(float(tensor.abs().max()) for tensor in oracle)
    return max(float((one - other).abs().max()) for one, other in zip(found, oracle, strict=True)) / scale


def _plain(model: nn.Module, ids: Tensor) -> Step:
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-4)

    def step() -> None:
        _losses(model, ids).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def _ours(model: nn.Module, ids: Tensor) -> Iterator[tuple[Step, Callable[[], list[Tensor]]]]:
    parameters = _trained(model)
    how = Mechanism(NOISE, CLIP, 0.01, BATCH, 1)
    optimizer = NoisedOptimizer(torch.optim.AdamW(parameters, lr=1e-4), how, SystemRandomness())

    def gradients() -> None:
        _losses(model, ids).sum().backward()  # type: ignore[no-untyped-call]

    with per_sample_gradients(model):
        yield _private(optimizer, gradients), _clipped(optimizer, parameters, gradients)


def _hooks(model: nn.Module, ids: Tensor, *, functorch: bool) -> tuple[Step, Callable[[], list[Tensor]]]:
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False, force_functorch=functorch)
    parameters = _trained(model)
    optimizer = _opacus(DPOptimizer, parameters)

    def gradients() -> None:
        _losses(wrapped, ids).sum().backward()  # type: ignore[no-untyped-call]

    return _private(optimizer, gradients), _clipped(optimizer, parameters, gradients)


def _ghost(model: nn.Module, ids: Tensor) -> tuple[Step, Callable[[], list[Tensor]]]:
    """Two backward passes: one for the norms, one for the sum of clipped gradients."""
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=False, max_grad_norm=CLIP)
    parameters = _trained(model)
    optimizer = _opacus(DPOptimizerFastGradientClipping, parameters)

    def gradients() -> None:
        losses = _losses(wrapped, ids)
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()

    def clipped() -> list[Tensor]:
        optimizer.zero_grad()
        gradients()
        found = [parameter.grad.clone() for parameter in parameters]
        optimizer.zero_grad()
        return found

    return _private(optimizer, gradients), clipped


def _opacus(kind: Any, parameters: list[Any]) -> Any:
    plain = torch.optim.AdamW(parameters, lr=1e-4)
    return kind(plain, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=BATCH, loss_reduction="mean")


def _private(optimizer: Any, gradients: Callable[[], None]) -> Step:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _clipped(optimizer: Any, parameters: list[Any], gradients: Callable[[], None]) -> Callable[[], list[Tensor]]:
    def clipped() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        gradients()
        optimizer.clip_and_accumulate()
        found = [parameter.summed_grad.clone() for parameter in parameters]
        optimizer.zero_grad(set_to_none=True)
        return found

    return clipped


def _give_large_blocks_back() -> None:
    """Have the C library return memory at once, so that one engine's leavings are not another's peak."""
    mmap_threshold = -3
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(mmap_threshold, 65536)


def _timed(step: Step) -> tuple[float, float]:
    """Seconds of a step, and bytes by which the process grew at its peak; 0 where the system does not tell."""
    gc.collect()
    status = Path("/proc/self/status")
    before = 0
    if status.exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _kibibytes("VmRSS")
    began = time.perf_counter()
    step()
    taken = time.perf_counter() - began
    return taken, 1024.0 * (_kibibytes("VmHWM") - before) if status.exists() else 0.0


def _kibibytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])
