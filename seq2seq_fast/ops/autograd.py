"""What every op's autograd.Function and public function need of autograd and autocast."""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

_HALVES = (torch.bfloat16, torch.float16)


class _Once(torch.autograd.Function):
    """Passes a gradient on, tied to what it depends on; differentiating it again raises."""

    @staticmethod
    def forward(ctx, grad, *depends_on):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "seq2seq_fast has no double backward; use backend='reference', or use_backend around"
            " modules, where it is needed"
        )


def once(grads: tuple[Tensor | None, ...], depends_on: tuple[Tensor, ...]):
    if not torch.is_grad_enabled():  # true only with create_graph=True
        return grads
    return tuple(None if g is None else _Once.apply(g, *depends_on) for g in grads)


def wanted(grads, needs):
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def as_autocast(query: Tensor, *others: Tensor | None) -> tuple:
    """What autocast makes of the arguments of a matrix product; float64 it leaves alone."""
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, *_HALVES) else x
        for x in (query, *others)
    )


def autocast_on(query: object) -> bool:
    if not isinstance(query, Tensor):
        return False
    device = query.device.type  # meta is not one of autocast's devices: asking raises
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same in a compiler, which takes no tensor twice as an argument of a Function."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.clone() if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call goes through autograd, which refuses forward mode rather than lose it."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False
