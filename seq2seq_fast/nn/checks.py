"""Argument checks of the modules: they name the argument, what came, what was expected."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.additive_attention import PreparedKeys
from ..ops.checks import bools, instance, powers, probability, tensor
from ..ops.location import state_to_check

if TYPE_CHECKING:
    from .attention import PreparedSource


def at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: got {size!r}, expected a whole number above 0")


def decoder_state(state: object) -> None:
    if not hasattr(state, "hidden"):
        raise TypeError(f"state: got {type(state).__name__}, expected a DecoderState")


def teacher_forcing_ratio(x: float) -> None:
    """True and False will do: always, never."""
    probability("teacher_forcing_ratio", float(x) if isinstance(x, bool) else x)


def batch_of(src: object) -> int | None:
    """The rows of a source that the encoder has not looked at yet, if it has any to be told."""
    if isinstance(src, Tensor) and not src.is_nested and src.dim() > 1:
        return src.shape[0]
    return None


def batches_agree(src: object, trg: Tensor) -> None:
    """trg (B, T) has the rows of src."""
    B = batch_of(src)
    if B is not None and B != trg.shape[0]:
        raise ValueError(
            f"trg: got shape {tuple(trg.shape)}, expected (B, T) with B = {B} as src has"
        )


def part(name: str, x: object, expected: str, *attributes: str) -> None:
    """x is a module that has what is read of it."""
    if not all(hasattr(x, attribute) for attribute in attributes):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {expected}")


def lengths(x: object, batch: int, most: int, device: torch.device) -> Tensor:
    """x (B,): whole numbers from 0 to most, whose values are looked at as token ids' are."""
    x = tensor("lengths", x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths: got {x.dtype}, expected int64 or int32")
    if x.shape != (batch,):
        raise ValueError(f"lengths: got shape {tuple(x.shape)}, expected (B,) = ({batch},)")
    if x.device != device:
        raise ValueError(f"lengths: is on {x.device}, expected {device} as src is")
    if x.is_cpu and batch and not torch.compiler.is_compiling():
        low, high = (int(n) for n in torch.aminmax(x))
        if low < 0 or high > most:
            bad = low if low < 0 else high
            raise ValueError(f"lengths: got {bad}, expected 0 to S = {most}")
    return x


def location(x: object, channels: tuple[str, ...], values: Tensor) -> None:
    """x (B, C, S), or None; values (B, S, D)."""
    if x is None:
        return
    if not channels:
        raise ValueError("location: got a Tensor, expected None: the attention sees no location")
    x = floating("location", state_to_check(x, values), values)
    shape = (values.shape[0], len(channels), values.shape[1])
    if x.shape != shape:
        raise ValueError(f"location: got shape {tuple(x.shape)}, expected (B, C, S) = {shape}")


def floating(name: str, x: object, like: Tensor) -> Tensor:
    """x has the dtype and device of `like`, a parameter; under autocast any float will do."""
    x = tensor(name, x)
    if x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, expected {like.device} as the module is")
    if x.dtype != like.dtype:
        device = x.device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)
        if not (cast and x.dtype.is_floating_point):
            raise TypeError(f"{name}: got {x.dtype}, expected {like.dtype} as the module has")
    return x


def state(name: str, x: object, shape: tuple[int, ...], like: Tensor) -> None:
    x = floating(name, x, like)
    if tuple(x.shape) != shape:
        what = "(B, H)" if len(shape) == 2 else "(n_layers, B, H)"
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {what} = {shape}")


def encoder_outputs(x: Tensor, weight: Tensor) -> None:
    """x: (B, S, D) for a projection by weight (H, D)."""
    floating("encoder_outputs", x, weight)
    if x.dim() != 3 or x.shape[2] != weight.shape[1]:
        raise ValueError(
            f"encoder_outputs: got shape {tuple(x.shape)}, expected (B, S, D) with"
            f" D = {weight.shape[1]}"
        )
    if x.shape[1] == 0:
        raise ValueError("encoder_outputs: got an empty source (S = 0), expected S above 0")


def prepared_source(source: "PreparedSource", weight: Tensor) -> None:
    """source: made with a projection by weight (A, D), and not by one of other widths."""
    encoder_outputs(source.values, weight)
    instance("encoder_outputs.keys", source.keys, PreparedKeys)
    floating("encoder_outputs.keys", source.keys.keys, weight)
    floating("encoder_outputs.v", source.v, weight)
    expected = (*source.values.shape[:2], weight.shape[0])
    if source.keys.keys.shape != expected or source.v.shape != expected[2:]:
        raise ValueError(
            "encoder_outputs: got a prepared source with keys of shape"
            f" {tuple(source.keys.keys.shape)} and v {tuple(source.v.shape)}, expected"
            f" (B, S, A) = {tuple(expected)} and (A,)"
        )
    if source.keys.powers is not None:
        powers(source.keys.powers, source.keys.keys)
    mask(source.mask, source.values)


def mask(x: Tensor | None, outputs: Tensor) -> None:
    if x is None:
        return
    bools(x)
    if x.shape != outputs.shape[:2]:
        raise ValueError(
            f"mask: got shape {tuple(x.shape)}, expected (B, S) = {tuple(outputs.shape[:2])}"
        )
    if x.device != outputs.device:
        raise ValueError(f"mask: is on {x.device}, expected {outputs.device}")


def context(name: str, x: object, width: int, like: Tensor, batch: int | None = None) -> None:
    x = floating(name, x, like)
    if x.dim() != 2 or x.shape[1] != width or (batch is not None and x.shape[0] != batch):
        B = "any" if batch is None else batch
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, D) = ({B}, {width})")
