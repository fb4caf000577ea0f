"""Argument checks of the public functions: they name the argument, what came, what was expected."""

import math
import sys

import torch
from torch import Tensor

STRIDED = torch.strided
WHOLE = 2**63  # whole numbers of an op are below it
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def instance(name: str, x: object, kind: type) -> None:
    if not isinstance(x, kind):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {kind.__name__}")


def flag(**given: object) -> None:
    for name, x in given.items():
        if type(x) is not bool:
            raise TypeError(f"{name}: got {type(x).__name__}, expected True or False")


def tensor(name: str, x: object, expected: str = "a Tensor") -> Tensor:
    """x, a tensor that is read by its strides: sparse, nested and oneDNN's ones have none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {expected}")
    if x.layout is not STRIDED or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name}: got a Tensor that is {kind}, expected a strided one")
    return x


def token_ids(
    name: str,
    x: object,
    spelled: str,
    dims: int,
    vocabulary: int,
    device: torch.device,
    whose: str = "the module",
) -> None:
    """x: ids below `vocabulary`, on a device. On a GPU or in a compiler their range is left to the
    embedding, because looking would wait for the device or break the graph."""
    x = tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got {x.dtype}, expected int64 or int32 token ids")
    if x.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {spelled}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, expected {device} as {whose} is")
    if x.is_cpu and not torch.compiler.is_compiling():
        in_vocabulary(name, x, vocabulary)


def in_vocabulary(name: str, x: Tensor, vocabulary: int) -> None:
    """Looks at the values of x."""
    if x.numel() == 0:
        return
    low, high = (int(n) for n in torch.aminmax(x))
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"{name}: got token id {bad}, expected 0 to {vocabulary - 1}")


def bools(x: object) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"mask: got {got}, expected a bool Tensor, True = attend")
    return tensor("mask", x)


def _tensor(
    name: str, x: object, like: Tensor | None = None, whose: str = "query", any_float: bool = False
) -> None:
    x = tensor(name, x)
    if (like is None or any_float) and x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, expected one of {[str(d) for d in DTYPES]}")
    if like is None:
        return
    if x.dtype != like.dtype and not any_float:
        raise TypeError(f"{name}: got {x.dtype}, expected {like.dtype} as {whose} has")
    if x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, expected {like.device} as {whose} is")


def tensor_like(
    name: str, x: Tensor, query: Tensor, spelled: str, *shape: int | None, any_float: bool
) -> None:
    """x has query's device, a shape, in which None stands for any size, and its dtype or any."""
    _tensor(name, x, query, any_float=any_float)
    _shape(name, x, spelled, shape)


def _shape(name: str, x: Tensor, spelled: str, *expected: tuple[int | None, ...]) -> None:
    for shape in expected:
        if x.dim() == len(shape) and all(
            e is None or e == n for e, n in zip(shape, x.shape, strict=True)
        ):
            return
    wanted = " or ".join(map(sizes, expected))
    raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {spelled} = {wanted}")


def sizes(shape: tuple[int | None, ...]) -> str:
    """A shape, in which None stands for any size, as Python writes tuples."""
    return str(tuple("any" if n is None else n for n in shape)).replace("'", "")


def keys(keys: Tensor) -> None:
    _tensor("keys", keys)
    _shape("keys", keys, "(B, S, H)", (None, None, None))
    if 0 in keys.shape[1:]:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected S and H above 0")


