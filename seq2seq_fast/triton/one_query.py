"""One query, the step of a decoder: scores, masked softmax and context in one launch.

Keys and values are read once, as they are, and that is what it takes: an exponential per key made
on the way (one special function, beside half a reciprocal) costs less than reading a stored one.
Where one source is attended to many times, its keys' exponentials may be given in place of them.
Where batches are few and sources long, parts of a source go to several programs, whose results a
second launch combines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic
from .arithmetic import (
    exp2_fast,
    exp_2x,
    exp_negative,
    magnitude,
    reciprocal,
    tanh,
    wide,
)
from .launch import multiprocessors, parts
from .softmax import attended_at, logit, mask_bytes

ROWS = 32  # source positions that a program has in hand
FEATURES = 128  # of keys that a program has in hand, at most
COLUMNS = 64  # of values that a program has in hand
LEAST = 8192  # features of keys, 32 KiB: a part of a source with fewer is not worth a second launch

# Sizes and strides for which no kernel of their own is compiled.
NUMBERS = (
    "S splits stride_qb stride_qh stride_v stride_mb stride_ms stride_bb stride_bs stride_also"
).split()
# What a decoder has at another place in every step, aligned or not.
PLACES = ["query", "weights", "context", "also"]

_ROWS, _COLUMNS = tl.constexpr(ROWS), tl.constexpr(COLUMNS)

# Bounds of the largest denominator (1 + exp(2(q0 + k0))) (1 + exp(2(q1 + k1))) among some keys,
# outside of which their scores are made by tanh itself: below, numerators x - 1 are rounded too
# coarsely (it is 4 where q + k = 0); above, v times it could overflow.
_SMALL, _LARGE = tl.constexpr(10.0), tl.constexpr(1e28)


@triton.jit
def _scores_fast(
    keys,
    factors,
    s,
    S,
    H,
    stride_ks,
    stride_kh,
    ARE_POWERS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Scores of the keys at s (ROWS, 1), and the largest denominator that they met.

    Features h and h + WIDTH / 2 share a reciprocal; (x - 1) / (x + 1) as in additive_scores.py.
    """
    half: tl.constexpr = WIDTH // 2
    total = tl.zeros((_ROWS, half), tl.float32)
    largest = tl.zeros((_ROWS, half), tl.float32)
    i = tl.arange(0, half)[None, :]
    keys += tl.minimum(s, S - 1).to(tl.int64) * stride_ks
    for first in range(0, H, WIDTH):
        h0, h1 = wide(first) + i, wide(first) + half + i
        if EVEN:
            k0, k1 = tl.load(keys + h0 * stride_kh), tl.load(keys + h1 * stride_kh)
        else:
            k0 = tl.load(keys + h0 * stride_kh, mask=h0 < H, other=0.0)
            k1 = tl.load(keys + h1 * stride_kh, mask=h1 < H, other=0.0)
        # The factors have zeros as far as whole WIDTHs go.
        q0, q1 = tl.load(factors + i), tl.load(factors + half + i)
        vq0, vq1 = tl.load(factors + WIDTH + i), tl.load(factors + WIDTH + half + i)
        minus_v0 = tl.load(factors + 2 * WIDTH + i)
        minus_v1 = tl.load(factors + 2 * WIDTH + half + i)
        if ARE_POWERS:
            x0, x1 = k0, k1
        else:
            x0 = exp2_fast(k0.to(tl.float32) * 2.8853900817779268)
            x1 = exp2_fast(k1.to(tl.float32) * 2.8853900817779268)
        d0, d1 = tl.fma(q0, x0, 1.0), tl.fma(q1, x1, 1.0)
        n0, n1 = tl.fma(vq0, x0, minus_v0), tl.fma(vq1, x1, minus_v1)
        d = d0 * d1
        largest = tl.maximum(largest, d)
        total = tl.fma(tl.fma(n1, d0, n0 * d1), reciprocal(d), total)
        factors += 3 * WIDTH
    return tl.sum(total, axis=1, keep_dims=True), tl.max(largest)


