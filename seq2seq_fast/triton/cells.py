"""One step of a recurrent cell, forward and backward, behind and before the product with its
weights. Gates come in blocks of H: i f g o (LSTM), n r z m (GRU, m the hidden state's part of n) or
h (RNN).

Grid: a program has BLOCK of the B H units, a thread one of them. A step has few, so that one to a
thread, which neighbours read side by side, waits for memory once. Nothing is gained by knowing how
sizes and pointers are aligned, and the latter change from step to step: kernels are compiled once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import sigmoid, tanh

BLOCK = 128

ADVANCE_ARGUMENTS = (
    "product bias gates hidden_before cell_before hidden cell to_self to_next factors"
    " B H stride_bias stride_self stride_next"
).split()
RETREAT_ARGUMENTS = (
    "of_self of_next factors of_query of_output passed gates hidden_before cell_before cell"
    " grad_cell grad_gates B H stride_self stride_next"
).split()


@triton.jit
def _units(B, H, BLOCK: tl.constexpr):
    """b, h and b H + h of the program's units, and which of them there are."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = i // H
    return b.to(tl.int64), i - b * H, i, i < B * H


@triton.jit(do_not_specialize=ADVANCE_ARGUMENTS)
def advance_kernel(
    product,  # (B, G), of [x | hidden state] and the layer's weights
    bias,  # (G,), or (B, G) with stride_bias = G
    gates,  # (B, G), after their nonlinearities; with HAS_INPUT it has, but for a GRU's m, the
    # input's part of them before
    hidden_before,  # (B, H)
    cell_before,  # (B, H) of an LSTM, else None
    hidden,  # (B, H)
    cell,  # (B, H) of an LSTM, else None
    to_self,  # (B, H), stride_self apart: the hidden state's place in the next step's product
    to_next,  # (B, H), stride_next apart: and, times factors, in the next layer's; or None
    factors,  # (B, H), or None
    B,
    H,
    stride_bias,
    stride_self,
    stride_next,
    CELL: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, i, used = _units(B, H, BLOCK)
    BLOCKS: tl.constexpr = 1 if CELL == "rnn" else 4
    at = b * (BLOCKS * H) + h
    of_bias = bias + b * stride_bias + h
    x0 = tl.load(product + at, mask=used) + tl.load(of_bias, mask=used)
    if HAS_INPUT:
        x0 += tl.load(gates + at, mask=used)
    if CELL == "rnn":
        y = tanh(x0)
        tl.store(gates + at, y, mask=used)
    else:
        x1 = tl.load(product + at + H, mask=used) + tl.load(of_bias + H, mask=used)
        x2 = tl.load(product + at + 2 * H, mask=used) + tl.load(of_bias + 2 * H, mask=used)
        x3 = tl.load(product + at + 3 * H, mask=used) + tl.load(of_bias + 3 * H, mask=used)
        if HAS_INPUT:
            x1 += tl.load(gates + at + H, mask=used)
            x2 += tl.load(gates + at + 2 * H, mask=used)
            if CELL == "lstm":
                x3 += tl.load(gates + at + 3 * H, mask=used)
        x1 = sigmoid(x1)
        if CELL == "lstm":
            x0, x2, x3 = sigmoid(x0), tanh(x2), sigmoid(x3)
            memory = x1 * tl.load(cell_before + i, mask=used) + x0 * x2
            tl.store(cell + i, memory, mask=used)
            y = x3 * tanh(memory)
        else:
            x2 = sigmoid(x2)
            x0 = tanh(x0 + x1 * x3)
            y = x0 + x2 * (tl.load(hidden_before + i, mask=used) - x0)
        tl.store(gates + at, x0, mask=used)
        tl.store(gates + at + H, x1, mask=used)
        tl.store(gates + at + 2 * H, x2, mask=used)
        tl.store(gates + at + 3 * H, x3, mask=used)
    tl.store(hidden + i, y, mask=used)
    tl.store(to_self + b * stride_self + h, y, mask=used)
    if to_next is not None:
        if factors is not None:
            y *= tl.load(factors + i, mask=used)
        tl.store(to_next + b * stride_next + h, y, mask=used)


@triton.jit(do_not_specialize=RETREAT_ARGUMENTS)
def retreat_kernel(
    # Parts of the hidden state's gradient, (B, H) each:
    of_self,  # stride_self apart: of the product that read it in the next step
    of_next,  # stride_next apart, to be multiplied by factors: in the next layer, or None
    factors,  # or None
    of_query,  # of the query's product, or None
    of_output,  # or None
    passed,  # what passed the gates of the next step by, then of this one; of a GRU, else None
    gates,  # (B, G), after their nonlinearities
    hidden_before,  # (B, H)
    cell_before,  # (B, H), as are the next two: of an LSTM, else None
    cell,
    grad_cell,  # of the cell state after the step, then before
    grad_gates,  # (B, G), before their nonlinearities
    B,
    H,
    stride_self,
    stride_next,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, i, used = _units(B, H, BLOCK)
    dh = tl.load(of_self + b * stride_self + h, mask=used)
    if CELL == "gru":
        dh += tl.load(passed + i, mask=used)
    if of_query is not None:
        dh += tl.load(of_query + i, mask=used)
    if of_output is not None:
        dh += tl.load(of_output + i, mask=used)
    if of_next is not None:
        dx = tl.load(of_next + b * stride_next + h, mask=used)
        if factors is not None:
            dx *= tl.load(factors + i, mask=used)
        dh += dx
    BLOCKS: tl.constexpr = 1 if CELL == "rnn" else 4
    at = b * (BLOCKS * H) + h
    x0 = tl.load(gates + at, mask=used)
    to = grad_gates + at
    if CELL == "rnn":
        tl.store(to, dh * (1.0 - x0 * x0), mask=used)
    else:
        x1 = tl.load(gates + at + H, mask=used)
        x2 = tl.load(gates + at + 2 * H, mask=used)
        x3 = tl.load(gates + at + 3 * H, mask=used)
        if CELL == "lstm":
            y = tanh(tl.load(cell + i, mask=used))
            dc = tl.load(grad_cell + i, mask=used) + dh * x3 * (1.0 - y * y)
            before = tl.load(cell_before + i, mask=used)
            tl.store(to, dc * x2 * x0 * (1.0 - x0), mask=used)
            tl.store(to + H, dc * before * x1 * (1.0 - x1), mask=used)
            tl.store(to + 2 * H, dc * x0 * (1.0 - x2 * x2), mask=used)
            tl.store(to + 3 * H, dh * y * x3 * (1.0 - x3), mask=used)
            tl.store(grad_cell + i, dc * x1, mask=used)
        else:
            dn = dh * (1.0 - x2) * (1.0 - x0 * x0)
            before = tl.load(hidden_before + i, mask=used)
            tl.store(to, dn, mask=used)
            tl.store(to + H, dn * x3 * x1 * (1.0 - x1), mask=used)
            tl.store(to + 2 * H, dh * (before - x0) * x2 * (1.0 - x2), mask=used)
            tl.store(to + 3 * H, dn * x1, mask=used)
            tl.store(passed + i, dh * x2, mask=used)


def advance(
    cell_type: str,
    product: Tensor,
    bias: Tensor,
    gates: Tensor,
    before: tuple[Tensor, Tensor | None],
    after: tuple[Tensor, Tensor | None],
    to_self: Tensor,
    to_next: Tensor | None,
    factors: Tensor | None,
    has_input: bool,
) -> None:
    """before and after: hidden and, of an LSTM, cell state. See advance_kernel."""
    B, H = after[0].shape
    advance_kernel[(triton.cdiv(B * H, BLOCK),)](
        product, bias, gates, *before, *after, to_self, to_next, factors, B, H,
        0 if bias.dim() == 1 else bias.stride(0), to_self.stride(0),
        0 if to_next is None else to_next.stride(0),
        CELL=cell_type, HAS_INPUT=has_input, BLOCK=BLOCK,
    )  # fmt: skip


def retreat(
    cell_type: str,
    of_self: Tensor,
    of_next: Tensor | None,
    factors: Tensor | None,
    of_query: Tensor | None,
    of_output: Tensor | None,
    passed: Tensor | None,
    gates: Tensor,
    before: tuple[Tensor, Tensor | None],
    cell: Tensor | None,
    grad_cell: Tensor | None,
    grad_gates: Tensor,
) -> None:
    """before: hidden and, of an LSTM, cell state. See retreat_kernel."""
    B, H = before[0].shape
    retreat_kernel[(triton.cdiv(B * H, BLOCK),)](
        of_self, of_next, factors, of_query, of_output, passed, gates, *before, cell, grad_cell,
        grad_gates, B, H, of_self.stride(0), 0 if of_next is None else of_next.stride(0),
        CELL=cell_type, BLOCK=BLOCK,
    )  # fmt: skip
