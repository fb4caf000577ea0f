"""Registration with torch.library: schemas, the reference as fallback, kernels as override."""

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

from . import reference, reference_decoder

SCHEMAS = {
    "prepare_keys": "(Tensor keys) -> Tensor",
    "additive_scores": "(Tensor query, Tensor keys, Tensor v) -> Tensor",
    "additive_scores_backward": "(Tensor grad, Tensor query, Tensor keys, Tensor v,"
    " bool need_query, bool need_keys, bool need_v) -> (Tensor, Tensor, Tensor)",
    "additive_attention": "(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? mask,"
    " Tensor? score_bias, float scale, Tensor? powers) -> (Tensor, Tensor)",
    "additive_attention_backward": "(Tensor grad_context, Tensor grad_weights, Tensor query,"
    " Tensor keys, Tensor values, Tensor v, Tensor weights, float scale, Tensor? powers,"
    " bool need_query, bool need_keys, bool need_values, bool need_v, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_decoder": "(Tensor inputs, Tensor hidden, Tensor cell, Tensor[] layers,"
    " Tensor[] attention, Tensor? mask, Tensor? powers, Tensor? context, Tensor? dropout,"
    " str cell_type, bool query_after, int[] feedback, Tensor[] readout, Tensor? input_dropout,"
    " int[] batch_sizes=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_decoder_backward": "(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,"
    " Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells, Tensor gates,"
    " Tensor queries, Tensor weights, Tensor[] layers, Tensor[] attention, Tensor? powers,"
    " Tensor? dropout, str cell_type, bool query_after, bool need_state,"
    " int[] batch_sizes=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # One query of each source. location: conv, projection and state; see Location.
    "location_attention": "(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? mask,"
    " Tensor[] location, int[] accumulates) -> (Tensor, Tensor, Tensor)",
    "location_attention_backward": "(Tensor grad_context, Tensor grad_weights, Tensor grad_next,"
    " Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, Tensor[] location,"
    " int[] accumulates, bool detach)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # attention_decoder with what few models have: a location, of which backward gets the state
    # before every step, dropout of states and of contexts, and attentional vectors.
    "extended_decoder": "(Tensor inputs, Tensor hidden, Tensor cell, Tensor[] layers,"
    " Tensor[] attention, Tensor? mask, Tensor? powers, Tensor? context, Tensor? dropout,"
    " str cell_type, bool query_after, int[] feedback, Tensor[] readout, Tensor? input_dropout,"
    " Tensor[] location, int[] accumulates, Tensor? state_dropout, Tensor[] vector, str activation,"
    " Tensor? vector_dropout, Tensor? context_dropout, Tensor? features_dropout,"
    " int[] batch_sizes=[])"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "extended_decoder_backward": "(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,"
    " Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells, Tensor gates,"
    " Tensor queries, Tensor weights, Tensor[] layers, Tensor[] attention, Tensor? powers,"
    " Tensor? dropout, str cell_type, bool query_after, bool need_state, Tensor grad_location,"
    " Tensor[] location, int[] accumulates, bool detach, Tensor? state_dropout,"
    " Tensor grad_vectors, Tensor vectors, Tensor[] vector, str activation, Tensor? vector_dropout,"
    " Tensor? context_dropout, Tensor? features_dropout, int[] batch_sizes=[])"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # a b; `blas` names what computes it, None is the faster one.
    "product": "(Tensor a, Tensor b, bool? blas=None) -> Tensor",
    # a with each of b in turn, and then, if they are wanted, the sums of its rows. Of a's columns,
    # in as many parts as there are batch_sizes, those behind the first of each part are zeros.
    "products": "(Tensor a, Tensor[] b, bool sums, int[] batch_sizes=[]) -> Tensor[]",
    "dropout_factors": "(Tensor seed, int[] size, float p) -> Tensor",
    "linear_cross_entropy": "(Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor? logits, int[] steps, float label_smoothing,"
    " int ignore_index, bool mean, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "decode": "(Tensor packed, Tensor layout, str cell_type, bool query_after, Tensor hidden,"
    " Tensor cell, Tensor? context, Tensor[] source, Tensor? mask, Tensor? limits, Tensor? prefix,"
    " int max_length, int[] whole, float length_penalty, float coverage_penalty,"
    " bool return_weights, bool return_scores, bool project_values, Tensor? seed,"
    " float temperature, int top_k, float top_p, int[] accumulates, int[] vector, Tensor? bos)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # One step of it, with all logits.
    "decoder_step": "(Tensor packed, Tensor layout, str cell_type, bool query_after, Tensor tokens,"
    " Tensor hidden, Tensor cell, Tensor? context, Tensor[] source, Tensor? mask,"
    " int[] accumulates, int[] vector) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # An encoder's layers, with weights packed as decoding has them.
    "recurrent_layers": "(Tensor x, Tensor? lengths, Tensor packed, Tensor layout, str cell_type,"
    " int hidden_dim, bool bidirectional) -> (Tensor, Tensor, Tensor)",
    # Memory for n bytes of weights, in few large pages where there are some.
    "weights_memory": "(Tensor like, int n) -> Tensor",
    # Of float32 panels (P, K, blocks * unit) the columns of a weight (blocks * N, k), from one on.
    "pack_panels": "(Tensor(a!) panels, Tensor weight, int blocks, int column) -> ()",
    # The same on a GPU: steps over a state that stays there, and what they have come to.
    "decode_steps": "(Tensor(a!)[] state, Tensor[] weights, str cell_type, bool query_after,"
    " Tensor[] source, Tensor? mask, Tensor limits, Tensor prefix, Tensor penalties, Tensor? seed,"
    " int[] whole, float coverage_penalty, float temperature, int top_k, float top_p,"
    " int[] accumulates, int[] vector, int steps) -> ()",
    # Greedy decoding in one launch; empty where a block of the GPU has too little memory for it.
    "decode_greedy": "(Tensor hidden, Tensor cell, Tensor? context, Tensor[] weights,"
    " str cell_type, bool query_after, Tensor[] source, Tensor? mask, Tensor? limits,"
    " Tensor prefix, int[] whole, float length_penalty, bool return_weights, int steps,"
    " Tensor? bos)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "decode_results": "(Tensor[] state, int fill)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _prepare_keys(keys):
    """Nothing: the plain form has no use for exponentials of the keys."""
    return keys.new_empty(0)


def _scores_backward(grad, query, keys, v, need_query, need_keys, need_v):
    grads = reference.additive_scores_backward(grad, query, keys, v)
    return _needed(grads, (need_query, need_keys, need_v))


def _attention(query, keys, values, v, mask, score_bias, scale, powers):
    if query.dim() == 3:
        return reference.additive_attention(query, keys, values, v, mask, score_bias, scale)
    query = query.unsqueeze(1)
    context, weights = _attention(query, keys, values, v, mask, score_bias, scale, powers)
    return context.squeeze(1), weights.squeeze(1)


def _attention_backward(
    grad_context, grad_weights, query, keys, values, v, weights, scale, powers, *needs
):
    grads = reference.additive_attention_backward(
        grad_context, grad_weights, query, keys, values, v, weights, scale
    )
    return _needed(grads, needs)


def _decoder(*args):
    others, sizes = args[:14], args[14:]  # what is a default may be left out
    run = reference_decoder.attention_decoder(*others, batch_sizes=sizes[0] if sizes else ())
    return run[:8]  # no location, no vectors


def _product(a, b, blas=None):
    return a @ b


def _products(a, b, sums, batch_sizes=()):
    return [*(a @ x for x in b), *([a.sum(1)] if sums else [])]


def _dropout_factors(seed, size, p):
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    kept = torch.rand(size, generator=generator, device=seed.device).ge_(p)
    return kept.mul_(1 / (1 - p)) if p < 1 else kept


def _weights_memory(like, n):
    return like.new_empty(n, dtype=torch.uint8)


def _needed(grads, needs):
    """What is not needed is an empty tensor: the number of outputs of a schema is fixed."""
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))


