"""Additive attention: fake kernels, autograd and the public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..library import HAS_KERNEL, asked_for, choose
from . import checks
from .autograd import as_autocast, autocast_on, distinct, needs_grad, once, wanted
from .kernels import OPS, fake

_ops = torch.ops.seq2seq_fast


@torch.library.register_fake("seq2seq_fast::prepare_keys")
def _(keys):
    if not HAS_KERNEL.get(("prepare_keys", keys.device.type)):
        return keys.new_empty(0)
    return keys.new_empty(checks.powers_shape(keys), dtype=torch.float32)


@fake("additive_scores")
def _(query, keys, v):
    return query.new_empty(query.shape[0], query.shape[1], keys.shape[1])


def _empty_gradients(tensors, needs):
    return tuple(x.new_empty(x.shape if n else 0) for x, n in zip(tensors, needs, strict=True))


@fake("additive_scores_backward")
def _(grad, query, keys, v, *needs):
    return _empty_gradients((query, keys, v), needs)


@fake("additive_attention")
def _(query, keys, values, v, mask, score_bias, scale, powers):
    rows = query.shape[:-1]  # (B, T), or (B,): one query has no T axis in the results either
    return query.new_empty(*rows, values.shape[2]), query.new_empty(*rows, keys.shape[1])


@fake("additive_attention_backward")
def _(grad_context, grad_weights, query, keys, values, v, weights, scale, powers, *needs):
    return _empty_gradients((query, keys, values, v, weights), needs)


class PreparedKeys(NamedTuple):
    """Keys (B, S, H) together with what a kernel derives from them once per source."""

    keys: Tensor
    powers: Tensor | None = None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, keys, v):
        ctx.backend = backend
        ctx.save_for_backward(query, keys, v)
        return OPS["additive_scores", backend](query, keys, v)

    @staticmethod
    def backward(ctx, grad):
        inputs, needs = (grad, *ctx.saved_tensors), ctx.needs_input_grad[1:]
        with torch.no_grad():
            grads = OPS["additive_scores_backward", ctx.backend](*inputs, *needs)
        return None, *once(wanted(grads, needs), inputs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, keys, values, v, mask, score_bias, scale, powers):
        context, weights = OPS["additive_attention", backend](
            query, keys, values, v, mask, score_bias, scale, powers
        )
        ctx.save_for_backward(query, keys, values, v, weights, powers)
        ctx.backend, ctx.scale = backend, scale
        return context, weights

    @staticmethod
    def backward(ctx, grad_context, grad_weights):
        *inputs, weights, powers = ctx.saved_tensors
        need_q, need_k, need_values, need_v, _, need_bias = ctx.needs_input_grad[1:7]
        needs = (need_q, need_k, need_values, need_v, need_bias)
        with torch.no_grad():
            grads = OPS["additive_attention_backward", ctx.backend](
                grad_context, grad_weights, *inputs, weights, ctx.scale, powers, *needs
            )
        *grads, grad_bias = once(wanted(grads, needs), (grad_context, grad_weights, *inputs))
        return None, *grads, None, grad_bias, None, None


def additive_scores(
    query: Tensor, keys: Tensor, v: Tensor, *, backend: str | None = None
) -> Tensor:
    """Scores of additive attention: sum_h v[h] * tanh(query[..., h] + keys[..., h]).

    Args:
        query: (B, T, H) or (B, H), floating point.
        keys: (B, S, H), already projected, same dtype and device.
        v: (H,), same dtype and device.
        backend: None for the best there is, "native", "triton" or "reference".

    Returns:
        (B, T, S), or (B, S) where query has no T axis.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and
    translate", 2014, appendix A.1.2.
    """
    if autocast_on(query):
        query, keys, v = as_autocast(query, keys, v)
    checks.scores(query, keys, v)
    single = query.dim() == 2
    q = query.unsqueeze(1) if single else query
    backend = choose("additive_scores", query, backend)
    if backend == "reference":
        out = reference.additive_scores(q, keys, v)
    elif needs_grad(query, keys, v):
        out = _Scores.apply(backend, *distinct(q, keys), v)
    else:
        out = OPS["additive_scores", backend](q, keys, v)
    return out.squeeze(1) if single else out


def prepare_keys(keys: Tensor) -> PreparedKeys:
    """Does the work on keys (B, S, H) that every query of a source shares.

    The result takes the place of keys in `additive_attention`, with gradients to keys as before.
    Worth it where a source is attended to in several calls, as in a decoder's loop.

    Raises:
        TypeError, ValueError: keys is no floating-point tensor (B, S, H) with S and H above 0.
    """
    checks.keys(keys)
    powers = None
    has_kernel = HAS_KERNEL.get(("prepare_keys", keys.device.type))
    if keys.dtype != torch.float64 and has_kernel and asked_for(None) != "reference":
        powers = _ops.prepare_keys(keys.detach())
    return PreparedKeys(keys, powers)


def additive_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    values: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive attention: softmax(scale * scores + score_bias) over the source, and its context.

    Args:
        query: (B, T, H) or (B, H), floating point.
        keys: (B, S, H), already projected; or what `prepare_keys` made of them.
        values: (B, S, D).
        v: (H,).
        mask: bool, True = attend, (B, S) or (B, T, S). A row that is masked everywhere gives
            zeros in both results, and no gradient.
        score_bias: added to the scaled scores, broadcastable to (B, T, S) (or (B, S) where
            query has no T axis).
        scale: factor of the scores.
        backend: None for the best there is, "native", "triton" or "reference".

    Returns:
        context (B, T, D) and weights (B, T, S), without the T axis where query has none.

    Under autocast every floating-point argument but float64 is cast to autocast's dtype first, as
    for a matrix product; sums are in float32 all the same.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    k, powers = keys if isinstance(keys, PreparedKeys) else (keys, None)
    if autocast_on(query):
        cast = as_autocast(query, k, values, v, score_bias)
        powers = powers if cast[1] is k else None
        query, k, values, v, score_bias = cast
    checks.attention(query, k, values, v, mask, score_bias)
    if powers is not None:
        checks.powers(powers, k)
    if type(scale) is not float:
        checks.number("scale", scale)
    single = query.dim() == 2
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    if score_bias is not None:
        B, S = k.shape[:2]
        if single:
            score_bias = score_bias.expand(B, S).unsqueeze(1)
        score_bias = score_bias.expand(B, 1 if single else query.shape[1], S)
    backend = choose("additive_attention", query, backend)
    if backend != "reference" and not needs_grad(query, k, values, v, score_bias):
        op = OPS["additive_attention", backend]
        return op(query, k, values, v, mask, score_bias, scale, powers)
    q = query.unsqueeze(1) if single else query
    if backend == "reference":
        out = reference.additive_attention(q, k, values, v, mask, score_bias, scale)
    else:
        q, k, values = distinct(q, k, values)
        out = _Attention.apply(backend, q, k, values, v, mask, score_bias, scale, powers)
    return (out[0].squeeze(1), out[1].squeeze(1)) if single else out
