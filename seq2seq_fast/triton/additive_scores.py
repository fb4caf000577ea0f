"""scores[b,t,s] = sum_h v[h] tanh(query[b,t,h] + keys[b,s,h]), without tanh in the loop.

With x = exp(2q) exp(2k), tanh(q + k) = (x - 1) / (x + 1), and two features share one reciprocal:

    v0 tanh0 + v1 tanh1 = ((v0 + v1) (x0 x1 - 1) + (v0 - v1) (x0 - x1)) / (x0 x1 + x0 + x1 + 1)

Numerator and denominator are linear in x0, x1 and x0 x1, each a product of what belongs to the
query and what belongs to the key: three fused multiply-adds for either, one reciprocal, one more
multiply-add, eight instructions for two elements. A launch before makes the factors.

Where all of q + k is small, x - 1 is too, and is made of exp(2q) - 1 and exp(2k) - 1 instead: with
z = (x - 1) / 2, tanh(q + k) = z / (1 + z), ten instructions for two elements. Where it is large,
tanh itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic
from .arithmetic import exp_2x, expm1_2x, four, magnitude, reciprocal, tanh, wide
from .launch import multiprocessors, parts
from .one_query import one_query

ROWS, COLUMNS = 8, 4  # queries and source positions of a thread
Q_STREAMS, K_STREAMS = 5, 8  # numbers that prepare_kernel makes of two features
BLOCK = 64  # rows that lie together in the factors, and share a maximum
CHUNK = 32  # pairs of features that are summed up before they join the rest, for accuracy
PAIRS = 16  # of one program that makes factors
THREADS = 128  # of a program
PROGRAMS = 3  # of forward_kernel that a multiprocessor holds at a time

# Compiled for all sizes and strides at once: nothing is gained by compiling for some of them.
PREPARE_NUMBERS = "N H blocks pairs stride_b stride_n stride_h stride_v".split()
FORWARD_NUMBERS = (
    "B T S H pairs splits stride_qb stride_qt stride_qh stride_kb stride_ks stride_kh stride_v"
).split()

_Q_STREAMS, _K_STREAMS = tl.constexpr(Q_STREAMS), tl.constexpr(K_STREAMS)
_ROWS, _COLUMNS, _BLOCK, _CHUNK = (tl.constexpr(x) for x in (ROWS, COLUMNS, BLOCK, CHUNK))


@triton.jit(do_not_specialize=PREPARE_NUMBERS)
def prepare_kernel(
    x,  # (B, N, H), query or keys
    v,  # (H,)
    factors,  # (B, blocks, pairs, streams, BLOCK): row n of x is n % BLOCK in block n // BLOCK
    maxima,  # (B, blocks, chunks) max|x|, and of keys max|v| too
    v_pairs,  # (3, pairs) -(v0 + v1), v0 and v1, from keys
    N,
    H,
    blocks,
    pairs,
    stride_b,
    stride_n,
    stride_h,
    stride_v,
    IS_KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grid (B blocks chunks,): a program makes the factors of BLOCK rows and PAIRS pairs.

    Streams of queries are exp(2q0), exp(2q1) and their product, then (exp(2q) - 1) / 2 of both; of
    keys the same, with the first three again, times what they have in the numerator, in between.
    Rows and features beyond the last count as 0, and so does v.
    """
    chunks = tl.cdiv(pairs, PAIRS)
    pid = tl.program_id(0)
    chunk, block, b = pid % chunks, pid // chunks % blocks, pid // chunks // blocks
    row = tl.arange(0, _BLOCK)
    n = block * _BLOCK + row[:, None]
    pair = chunk * PAIRS + tl.arange(0, PAIRS)[None, :]
    at = x + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
    even = (2 * pair).to(tl.int64)
    x0 = tl.load(at + even * stride_h, mask=(n < N) & (even < H), other=0.0).to(tl.float32)
    x1 = tl.load(at + (even + 1) * stride_h, mask=(n < N) & (even + 1 < H), other=0.0)
    x1 = x1.to(tl.float32)
    largest = tl.maximum(magnitude(x0), magnitude(x1))

    streams: tl.constexpr = _K_STREAMS if IS_KEYS else _Q_STREAMS
    first = (b.to(tl.int64) * blocks + block) * pairs
    to = factors + (first + pair) * (streams * _BLOCK) + row[:, None]
    kept = pair < pairs
    e0, half0 = exp_2x(x0), 0.5 * expm1_2x(x0)
    e1, half1 = exp_2x(x1), 0.5 * expm1_2x(x1)
    product = e0 * e1
    tl.store(to, e0, mask=kept)
    tl.store(to + _BLOCK, e1, mask=kept)
    tl.store(to + 2 * _BLOCK, product, mask=kept)
    if IS_KEYS:
        v0 = tl.load(v + even * stride_v, mask=even < H, other=0.0).to(tl.float32)
        v1 = tl.load(v + (even + 1) * stride_v, mask=even + 1 < H, other=0.0).to(tl.float32)
        tl.store(to + 3 * _BLOCK, (v0 - v1) * e0, mask=kept)
        tl.store(to + 4 * _BLOCK, (v1 - v0) * e1, mask=kept)
        tl.store(to + 5 * _BLOCK, (v0 + v1) * product, mask=kept)
        tl.store(to + 6 * _BLOCK, half0, mask=kept)
        tl.store(to + 7 * _BLOCK, half1, mask=kept)
        once = kept & (b == 0) & (block == 0)
        tl.store(v_pairs + pair, -(v0 + v1), mask=once)
        tl.store(v_pairs + pairs + pair, v0, mask=once)
        tl.store(v_pairs + 2 * pairs + pair, v1, mask=once)
        large_v = tl.maximum(magnitude(v0), magnitude(v1)) >= arithmetic._LARGE_V
        largest = tl.maximum(largest, tl.where(large_v, float("inf"), 0.0))
    else:
        tl.store(to + 3 * _BLOCK, half0, mask=kept)
        tl.store(to + 4 * _BLOCK, half1, mask=kept)
    tl.store(maxima + pid, tl.max(largest))