_FALLBACKS = {
    "prepare_keys": _prepare_keys,
    "additive_scores": reference.additive_scores,
    "additive_scores_backward": _scores_backward,
    "additive_attention": _attention,
    "additive_attention_backward": _attention_backward,
    "attention_decoder": _decoder,
    "attention_decoder_backward": reference_decoder.attention_decoder_backward,
    "product": _product,
    "products": _products,
    "dropout_factors": _dropout_factors,
    "weights_memory": _weights_memory,
    "linear_cross_entropy": reference.linear_cross_entropy,
}

_lib = torch.library.Library("seq2seq_fast", "DEF")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema)
    # Decoding's is decoding/stepwise.py, which is no function of tensors. Those of a location are
    # chosen where they are called, since the op of another backend is not theirs.
    if _name in _FALLBACKS:
        _lib.impl(_name, _FALLBACKS[_name], "CompositeExplicitAutograd")

# find_spec, not `except ImportError`: a broken build must be seen.
CUDA_ARCHITECTURES: tuple[int, ...] = ()  # compute capabilities that the extension is built for
if importlib.util.find_spec("seq2seq_fast._C") is not None:
    import seq2seq_fast._C as _C

    CUDA_ARCHITECTURES = tuple(map(int, _C.cuda_architectures.split()))