@triton.jit
def _scores_exact(query, keys, v, s, S, H, stride_qh, stride_ks, stride_kh, stride_v):
    """The same by tanh itself, a few features at a time so as to leave registers alone."""
    WIDTH: tl.constexpr = 32
    total = tl.zeros((_ROWS, WIDTH), tl.float32)
    keys += tl.minimum(s, S - 1).to(tl.int64) * stride_ks
    for first in range(0, H, WIDTH):
        h = wide(first) + tl.arange(0, WIDTH)[None, :]
        k = tl.load(keys + h * stride_kh, mask=h < H, other=0.0).to(tl.float32)
        q = tl.load(query + h * stride_qh, mask=h < H, other=0.0).to(tl.float32)
        w = tl.load(v + h * stride_v, mask=h < H, other=0.0).to(tl.float32)
        total += w * tanh(q + k)
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=NUMBERS + PLACES)
def one_query_kernel(
    query,  # (B, H)
    keys,  # (B, S, H)
    powers,  # (B, S, H) float32, exp(2 keys) with their strides; or None
    values,  # (B, S, D)
    v,  # (H,)
    mask,  # (B, S) uint8
    bias,  # (B, S)
    factors,  # (B splits, 3 Hp) float32, made here by each program for itself: exp(2 query),
    # v exp(2 query) and -v, in turns of WIDTH features; Hp is H in whole WIDTHs
    logits,  # (B, S) float32: scale scores + bias
    weights,  # (B, S)
    context,  # (B, D)
    also,  # (B, D), stride_also apart: the context once more; or None
    tops,  # (B, splits) float32, as are the next two: largest logit of a part of the source,
    totals,  # (B, splits) sum of exp(logit - top),
    contexts,  # (B, splits, D) and the context by those weights; unused where splits = 1
    S,
    H,
    D,
    splits,
    scale,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vd,
    stride_v,
    stride_mb,
    stride_ms,
    stride_bb,
    stride_bs,
    stride_also,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,  # H is a multiple of WIDTH
    SPLIT: tl.constexpr,
):
    """Grid (B splits,): a program has one of `splits` parts of a source."""
    b, split = wide(tl.program_id(0) // splits), tl.program_id(0) % splits
    query += b * stride_qb
    keys += b * stride_kb
    values += b * stride_vb
    mask += b * stride_mb
    bias += b * stride_bb
    factors += wide(tl.program_id(0)) * (3 * tl.cdiv(H, WIDTH) * WIDTH)
    logits += b * S
    largest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, H, WIDTH):
        i = tl.arange(0, WIDTH)
        h = first + i
        at = h.to(tl.int64)
        q = tl.load(query + at * stride_qh, mask=h < H, other=0.0).to(tl.float32)
        w = tl.load(v + at * stride_v, mask=h < H, other=0.0).to(tl.float32)
        large_v = tl.where(magnitude(w) < arithmetic._LARGE_V, 0.0, float("inf"))
        largest = tl.maximum(largest, tl.maximum(magnitude(q), large_v))
        x = exp_2x(q)
        tl.store(factors + 3 * first + i, x)
        tl.store(factors + 3 * first + WIDTH + i, w * x)
        tl.store(factors + 3 * first + 2 * WIDTH + i, -w)
    moderate = tl.max(largest) < arithmetic._LARGE
    tl.debug_barrier()  # the factors are read by other threads than wrote them

    per_split = tl.cdiv(tl.cdiv(S, _ROWS), splits) * _ROWS
    start = split * per_split
    stop = tl.minimum(start + per_split, S)
    row = tl.arange(0, _ROWS)[:, None]
    top = float("-inf")
    attends = 0
    for first in range(start, stop, _ROWS):
        s = first + row
        if powers is not None:
            score, d = _scores_fast(
                powers + b * stride_kb, factors, s, S, H, stride_ks, stride_kh, True, WIDTH, EVEN
            )
        else:
            score, d = _scores_fast(
                keys, factors, s, S, H, stride_ks, stride_kh, False, WIDTH, EVEN
            )
        finite = tl.max(tl.where(score - score == 0.0, 0, 1)) == 0
        if not (moderate & finite & (d > _SMALL) & (d < _LARGE)):
            score = _scores_exact(
                query, keys, v, s, S, H, stride_qh, stride_ks, stride_kh, stride_v
            )
        x = logit(score, bias, s, S, scale, stride_bs, HAS_BIAS)
        attended = attended_at(mask, s, S, stride_ms, HAS_MASK)
        tl.store(logits + s, x, mask=s < S)
        top = tl.maximum(top, tl.max(tl.where(attended, x, float("-inf"))))
        attends = tl.maximum(attends, tl.max(attended.to(tl.int32)))
    tl.debug_barrier()

    if SPLIT:  # at -infinity all, but not masked: the other parts decide what that means
        lowest = -3.4028234663852886e38
        top = tl.where(attends > 0, tl.maximum(top, lowest), float("-inf"))
    total = 0.0
    for first in range(start, stop, _ROWS):
        s = first + row
        attended = attended_at(mask, s, S, stride_ms, HAS_MASK) & (s < stop)
        x = tl.load(logits + s, mask=attended, other=0.0)
        total += tl.sum(tl.where(attended, exp_negative(x - top), 0.0))
    if SPLIT:
        tl.store(tops + tl.program_id(0), top)
        tl.store(totals + tl.program_id(0), total)
    for first_d in range(0, D, _COLUMNS):
        d = first_d + tl.arange(0, _COLUMNS)[None, :]
        sums = tl.zeros((_ROWS, _COLUMNS), tl.float32)
        for first in range(start, stop, _ROWS):
            s = first + row
            attended = attended_at(mask, s, S, stride_ms, HAS_MASK) & (s < stop)
            x = tl.load(logits + s, mask=attended, other=0.0)
            weight = tl.where(attended, exp_negative(x - top), 0.0)
            if not SPLIT:
                weight = tl.where(attended, weight / total, 0.0)
                tl.store(weights + b * S + s, weight, mask=(s < stop) & (first_d == 0))
            at = values + s.to(tl.int64) * stride_vs + d.to(tl.int64) * stride_vd
            value = tl.load(at, mask=(s < stop) & (d < D), other=0.0).to(tl.float32)
            sums += weight * value
        sum_d = tl.sum(sums, axis=0, keep_dims=True)
        if SPLIT:
            tl.store(contexts + wide(tl.program_id(0)) * D + d, sum_d, mask=d < D)
        else:
            tl.store(context + b * D + d, sum_d, mask=d < D)
            if also is not None:
                tl.store(also + b * stride_also + d, sum_d, mask=d < D)


