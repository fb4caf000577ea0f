"""Argument checks of `attention_decoder`."""

from collections.abc import Sequence

from torch import Tensor

from ..reference_decoder import BLOCKS
from .attentional_vector import AttentionalVector
from .attentional_vector import check as check_vector
from .checks import DTYPES, STRIDED, bools, flag, instance, powers, probability, sizes, token_ids
from .checks import tensor as check_tensor
from .location import check as check_location

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def cell_type(name: object) -> None:
    if not isinstance(name, str) or name not in BLOCKS:
        raise ValueError(f"cell_type: got {name!r}, expected one of {list(BLOCKS)}")


def _tensor(
    name: str, x: object, like: Tensor, whose: str, spelled: str, shape: tuple, autocast: bool
) -> None:
    """x is a tensor of a shape, in which None stands for any size."""
    if not isinstance(x, Tensor) or x.layout is not STRIDED or x.is_nested:
        x = check_tensor(name, x, f"a Tensor {spelled}")  # an error
    if x.dtype != like.dtype and not (autocast and x.dtype in DTYPES):
        raise TypeError(f"{name}: got {x.dtype}, expected {like.dtype} as {whose}")
    if x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, expected {like.device} as {whose}")
    if x.shape == shape:
        return
    pairs = zip(x.shape, shape, strict=False)
    if x.dim() != len(shape) or any(e is not None and n != e for n, e in pairs):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {spelled} = {sizes(shape)}")


def listed(name: str, x: object, expected: str, n: int | None = None) -> None:
    """x is a sequence, where n is given of as many tensors."""
    if isinstance(x, Tensor) or not (hasattr(x, "__getitem__") and hasattr(x, "__len__")):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {expected}")
    if n is not None and len(x) != n:
        raise ValueError(f"{name}: got {len(x)} tensors, expected {expected}")


def decoder(
    inputs: Tensor,
    embedding: Tensor | None,
    hidden: Tensor,
    cell: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    attention: Sequence[Tensor | None],
    key_powers: object,
    mask: Tensor | None,
    context: Tensor | None,
    kind: str,
    query_after: bool,
    dropout: float | Tensor,
    state_dropout: float | Tensor,
    context_dropout: float | Tensor,
    feedback: Sequence | None,
    recompute: bool,
    location: object,
    vector: object,
    batch_sizes: Sequence[int] | None,
    autocast: bool,
) -> None:
    """attention: weight and bias of the query's projection, keys, values and v, or five None."""
    cell_type(kind)
    flag(query_after=query_after, recompute=recompute)
    name, spelled, dims, whose = "inputs", "(B, T, E)", 3, "that of inputs"
    if embedding is not None:
        name, spelled, dims, whose = "embedding", "(V, E)", 2, "that of embedding"
    like = inputs if embedding is None else embedding
    like = check_tensor(name, like, f"a floating-point Tensor {spelled}")
    if like.dtype not in DTYPES:
        raise TypeError(f"{name}: got {like.dtype}, expected a floating-point Tensor {spelled}")

    def tensor(name: str, x: object, spelled: str, *shape: int | None) -> None:
        _tensor(name, x, like, whose, spelled, shape, autocast)

    tensor(name, like, spelled, *dims * [None])
    if embedding is not None:
        token_ids("inputs", inputs, "(B, T)", 2, len(like), like.device, "embedding")
    listed("layers", layers, "a sequence of four tensors for each layer")
    for layer in layers[:1]:
        listed("layers[0]", layer, "weight_ih, weight_hh, bias_ih, bias_hh", 4)
    (B, T), E = inputs.shape[:2], like.shape[-1]
    L = len(layers)
    tensor("hidden", hidden, "(L, B, H)", L, B, None)
    H = hidden.shape[2]
    if L == 0 or H == 0:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected L and H above 0")
    if kind == "lstm":
        tensor("cell", cell, "(L, B, H)", L, B, H)
    elif cell is not None:
        raise ValueError(f"cell: got a Tensor, expected None: cell_type is {kind!r}")
    if location is not None and all(x is None for x in attention):
        raise ValueError("location: got a Location, expected None without keys and values")
    if vector is not None:
        instance("vector", vector, AttentionalVector)
        if not query_after or attention[2] is None:
            raise ValueError(
                "vector: got an AttentionalVector, expected None without query_after and attention"
            )
    D = _source(tensor, attention, key_powers, mask, context, B, H, vector is not None)
    features, of_readout, fed = H + D, "(V, H + D)", "(B, T, D)"  # the first layer reads D
    if isinstance(vector, AttentionalVector):
        D = features = check_vector(vector, tensor, B, T, H, D)
        of_readout, fed = "(V, O)", "(B, T, O)"
        if context is not None:
            tensor("context", context, "(B, O)", B, D)
    if location is not None and attention[2] is not None:
        check_location(location, tensor, *attention[2].shape)
    G = GATES[kind] * H
    for i, layer in enumerate(layers):
        if type(layer) is not list or len(layer) != 4:
            listed(f"layers[{i}]", layer, "weight_ih, weight_hh, bias_ih, bias_hh", 4)
        tensor(f"layers[{i}][0]", layer[0], "(gates, inputs)", G, E + D if i == 0 else H)
        tensor(f"layers[{i}][1]", layer[1], "(gates, H)", G, H)
        tensor(f"layers[{i}][2]", layer[2], "(gates,)", G)
        tensor(f"layers[{i}][3]", layer[3], "(gates,)", G)
    for name, x, spelled, *shape in (
        ("dropout", dropout, "(L - 1, B, T, H)", L - 1, B, T, H),
        ("state_dropout", state_dropout, "(L, B, T, H)", L, B, T, H),
        ("context_dropout", context_dropout, fed, B, T, D),
    ):
        if isinstance(x, Tensor):
            tensor(name, x, spelled, *shape)
        else:
            probability(name, x)
    no_context = attention[2] is None and not (
        isinstance(context_dropout, (int, float)) and context_dropout == 0
    )
    if no_context:
        raise ValueError("context_dropout: got one, expected 0 without keys and values")
    if feedback is not None:
        _feedback(tensor, feedback, B, T, E, features, of_readout)
    if batch_sizes is not None:
        _batch_sizes(batch_sizes, B, T)