def interruption() -> BaseException | None:
    """What a signal's handler raised during a call of the extension, and so ended it, if it did."""
    raised: BaseException | None = _C.interruption()
    return raised


# Asked once: the query itself breaks torch.compile(fullgraph=True).
HAS_KERNEL = {
    (name, device): torch._C._dispatch_has_kernel_for_dispatch_key(
        f"seq2seq_fast::{name}", device.upper()
    )
    for name in SCHEMAS
    for device in ("cpu", "cuda")
}

BACKENDS = ("native", "triton", "reference")
# Best first, where a backend has the op; measurements may give an op and a device their own order.
ORDER = {
    (name, device): BACKENDS if device == "cuda" else ("native", "reference", "triton")
    for name in SCHEMAS
    for device in ("cpu", "cuda")
}
TRITON_OPS: dict[str, str] = {}  # name of an op: name of its Triton kernels' op
TRITON_DEVICE = ""


def _sizes(name: str, args: tuple) -> tuple[int, ...]:
    """What must not be 0 where an op's Triton kernels are launched."""
    if name == "attention_decoder":
        (T, B, _), attention = args[0].shape, args[4]
    elif name == "attention_decoder_backward":
        (_, T, B, _), attention = args[7].shape, args[11]
    else:
        return tuple(x.numel() for x in args if isinstance(x, torch.Tensor))
    return T, B, *(keys.shape[1] for keys in attention[3:4])


