"""Logits of all steps of a decoder, as one product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import is_reference
from .additive_attention import _autocast, _autocast_on, _needs_grad, _once, _wanted


def _logits(features: Tensor, weight: Tensor, bias: Tensor, made: Tensor | None, steps):
    """(B, T + 1, V) of features (B, T + 1, K) whose first step is zero; fills `made` up."""
    if made is None:
        logits = F.linear(features, weight, bias)
    else:
        logits, rest = made, sorted({*range(1, features.shape[1])} - {*steps})
        logits[:, rest] = F.linear(features[:, rest], weight, bias)
    logits[:, 0] = 0
    return logits


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, contexts, weight, bias, made, steps):
        features = F.pad(torch.cat([outputs, contexts], -1), (0, 0, 1, 0))
        ctx.save_for_backward(features, weight)
        ctx.width = outputs.shape[2]
        return _logits(features, weight, bias, made, steps)

    @staticmethod
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            rows = grad.flatten(0, 1)
            # The first step's features are zero, so that its gradient reaches no weight.
            grad_features = (rows @ weight).view(features.shape)[:, 1:]
            grads = (
                grad_features[..., : ctx.width],
                grad_features[..., ctx.width :],
                rows.T @ features.flatten(0, 1) if ctx.needs_input_grad[2] else None,
                grad[:, 1:].sum((0, 1)),
                None,
                None,
            )
        return _once(_wanted(grads, ctx.needs_input_grad), (grad, features, weight))


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
    if _autocast_on(outputs):
        outputs, contexts, weight, bias, made = _autocast(outputs, contexts, weight, bias, made)
    if is_reference("attention_decoder", outputs, None):
        logits = F.linear(torch.cat([outputs, contexts], -1), weight, bias)
        return F.pad(logits, (0, 0, 1, 0))
    if _needs_grad(outputs, contexts, weight, bias):
        return _Readout.apply(outputs, contexts, weight, bias, made, steps)
    features = F.pad(torch.cat([outputs, contexts], -1), (0, 0, 1, 0))
    return _logits(features, weight, bias, made, steps)