@triton.jit
def _pair(total, q0, q1, q2, q3, k, v_pair, SMALL: tl.constexpr):
    if SMALL:
        z0, z1 = tl.fma(q0, k[0], q2), tl.fma(q1, k[1], q3)
        numerator = tl.fma(v_pair[1], z0, tl.fma(v_pair[2], z1, (-v_pair[0] * z0) * z1))
        d0 = z0 + 1.0
        denominator = tl.fma(d0, z1, d0)
    else:
        numerator = tl.fma(q1, k[4], tl.fma(q0, k[3], tl.fma(q2, k[5], v_pair[0])))
        denominator = tl.fma(q1, k[1], tl.fma(q0, k[0], tl.fma(q2, k[2], 1.0)))
    return tl.fma(numerator, reciprocal(denominator), total)


@triton.jit
def _four_queries(a0, a1, a2, a3, q, k, v_pair, SMALL: tl.constexpr, THREADS: tl.constexpr):
    w0, w1, w2, w3 = four(q, THREADS)
    x0, x1, x2, x3 = four(q + _BLOCK, THREADS)
    if SMALL:
        y0, y1, y2, y3 = four(q + 3 * _BLOCK, THREADS)
        z0, z1, z2, z3 = four(q + 4 * _BLOCK, THREADS)
    else:
        y0, y1, y2, y3 = four(q + 2 * _BLOCK, THREADS)
        z0, z1, z2, z3 = y0, y1, y2, y3
    a0 = _pair(a0, w0, x0, y0, z0, k, v_pair, SMALL)
    a1 = _pair(a1, w1, x1, y1, z1, k, v_pair, SMALL)
    a2 = _pair(a2, w2, x2, y2, z2, k, v_pair, SMALL)
    a3 = _pair(a3, w3, x3, y3, z3, k, v_pair, SMALL)
    return a0, a1, a2, a3


@triton.jit
def _of_v(at, pairs, SMALL: tl.constexpr):
    if SMALL:
        return tl.load(at), tl.load(at + pairs), tl.load(at + 2 * pairs)
    else:
        return (tl.load(at),)


@triton.jit
def _of_keys(k, SMALL: tl.constexpr):
    if SMALL:
        return tl.load(k + 6 * _BLOCK), tl.load(k + 7 * _BLOCK)
    else:
        k0, k1, kk = tl.load(k), tl.load(k + _BLOCK), tl.load(k + 2 * _BLOCK)
        vk0, vk1 = tl.load(k + 3 * _BLOCK), tl.load(k + 4 * _BLOCK)
        return k0, k1, kk, vk0, vk1, tl.load(k + 5 * _BLOCK)


