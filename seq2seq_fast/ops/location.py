"""Where was attended before, as the scores see it: location-sensitive attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..library import choose
from ..reference_decoder import location_features, next_location
from . import checks
from .additive_attention import PreparedKeys, additive_attention
from .autograd import autocast_off, autocast_on, distinct, needs_grad, once, wanted
from .kernels import OPS, fake

CHANNELS = ("previous", "cumulative")


class Location(NamedTuple):
    """Scores that see where was attended before: v tanh(query + key + projection f), where f are
    filters of the weights of the step before, or of the sum of those of all steps before, with
    zeros beyond the source's ends.

    Chorowski et al., "Attention-based models for speech recognition" (2015), have "previous";
    Tacotron 2 (Shen et al. 2018) has both. With "cumulative" and one filter of width 1 it is the
    coverage of See et al., "Get to the point" (2017).

    Args:
        conv: (N, C, K), N filters of odd width K over C channels, as of
            `nn.Conv1d(C, N, K, bias=False)`. What a bias would add is the same everywhere,
            projection @ bias: a part of the query.
        projection: (A, N), as of `nn.Linear(N, A, bias=False)`.
        channels: "previous" or "cumulative" for each of the C, in conv's order.
        state: (B, C, S), the channels before the first step; None for zeros. It may be float32
            beside conv in 16 bits, as sums over steps should be. (ESPnet and SpeechBrain begin with
            uniform weights.)
        detach: no gradient from a step to the weights of those before, as SpeechBrain has it.
    """

    conv: Tensor
    projection: Tensor
    channels: Sequence[str] = ("previous",)
    state: Tensor | None = None
    detach: bool = False


def accumulates(channels: Sequence[str]) -> tuple[int, ...]:
    """Of each channel whether it is a sum over steps."""
    return tuple(int(name == "cumulative") for name in channels)


def check_channels(name: str, channels: object) -> None:
    known = isinstance(channels, Sequence) and all(x in CHANNELS for x in channels)
    if isinstance(channels, str) or not known:
        got = repr(channels) if isinstance(channels, Sequence) else type(channels).__name__
        raise ValueError(
            f'{name}: got {got}, expected a sequence of "previous" and "cumulative", such as'
            ' ("previous",)'
        )


def state_to_check(state: object, like: Tensor) -> object:
    """state, or where it is float32 beside a tensor of 16 bits, the same in its dtype."""
    sixteen = isinstance(like, Tensor) and like.dtype in (torch.bfloat16, torch.float16)
    if sixteen and isinstance(state, Tensor) and state.dtype == torch.float32:
        return state.to(like.dtype)
    return state


def check(location: object, tensor, B: int, S: int, A: int) -> None:
    """tensor(name, x, spelled, *shape) checks what a tensor is."""
    if not isinstance(location, Location):
        raise TypeError(f"location: got {type(location).__name__}, expected a Location")
    channels = location.channels
    check_channels("location.channels", channels)
    if len(channels) == 0:
        raise ValueError(f"location.channels: got {channels!r}, expected one at least")
    tensor("location.conv", location.conv, "(N, C, K)", None, len(channels), None)
    N, _, K = location.conv.shape
    if N == 0 or K % 2 == 0:
        raise ValueError(
            f"location.conv: got shape {tuple(location.conv.shape)}, expected N above 0, K odd"
        )
    tensor("location.projection", location.projection, "(A, N)", A, N)
    if location.state is not None:
        state = state_to_check(location.state, location.conv)
        tensor("location.state", state, "(B, C, S)", B, len(channels), S)
    if not isinstance(location.detach, bool):
        raise TypeError(f"location.detach: got {location.detach!r}, expected a bool")


def parts(location: Location, keys: Tensor) -> list[Tensor]:
    """Filters, projection and state, as the ops have them."""
    state = location.state
    if state is None:
        state = keys.new_zeros(keys.shape[0], len(location.channels), keys.shape[1])
    return [location.conv, location.projection, state]


@fake("location_attention")
def _(query, keys, values, v, mask, location, accumulates):
    B, S, _ = keys.shape
    return (
        query.new_empty(B, values.shape[2]),
        query.new_empty(B, S),
        query.new_empty(location[2].shape),
    )


@fake("location_attention_backward")
def _(grad_context, grad_weights, grad_next, query, keys, values, v, weights, location, *_):
    return tuple(x.new_empty(x.shape) for x in (query, keys, v, *location))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, query, keys, values, v, mask, *location):
        ctx.accumulates, ctx.detach = options
        context, weights, after = OPS["location_attention", "native"](
            query, keys, values, v, mask, location, ctx.accumulates
        )
        ctx.save_for_backward(query, keys, values, v, weights, *location)
        return context, weights, after

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: checkpointing makes them anew each time
        query, keys, values, v, weights, *location = saved
        with torch.no_grad(), autocast_off(query):
            dquery, dkeys, dv, *of_location = OPS["location_attention_backward", "native"](
                *(g.contiguous() for g in grads), query, keys, values, v, weights, location,
                ctx.accumulates, ctx.detach,
            )  # fmt: skip
            dvalues = weights.unsqueeze(2) * grads[0].unsqueeze(1)
        found = (None, dquery, dkeys, dvalues, dv, None, *of_location)
        return once(wanted(found, ctx.needs_input_grad), (*grads, *saved))


def location_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    values: Tensor,
    v: Tensor,
    location: Location,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of location-sensitive attention: softmax(scale v tanh(query + keys + projection f))
    over the source, and its context, where f are filters of where was attended before.

    Args:
        query: (B, A), floating point.
        keys: (B, S, A), already projected; or what `prepare_keys` made of them.
        values: (B, S, D).
        v: (A,).
        location: filters, and where was attended before; see `Location`.
        mask: bool (B, S), True = attend. A row that is masked everywhere gives zeros in context
            and weights, and no gradient.
        scale: factor of the scores.
        backend: None for the best there is, "native", "triton" or "reference".

    Returns:
        context (B, D), weights (B, S), and the location's state after the step (B, C, S), which is
        `location.state` of the next one. In a loop:

            context, weights, state = location_attention(
                query, keys, values, v, Location(conv, projection, ("cumulative",), state)
            )

    Float16 and bfloat16 are computed in float32. Under autocast so is everything but float64, and
    context and weights have autocast's dtype. The state is float32 all the same, since sums of 16
    bits would stand still. On a GPU the term of the location is a tensor (B, S, A) that is added to
    the keys.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    k = keys.keys if isinstance(keys, PreparedKeys) else keys
    autocast = autocast_on(query)
    checks.attention(query, k, values, v, mask, None, autocast)
    if query.dim() != 2:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (B, A)")
    checks.number("scale", scale)

    def tensor(name: str, x: Tensor, spelled: str, *shape: int | None) -> None:
        checks.tensor_like(name, x, query, spelled, *shape, any_float=autocast)

    check(location, tensor, *k.shape)
    backend = choose("location_attention", query, backend)
    adds_up, detach = accumulates(location.channels), location.detach
    dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
    dtype = torch.float64 if query.dtype == torch.float64 else dtype
    within = torch.float64 if dtype == torch.float64 else torch.float32
    with autocast_off(query):
        q, k, values, v, *seen = (x.to(within) for x in (query, k, values, v, *parts(location, k)))
        v = v if scale == 1 else v * scale
        if backend != "native" or not q.is_cpu:
            placed = k + location_features(seen[2], seen[0]) @ seen[1].T
            context, weights = additive_attention(q, placed, values, v, mask=mask, backend=backend)
            after = next_location(seen[2], weights, adds_up, detach)
        elif needs_grad(q, k, values, v, *seen):
            k, values = distinct(k, values)
            context, weights, after = _Attention.apply(
                (adds_up, detach), q, k, values, v, mask, *seen
            )
        else:
            context, weights, after = OPS["location_attention", "native"](
                q, k, values, v, mask, seen, adds_up
            )
    return context.to(dtype), weights.to(dtype), after