def powers_shape(keys: Tensor) -> tuple[int, int]:
    """Of what a kernel makes of keys (B, S, H) once per source: rows padded to whole sixteens, and
    a maximum per block of sixteen positions."""
    B, S, H = keys.shape
    return B, S * ((H + 15) // 16 * 16) + ((S + 15) // 16 + 15) // 16 * 16


def powers(powers: object, keys: Tensor) -> None:
    """Only its form: whether it was made of these very keys cannot be seen."""
    expected = powers_shape(keys)
    got = type(powers).__name__
    if isinstance(powers, Tensor):
        tensor("keys.powers", powers)
        if powers.dtype == torch.float32 and powers.is_contiguous():
            if powers.shape == expected and powers.is_cpu and keys.is_cpu:
                return
            empty = powers.numel() == 0 and not keys.is_cpu  # where there is no kernel
            if powers.device == keys.device and (powers.shape == expected or empty):
                return
        got = f"{powers.dtype} of shape {tuple(powers.shape)} on {powers.device}"
    raise ValueError(
        f"keys.powers: got {got}, expected what prepare_keys makes of the keys: contiguous float32"
        f" of shape {expected} on {keys.device}"
    )


def number(name: str, x: object) -> None:
    if type(x) is float:
        return
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a number")
    if type(x) is int and abs(x) > sys.float_info.max:
        raise ValueError(f"{name}: got {x.bit_length()} bits, expected what a float can hold")


def above_zero(name: str, x: float) -> None:
    number(name, x)
    if not (math.isfinite(x) and x > 0):
        raise ValueError(f"{name}: got {x}, expected a finite number above 0")


def probability(name: str, p: float) -> None:
    number(name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: got {p}, expected between 0 and 1")


def whole(name: str, x: object, least: int, most: int = WHOLE - 1) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a whole number")
    if not least <= x <= most:
        span = f"at least {least}" if x < least and most == WHOLE - 1 else f"{least} to {most}"
        raise ValueError(f"{name}: got {x}, expected {span}")


def _right(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> bool:
    """Settles the usual case in 1 us; what fails here is looked at argument by argument.

    Spelled out because this is a good part of a call on a few numbers.
    """
    if not (
        isinstance(query, Tensor)
        and isinstance(keys, Tensor)
        and isinstance(v, Tensor)
        and isinstance(values, Tensor)
    ):
        return False
    dtype = query.dtype
    if not (dtype in DTYPES and keys.dtype == dtype == v.dtype and values.dtype == dtype):
        return False
    if not (query.layout is keys.layout is v.layout is values.layout is STRIDED):
        return False
    if query.is_nested or keys.is_nested or v.is_nested or values.is_nested:
        return False
    if not (query.is_cpu and keys.is_cpu and v.is_cpu and values.is_cpu):
        if not query.device == keys.device == v.device == values.device:
            return False
    shape, source, width, more = query.shape, keys.shape, v.shape, values.shape
    return (
        len(source) == 3
        and len(shape) in (2, 3)
        and len(width) == 1
        and len(more) == 3
        and shape[0] == source[0] == more[0]
        and source[1] == more[1]
        and shape[-1] == source[2] == width[0]
        and source[1] != 0
        and source[2] != 0
    )


def scores(query: Tensor, keys: Tensor, v: Tensor, any_float: bool = False) -> None:
    if _right(query, keys, v, keys):
        return
    _tensor("query", query)
    _tensor("keys", keys, query, any_float=any_float)
    _tensor("v", v, query, any_float=any_float)
    _shape("query", query, "(B, T, H) or (B, H)", (None, None, None), (None, None))
    B, H = query.shape[0], query.shape[-1]
    _shape("keys", keys, "(B, S, H)", (B, None, H))
    _shape("v", v, "(H,)", (H,))
    if keys.shape[1] == 0:
        raise ValueError("keys: got an empty source (S = 0), expected at least one position")
    if H == 0:
        raise ValueError("query: got H = 0, expected at least one feature")


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    score_bias: Tensor | None,
    any_float: bool = False,
) -> None:
    if not _right(query, keys, v, values):
        scores(query, keys, v, any_float)
        _tensor("values", values, query, any_float=any_float)
        _shape("values", values, "(B, S, D)", (*keys.shape[:2], None))
    if mask is None and score_bias is None:
        return
    B, S = keys.shape[:2]
    full = (B, query.shape[1], S) if query.dim() == 3 else (B, S)
    if mask is not None:
        bools(mask)
        if mask.device != query.device:
            raise ValueError(f"mask: is on {mask.device}, expected {query.device} as query is")
        if query.dim() == 3:
            _shape("mask", mask, "(B, S) or (B, T, S)", (B, S), full)
        else:
            _shape("mask", mask, "(B, S)", (B, S))
    if score_bias is not None:
        _tensor("score_bias", score_bias, query)
        sizes = zip(score_bias.shape[::-1], full[::-1], strict=False)
        if score_bias.dim() > len(full) or any(n not in (1, e) for n, e in sizes):
            raise ValueError(
                f"score_bias: got shape {tuple(score_bias.shape)}, expected broadcastable to {full}"
            )


def rows(name: str, x: Tensor, target: Tensor) -> None:
    """x (..., K) has as many rows as target (...)."""
    _tensor(name, x)
    tensor("target", target)
    if x.dim() == 0 or x.shape[:-1] != target.shape:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected {tuple(x.shape[:-1])}, one for"
            f" each row of {name}"
        )


def classes(target: Tensor, V: int, ignored: int) -> None:
    """On a GPU or in a compiler their range is not looked at: that would wait for the device or
    break the graph."""
    if target.dtype != torch.int64:
        raise TypeError(f"target: got {target.dtype}, expected int64 classes")
    whole("ignore_index", ignored, -WHOLE)
    if not target.is_cpu or torch.compiler.is_compiling() or target.numel() == 0:
        return
    least, most = target.aminmax()
    if least >= 0 and most < V:  # most often, and told in a few microseconds
        return
    bad = target[((target < 0) | (target >= V)) & (target != ignored)]
    if len(bad):
        raise ValueError(
            f"target: got class {bad[0].item()}, expected 0 to {V - 1}, or {ignored} to ignore"
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    autocast: bool,
) -> None:
    def tensor(name: str, x: Tensor, spelled: str, *shape: int | None) -> None:
        _tensor(name, x, input, "input", any_float=autocast)
        _shape(name, x, spelled, shape)

    tensor("linear_weight", linear_weight, "(V, K)", None, input.shape[-1])
    V = linear_weight.shape[0]
    if V == 0:
        raise ValueError("linear_weight: got V = 0, expected at least one class")
    if linear_bias is not None:
        tensor("linear_bias", linear_bias, "(V,)", V)
    loss(input, V, target, weight, reduction, label_smoothing, autocast)


def loss(
    input: Tensor,
    V: int,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    autocast: bool,
) -> None:
    """Of V classes, by what is like input."""
    if weight is not None:
        _tensor("weight", weight, input, "input", any_float=autocast)
        _shape("weight", weight, "(V,)", (V,))
    if target.device != input.device:
        raise ValueError(f"target: is on {target.device}, expected {input.device} as input is")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: got {reduction!r}, expected "mean" or "sum"')
    probability("label_smoothing", label_smoothing)