@triton.jit
def _fast(q, k, v_pairs, pairs, first, last, SMALL: tl.constexpr, THREADS: tl.constexpr):
    """Sums over pairs of features [first, last), an even number; (threads, 4) for each query."""
    a0 = tl.zeros((THREADS, _COLUMNS), tl.float32)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    UNROLL: tl.constexpr = 1 if SMALL else 2
    q += first * (_Q_STREAMS * _BLOCK)
    k += first * (_K_STREAMS * _BLOCK)
    for pair in range(first, last, UNROLL):
        for i in tl.static_range(UNROLL):
            v_pair = _of_v(v_pairs + pair + i, pairs, SMALL)
            ks = _of_keys(k, SMALL)
            a0, a1, a2, a3 = _four_queries(a0, a1, a2, a3, q, ks, v_pair, SMALL, THREADS)
            a4, a5, a6, a7 = _four_queries(a4, a5, a6, a7, q + 4, ks, v_pair, SMALL, THREADS)
            q += _Q_STREAMS * _BLOCK
            k += _K_STREAMS * _BLOCK
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _exact(
    query,
    keys,
    v,
    t,
    s,
    T,
    S,
    first,
    last,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_v,
    THREADS: tl.constexpr,
):
    """The same of features [first, last) by tanh itself, for one query: (threads, 4)."""
    total = tl.zeros((THREADS, _COLUMNS), tl.float32)
    query += t * stride_qt
    keys += s * stride_ks
    for i in range(first, last):
        h = wide(i)
        q = tl.load(query + h * stride_qh, mask=t < T, other=0.0).to(tl.float32)
        k = tl.load(keys + h * stride_kh, mask=s < S, other=0.0).to(tl.float32)
        total += tl.load(v + h * stride_v).to(tl.float32) * tanh(q + k)
    return total


@triton.jit
def _put(to, x, used, again):
    """Stores x, or adds it to what is there."""
    before = tl.load(to, mask=used & again, other=0.0)
    tl.store(to, before + x, mask=used)


@triton.jit
def _largest_of(maxima, chunks, CHUNKS: tl.constexpr):
    """(threads, 1) largest of the `chunks` numbers that each thread's pointer points to."""
    i = tl.arange(0, CHUNKS)[None, :]
    return tl.max(tl.load(maxima + i, mask=i < chunks, other=0.0), axis=1, keep_dims=True)


