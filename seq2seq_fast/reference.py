"""The specification of every op, forward and backward, in plain PyTorch.

Shapes: query (B, T, H), keys (B, S, H), values (B, S, D), v (H,); mask (B, T or 1, S) bool with
True = attend; score_bias (B, T, S). These run in any floating dtype and on any device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


_CHUNK = 1 << 22  # logits at a time: at least a few rows of any vocabulary


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    steps: list[int],
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for input (B, T, K), linear_weight (V, K) and linear_bias (V,).

    target (B, T); what is not needed is an empty tensor. logits (B, T, V), known for some steps,
    would only spare a product. Softmax is in float32 at least.
    """
    V, x, y = linear_weight.shape[0], input.flatten(0, 1), target.flatten()
    within = torch.promote_types(input.dtype, torch.float32)
    kept = y != ignore_index
    y = torch.where(kept, y, 0).unsqueeze(1)
    w = torch.ones_like(linear_weight[:, 0]) if weight is None else weight
    w, kept = w.to(within), kept.to(within).unsqueeze(1)
    of_target, of_others = (1 - label_smoothing) * kept * w[y], kept * label_smoothing / V
    scale = 1 / (kept * w[y]).sum() if mean else 1.0

    loss = torch.zeros_like(w[0])
    d_input, d_weight = torch.empty_like(x), torch.zeros_like(linear_weight)
    d_bias = torch.zeros_like(w)
    n = max(1, _CHUNK // V)
    for i in range(0, len(x), n):
        rows = slice(i, i + n)
        log_p = F.linear(x[rows], linear_weight, linear_bias).to(within).log_softmax(-1)
        of_row = of_target[rows] * log_p.gather(1, y[rows]) + of_others[rows] * (log_p @ w)[:, None]
        # Not 0 * log_p, which is NaN where a logit is infinite.
        loss -= torch.where(kept[rows] > 0, of_row, 0).sum()
        if not (need_input or need_weight or need_bias):
            continue
        g = log_p.exp() * (of_target[rows] + of_others[rows] * w.sum()) - of_others[rows] * w
        g = scale * g.scatter_add(1, y[rows], -of_target[rows])
        d_bias += g.sum(0)
        g = g.to(x.dtype)
        torch.mm(g, linear_weight, out=d_input[rows])
        d_weight.addmm_(g.T, x[rows])
    d_input, d_bias, none = d_input.view_as(input), d_bias.to(x.dtype), x.new_empty
    return (
        (loss * scale + 0 * scale).to(x.dtype),  # NaN, of no weight at all
        d_input if need_input else none(0),
        d_weight if need_weight else none(0),
        d_bias if need_bias else none(0),
    )
