"""Masked softmax of scores, and its gradient: one row at a time, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import exp_negative, wide

WIDTH = 1024  # numbers of a row that a program has in hand, at most

# Sizes and strides for which no kernel of their own is compiled.
SOFTMAX_NUMBERS = "B T S Tp Sp splits stride_mb stride_mt stride_bb stride_bt".split()
BACKWARD_NUMBERS = "T S Sp stride_gb stride_gt stride_wb stride_wt".split()


@triton.jit
def attended_at(mask, s, S, stride_ms, HAS_MASK: tl.constexpr):
    attended = s < S
    if HAS_MASK:
        attended &= tl.load(mask + s.to(tl.int64) * stride_ms, mask=attended, other=0) != 0
    return attended


@triton.jit
def logit(score, bias, s, S, scale, stride_bs, HAS_BIAS: tl.constexpr):
    x = score * scale
    if HAS_BIAS:
        x += tl.load(bias + s.to(tl.int64) * stride_bs, mask=s < S, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=SOFTMAX_NUMBERS)
def softmax_kernel(
    scores,  # (splits, B, Tp, Sp) float32, to be summed over splits
    mask,  # (B, T or 1, S) uint8
    bias,  # (B, T, S)
    weights,  # (B, T, S)
    B,
    T,
    S,
    Tp,
    Sp,
    splits,
    scale,
    stride_mb,
    stride_mt,
    stride_ms,
    stride_bb,
    stride_bt,
    stride_bs,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (B T,): a program has a row. Three passes, of which all but the first find it in cache:
    a running maximum would make NaN of positions at -infinity."""
    b, t = wide(tl.program_id(0) // T), wide(tl.program_id(0) % T)
    scores += (b * Tp + t) * Sp
    mask += b * stride_mb + t * stride_mt
    bias += b * stride_bb + t * stride_bt
    weights += (b * T + t) * S
    top = float("-inf")
    total = 0.0
    for stage in tl.static_range(3):
        for first in range(0, S, WIDTH):
            s = first + tl.arange(0, WIDTH)
            score = tl.load(scores + s, mask=s < S, other=0.0)
            for i in range(1, splits):
                score += tl.load(scores + wide(i) * B * Tp * Sp + s, mask=s < S, other=0.0)
            x = logit(score, bias, s, S, scale, stride_bs, HAS_BIAS)
            attended = attended_at(mask, s, S, stride_ms, HAS_MASK)
            if stage == 0:
                top = tl.maximum(top, tl.max(tl.where(attended, x, float("-inf"))))
            else:
                e = tl.where(attended, exp_negative(x - top), 0.0)
                if stage == 1:
                    total += tl.sum(e)
                else:
                    tl.store(weights + s, tl.where(attended, e / total, 0.0), mask=s < S)


@triton.jit(do_not_specialize=BACKWARD_NUMBERS)
def softmax_backward_kernel(
    grad,  # (B, T, S) gradient of weights
    weights,  # (B, T, S)
    grad_bias,  # (B, T, S)
    g,  # (B, T, Sp) float32: scale grad_bias, and 0 beyond S
    T,
    S,
    Sp,
    scale,
    stride_gb,
    stride_gt,
    stride_gs,
    stride_wb,
    stride_wt,
    stride_ws,
    NEED_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (B T,): a program has a row."""
    row = wide(tl.program_id(0))
    b, t = row // T, row % T
    grad += b * stride_gb + t * stride_gt
    weights += b * stride_wb + t * stride_wt
    dot = 0.0
    total = 0.0
    mean = 0.0
    for stage in tl.static_range(2):
        for first in range(0, Sp, WIDTH):
            s = first + tl.arange(0, WIDTH)
            at = s.to(tl.int64)
            dw = tl.load(grad + at * stride_gs, mask=s < S, other=0.0).to(tl.float32)
            w = tl.load(weights + at * stride_ws, mask=s < S, other=0.0).to(tl.float32)
            if stage == 0:
                dot += tl.sum(dw * w)
                total += tl.sum(w)
            else:
                x = w * (dw - mean)
                tl.store(g + row * Sp + s, x * scale, mask=s < Sp)
                if NEED_BIAS:
                    tl.store(grad_bias + row * S + s, x, mask=s < S)
        # Weights that were rounded to 16 bits do not add up to one; the gradients must to zero.
        mean = tl.where(total > 0.0, dot / total, dot)


def _width(n: int) -> int:
    return min(WIDTH, triton.next_power_of_2(n))


def mask_bytes(mask: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """mask (B, T or 1, S) as bytes, and its strides; something to point to where there is none."""
    if mask is None:
        return like, (0, 0, 0)
    b, t, s = (0 if n == 1 else i for n, i in zip(mask.shape, mask.stride(), strict=True))
    return mask.view(torch.uint8), (b, t, s)


def softmax(
    scores: Tensor,
    like: Tensor,
    shape: tuple[int, int, int],
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Weights of shape (B, T, S) and like's dtype; scores as additive_scores.partial_scores."""
    B, T, S = shape
    splits, _, Tp, Sp = scores.shape
    weights = like.new_empty(shape)
    mask_, mask_strides = mask_bytes(mask, like)
    softmax_kernel[(B * T,)](
        scores,
        mask_,
        like if bias is None else bias,
        weights,
        B,
        T,
        S,
        Tp,
        Sp,
        splits,
        scale,
        *mask_strides,
        *((0, 0, 0) if bias is None else bias.stride()),
        HAS_MASK=mask is not None,
        HAS_BIAS=bias is not None,
        WIDTH=_width(S),
    )
    return weights


def softmax_backward(
    grad: Tensor, weights: Tensor, scale: float, Sp: int, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of score_bias, or an empty tensor, and of the scores (B, T, Sp) in float32."""
    B, T, S = weights.shape
    grad_bias = weights.new_empty(weights.shape if need_bias else 0)
    g = weights.new_empty((B, T, Sp), dtype=torch.float32)
    softmax_backward_kernel[(B * T,)](
        grad,
        weights,
        grad_bias,
        g,
        T,
        S,
        Sp,
        scale,
        *grad.stride(),
        *weights.stride(),
        NEED_BIAS=need_bias,
        WIDTH=_width(Sp),
    )
    return grad_bias, g
