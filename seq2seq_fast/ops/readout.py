"""Logits of all steps of a decoder, as one product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import is_reference
from .autograd import as_autocast, autocast_off, autocast_on, needs_grad, once, wanted
from .kernels import product


def _features(outputs: Tensor, contexts: Tensor) -> Tensor:
    """(B, T + 1, H + D + 1): output, context and a one for the bias; the first step is zero.

    The bias is a weight like the others because PyTorch adds one, and sums its gradient, in passes
    of their own over all logits: a fifth of the readout's time at V = 10,000.
    """
    one = outputs.new_ones(1, 1, 1).expand(*outputs.shape[:2], 1)
    return F.pad(torch.cat([outputs, contexts, one], -1), (0, 0, 1, 0))


def _linear(features: Tensor, weight: Tensor) -> Tensor:
    return product(features.flatten(0, 1), weight.T).unflatten(0, features.shape[:2])


def _logits(features: Tensor, weight: Tensor, bias: Tensor, made: Tensor | None, steps):
    """(B, T + 1, V); fills `made` up, which has those of `steps` already."""
    weight = torch.cat([weight, bias.unsqueeze(1)], 1)
    if made is None:
        logits = _linear(features, weight)
    else:
        logits, rest = made, sorted({*range(1, features.shape[1])} - {*steps})
        logits[:, rest] = _linear(features[:, rest], weight)
    logits[:, 0] = 0
    return logits


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, contexts, weight, bias, made, steps):
        features = _features(outputs, contexts)
        ctx.save_for_backward(features, weight)
        ctx.width = outputs.shape[2]
        return _logits(features, weight, bias, made, steps)

    @staticmethod
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        need_output, need_context, need_weight, need_bias, _, _ = ctx.needs_input_grad
        grads = [None] * 6
        with torch.no_grad(), autocast_off(grad):
            rows = grad.flatten(0, 1)
            if need_output or need_context:
                of_features = product(rows, weight).unflatten(0, grad.shape[:2])[:, 1:]
                grads[0], grads[1] = of_features.tensor_split((ctx.width,), -1)
            if need_weight or need_bias:
                # The first step's features are zero: its gradient goes nowhere.
                of_weight = product(rows.T, features.flatten(0, 1))
                grads[2], grads[3] = of_weight[:, :-1], of_weight[:, -1]
        return once(wanted(grads, ctx.needs_input_grad), (grad, features, weight))


def readout(
    outputs: Tensor,
    contexts: Tensor,
    weight: Tensor,
    bias: Tensor,
    made: Tensor | None = None,
    steps: Sequence[int] = (),
) -> Tensor:
    """Logits (B, T + 1, V) of outputs (B, T, H) and contexts (B, T, D); zeros come first.

    weight (V, H + D) is over [output; context], bias is (V,). made (B, T + 1, V) has [:, t] already
    for each t of `steps`; it is filled up in place.
    """
    if autocast_on(outputs):
        outputs, contexts, weight, bias, made = as_autocast(outputs, contexts, weight, bias, made)
    if is_reference("attention_decoder", outputs, None):
        logits = F.linear(torch.cat([outputs, contexts], -1), weight, bias)
        return F.pad(logits, (0, 0, 1, 0))
    if needs_grad(outputs, contexts, weight, bias):
        return _Readout.apply(outputs, contexts, weight, bias, made, steps)
    return _logits(_features(outputs, contexts), weight, bias, made, steps)
