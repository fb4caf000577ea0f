"""Attention of one query backward, the step of a decoder. With dcontext and dweights given,

    dw[s] = sum_d values[s,d] dcontext[d] + dweights[s]
    ds[s] = w[s] (dw[s] - sum_s w dw)
    dq[h] = v[h] sum_s ds[s] (1 - tanh²(q[h] + k[s,h]))

where features h and h + WIDTH / 2 share a reciprocal, as source positions do in
additive_scores_backward.py, whose sums these are. What is derived from the keys is made once for
all steps. A program has a row; where rows would leave most of a GPU idle, programs share one in two
launches: dw by ranges of the source, then the rest by slices of the features.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic
from .arithmetic import exp_2x, expm1_2x, magnitude, reciprocal, tanh, wide
from .launch import multiprocessors, parts

# What a program has in hand, at most: of source positions (the fewer are for short sources), of
# features of keys, of values. Eight pairs of features are a thread's.
ROWS, FEATURES, COLUMNS = (32, 64), (64, 128), 128
BLOCK = 512  # numbers in a row
# Elements of a range of values, and of a row's keys and values from which another launch pays.
LEAST, LEAST_SHARED = 8192, 1 << 18

# Sizes, strides and what lies at another place in every step: nothing is compiled for some of them.
ANY = (
    "grad_context carried grad_weights weights query to_context to_scores to_query of_weights"
    " S n_parts stride_carried stride_v"
).split()

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _slopes(
    q0,  # (1, WIDTH / 2) queries, as are q1's
    q1,
    powers,  # exp(2 keys), or with SMALL that minus one, at feature h0 of the first position
    ds,  # (S,)
    h0,
    S,
    H,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    SMALL: tl.constexpr,
):
    """sum_s ds (1 - tanh²) of the features h0 and h0 + WIDTH / 2."""
    half: tl.constexpr = WIDTH // 2
    row = tl.arange(0, ROWS)[:, None]
    x0, x1 = exp_2x(q0), exp_2x(q1)
    e0, e1 = expm1_2x(q0), expm1_2x(q1)
    sum0 = tl.zeros((ROWS, half), tl.float32)
    sum1 = tl.zeros((ROWS, half), tl.float32)
    for first in range(0, S, ROWS):
        s = first + row
        g = tl.load(ds + s, mask=s < S, other=0.0)
        at = powers + tl.minimum(s, S - 1).to(tl.int64) * H
        if EVEN:
            k0, k1 = tl.load(at), tl.load(at + half)
        else:
            k0 = tl.load(at, mask=h0 < H, other=0.0)
            k1 = tl.load(at + half, mask=h0 + half < H, other=0.0)
        if SMALL:
            y0, y1 = tl.fma(x0, k0, e0), tl.fma(x1, k1, e1)
            d0, d1 = y0 + 2.0, y1 + 2.0
            r = reciprocal(d0 * d1)
            tanh0, tanh1 = y0 * (r * d1), y1 * (r * d0)
            sum0 += tl.fma(-(g * tanh0), tanh0, g)
            sum1 += tl.fma(-(g * tanh1), tanh1, g)
        else:
            d0, d1 = tl.fma(x0, k0, 1.0), tl.fma(x1, k1, 1.0)
            r = reciprocal(d0 * d1)
            r0, r1 = r * d1, r * d0
            sum0 = tl.fma((g * r0) * r0, k0, sum0)
            sum1 = tl.fma((g * r1) * r1, k1, sum1)
    dq0 = tl.sum(sum0, axis=0, keep_dims=True)
    dq1 = tl.sum(sum1, axis=0, keep_dims=True)
    if SMALL:
        return dq0, dq1
    else:
        return 4.0 * (dq0 * x0), 4.0 * (dq1 * x1)


@triton.jit
def _slopes_exact(q, w, keys, ds, h, S, H, ROWS: tl.constexpr):
    """v sum_s ds (1 - tanh²) of the features h (1, n), by tanh itself."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, h.shape[1]), tl.float32)
    for first in range(0, S, ROWS):
        s = first + row
        g = tl.load(ds + s, mask=s < S, other=0.0)
        k = tl.load(keys + s.to(tl.int64) * H + h, mask=(s < S) & (h < H), other=0.0)
        y = tanh(q + k)
        total += tl.where(s < S, g * w * ((1.0 - y) * (1.0 + y)), 0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def _values(
    grad_context,  # (D,), to which is added
    carried,  # (D,)
    grad_weights,  # (S,)
    weights,  # (S,)
    values,  # (S, D)
    to_context,  # (D,)
    of_weights,  # (S,) dw
    start,
    stop,
    S,
    D,
    stride_vs,
    stride_vd,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum_s weights dw of the positions from start to stop, of which dw is stored."""
    i = tl.arange(0, _BLOCK)
    for first in range(0, D, _BLOCK):
        d = first + i
        c = tl.load(grad_context + d, mask=d < D)
        c += tl.load(carried + d, mask=d < D)
        tl.store(to_context + d, c, mask=d < D)
    tl.debug_barrier()  # what is read now was written by other threads, and so below

    row = tl.arange(0, ROWS)[:, None]
    dot = 0.0
    for first in range(start, stop, ROWS):
        s = first + row
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first_d in range(0, D, COLUMNS):
            d = first_d + tl.arange(0, COLUMNS)[None, :]
            c = tl.load(to_context + d, mask=d < D, other=0.0)
            at = values + s.to(tl.int64) * stride_vs + d.to(tl.int64) * stride_vd
            sums = tl.fma(tl.load(at, mask=(s < S) & (d < D), other=0.0), c, sums)
        dw = tl.sum(sums, axis=1, keep_dims=True)
        dw += tl.load(grad_weights + s, mask=s < S, other=0.0)
        dot += tl.sum(tl.where(s < S, tl.load(weights + s, mask=s < S, other=0.0) * dw, 0.0))
        tl.store(of_weights + s, dw, mask=s < S)
    tl.debug_barrier()
    return dot


@triton.jit
def _dot(of_weights, weights, S):
    """sum_s weights dw of a whole row."""
    dot = 0.0
    for first in range(0, S, _BLOCK):
        s = first + tl.arange(0, _BLOCK)
        dw = tl.load(of_weights + s, mask=s < S, other=0.0)
        dot += tl.sum(tl.load(weights + s, mask=s < S, other=0.0) * dw)
    return dot


@triton.jit(do_not_specialize=ANY)
def one_query_backward_kernel(
    grad_context,  # (B, D), to which is added
    carried,  # (B, D), stride_carried apart
    grad_weights,  # (B, S)
    weights,  # (B, S)
    query,  # (B, H)
    keys,  # (B, S, H), as are the next two
    powers,  # exp(2 keys)
    minus_one,  # exp(2 keys) - 1
    maxima,  # (B,) max|keys|, NaN where one is
    values,  # (B, S, D)
    v,  # (H,)
    to_context,  # (B, D)
    to_scores,  # (B, S)
    to_query,  # (B, H)
    of_weights,  # (B, S) dw; of STAGE "all" to_scores
    S,
    H,
    D,
    n_parts,
    stride_carried,
    stride_vb,
    stride_vs,
    stride_vd,
    stride_v,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,  # H is a multiple of WIDTH
    STAGE: tl.constexpr,  # "all", or "values" or "slopes"
):
    """Grid (B n_parts,): a program has a row, of which there is one part, or one of its parts in
    this stage."""
    b, part = wide(tl.program_id(0) // n_parts), tl.program_id(0) % n_parts
    to_scores += b * S
    weights += b * S
    of_weights += b * S
    if STAGE == "slopes":
        dot = _dot(of_weights, weights, S)
    else:
        per_part = tl.cdiv(tl.cdiv(S, ROWS), n_parts) * ROWS
        start = part * per_part
        dot = _values(
            grad_context + b * D, carried + b * stride_carried, grad_weights + b * S, weights,
            values + b * stride_vb, to_context + b * D, of_weights, start,
            tl.minimum(start + per_part, S), S, D, stride_vs, stride_vd, ROWS, COLUMNS,
        )  # fmt: skip
    if STAGE == "values":
        return

    # Programs that share a row all store its gradients of scores, the same ones.
    i = tl.arange(0, _BLOCK)
    largest = tl.load(maxima + b)
    finite = 1
    for first in range(0, S, _BLOCK):
        s = first + i
        dw = tl.load(of_weights + s, mask=s < S, other=0.0)
        ds = tl.load(weights + s, mask=s < S, other=0.0) * (dw - dot)
        tl.store(to_scores + s, ds, mask=s < S)
        finite = tl.minimum(finite, tl.min(tl.where((ds - ds == 0.0) | (s >= S), 1, 0)))
    largest_q = 0.0
    for first in range(0, H, _BLOCK):
        h = first + i
        q = tl.load(query + b * H + h, mask=h < H, other=0.0)
        largest_q = tl.maximum(largest_q, tl.max(magnitude(q)))
        w = tl.load(v + h.to(tl.int64) * stride_v, mask=h < H, other=0.0)
        finite = tl.minimum(finite, tl.min(tl.where(w - w == 0.0, 1, 0)))
    tl.debug_barrier()
    largest += largest_q
    moderate = (largest < arithmetic._LARGE) & (finite == 1)  # no: NaN is not

    half: tl.constexpr = WIDTH // 2
    slice = tl.cdiv(tl.cdiv(H, WIDTH), n_parts) * WIDTH
    for first in range(part * slice, tl.minimum((part + 1) * slice, H), WIDTH):
        h0 = first + tl.arange(0, half)[None, :]
        h1 = h0 + half
        q0 = tl.load(query + b * H + h0, mask=h0 < H, other=0.0)
        q1 = tl.load(query + b * H + h1, mask=h1 < H, other=0.0)
        w0 = tl.load(v + h0.to(tl.int64) * stride_v, mask=h0 < H, other=0.0)
        w1 = tl.load(v + h1.to(tl.int64) * stride_v, mask=h1 < H, other=0.0)
        at = b * S * H
        if moderate & (largest < arithmetic._SMALL):
            dq0, dq1 = _slopes(
                q0, q1, minus_one + at + h0, to_scores, h0, S, H, ROWS, WIDTH, EVEN, True
            )
            dq0, dq1 = dq0 * w0, dq1 * w1
        elif moderate:
            dq0, dq1 = _slopes(
                q0, q1, powers + at + h0, to_scores, h0, S, H, ROWS, WIDTH, EVEN, False
            )
            dq0, dq1 = dq0 * w0, dq1 * w1
        else:
            dq0 = _slopes_exact(q0, w0, keys + at, to_scores, h0, S, H, ROWS)
            dq1 = _slopes_exact(q1, w1, keys + at, to_scores, h1, S, H, ROWS)
        tl.store(to_query + b * H + h0, dq0, mask=h0 < H)
        tl.store(to_query + b * H + h1, dq1, mask=h1 < H)


def shape_of_program(S: int, H: int, D: int) -> dict[str, int]:
    rows, width = ROWS[S > ROWS[0]], FEATURES[H > FEATURES[0]]
    columns = min(COLUMNS, max(16, triton.next_power_of_2(D)))
    return dict(ROWS=rows, WIDTH=width, COLUMNS=columns, num_warps=rows * width // (2 * 8 * 32))


class OneQueryBackward:
    """The backward of one_query.OneQuery on a source in float32."""

    def __init__(self, keys: Tensor, values: Tensor, v: Tensor):
        (B, S, H), D = keys.shape, values.shape[2]
        keys = keys.contiguous()
        twice = 2 * keys
        maxima = keys.abs().amax((1, 2))
        shape = shape_of_program(S, H, D)
        self.B = B
        self.source = (keys, twice.exp(), twice.expm1_(), maxima, values, v)
        self.sizes = (S, H, D)
        self.strides = (*values.stride(), v.stride(0))
        self.options = shape | dict(EVEN=H % shape["WIDTH"] == 0)
        idle = multiprocessors(keys) // max(B, 1)
        self.stages, self.of_weights = {"all": 1}, None
        if idle > 1 and S * (H + D) >= LEAST_SHARED:
            self.of_weights = keys.new_empty(B, S)
            self.stages = {
                "values": parts(triton.cdiv(S, shape["ROWS"]), min(idle, S * D // LEAST)),
                "slopes": parts(triton.cdiv(H, shape["WIDTH"]), idle),
            }

    def __call__(
        self,
        grad_context: Tensor,
        carried: Tensor,
        grad_weights: Tensor,
        weights: Tensor,
        query: Tensor,
        to_context: Tensor,
        to_scores: Tensor,
        to_query: Tensor,
    ) -> None:
        """See one_query_backward_kernel; but for carried, whose rows may lie apart, contiguous."""
        of_weights = to_scores if self.of_weights is None else self.of_weights
        for stage, n_parts in self.stages.items():
            one_query_backward_kernel[(self.B * n_parts,)](
                grad_context, carried, grad_weights, weights, query, *self.source, to_context,
                to_scores, to_query, of_weights, *self.sizes, n_parts, carried.stride(0),
                *self.strides, STAGE=stage, **self.options,
            )  # fmt: skip
