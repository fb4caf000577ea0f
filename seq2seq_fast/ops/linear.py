"""A linear layer by the product that is fastest on the CPU; see kernels.product."""

import torch
from torch import Tensor, nn

from ..library import asked_for
from .autograd import autocast_on, needs_grad, once, wanted
from .kernels import product
from .modules import has_hooks


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, blas: bool | None = None) -> Tensor:
    out = product(x, weight.T, blas)
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        with torch.no_grad():
            found = (
                product(grad, weight) if need_x else None,
                product(grad.T, x) if need_weight else None,
                grad.sum(0) if need_bias else None,
            )
        return once(wanted(found, ctx.needs_input_grad), (grad, x, weight))


def linear(layer: nn.Linear, x: Tensor, alike: bool = False) -> Tensor:
    """layer(x) of x (..., K); layers that are more than a weight and a bias are called. alike: a
    row's result is rounded alike however many there are, where no gradient is needed."""
    plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not has_hooks(layer)
    plain = plain and x.is_cpu and x.dtype == torch.float32 and not autocast_on(x)
    if not plain or asked_for(None) == "reference":
        return layer(x)
    rows, weight, bias = x.flatten(0, -2), layer.weight, layer.bias
    if needs_grad(rows, weight, bias):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _product(rows, weight, bias, blas=False if alike else None)
    return out.unflatten(0, x.shape[:-1])
