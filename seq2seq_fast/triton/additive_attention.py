"""weights = softmax(scale scores + score_bias) where mask allows, context = weights values.

Many queries: a launch each for factors, scores and softmax, and a batched product for the context.
One query: see one_query.py.
"""

import torch
from torch import Tensor

from .additive_scores import partial_scores
from .additive_scores_backward import gradients, padded, shape_of_programs
from .one_query import one_query
from .softmax import softmax, softmax_backward


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    score_bias: Tensor | None,
    scale: float,
    powers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of powers, what other kernels derive from keys, these have no use: see one_query.py."""
    if query.dim() == 2 or query.shape[1] == 1:
        row = query if query.dim() == 2 else query[:, 0]
        context, weights, _ = one_query(row, keys, values, v, mask, score_bias, scale)
        return (context, weights) if query.dim() == 2 else (context[:, None], weights[:, None])
    (B, T, _), S = query.shape, keys.shape[1]
    scores = partial_scores(query, keys, v)
    weights = softmax(scores, query, (B, T, S), mask, score_bias, scale)
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
    powers: Tensor | None,
    need_query: bool,
    need_keys: bool,
    need_values: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_values = query.new_empty(0)
    if need_values:
        grad_values = torch.bmm(weights.transpose(1, 2), grad_context)
    found = [query.new_empty(0) for _ in range(4)]
    if need_query or need_keys or need_v or need_bias:
        grad = torch.baddbmm(grad_weights, grad_context, values.transpose(1, 2))
        shape = shape_of_programs(keys)
        found[3], g = softmax_backward(grad, weights, scale, padded(keys, shape), need_bias)
        if need_query or need_keys or need_v:
            found[:3] = gradients(g, query, keys, v, shape, (need_query, need_keys, need_v))
    return found[0], found[1], grad_values, found[2], found[3]
