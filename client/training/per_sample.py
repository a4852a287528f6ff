"""Gradients of every example on its own, left in `p.grad_sample` where Opacus' optimiser looks for them.

Three engines do it; which one is chosen by what trains.

*layers*: the gradient of a linear layer's weight is a sum over the batch of products of outputs' gradients and inputs.
The sum is left out in the one backward pass that training does anyway: a batched product gives every example's
gradient at the cost of the usual one, and `p.grad` is not made. The same for layer norms. For adapters all of whose
parameters belong to such layers.

*vmap*: the gradient of one example's loss as a function, mapped over the batch by torch.func. For parameters outside
these layers: virtual tokens, factors, embeddings, norms of other kinds.

*single*: one backward pass for each example. Slow, always right; where the model's code cannot be mapped.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.errors import PrivacyError
from common.tasks.task import Batch, Example, Task

__all__ = ["Engine", "EngineName", "engine_of", "per_sample_gradients"]

EngineName = Literal["layers", "vmap", "single"]

# (task, examples, precision): leaves `grad_sample`, (examples, *p.shape) in float32, in every trained parameter.
Engine = Callable[[Task, Sequence[Example], str], None]


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass stashes per-example gradients of weight and bias in the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        if half is not None:  # as autocast does in the layer; the cast input is what must be kept
            x = x.to(half)
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # the parameters themselves: with checkpoints they are met again
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        examples = x.shape[0]
        outer = gradient.reshape(examples, -1, gradient.shape[-1])
        inner = x.reshape(examples, -1, x.shape[-1])
        if ctx.weight.requires_grad:
            _stash(ctx.weight, torch.bmm(outer.transpose(1, 2), inner))
        if ctx.bias is not None and ctx.bias.requires_grad:
            _stash(ctx.bias, outer.sum(1, dtype=torch.float32))
        down = gradient @ ctx.weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return down, None, None


class _Affine(torch.autograd.Function):
    """x * weight + bias, the end of a layer norm, whose backward pass stashes per-example gradients of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        outer = gradient.reshape(x.shape[0], -1, x.shape[-1])
        if ctx.weight.requires_grad:
            _stash(ctx.weight, (outer * x.reshape(outer.shape)).sum(1, dtype=torch.float32))
        if ctx.bias is not None and ctx.bias.requires_grad:
            _stash(ctx.bias, outer.sum(1, dtype=torch.float32))
        return (gradient * ctx.weight if ctx.needs_input_grad[0] else None), None, None


