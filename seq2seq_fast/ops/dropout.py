"""What dropout multiplies by, for whole sequences at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.register_fake("seq2seq_fast::dropout_factors")
def _(seed, size, p):
    return seed.new_empty(size, dtype=torch.float32)


def dropout_factors(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """1 / (1 - p), or zero with probability p: of a shape, and of like's dtype and device.

    Reproducible from the seed of torch's generator, which is asked for one number: on the CPU it
    makes one after the other, and takes longer for them than a decoder for its step.
    """
    if like.is_cpu:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=like.device)
        return torch.ops.seq2seq_fast.dropout_factors(seed, shape, p).to(like.dtype)
    return torch.nn.functional.dropout(like.new_ones(shape), p)
