"""Additive attention with its projections."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.additive_attention import PreparedKeys, additive_attention, prepare_keys
from ..ops.linear import linear
from ..ops.location import Location, check_channels, location_attention
from ..ops.modules import check_is_read, make_weights
from . import checks


class PreparedSource(NamedTuple):
    """What every decoder step needs of one source; made by `Attention.precompute`.

    Args:
        keys: Ua(encoder_outputs), (B, S, H), and what a kernel derives from it.
        values: encoder_outputs (B, S, D).
        v: the scores' weights (H,).
        mask: (B, S) bool, True = attend, or None.
    """

    keys: PreparedKeys
    values: Tensor
    v: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """weights = softmax(Va tanh(Wa hidden + Ua encoder_outputs)).

    Va's bias moves every score alike and therefore changes nothing; it is kept for the state dict.

    Args:
        hidden_dim: width that the scores are summed over (H).
        query_dim, key_dim: widths of hidden (Q) and of encoder_outputs (D); None for hidden_dim.
        location: "previous", "cumulative" or both: what the scores see of where was attended
            before, by location_dense(location_conv(...)) that is added to Ua encoder_outputs. See
            `Location`.
        location_filters, location_kernel_size: how many filters, and how wide; odd.
    """

    location: tuple[str, ...] = ()  # of modules too that were pickled before there was one
    location_conv: nn.Conv1d
    location_dense: nn.Linear

    def __init__(
        self,
        hidden_dim: int,
        *,
        query_dim: int | None = None,
        key_dim: int | None = None,
        location: Sequence[str] | None = (),
        location_filters: int = 32,
        location_kernel_size: int = 31,
    ):
        super().__init__()
        query_dim = hidden_dim if query_dim is None else query_dim
        key_dim = hidden_dim if key_dim is None else key_dim
        checks.at_least_one(hidden_dim=hidden_dim, query_dim=query_dim, key_dim=key_dim)
        self.Wa = nn.Linear(query_dim, hidden_dim)
        self.Ua = nn.Linear(key_dim, hidden_dim)
        self.Va = nn.Linear(hidden_dim, 1)
        location = () if location is None else location
        check_channels("location", location)
        self.location = tuple(location)
        if self.location:
            n, width = location_filters, location_kernel_size
            checks.at_least_one(location_filters=n, location_kernel_size=width)
            if width % 2 == 0:
                raise ValueError(f"location_kernel_size: got {width}, expected an odd number")
            self.location_conv = nn.Conv1d(len(location), n, width, padding=width // 2, bias=False)
            self.location_dense = nn.Linear(n, hidden_dim, bias=False)

    def located(self, state: Tensor | None) -> Location | None:
        """What `attention_decoder` takes, with the state before the first step; None where the
        scores see no location."""
        if not self.location:
            return None
        make_weights(self.location_conv, self.location_dense)
        weights = self.location_conv.weight, self.location_dense.weight
        return Location(*weights, self.location, state)

    def precompute(self, encoder_outputs: Tensor, mask: Tensor | None = None) -> PreparedSource:
        """Projects encoder_outputs (B, S, D) once for all the queries of a source.

        The result takes the place of encoder_outputs in `Attention` and `Decoder`. mask is (B, S)
        bool, True = attend. Gradients flow to encoder_outputs and the weights as without it.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.encoder_outputs(encoder_outputs, self.Ua.weight)
        checks.mask(mask, encoder_outputs)
        # Softmax cancels Va's bias. It stays in the graph, with a gradient of zero as in the plain
        # form, since DistributedDataParallel expects one of every parameter.
        check_is_read("attention.Va", self.Va)
        make_weights(self.Va)
        v = self.Va.weight[0]
        if torch.is_grad_enabled() and self.Va.bias is not None:
            v = v + 0 * self.Va.bias
        keys = linear(self.Ua, encoder_outputs, alike=True)
        # What a step adds to keys leaves no use for their exponentials.
        prepared = PreparedKeys(keys) if self.location else prepare_keys(keys)
        return PreparedSource(prepared, encoder_outputs, v, mask)

    def forward(
        self,
        hidden: Tensor,
        encoder_outputs: Tensor | PreparedSource,
        mask: Tensor | None = None,
        location: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One query per source.

        Args:
            hidden: (B, Q).
            encoder_outputs: (B, S, D), or what `precompute` made of them.
            mask: (B, S) bool, True = attend; given to `precompute` where that was used.
            location: (B, C, S), for each of the C channels the weights of the step before, or the
                sum of all before, to which the caller adds what this returns; zeros if None.

        Returns:
            context (B, 1, D) and weights (B, S).

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        source = self.source(encoder_outputs, mask)
        weight = self.Wa.weight
        checks.state("hidden", hidden, (source.values.shape[0], weight.shape[1]), weight)
        checks.location(location, self.location, source.values)
        args, where = (self.Wa(hidden), *source[:3]), self.located(location)
        if where is None:
            context, weights = additive_attention(*args, mask=source.mask)
        else:
            context, weights, _ = location_attention(*args, where, mask=source.mask)
        return context.unsqueeze(1), weights

    def source(
        self, encoder_outputs: Tensor | PreparedSource, mask: Tensor | None
    ) -> PreparedSource:
        """encoder_outputs and mask prepared, or what has been prepared already."""
        if not isinstance(encoder_outputs, PreparedSource):
            return self.precompute(encoder_outputs, mask)
        if mask is not None:
            raise ValueError("mask: got a Tensor, expected None: the prepared source has its own")
        checks.prepared_source(encoder_outputs, self.Ua.weight)
        return encoder_outputs
