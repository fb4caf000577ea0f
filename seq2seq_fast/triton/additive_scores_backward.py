"""Gradients of additive scores. With g = d loss / d score, x = exp(2q) exp(2k) and r = 1 / (1 + x),

    dq[b,t,h] = 4 v[h] sum_s g x r²
    dk[b,s,h] = 4 v[h] sum_t g x r²
    dv[h] = sum_bts g (x - 1) r

where two source positions share one reciprocal. x r², not r (1 - r), and x - 1, not 1 - 2r: what
is rounded is then of the size of the result. Of x, dq leaves exp(2q) and dk exp(2k) to the end.
Where all of q + k is small, tanh = y r of y = x - 1 and r = 1 / (2 + y), and g x r² is made as
(g - g tanh²) / 4: gradients of a softmax sum to zero, so that tanh² is all that remains of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic
from .arithmetic import exp_2x, expm1_2x, four, magnitude, reciprocal, tanh, wide
from .launch import multiprocessors, parts

ROWS, COLUMNS = 8, 4  # source positions and features of a thread
CHUNK = 64  # queries that are summed up before they join the rest, for accuracy
BLOCK = 16  # rows of a program of exponentials_kernel
SHAPES = ((2, 32), (3, 16), (4, 8))  # LEVELS and WIDTH that a program may have
PROGRAMS = 2  # of backward_kernel that a multiprocessor holds at a time

# Compiled for all sizes and strides at once: nothing is gained by compiling for some of them.
BACKWARD_NUMBERS = (
    "B T S H s_blocks h_blocks splits"
    " stride_qb stride_qt stride_qh stride_kb stride_ks stride_kh stride_v"
).split()

_ROWS, _COLUMNS, _CHUNK, _BLOCK = (tl.constexpr(x) for x in (ROWS, COLUMNS, CHUNK, BLOCK))


@triton.jit(do_not_specialize=["B", "T", "H", "stride_b", "stride_t"])
def exponentials_kernel(
    query,  # (B, T, H)
    out,  # (2, B, T, Hp) float32, exp(2 query) and exp(2 query) - 1, of 0 beyond H
    maxima,  # (B, blocks) max|query| of BLOCK rows
    B,
    T,
    H,
    Hp,
    stride_b,
    stride_t,
    stride_h,
    WIDTH: tl.constexpr,
):
    """Grid (B blocks,): a program has BLOCK rows."""
    blocks = tl.cdiv(T, _BLOCK)
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t = block * _BLOCK + tl.arange(0, _BLOCK)[:, None]
    largest = tl.zeros((_BLOCK, WIDTH), tl.float32)
    for first in range(0, Hp, WIDTH):
        h = first + tl.arange(0, WIDTH)[None, :]
        at = query + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
        q = tl.load(at + h.to(tl.int64) * stride_h, mask=(t < T) & (h < H), other=0.0)
        q = q.to(tl.float32)
        largest = tl.maximum(largest, magnitude(q))
        to = out + (b.to(tl.int64) * T + t) * Hp + h
        tl.store(to, exp_2x(q), mask=(t < T) & (h < Hp))
        tl.store(to + B.to(tl.int64) * T * Hp, expm1_2x(q), mask=(t < T) & (h < Hp))
    tl.store(maxima + tl.program_id(0), tl.max(largest))


@triton.jit
def _pair(q, e, k0, k1, g0, g1, dk0, dk1, dq, dv, SMALL: tl.constexpr):
    """Adds what two positions give; unless SMALL, to dk and dq without factors 4k and 4q."""
    if SMALL:
        y0, y1 = tl.fma(q, k0, e), tl.fma(q, k1, e)
        d0, d1 = y0 + 2.0, y1 + 2.0
    else:
        y0, y1 = tl.fma(q, k0, -1.0), tl.fma(q, k1, -1.0)
        d0, d1 = tl.fma(q, k0, 1.0), tl.fma(q, k1, 1.0)
    r = reciprocal(d0 * d1)
    r0, r1 = r * d1, r * d0
    if SMALL:
        tanh0, tanh1 = y0 * r0, y1 * r1
        gt0, gt1 = g0 * tanh0, g1 * tanh1
        e0, e1 = tl.fma(-gt0, tanh0, g0), tl.fma(-gt1, tanh1, g1)
        return dk0 + e0, dk1 + e1, dq + e0 + e1, dv + gt0 + gt1
    else:
        gr0, gr1 = g0 * r0, g1 * r1
        dv = tl.fma(gr1, y1, tl.fma(gr0, y0, dv))
        grr0, grr1 = gr0 * r0, gr1 * r1
        dq = tl.fma(grr1, k1, tl.fma(grr0, k0, dq))
        return tl.fma(grr0, q, dk0), tl.fma(grr1, q, dk1), dq, dv


@triton.jit
def _over_groups(x, LEVELS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum over the threads that have the same features: (features of the program,).

    Pairwise, of numbers that were brought to one thread: cheaper than tl.sum, which shuffles.
    """
    x = tl.trans(tl.reshape(x, (1 << LEVELS, WIDTH * _COLUMNS)))
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(x, (WIDTH * _COLUMNS, 1 << (LEVELS - 1 - level), 2)))
        x = even + odd
    return tl.reshape(x, (WIDTH * _COLUMNS,))