@triton.jit(do_not_specialize=FORWARD_NUMBERS)
def forward_kernel(
    query,  # (B, T, H)
    keys,  # (B, S, H)
    v,  # (H,)
    q_factors,  # of prepare_kernel, as are the next four
    k_factors,
    v_pairs,
    q_maxima,
    k_maxima,
    out,  # (splits, B, Tp, Sp) float32; Tp, Sp = T, S in whole ROWS, COLUMNS
    B,
    T,
    S,
    H,
    pairs,
    splits,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_v,
    MAXIMA: tl.constexpr,  # power of two that holds the chunks of prepare_kernel
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Grid (patches / THREADS · splits,): a thread makes a patch of ROWS x COLUMNS scores.

    A program sums over one of `splits` ranges of features. Patches of all the batch stand in one
    row, so that no thread is idle but the last: in strips of BLOCK source positions, whose last is
    as wide as it needs to be.
    """
    pid = tl.program_id(0)
    split = pid % splits
    thread = (pid // splits).to(tl.int64) * THREADS + tl.arange(0, THREADS)[:, None]
    rows, columns = tl.cdiv(T, _ROWS), tl.cdiv(S, _COLUMNS)
    used = thread < B * rows.to(tl.int64) * columns
    thread = tl.where(used, thread, 0)
    b = thread // (rows.to(tl.int64) * columns)
    patch = (thread - b * rows * columns).to(tl.int32)
    width: tl.constexpr = _BLOCK // _COLUMNS
    strip = tl.minimum(patch // (rows * width), columns // width)
    patch -= strip * rows * width
    strip_width = tl.where(strip < columns // width, width, columns % width)
    t = patch // strip_width * _ROWS
    s = strip * _BLOCK + patch % strip_width * _COLUMNS

    q_block = b * tl.cdiv(T, _BLOCK) + t // _BLOCK
    k_block = b * tl.cdiv(S, _BLOCK) + s // _BLOCK
    chunks = tl.cdiv(pairs, PAIRS)
    m = _largest_of(q_maxima + q_block * chunks, chunks, MAXIMA)
    m += _largest_of(k_maxima + k_block * chunks, chunks, MAXIMA)
    small, exact = tl.max(m) < arithmetic._SMALL, tl.max(tl.where(m < arithmetic._LARGE, 0, 1)) > 0

    column = tl.arange(0, _COLUMNS)[None, :]
    # Remainders spelled out: of `%` the compiler does not see that these are aligned.
    q = q_factors + q_block * pairs * (_Q_STREAMS * _BLOCK) + (t - t // _BLOCK * _BLOCK) + column
    k = k_factors + k_block * pairs * (_K_STREAMS * _BLOCK) + (s - s // _BLOCK * _BLOCK) + column
    query += b * stride_qb
    keys += b * stride_kb
    Sp = columns * _COLUMNS
    to = out + split * B.to(tl.int64) * rows * _ROWS * Sp
    to += (b * rows * _ROWS + t) * Sp + s + column
    per_split = tl.cdiv(tl.cdiv(pairs, _CHUNK), splits) * _CHUNK
    start = split * per_split
    for first in range(start, tl.minimum(start + per_split, pairs), _CHUNK):
        last = tl.minimum(first + _CHUNK, pairs)
        again = first > start
        if exact:
            for row in range(_ROWS):
                total = _exact(
                    query,
                    keys,
                    v,
                    wide(row) + t,
                    wide(0) + s + column,
                    T,
                    S,
                    2 * first,
                    tl.minimum(2 * last, H),
                    stride_qt,
                    stride_qh,
                    stride_ks,
                    stride_kh,
                    stride_v,
                    THREADS,
                )
                _put(to + row * Sp, total, used, again)
        else:
            if small:
                a0, a1, a2, a3, a4, a5, a6, a7 = _fast(
                    q, k, v_pairs, pairs, first, last, True, THREADS
                )
            else:
                a0, a1, a2, a3, a4, a5, a6, a7 = _fast(
                    q, k, v_pairs, pairs, first, last, False, THREADS
                )
            _put(to, a0, used, again)
            _put(to + Sp, a1, used, again)
            _put(to + 2 * Sp, a2, used, again)
            _put(to + 3 * Sp, a3, used, again)
            _put(to + 4 * Sp, a4, used, again)
            _put(to + 5 * Sp, a5, used, again)
            _put(to + 6 * Sp, a6, used, again)
            _put(to + 7 * Sp, a7, used, again)


def _up(n: int, to: int) -> int:
    return triton.cdiv(n, to) * to


def prepare(x: Tensor, v: Tensor, is_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """factors, maxima and v_pairs of prepare_kernel, of query or keys x (B, N, H)."""
    B, N, H = x.shape
    blocks, pairs = triton.cdiv(N, BLOCK), _up(H, 4) // 2
    chunks = triton.cdiv(pairs, PAIRS)
    factors = x.new_empty(
        (B, blocks, pairs, K_STREAMS if is_keys else Q_STREAMS, BLOCK), dtype=torch.float32
    )
    maxima = x.new_empty((B, blocks, chunks), dtype=torch.float32)
    v_pairs = x.new_empty((3, pairs if is_keys else 0), dtype=torch.float32)
    prepare_kernel[(B * blocks * chunks,)](
        x, v, factors, maxima, v_pairs, N, H, blocks, pairs, *x.stride(), v.stride(0),
        IS_KEYS=is_keys, PAIRS=PAIRS,
    )  # fmt: skip
    return factors, maxima, v_pairs


def partial_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """(splits, B, Tp, Sp) float32, to be summed over splits and cut to (B, T, S).

    Features are split over programs where the patches alone would leave multiprocessors idle.
    """
    (B, T, H), S = query.shape, keys.shape[1]
    patches = triton.cdiv(B * triton.cdiv(T, ROWS) * triton.cdiv(S, COLUMNS), THREADS)
    q_factors, q_maxima, _ = prepare(query, v, False)
    k_factors, k_maxima, v_pairs = prepare(keys, v, True)
    pairs, chunks = q_factors.shape[2], q_maxima.shape[2]
    splits = parts(triton.cdiv(pairs, CHUNK), PROGRAMS * multiprocessors(query) // patches)
    out = query.new_empty((splits, B, _up(T, ROWS), _up(S, COLUMNS)), dtype=torch.float32)
    forward_kernel[(patches * splits,)](
        query, keys, v, q_factors, k_factors, v_pairs, q_maxima, k_maxima, out, B, T, S, H,
        pairs, splits, *query.stride(), *keys.stride(), v.stride(0),
        MAXIMA=triton.next_power_of_2(chunks), PAIRS=PAIRS, THREADS=THREADS,
        num_warps=THREADS // 32,
    )  # fmt: skip
    return out


def additive_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    T, S = query.shape[1], keys.shape[1]
    if T == 1:
        _, _, scores = one_query(query[:, 0], keys, keys[..., :0], v, None, None, 1.0)
        return scores[:, None].to(query.dtype)
    partial = partial_scores(query, keys, v)
    total = partial[0] if len(partial) == 1 else partial.sum(0)
    return total[:, :T, :S].to(query.dtype).contiguous()
