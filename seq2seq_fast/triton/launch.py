"""How work is shared out over a GPU."""

import functools

import torch
import triton
from torch import Tensor


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that x is on; of the interpreter, one."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 1


def parts(n: int, wanted: int) -> int:
    """The number of parts, none of them empty, that n pieces of work are cut to: `wanted` or fewer,
    and one at least."""
    return triton.cdiv(n, triton.cdiv(n, min(max(wanted, 1), n)))