@triton.jit
def _raw(x, n, N, h, H, stride_n, stride_h):
    at = x + wide(n) * stride_n + h.to(tl.int64) * stride_h
    return tl.load(at, mask=(n < N) & (h < H), other=0.0).to(tl.float32)


@triton.jit
def _eight(keys, s, S, h, H, stride_ks, stride_kh):
    """Keys of ROWS source positions from s on."""
    k0 = _raw(keys, s, S, h, H, stride_ks, stride_kh)
    k1 = _raw(keys, s + 1, S, h, H, stride_ks, stride_kh)
    k2 = _raw(keys, s + 2, S, h, H, stride_ks, stride_kh)
    k3 = _raw(keys, s + 3, S, h, H, stride_ks, stride_kh)
    k4 = _raw(keys, s + 4, S, h, H, stride_ks, stride_kh)
    k5 = _raw(keys, s + 5, S, h, H, stride_ks, stride_kh)
    k6 = _raw(keys, s + 6, S, h, H, stride_ks, stride_kh)
    k7 = _raw(keys, s + 7, S, h, H, stride_ks, stride_kh)
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def _power(k, SMALL: tl.constexpr):
    if SMALL:
        return expm1_2x(k)
    else:
        return exp_2x(k)


@triton.jit
def _add(to, x, again):
    before = tl.load(to, mask=again, other=0.0)
    tl.store(to, before + x)


@triton.jit
def _add_key(to, d, k, w, again, SMALL: tl.constexpr):
    if SMALL:
        _add(to, d * w, again)
    else:
        _add(to, d * (4.0 * w * k), again)


@triton.jit
def _fast(
    k,  # keys of _eight
    powers,  # exp(2 query) of the first query
    minus_one,  # exp(2 query) - 1 of it
    weight,  # g of it
    n,  # queries
    w,  # (threads, 4) v of the thread's features
    w_program,  # v of all the program's features
    to_q,
    to_k,
    to_v,
    again,
    Sp,
    Hp,
    SMALL: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of n queries with the program's keys, unless they are not finite: then 1."""
    THREADS: tl.constexpr = WIDTH << LEVELS
    k0, k1, k2, k3 = (
        _power(k[0], SMALL),
        _power(k[1], SMALL),
        _power(k[2], SMALL),
        _power(k[3], SMALL),
    )
    k4, k5, k6, k7 = (
        _power(k[4], SMALL),
        _power(k[5], SMALL),
        _power(k[6], SMALL),
        _power(k[7], SMALL),
    )
    zero = tl.zeros((THREADS, _COLUMNS), tl.float32)
    d0, d1, d2, d3, d4, d5, d6, d7 = zero, zero, zero, zero, zero, zero, zero, zero
    sum_v = zero
    for _ in range(n):
        q = tl.load(powers)
        if SMALL:
            e = tl.load(minus_one)
        else:
            e = q
        g0, g1, g2, g3 = four(weight, THREADS)
        g4, g5, g6, g7 = four(weight + 4, THREADS)
        d0, d1, sum_q, of_v = _pair(q, e, k0, k1, g0, g1, d0, d1, zero, zero, SMALL)
        d2, d3, sum_q, of_v = _pair(q, e, k2, k3, g2, g3, d2, d3, sum_q, of_v, SMALL)
        d4, d5, sum_q, of_v = _pair(q, e, k4, k5, g4, g5, d4, d5, sum_q, of_v, SMALL)
        d6, d7, sum_q, of_v = _pair(q, e, k6, k7, g6, g7, d6, d7, sum_q, of_v, SMALL)
        sum_v += of_v
        if SMALL:
            tl.store(to_q, _over_groups(sum_q, LEVELS, WIDTH) * w_program)
        else:
            tl.store(to_q, _over_groups(sum_q * q, LEVELS, WIDTH) * (4.0 * w_program))
        powers += Hp
        minus_one += Hp
        weight += Sp
        to_q += Hp
    # An infinity or NaN in g shows here: with tanh = 1 exactly it is to be multiplied by 0.
    total = ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7)) + sum_v
    exact = tl.max(tl.where(total - total == 0.0, 0, 1))
    if exact == 0:
        _add_key(to_k, d0, k0, w, again, SMALL)
        _add_key(to_k + Hp, d1, k1, w, again, SMALL)
        _add_key(to_k + 2 * Hp, d2, k2, w, again, SMALL)
        _add_key(to_k + 3 * Hp, d3, k3, w, again, SMALL)
        _add_key(to_k + 4 * Hp, d4, k4, w, again, SMALL)
        _add_key(to_k + 5 * Hp, d5, k5, w, again, SMALL)
        _add_key(to_k + 6 * Hp, d6, k6, w, again, SMALL)
        _add_key(to_k + 7 * Hp, d7, k7, w, again, SMALL)
        _add(to_v, _over_groups(sum_v, LEVELS, WIDTH), again)
    return exact