def _batch_sizes(sizes: Sequence[int], B: int, T: int) -> None:
    if not isinstance(sizes, Sequence) or any(type(n) is not int for n in sizes):
        raise TypeError(f"batch_sizes: got {sizes!r}, expected a sequence of whole numbers")
    before = [B, *sizes]
    if len(sizes) != T or any(not 0 <= n <= m for m, n in zip(before, sizes, strict=False)):
        raise ValueError(
            f"batch_sizes: got {list(sizes)}, expected T = {T} numbers from B = {B} down to 0 that"
            " never grow"
        )


def _source(tensor, attention, key_powers, mask, context, B: int, H: int, vector: bool) -> int:
    """The context's width D."""
    given = [x is not None for x in attention]
    if any(given) != all(given):
        missing = ("query", "query", "keys", "values", "v")[given.index(False)]
        raise ValueError(f"{missing}: got None, expected all of query, keys, values and v, or none")
    if not any(given):
        if mask is not None:
            raise ValueError("mask: got a Tensor, expected None without keys and values")
        if context is None:
            return 0
        tensor("context", context, "(B, D)", B, None)
        return context.shape[1]
    w_query, b_query, keys, values, v = attention
    tensor("keys", keys, "(B, S, A)", B, None, None)
    S, A = keys.shape[1:]
    if S == 0 or A == 0:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected S and A above 0")
    if key_powers is not None:
        powers(key_powers, keys)
    tensor("query[0]", w_query, "(A, H)", A, H)
    tensor("query[1]", b_query, "(A,)", A)
    tensor("values", values, "(B, S, D)", B, S, None)
    tensor("v", v, "(A,)", A)
    if mask is not None:
        bools(mask)
        if mask.shape != (B, S):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (B, S) = {(B, S)}")
        if mask.device != keys.device:
            raise ValueError(f"mask: is on {mask.device}, expected {keys.device} as keys are")
    if context is not None and not vector:
        tensor("context", context, "(B, D)", B, values.shape[2])
    return values.shape[2]


def _feedback(tensor, feedback, B: int, T: int, E: int, features: int, spelled: str) -> None:
    steps, embedding, weight, bias, dropout = feedback
    if not isinstance(steps, Sequence) or any(type(t) is not int for t in steps):
        raise TypeError(f"feedback.steps: got {steps!r}, expected a sequence of whole numbers")
    if any(not 0 < t < T for t in steps) or list(steps) != sorted(set(steps)):
        raise ValueError(f"feedback.steps: got {steps}, expected steps 1 to {T - 1}, ascending")
    tensor("feedback.embedding", embedding, "(V, E)", None, E)
    V = embedding.shape[0]
    if V == 0:
        raise ValueError("feedback.embedding: got V = 0, expected at least one token")
    tensor("feedback.weight", weight, spelled, V, features)
    tensor("feedback.bias", bias, "(V,)", V)
    if dropout is not None:
        tensor("feedback.dropout", dropout, "(B, T, E)", B, T, E)
