"""What the kernels compute with: reciprocals, exponentials and a tanh that is right everywhere."""

import torch
import triton
import triton.language as tl

# Read once, as triton.jit does when it is applied: kernels run in numpy, on CPU tensors.
INTERPRETED = triton.knobs.runtime.interpret
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)

# Of max|query| + max|keys|. Below _SMALL, what is left of exp(2q) exp(2k) - 1 is rounded too
# coarsely, and has to be made otherwise. From _LARGE on, tanh itself is computed: exp(4 (q + k)),
# which the fast paths meet, could overflow when multiplied by a v of at most _LARGE_V.
_SMALL = tl.constexpr(1.0)
_LARGE = tl.constexpr(16.0)
_LARGE_V = tl.constexpr(1e5)


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place: a single instruction on NVIDIA GPUs."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _split_exponential(x):
    """(2^n, p) with exp(2x) = 2^n (1 + p) and 2^n (1 + p) - 1 = 2^n p + (2^n - 1); |x| < 43."""
    n = tl.floor(x * 2.8853900817779268 + 0.5)
    # y = 2x - n ln 2, in two steps since ln 2 is no float32. |y| <= 0.35
    y = 2.0 * x - n * 0.693145751953125
    y = y - n * 1.4286068203094172e-06
    p = 1.0 / 5040
    p = p * y + 1.0 / 720
    p = p * y + 1.0 / 120
    p = p * y + 1.0 / 24
    p = p * y + 1.0 / 6
    p = p * y + 0.5
    p = (p * y) * y + y
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True), p


@triton.jit
def exp_2x(x):
    power, p = _split_exponential(x)
    return power * p + power


@triton.jit
def expm1_2x(x):
    power, p = _split_exponential(x)
    return power * p + (power - 1.0)


@triton.jit
def tanh(x):
    """To two units in the last place for every x; infinities and NaN as in torch.tanh."""
    y = expm1_2x(tl.minimum(tl.abs(x), 12.0))  # from 9.02 on tanh rounds to 1
    t = y / (y + 2.0)
    t = tl.where(x < 0, -t, t)
    return tl.where(x == x, t, x)


@triton.jit
def magnitude(x):
    """|x|, and infinity for NaN, so that a maximum shows it."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def wide(i):
    """i, which may be a Python number, as int64."""
    return tl.zeros((), tl.int64) + i


@triton.jit
def four(at, THREADS: tl.constexpr):
    """Four neighbouring numbers of each thread, with one load, as columns (threads, 1)."""
    even, odd = tl.split(tl.reshape(tl.load(at), (THREADS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0[:, None], x1[:, None], x2[:, None], x3[:, None]


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 to a rounding or two; zero below -87, NaN for NaN."""
    power, p = _split_exponential(tl.maximum(0.5 * x, -43.5))
    e = tl.where(x < -87.0, 0.0, power * p + power)
    return tl.where(x == x, e, x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to a few units in the last place; zero below -87, NaN for NaN."""
    e = exp_negative(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r)


@triton.jit
def exp2_fast(x):
    """2^x to 2^-22: a single instruction on NVIDIA GPUs."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)
