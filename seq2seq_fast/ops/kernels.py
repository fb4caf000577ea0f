"""The op of each backend that has kernels, and what it makes of shapes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..library import TRITON_OPS

OPS = {
    (name, backend): getattr(torch.ops.seq2seq_fast, op)
    for name in (
        "additive_scores",
        "additive_scores_backward",
        "additive_attention",
        "additive_attention_backward",
        "attention_decoder",
        "attention_decoder_backward",
        "location_attention",
        "location_attention_backward",
        "extended_decoder",
        "extended_decoder_backward",
    )
    for backend, op in (("native", name), ("triton", TRITON_OPS.get(name)))
    if op
}


def fake(name: str) -> Callable[[Callable], Callable]:
    """Registers what an op makes of shapes, whatever the backend."""

    ops = [op for (of, _), op in OPS.items() if of == name]
    if not ops:
        raise KeyError(f"{name}: none of {sorted({of for of, _ in OPS})}")

    def register(function):
        for op in ops:
            torch.library.register_fake(op._qualified_op_name, function)
        return function

    return register


@torch.library.register_fake("seq2seq_fast::product")
def _(a, b, blas=None):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("seq2seq_fast::products")
def _(a, b, sums, batch_sizes=()):
    found = [a.new_empty(a.shape[0], x.shape[1]) for x in b]
    return [*found, a.new_empty(a.shape[0])] if sums else found


def product(a: Tensor, b: Tensor, blas: bool | None = None) -> Tensor:
    """a b of matrices (M, K) and (K, N), by what is fastest on this machine; has no gradient. blas:
    by that behind torch, or by the library's loops, which take float32."""
    return torch.ops.seq2seq_fast.product(a, b, blas)


def products(
    a: Tensor, b: list[Tensor], sums: bool = False, batch_sizes: Sequence[int] = ()
) -> list[Tensor]:
    """`product` of a with each of b, and if they are wanted the sums (M,) of its rows: a is read
    once for all of them. Its columns are in as many parts as there are batch_sizes, and but for the
    first of each they are zeros."""
    return torch.ops.seq2seq_fast.products(a, b, sums, batch_sizes)