def _stash(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to what is there: a layer that is used twice gives the sum of both uses."""
    before = getattr(parameter, "grad_sample", None)
    gradient = gradient.float()
    parameter.grad_sample = gradient if before is None else before + gradient  # type: ignore[attr-defined]


def engine_of(model: nn.Module) -> EngineName:
    """The engine that covers all that `model` trains.

    Raises:
        PrivacyError: layers of the model mix the examples of a batch, so none does.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(f"{name} is a batch normalisation: it mixes the records of a batch; use another base")
    covered = {id(p) for layer in _covered_layers(model) for p in layer.parameters()}
    if all(id(p) in covered for p in model.parameters() if p.requires_grad):
        return "layers"
    # Recomputing activations needs a backward pass of the usual kind, which vmap has not.
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return "single" if checkpointed else "vmap"


@contextlib.contextmanager
def per_sample_gradients(model: nn.Module, engine: EngineName | None = None) -> Iterator[Engine]:
    """A function that leaves per-example gradients of what `model` trains now, good while the context is open.

    A record's loss must depend on nothing but the record, and the batch be the first dimension of every layer's input;
    `client/training/preflight.py` checks both. Where torch cannot map the model's code, single takes vmap's place.

    Raises:
        PrivacyError: layers of the model mix the examples of a batch.
    """
    chosen = engine or engine_of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad_sample = None  # type: ignore[attr-defined]
    try:
        with _OPENED[chosen](model, parameters) as gradients:
            yield gradients
    finally:
        for parameter in parameters.values():
            del parameter.grad_sample  # type: ignore[attr-defined]


def _summed_loss(model: nn.Module, task: Task, batch: Batch, precision: str) -> Tensor:
    device = batch.input_ids.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(**batch.inputs())
    return task.losses(output, batch).sum()


def _covered_layers(model: nn.Module) -> list[nn.Linear | nn.LayerNorm]:
    """The layers with trained parameters that the engine can patch, by exact type: a subclass may do otherwise."""
    return [
        module
        for module in model.modules()
        if (type(module) is nn.Linear or (type(module) is nn.LayerNorm and len(module.normalized_shape) == 1))
        and any(parameter.requires_grad for parameter in module.parameters())
    ]


@contextlib.contextmanager
def _by_layer(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Engine]:
    device = next(model.parameters()).device
    layers = _covered_layers(model)
    covered = {id(p) for layer in layers for p in layer.parameters()}
    missing = [name for name, p in parameters.items() if id(p) not in covered]
    if missing:
        raise PrivacyError(f"the engine 'layers' gives no per-record gradients of {missing[0]}")

    def gradients(task: Task, examples: Sequence[Example], precision: str) -> None:
        for parameter in parameters.values():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        _summed_loss(model, task, task.collate(examples, device), precision).backward()  # type: ignore[no-untyped-call]

    for layer in layers:
        layer.forward = _patched(layer)  # type: ignore[method-assign]
    try:
        yield gradients
    finally:
        for layer in layers:
            del layer.forward


def _patched(layer: nn.Linear | nn.LayerNorm) -> Any:
    if isinstance(layer, nn.Linear):
        return lambda x: _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]

    def norm(x: Tensor) -> Any:
        normal = functional.layer_norm(x.float(), layer.normalized_shape, None, None, layer.eps)
        result: Tensor = _Affine.apply(normal, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return result.to(x.dtype)

    return norm


@contextlib.contextmanager
def _one_by_one(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Engine]:
    device = next(model.parameters()).device

    def gradients(task: Task, examples: Sequence[Example], precision: str) -> None:
        rows = []
        for example in examples:
            loss = _summed_loss(model, task, task.collate([example], device), precision)
            rows.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
        for parameter, column in zip(parameters.values(), zip(*rows, strict=True), strict=True):
            grads = [torch.zeros_like(parameter) if gradient is None else gradient for gradient in column]
            parameter.grad_sample = torch.stack(grads).float()  # type: ignore[attr-defined]

    yield gradients


@contextlib.contextmanager
def _mapped(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Engine]:
    device = next(model.parameters()).device
    possible = True

    def gradients(task: Task, examples: Sequence[Example], precision: str) -> None:
        nonlocal possible
        if not possible:
            return one_by_one(task, examples, precision)
        batch = task.collate(examples, device)

        def loss(values: dict[str, Tensor], ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
            single = Batch(ids[None], mask[None], targets[None], ())
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = functional_call(model, values, kwargs=single.inputs())
            return task.losses(output, single).sum()

        values = {name: parameter.detach() for name, parameter in parameters.items()}
        of_each = vmap(grad(loss), in_dims=(None, 0, 0, 0), randomness="different")
        try:
            found = of_each(values, batch.input_ids, batch.attention_mask, batch.targets)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError):
            possible = False  # the model's code looks into a tensor, which cannot be mapped
            return one_by_one(task, examples, precision)
        for name, parameter in parameters.items():
            parameter.grad_sample = found[name].detach().float()  # type: ignore[attr-defined]
        return None

    with _mappable_attention(model), _one_by_one(model, parameters) as one_by_one:
        yield gradients


_OPENED = {"layers": _by_layer, "vmap": _mapped, "single": _one_by_one}

ATTENTION = "coadapt_sdpa"


def _mask_without_a_look(*args: Any, **options: Any) -> Tensor | None:
    """The library's mask; it leaves the mask out where a look at its values shows that it masks nothing."""
    looks = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return cast(Tensor | None, sdpa_mask(*args, **{**options, **looks}))


def _attention(*args: Any, **options: Any) -> Any:
    """The library's attention from plain products, which can be mapped; the fused kernel would be called row by row."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(*args, **options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask_without_a_look)


@contextlib.contextmanager
def _mappable_attention(model: nn.Module) -> Iterator[None]:
    """While open, attention's masks are made without looking into a tensor."""
    bodies = [m for m in model.modules() if isinstance(m, PreTrainedModel)][:1]
    before = [body.config._attn_implementation for body in bodies]
    for body in bodies:
        if body.config._attn_implementation == "sdpa":
            body.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for body, name in zip(bodies, before, strict=True):
            body.set_attn_implementation(name)
