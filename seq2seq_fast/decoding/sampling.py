"""Draws of tokens.

By Gumbel's trick: with g = -log(-log u), u uniform between 0 and 1 and each token's own, x + g is
largest at a token with probability softmax(x) (Gumbel 1954). The numbers are those of Philox4x32-10
(Salmon et al. 2011), by seed, row, step and token, so that every engine draws the same tokens.
"""

import torch
from torch import Tensor

from .options import DecodingOptions

BLOCK, WORD = 256, 0xFFFFFFFF  # tokens that 64 counters make, of four words each


def seed_of(options: DecodingOptions, device: torch.device) -> Tensor:
    """(1,) int64, of the generator that was given, or torch's."""
    g = options.generator
    if g is not None and g.device.type != device.type:
        raise ValueError(f"generator: got one on {g.device}, expected one on {device}")
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=g, device=device)


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> list[Tensor]:
    """Four words of 32 bits, in int64, for a key of 64 bits and a counter of four words."""
    a, b, c, d = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        low, high = 0xD2511F53 * a, 0xCD9E8D57 * c  # of 64 bits, which wrap around as they should
        a, b, c, d = high >> 32 & WORD ^ b ^ k0, high & WORD, low >> 32 & WORD ^ d ^ k1, low & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [a, b, c, d]


def gumbel(seed: Tensor, rows: Tensor, step: int, V: int) -> Tensor:
    """g (N, V) float64 of some rows of the batch."""
    blocks = -(-V // BLOCK)
    counters = torch.arange(blocks * BLOCK // 4, device=seed.device).expand(len(rows), -1)
    zero = torch.zeros_like(counters)
    words = philox(seed, (counters, zero, rows[:, None] + zero, zero + step))
    numbers = torch.stack([w.unflatten(1, (blocks, -1)) for w in words], 2).flatten(1)[:, :V]
    v = (numbers.double() + 0.5) / 2.0**32  # 1 - u
    return -(-torch.log1p(-v)).log()


def draw(logits: Tensor, noise: Tensor, options: DecodingOptions) -> Tensor:
    """One token (N,) of each row of logits (N, V). Where one is +inf or NaN, that is the token."""
    x = logits.double()
    x = (x - x.amax(1, keepdim=True).nan_to_num(0, torch.inf, 0)) / options.temperature
    if 0 < options.top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(options.top_k).values[:, -1:], -torch.inf)
    if options.top_p < 1:
        ordered, index = x.sort(dim=1, descending=True, stable=True)
        p = ordered.softmax(1)
        beyond = p.cumsum(1) - p >= options.top_p  # what comes before reaches top_p already
        x = x.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return (x + noise).argmax(1)
