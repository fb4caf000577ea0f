"""The specification of every op, forward and backward, in plain PyTorch.

Shapes: query (B, T, H), keys (B, S, H), values (B, S, D), v (H,); mask (B, T or 1, S) bool with
True = attend; score_bias (B, T, S). These run in any floating dtype and on any device.
"""

import torch
from torch import Tensor


def additive_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """scores[b, t, s] = sum_h v[h] tanh(query[b, t, h] + keys[b, s, h]) (Bahdanau et al. 2014)."""
    return (torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) * v).sum(-1)


def additive_scores_backward(
    grad: Tensor, query: Tensor, keys: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `additive_scores` for query, keys and v, given grad (B, T, S)."""
    tanh = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))
    inner = grad.unsqueeze(-1) * v * (1 - tanh * tanh)
    return inner.sum(2), inner.sum(1), (grad.unsqueeze(-1) * tanh).sum((0, 1, 2))


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis; masked places, and rows masked everywhere, are zero."""
    if mask is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    score_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """weights = softmax(scale * scores + score_bias), context = weights @ values."""
    scores = additive_scores(query, keys, v)
    if scale != 1:
        scores = scores * scale
    if score_bias is not None:
        scores = scores + score_bias
    weights = masked_softmax(scores, mask)
    return torch.bmm(weights, values), weights


def additive_attention_backward(
    grad_context: Tensor,
    grad_weights: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `additive_attention` for query, keys, values, v and score_bias (B, T, S)."""
    grad_values = torch.bmm(weights.transpose(1, 2), grad_context)
    grad_weights = grad_weights + torch.bmm(grad_context, values.transpose(1, 2))
    grad_bias = softmax_backward(grad_weights, weights)
    grad_query, grad_keys, grad_v = additive_scores_backward(grad_bias * scale, query, keys, v)
    return grad_query, grad_keys, grad_values, grad_v, grad_bias


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the softmax's input, given its output; zero wherever the weight is zero."""
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))