@triton.jit(do_not_specialize=["S", "D", "splits", "stride_mb", "stride_also", *PLACES[1:]])
def combine_kernel(
    logits,  # as in one_query_kernel
    mask,
    tops,
    totals,
    contexts,
    weights,
    context,
    also,
    S,
    D,
    splits,
    stride_mb,
    stride_ms,
    stride_also,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,  # power of two that holds splits
    WIDTH: tl.constexpr,
):
    """Grid (B (cdiv(S, WIDTH) + cdiv(D, WIDTH)),): a program has WIDTH weights, or WIDTH of D."""
    parts_s = tl.cdiv(S, WIDTH)
    parts = parts_s + tl.cdiv(D, WIDTH)
    b, part = wide(tl.program_id(0) // parts), tl.program_id(0) % parts
    i = tl.arange(0, SPLITS)[:, None]
    top_i = tl.load(tops + b * splits + i, mask=i < splits, other=float("-inf"))
    total_i = tl.load(totals + b * splits + i, mask=i < splits, other=0.0)
    top = tl.max(top_i)
    factor = tl.where(total_i == 0.0, 0.0, exp_negative(top_i - top))
    total = tl.sum(factor * total_i)
    if part < parts_s:
        s = part * WIDTH + tl.arange(0, WIDTH)
        attended = attended_at(mask + b * stride_mb, s, S, stride_ms, HAS_MASK)
        x = tl.load(logits + b * S + s, mask=attended, other=0.0)
        weight = tl.where(attended, exp_negative(x - top) / total, 0.0)
        tl.store(weights + b * S + s, weight, mask=s < S)
    else:
        d = (part - parts_s) * WIDTH + tl.arange(0, WIDTH)[None, :]
        at = contexts + (b * splits + i) * D + d
        sums = tl.load(at, mask=(i < splits) & (d < D), other=0.0)
        sums = tl.sum(factor * sums, axis=0, keep_dims=True)
        sums = tl.where(top == float("-inf"), sums, sums / total)
        tl.store(context + b * D + d, sums, mask=d < D)
        if also is not None:
            tl.store(also + b * stride_also + d, sums, mask=d < D)


class OneQuery:
    """Attends to a source with one query at a time; what its calls share is made once."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        powers: Tensor | None = None,
    ):
        """mask (B, 1, S) and bias (B, 1, S), or None; powers as in one_query_kernel."""
        B, S, H = keys.shape
        D = values.shape[2]
        splits = min(2 * multiprocessors(keys) // B, S * H // LEAST)
        splits = parts(triton.cdiv(S, ROWS), splits)

        def new(*shape: int) -> Tensor:
            return keys.new_empty(shape, dtype=torch.float32)

        width = FEATURES // 2 if H % FEATURES else FEATURES
        factors = new(B * splits, 3 * triton.cdiv(H, width) * width)
        self.logits = new(B, S)  # scaled and biased scores of the last call
        self.split = splits > 1
        tops, totals, contexts = (
            new(B, splits, n) if self.split else self.logits for n in (1, 1, D)
        )
        mask_, (stride_mb, _, stride_ms) = mask_bytes(mask, keys)
        stride_bb, _, stride_bs = (0, 0, 0) if bias is None else bias.stride()
        self.grid = (B * splits,)
        bias_ = keys if bias is None else bias
        self.source = (keys, powers, values, v, mask_, bias_, factors, self.logits)
        self.joined = (tops, totals, contexts)
        self.sizes = (S, H, D, splits, scale)
        self.strides = (
            *keys.stride(), *values.stride(), v.stride(0),
            stride_mb, stride_ms, stride_bb, stride_bs,
        )  # fmt: skip
        self.options = dict(
            HAS_MASK=mask is not None, HAS_BIAS=bias is not None, WIDTH=width, EVEN=H % width == 0,
            SPLIT=self.split,
        )  # fmt: skip
        self.combine_grid = (B * (triton.cdiv(S, FEATURES) + triton.cdiv(D, FEATURES)),)
        self.combined = (self.logits, mask_, *self.joined)
        self.combine_sizes = (S, D, splits, stride_mb, stride_ms)
        self.combine_options = dict(
            HAS_MASK=mask is not None, SPLITS=triton.next_power_of_2(splits), WIDTH=FEATURES
        )

    def __call__(
        self, query: Tensor, context: Tensor, weights: Tensor, also: Tensor | None = None
    ) -> None:
        """query (B, H) to context (B, D) and weights (B, S), both contiguous; the context once more
        to also, whose rows may lie apart."""
        stride_also = 0 if also is None else also.stride(0)
        one_query_kernel[self.grid](
            query, *self.source, weights, context, also, *self.joined, *self.sizes,
            *query.stride(), *self.strides, stride_also, **self.options,
        )  # fmt: skip
        if self.split:
            combine_kernel[self.combine_grid](
                *self.combined, weights, context, also, *self.combine_sizes, stride_also,
                **self.combine_options,
            )  # fmt: skip


def one_query(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """context (B, D), weights (B, S) and the scaled and biased scores (B, S) in float32.

    query (B, H); mask (B, 1, S) and bias (B, 1, S), or None.
    """
    (B, S, _), D = keys.shape, values.shape[2]
    context, weights = query.new_empty((B, D)), query.new_empty((B, S))
    attend = OneQuery(keys, values, v, mask, bias, scale)
    attend(query, context, weights)
    return context, weights, attend.logits