@triton.jit(do_not_specialize=BACKWARD_NUMBERS)
def backward_kernel(
    query,  # (B, T, H)
    keys,  # (B, S, H)
    v,  # (H,)
    powers,  # (2, B, T, Hp) of exponentials_kernel
    maxima,  # (B, cdiv(T, BLOCK)) of exponentials_kernel
    g,  # (B, T, Sp) float32, 0 beyond S
    dq,  # (s_blocks, B, T, Hp) float32
    dk,  # (splits, B, Sp, Hp) float32
    dv,  # (splits, B, s_blocks, Hp) float32
    B,
    T,
    S,
    H,
    s_blocks,
    h_blocks,
    splits,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_v,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (B s_blocks h_blocks splits,): a program has GROUPS ROWS source positions, WIDTH COLUMNS
    features (Sp and Hp are whole multiples) and one of `splits` ranges of queries.

    A thread keeps ROWS x COLUMNS keys and their gradients in registers while the queries pass.
    What a query's gradient gets of the program's keys is summed up over its threads.
    """
    GROUPS: tl.constexpr = 1 << LEVELS
    THREADS: tl.constexpr = GROUPS * WIDTH
    pid = tl.program_id(0)
    h_block, pid = pid % h_blocks, pid // h_blocks
    s_block, pid = pid % s_blocks, pid // s_blocks
    split, b = pid % splits, wide(pid // splits)
    Sp, Hp = s_blocks * GROUPS * _ROWS, h_blocks * WIDTH * _COLUMNS
    thread = tl.arange(0, THREADS)
    s = s_block * GROUPS * _ROWS + (thread // WIDTH * _ROWS)[:, None]
    column = tl.arange(0, _COLUMNS)[None, :]
    h_first = h_block * WIDTH * _COLUMNS
    h_thread = (thread % WIDTH * _COLUMNS)[:, None]
    h = h_first + h_thread + column
    h_program = h_first + tl.arange(0, WIDTH * _COLUMNS)

    query += b * stride_qb
    keys += b * stride_kb
    raw = _eight(keys, s, S, h, H, stride_ks, stride_kh)
    m = magnitude(raw[0])
    for i in tl.static_range(1, _ROWS):
        m = tl.maximum(m, magnitude(raw[i]))
    m = tl.max(m)
    w = tl.load(v + h.to(tl.int64) * stride_v, mask=h < H, other=0.0).to(tl.float32)
    m = tl.where(tl.max(magnitude(w)) < arithmetic._LARGE_V, m, float("inf"))
    w_program = tl.load(v + h_program.to(tl.int64) * stride_v, mask=h_program < H, other=0.0)
    w_program = w_program.to(tl.float32)
    to_q = dq + ((s_block * B.to(tl.int64) + b) * T) * Hp + h_program
    to_k = dk + ((split * B.to(tl.int64) + b) * Sp + s) * Hp + h
    to_v = dv + ((split * B.to(tl.int64) + b) * s_blocks + s_block) * Hp + h_program
    per_split = tl.cdiv(tl.cdiv(T, _CHUNK), splits) * _CHUNK
    start = split * per_split
    block = tl.arange(0, _CHUNK // _BLOCK)
    blocks = tl.cdiv(T, _BLOCK)
    for first in range(start, tl.minimum(start + per_split, T), _CHUNK):
        again = first > start
        last = tl.minimum(first + _CHUNK, T)
        at = first // _BLOCK + block
        largest = tl.max(tl.load(maxima + b * blocks + at, mask=at < blocks, other=0.0))
        exact = 1
        if m + largest < arithmetic._LARGE:
            raw = _eight(keys, s, S, h, H, stride_ks, stride_kh)
            power = powers + (b * T + first) * Hp + h_first + h_thread + column
            minus_one = power + B.to(tl.int64) * T * Hp
            weight = g + (b * T + first) * Sp + s + column
            to = to_q + wide(first) * Hp
            if m + largest < arithmetic._SMALL:
                exact = _fast(
                    raw,
                    power,
                    minus_one,
                    weight,
                    last - first,
                    w,
                    w_program,
                    to,
                    to_k,
                    to_v,
                    again,
                    Sp,
                    Hp,
                    True,
                    LEVELS,
                    WIDTH,
                )
            else:
                exact = _fast(
                    raw,
                    power,
                    minus_one,
                    weight,
                    last - first,
                    w,
                    w_program,
                    to,
                    to_k,
                    to_v,
                    again,
                    Sp,
                    Hp,
                    False,
                    LEVELS,
                    WIDTH,
                )
        if exact != 0:
            tl.debug_barrier()  # the rows of dq are written anew, maybe by other threads
            sum_v = tl.zeros((THREADS, _COLUMNS), tl.float32)
            for row in range(_ROWS):
                of_v = tl.zeros((THREADS, _COLUMNS), tl.float32)
                k = _raw(keys, s + row, S, h, H, stride_ks, stride_kh)
                d = tl.zeros((THREADS, _COLUMNS), tl.float32)
                for t in range(first, last):
                    y = tanh(_raw(query, t, T, h, H, stride_qt, stride_qh) + k)
                    gt = tl.load(g + (b * T + t) * Sp + s + row)
                    e = gt * w * ((1.0 - y) * (1.0 + y))
                    of_v += gt * y
                    d += e
                    _add(to_q + wide(t) * Hp, _over_groups(e, LEVELS, WIDTH), row > 0)
                _add(to_k + row * Hp, d, again)
                sum_v += of_v
            _add(to_v, _over_groups(sum_v, LEVELS, WIDTH), again)


def shape_of_programs(keys: Tensor) -> tuple[int, int]:
    """LEVELS and WIDTH: of the shapes a program may have, the one that leaves least of it idle."""
    _, S, H = keys.shape

    def covered(shape: tuple[int, int]) -> int:
        s, h = ROWS << shape[0], shape[1] * COLUMNS
        return triton.cdiv(S, s) * s * triton.cdiv(H, h) * h

    return min(SHAPES, key=covered)


def padded(keys: Tensor, shape: tuple[int, int]) -> int:
    """S in whole programs."""
    rows = ROWS << shape[0]
    return triton.cdiv(keys.shape[1], rows) * rows


def gradients(
    g: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """Gradients of query (B, T, H), keys (B, S, H) and v (H,), empty where not needed.

    g (B, T, Sp) is float32, with Sp of padded(keys, shape) and zeros beyond S. Queries are split
    over programs where sources and features alone would leave multiprocessors idle.
    """
    (B, T, H), S, Sp = query.shape, keys.shape[1], g.shape[2]
    levels, width = shape
    s_blocks, h_blocks = Sp // (ROWS << levels), triton.cdiv(H, width * COLUMNS)
    Hp, programs = h_blocks * width * COLUMNS, B * s_blocks * h_blocks
    splits = parts(triton.cdiv(T, CHUNK), PROGRAMS * multiprocessors(query) // programs)

    def new(*sizes: int) -> Tensor:
        return query.new_empty(sizes, dtype=torch.float32)

    powers, maxima = new(2, B, T, Hp), new(B, triton.cdiv(T, BLOCK))
    exponentials_kernel[(maxima.numel(),)](
        query, powers, maxima, B, T, H, Hp, *query.stride(), WIDTH=64
    )
    dq, dk = new(s_blocks, B, T, Hp), new(splits, B, Sp, Hp)
    dv = new(splits * B * s_blocks, Hp)
    backward_kernel[(programs * splits,)](
        query, keys, v, powers, maxima, g, dq, dk, dv, B, T, S, H, s_blocks, h_blocks, splits,
        *query.stride(), *keys.stride(), v.stride(0), LEVELS=levels, WIDTH=width, num_warps=4,
    )  # fmt: skip
    found = (dq[..., :H], dk[:, :, :S, :H], dv[:, :H])
    return [
        (x[0] if len(x) == 1 else x.sum(0)).to(query.dtype).contiguous()
        if need
        else query.new_empty(0)
        for x, need in zip(found, needs, strict=True)
    ]


def additive_scores_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    need_query: bool,
    need_keys: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape_of_programs(keys)
    g = grad.new_zeros((*grad.shape[:2], padded(keys, shape)), dtype=torch.float32)
    g[..., : grad.shape[2]] = grad
    dq, dk, dv = gradients(g, query, keys, v, shape, (need_query, need_keys, need_v))
    return dq, dk, dv
