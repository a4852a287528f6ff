"""Gradients of every example on its own, in the one backward pass that training does anyway.

The gradient of a linear layer's weight is a sum over the batch of products of outputs' gradients and inputs. The sum
is left out: a batched product gives every example's gradient at the cost of the usual one, and `p.grad` is not made.
What comes out lies in `p.grad_sample`, of shape (examples, *p.shape) in float32, where Opacus' optimiser looks for it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import PrivacyError

__all__ = ["per_sample_gradients"]


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
        _stash(ctx.weight, torch.bmm(outer.transpose(1, 2), inner))
        if ctx.bias is not None:
            _stash(ctx.bias, outer.sum(1, dtype=torch.float32))
        down = gradient @ ctx.weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return down, None, None


def _stash(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to what is there: a layer that is used twice gives the sum of both uses."""
    if not parameter.requires_grad:
        return
    before = getattr(parameter, "grad_sample", None)
    gradient = gradient.float()
    parameter.grad_sample = gradient if before is None else before + gradient  # type: ignore[attr-defined]


@contextlib.contextmanager
def per_sample_gradients(model: nn.Module) -> Iterator[None]:
    """While it is open, a backward pass of `model` leaves every trained parameter's `grad_sample`, and no `grad`.

    The loss must be a sum of per-example losses that depend on nothing but their example; the batch is the first
    dimension of every layer's input. The caller clears `grad_sample` between backward passes.

    Raises:
        PrivacyError: a trained parameter does not belong to a linear layer, or layers mix the examples of a batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(f"{name} is a batch normalisation: it mixes the records of a batch; use another base")
    covered: set[int] = set()
    layers = []
    for module in model.modules():
        if type(module) is nn.Linear and any(p.requires_grad for p in module.parameters()):
            layers.append(module)
            covered |= {id(parameter) for parameter in module.parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if missing:
        raise PrivacyError(
            f"no verified engine gives per-record gradients of {missing[0]}; choose another adapter or target"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad_sample = None  # type: ignore[attr-defined]
    for layer in layers:
        layer.forward = _patched(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for parameter in parameters:
            del parameter.grad_sample  # type: ignore[attr-defined]


def _patched(layer: nn.Linear) -> Any:
    def forward(x: Tensor) -> Any:
        return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]

    return forward