def _in_triton(name: str, launch: Callable) -> None:
    """Registers the launcher of an op's Triton kernels as an op of its own."""
    fallback = _FALLBACKS[name]

    def on_device(*args):
        first = args[0]
        if first.dtype == torch.float64 or 0 in _sizes(name, args):
            return fallback(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    TRITON_OPS[name] = f"{name}_triton"
    _lib.define(TRITON_OPS[name] + SCHEMAS[name])
    _lib.impl(TRITON_OPS[name], on_device, TRITON_DEVICE.upper())


# A CPU build of torch has nothing to run kernels on but Triton's interpreter.
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if (_interpreted or torch.backends.cuda.is_built()) and importlib.util.find_spec("triton"):
    from . import triton as _triton

    TRITON_DEVICE = "cpu" if _triton.INTERPRETED else "cuda"
    for _name, _launch in _triton.LAUNCHERS.items():
        _in_triton(_name, _launch)


def _has(backend: str, name: str, device: str) -> bool:
    if backend == "native":
        return HAS_KERNEL.get((name, device), False)
    return backend == "reference" or (name in TRITON_OPS and device == TRITON_DEVICE)


_USABLE = {
    key: tuple(backend for backend in order if _has(backend, *key)) for key, order in ORDER.items()
}
# What is an op of its own on the CPU alone: elsewhere others do it.
for _device in ("cpu", "cuda"):
    _USABLE["location_attention", _device] = _USABLE["additive_attention", _device]
_USABLE["decode", "cuda"] = _USABLE["decode_steps", "cuda"]
_PARTS = (  # of others: nobody asks for a backend of these
    "product", "products", "dropout_factors", "decoder_step", "recurrent_layers", "weights_memory",
    "pack_panels", "decode_steps", "decode_greedy", "decode_results",
)  # fmt: skip


class _Forced(threading.local):
    """What `use_backend` names, in the thread that is inside the block."""

    name: str | None = None


_forced = _Forced()


def backends() -> dict[str, dict[str, tuple[str, ...]]]:
    """Usable backends per op and device, best first; the first one is used by default.

    On a GPU all of them compute float64 as the reference does, and "triton" empty tensors too.
    "triton" takes CPU tensors only in Triton's interpreter, which TRITON_INTERPRET=1 turns on, and
    only when asked for by name. A GPU that the extension was not built for has no "native".
    """
    usable = _usable if torch.cuda.is_available() else _built
    return {
        name: {device: usable(name, device) for device in ("cpu", "cuda")}
        for name in SCHEMAS
        if name not in _PARTS
    }


def _built(op: str, device: str) -> tuple[str, ...]:
    return _USABLE.get((op, device), ("reference",))


def _usable(op: str, device: str) -> tuple[str, ...]:
    built = _built(op, device)
    if device == "cuda" and built[0] == "native" and _gpu_is_too_old():
        return built[1:]
    return built


@torch.compiler.assume_constant_result
def _gpu_is_too_old() -> bool:
    return _asked_of_gpus()  # a function of its own: torch.compile looks through the cache


@functools.cache
def _asked_of_gpus() -> bool:
    """Whether a GPU of this machine is older than what the extension was built for.

    Asked when a GPU is first used, not at import, because the question initialises CUDA.
    """
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    major, minor = min(capabilities)
    oldest = min(CUDA_ARCHITECTURES)
    if 10 * major + minor >= oldest:
        return False
    warnings.warn(
        f"seq2seq_fast: the compiled CUDA kernels are for compute capability {oldest / 10} and"
        f" later, a GPU here has {major}.{minor}: other backends take their place",
        stacklevel=3,
    )
    return True


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "native", "triton" or "reference". It holds
    for the thread that is in the block."""
    check_backend_name(name)
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def check_backend_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {list(BACKENDS)}")


def asked_for(backend: str | None) -> str | None:
    """The backend that a call's argument names, or else `use_backend`."""
    return _forced.name if backend is None else backend


def choose(op: str, x: torch.Tensor, backend: str | None) -> str:
    """The backend of a call on tensors like x; a named backend that is absent raises."""
    device = x.device.type
    usable = _usable(op, device)
    backend = asked_for(backend)
    if backend is None:
        backend = usable[0]
    elif backend not in usable:
        check_backend_name(backend)
        raise ValueError(f"backend: {backend!r} was asked for, but has no {op} kernel for {device}")
    if device == "cuda" and x.dtype == torch.float64:
        return "reference"
    return backend


def is_reference(op: str, x: torch.Tensor, backend: str | None) -> bool:
    """Whether a call on tensors like x runs the plain PyTorch form; see `choose`."""
    return choose(op, x, backend) == "reference"
