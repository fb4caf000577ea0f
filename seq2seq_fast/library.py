"""Registration with torch.library: schemas, the reference as fallback, kernels as override."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from . import reference

SCHEMAS = {
    "additive_scores": "(Tensor query, Tensor keys, Tensor v) -> Tensor",
    "additive_scores_backward": "(Tensor grad, Tensor query, Tensor keys, Tensor v)"
    " -> (Tensor, Tensor, Tensor)",
    "additive_attention": "(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? mask,"
    " Tensor? score_bias, float scale) -> (Tensor, Tensor)",
}


def _attention(query, keys, values, v, mask, score_bias, scale):
    """Scores by the best kernel there is; softmax and context by PyTorch."""
    scores = torch.ops.seq2seq_fast.additive_scores(query, keys, v)
    return reference.attend(scores, values, mask, score_bias, scale)


_FALLBACKS = {
    "additive_scores": reference.additive_scores,
    "additive_scores_backward": reference.additive_scores_backward,
    "additive_attention": _attention,
}

_lib = torch.library.Library("seq2seq_fast", "DEF")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema)
    _lib.impl(_name, _FALLBACKS[_name], "CompositeExplicitAutograd")

# find_spec, not `except ImportError`: a broken build must be seen.
if importlib.util.find_spec("seq2seq_fast._C") is not None:
    import seq2seq_fast._C  # noqa: F401

# Asked once: the query itself breaks torch.compile(fullgraph=True). Attention stands on the scores.
_NATIVE = {
    (name, device): torch._C._dispatch_has_kernel_for_dispatch_key(
        "seq2seq_fast::additive_scores"
        if name == "additive_attention"
        else f"seq2seq_fast::{name}",
        device.upper(),
    )
    for name in SCHEMAS
    for device in ("cpu", "cuda")
}
_forced: list[str] = []


def backends() -> dict[str, dict[str, tuple[str, ...]]]:
    """Usable backends per op and device, best first; the first one is used by default."""
    return {
        name: {
            device: (("native", "reference") if _NATIVE[name, device] else ("reference",))
            for device in ("cpu", "cuda")
        }
        for name in SCHEMAS
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "native" or "reference"."""
    check_backend_name(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def check_backend_name(name: str) -> None:
    if name not in ("native", "reference"):
        raise ValueError(f'backend: got {name!r}, expected "native" or "reference"')


def is_reference(op: str, device: str, backend: str | None) -> bool:
    """Whether this call runs the plain PyTorch form; a named backend that is absent raises."""
    if backend is None:
        backend = _forced[-1] if _forced else None
    if backend is None:
        return not _NATIVE.get((op, device), False)
    check_backend_name(backend)
    if backend == "native" and not _NATIVE.get((op, device), False):
        raise ValueError(f"backend: 'native' was asked for, but has no {op} kernel for {device}")
    return backend == "reference"
