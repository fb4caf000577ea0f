"""Rows of different lengths in one batch, which recurrent layers read to their ends and no further;
B batch, S source, batch first."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import checks

SATURATED = 1e6  # before a sigmoid, and far above what weights and states add


def read_lengths(src: Tensor, pad_idx: int) -> Tensor | None:
    """(B,) how many tokens a row of src (B, S) has before its last ones, which are all pad_idx.
    None of what is no such source, as the encoder will say."""
    if not isinstance(src, Tensor) or src.dim() != 2 or src.shape[1] == 0:
        return None
    places = torch.arange(1, src.shape[1] + 1, device=src.device)
    return ((src != pad_idx) * places).amax(1)


def values_are_known() -> bool:
    """Whether what is done may depend on the values of tensors: nothing records it."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


# Of all rows' steps; below that the order of rows is not worth changing.
LEAST_LEFT = 0.03


def leaving(trg: Tensor, ignored: int) -> tuple[Tensor, list[int]] | None:
    """An order (B,) of the rows of targets (B, T), the longest first, and how many of them each
    step has, where those behind a row's last target that is not `ignored` leave; None if hardly
    any do."""
    if trg.numel() == 0 or not bool((trg[:, -1] == ignored).any()):
        return None
    lengths = read_lengths(trg, ignored)
    assert lengths is not None
    if int(lengths.sum()) >= (1 - LEAST_LEFT) * trg.numel():
        return None
    return lengths.argsort(descending=True, stable=True), batch_sizes(lengths, trg.shape[1])


def batch_sizes(lengths: Tensor, steps: int) -> list[int]:
    """How many rows of such lengths (B,) each step has."""
    ends = torch.bincount(lengths, minlength=steps + 1)
    sizes: list[int] = (len(lengths) - ends[:steps].cumsum(0)).tolist()
    return sizes


class _Reordered(torch.autograd.Function):
    """The rows of x in another order, which `back` takes back, so that x's gradient is its rows.
    That of index_select, which sums up, takes six times as long."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return _Reordered.apply(grad, back, order), None, None


def reordered(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x's rows in an order, and `back` is the order that makes them x again."""
    if not values_are_known():  # compilers have their own, and take no tensor twice
        return x.index_select(0, order)
    found: Tensor = _Reordered.apply(x, order, back)
    return found


class Rows:
    """What a batch's rows need around operations that read all of them to the end."""

    sizes: list[int] | None = None  # how many rows each step has, where the longest come first

    def __init__(self, lengths: Tensor, size: int):
        self.lengths = lengths  # (B,) int64
        places = torch.arange(size, device=lengths.device)
        self.behind = places >= lengths[:, None]  # (B, S)

    @classmethod
    def of(cls, lengths: Tensor, src: Tensor) -> "Rows":
        """Raises a TypeError or ValueError of lengths that are not those of src (B, S)."""
        B, S = src.shape
        return cls(checks.lengths(lengths, B, S, src.device).long().contiguous(), S)

    def longest_first(self) -> tuple[Tensor, "Rows"]:
        """The order (B,) of rows that puts the longest first, and what they need in it."""
        order = self.lengths.argsort(descending=True, stable=True)
        rows = Rows(self.lengths[order], self.behind.shape[1])
        rows.sizes = batch_sizes(rows.lengths, self.behind.shape[1])
        return order, rows

    def cut(self, x: Tensor) -> Tensor:
        """x (B, S, N) with zeros behind each row's end."""
        return x.masked_fill(self.behind[..., None], 0)

    def turned(self, x: Tensor) -> Tensor:
        """x (B, S, N), each row up to its end from there to the front; twice, it is x again."""
        B, S = self.behind.shape
        places = torch.arange(S, device=x.device)
        turned = torch.where(self.behind, places, self.lengths[:, None] - 1 - places)
        rows = turned + S * torch.arange(B, device=x.device)[:, None]
        rows = rows.flatten()
        return reordered(x.flatten(0, 1), rows, rows).view(x.shape)

    def last(self, x: Tensor) -> Tensor:
        """(B, N): the last of each row of x (B, S, N), zeros of those that have none."""
        batch = torch.arange(len(x), device=x.device)
        found = x[batch, (self.lengths - 1).clamp_min(0)]
        return found.masked_fill(self.lengths[:, None] == 0, 0)

    def keeping_cells(
        self, x: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Inputs and weights of an LSTM's layer, in which the cell state behind a row's end stays
        what it is: one more input, of 1 there, closes the input gate and opens the forget gate."""
        w_input, *others = weights
        column = torch.zeros_like(w_input[:, :1]).unflatten(0, (4, -1))  # of gates i f g o
        column = column + column.new_tensor([-SATURATED, SATURATED, 0, 0])[:, None, None]
        x = torch.cat([x, self.behind[..., None].to(x.dtype)], -1)
        return x, [torch.cat([w_input, column.flatten(0, 1)], 1), *others]

    def through(self, layers: nn.RNNBase, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What layers make of packed x (B, S, E): outputs (B, S, D), hidden, cell of an LSTM."""
        if len(x) == 0:  # which cannot be packed
            outputs, state = layers(x)
            return outputs, *(state if isinstance(state, tuple) else (state, None))
        sizes = self.lengths.cpu()  # of a GPU's nobody has looked at the values yet
        checks.lengths(sizes, len(x), x.shape[1], sizes.device)
        # A row of none is read as one of one, whose results are cleared.
        rows = sizes.clamp_min(1)
        packed = pack_padded_sequence(x, rows, batch_first=True, enforce_sorted=False)
        found, state = layers(packed)
        outputs, _ = pad_packed_sequence(found, batch_first=True, total_length=x.shape[1])
        none = (self.lengths == 0)[:, None]
        hidden, cell = state if isinstance(state, tuple) else (state, None)
        cell = None if cell is None else cell.masked_fill(none, 0)
        return self.cut(outputs), hidden.masked_fill(none, 0), cell
