"""Where a decoder has attended before, as its scores see it: location-sensitive attention."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

CHANNELS = ("previous", "cumulative")


class Location(NamedTuple):
    """Scores that see where was attended before: v tanh(query + key + projection f), where f are
    filters of the weights of the step before, or of the sum of those of all steps before, with
    zeros beyond the source's ends.

    Chorowski et al., "Attention-based models for speech recognition" (2015), have "previous";
    Tacotron 2 (Shen et al. 2018) has both. With "cumulative" and one filter of width 1 it is the
    coverage of See et al., "Get to the point" (2017).
    """

    conv: Tensor  # (N, C, K), N filters of odd width K over C channels; as of nn.Conv1d
    projection: Tensor  # (A, N)
    channels: Sequence[str] = ("previous",)  # C of "previous" and "cumulative"
    state: Tensor | None = None  # (B, C, S), the channels before the first step; None: zeros
    detach: bool = False  # no gradient from a step to the weights of those before


def accumulates(channels: Sequence[str]) -> tuple[int, ...]:
    """Of each channel whether it is a sum over steps."""
    return tuple(int(name == "cumulative") for name in channels)


def check_channels(name: str, channels: object) -> None:
    known = isinstance(channels, Sequence) and all(x in CHANNELS for x in channels)
    if isinstance(channels, str) or not known:
        expected = " and ".join(CHANNELS)
        raise ValueError(f"{name}: got {channels!r}, expected a sequence of {expected}")


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
        tensor("location.state", location.state, "(B, C, S)", B, len(channels), S)
    if not isinstance(location.detach, bool):
        raise TypeError(f"location.detach: got {location.detach!r}, expected a bool")
