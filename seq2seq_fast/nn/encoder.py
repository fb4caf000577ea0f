"""The recurrent encoder; B batch, S source, batch first."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.fits import plain_layers
from ..decoding.packing import PackedLayers, let_go, pack_layers
from ..library import asked_for, choose
from ..ops.attention_decoder import DecoderOutput, attention_decoder
from ..ops.checks import flag, probability, token_ids
from ..ops.dropout import dropout_factors
from ..ops.linear import linear
from ..ops.modules import dropout_rate, has_hooks, has_own_forward, rate_between_layers
from . import checks
from .cells import recurrent
from .lengths import Rows, reordered, values_are_known

_States = tuple[Tensor, Tensor, Tensor | None]  # outputs, hidden, cell

# oneDNN's LSTM has none on processors without AVX-512: an error there.
_LSTM_TAKES_BFLOAT16 = (
    not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


class Encoder(nn.Module):
    """Embedding, dropout and recurrent layers over the source.

    Args:
        input_dim: size of the vocabulary.
        emb_dim, hidden_dim (H), n_layers: widths and depth.
        dropout: on the embedded source and between layers.
        cell_type: "lstm", "gru" or "rnn" (tanh); the layers are the module of that name.
        bidirectional: outputs, and states unless bridged, are 2 H wide, the forward half first.
        bridge_dim: width of the states handed to a decoder: hidden = tanh(bridge_hidden(state)),
            cell = bridge_cell(state). None hands them over as they are.

    Attributes:
        output_dim, state_dim: widths of outputs and of the states handed over. `Seq2Seq` reads
            them, `cell_type` and `layers.num_layers` of an encoder of any kind.
    """

    packed: PackedLayers | None = None  # what prepare_inference left

    def __init__(
        self,
        input_dim: int,
        emb_dim: int,
        hidden_dim: int,
        n_layers: int,
        dropout: float,
        *,
        cell_type: str = "lstm",
        bidirectional: bool = False,
        bridge_dim: int | None = None,
    ):
        super().__init__()
        checks.at_least_one(
            input_dim=input_dim, emb_dim=emb_dim, hidden_dim=hidden_dim, n_layers=n_layers
        )
        probability("dropout", dropout)
        flag(bidirectional=bidirectional)
        self.cell_type = cell_type
        self.output_dim = hidden_dim * (2 if bidirectional else 1)
        self.state_dim = self.output_dim if bridge_dim is None else bridge_dim
        self.embedding = nn.Embedding(input_dim, emb_dim)
        layers = recurrent(cell_type, emb_dim, hidden_dim, n_layers, dropout, bidirectional)
        self.add_module(cell_type, layers)
        self.dropout = nn.Dropout(dropout)
        if bridge_dim is not None:
            checks.at_least_one(bridge_dim=bridge_dim)
            self.bridge_hidden = nn.Linear(self.output_dim, bridge_dim)
            if cell_type == "lstm":
                self.bridge_cell = nn.Linear(self.output_dim, bridge_dim)

    @property
    def layers(self) -> nn.RNNBase:
        return getattr(self, self.cell_type)

    def _apply(self, fn: Any, recurse: bool = True) -> "Encoder":
        super()._apply(fn, recurse)  # to(), double(), cuda(): where weights may become others
        self.packed = let_go(self.packed)
        return self

    def forward(
        self, src: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """src (B, S) token ids -> outputs (B, S, output_dim), hidden and cell
        (n_layers, B, state_dim); cell is None unless the layers are an LSTM.

        Args:
            lengths: (B,) int64 or int32, 0 to S: the layers read so many of a row's tokens, as
                those of a packed sequence (`torch.nn.utils.rnn.pack_padded_sequence`). Outputs
                behind them are 0; states are those after a row's last token, and backwards the
                layers begin there. None reads S of each. On a GPU it waits for their values. On the
                CPU dropout between layers is drawn for the longest rows first.

        Raises:
            TypeError, ValueError: src is not (B, S) whole numbers in the vocabulary with S above 0,
                or lengths are not (B,) whole numbers from 0 to S.
        """
        table = self.embedding
        token_ids("src", src, "(B, S)", 2, table.num_embeddings, table.weight.device)
        if src.shape[1] == 0:
            raise ValueError("src: got an empty source (S = 0), expected S above 0")
        rows = None if lengths is None else Rows.of(lengths, src)
        embedded = self.embedding(src)
        if type(self.dropout) is not nn.Dropout or has_hooks(self.dropout):
            embedded = self.dropout(embedded)
        elif (p := dropout_rate("encoder.dropout", self.dropout)) > 0:
            embedded = embedded * dropout_factors(embedded.shape, p, embedded)
        outputs, hidden, cell = self._recur(embedded, rows)
        hidden = self._both_directions(hidden)
        cell = None if cell is None else self._both_directions(cell)
        if hasattr(self, "bridge_hidden"):
            hidden = torch.tanh(linear(self.bridge_hidden, hidden, alike=True))
            cell = None if cell is None else linear(self.bridge_cell, cell, alike=True)
        return outputs, hidden, cell

    def prepare_inference(self) -> "Encoder":
        """Keeps the recurrent layers' weights packed for calls that need no gradient, which then
        take a third of the time for one short source, and half or more of it for others. On the
        CPU in float32; elsewhere it does nothing. See `Seq2Seq.prepare_inference`.

        Returns:
            The encoder itself.
        """
        weight = self.embedding.weight
        if weight.is_cpu and self._runs_in_loops(weight):
            self.packed = pack_layers(self._modules, self.cell_type)
        return self

    def _recur(self, x: Tensor, rows: Rows | None) -> _States:
        """What the recurrent layers make of x (B, S, E), wherever that is fastest."""
        run = self._loop(x, rows)
        if run is None and rows is not None:
            return rows.through(self.layers, x)
        if run is None:
            outputs, state = self.layers(x)
            return outputs, *(state if self.cell_type == "lstm" else (state, None))
        if not torch.is_autocast_enabled("cpu"):
            return run(x, rows)
        with torch.autocast("cpu", enabled=False):
            outputs, hidden, cell = run(x, rows)
        if self.cell_type == "gru":  # whose results autocast leaves in float32
            return outputs, hidden, None
        dtype = torch.get_autocast_dtype("cpu")
        return outputs.to(dtype), hidden.to(dtype), None if cell is None else cell.to(dtype)

    def _loop(
        self, x: Tensor, rows: Rows | None
    ) -> Callable[[Tensor, Rows | None], _States] | None:
        """The library's own that is faster than torch's module, if one is.

        The decoder's loop, which needs no attention, takes 20 to 90 % of the time of nn.GRU and
        nn.RNN on the CPU, the least with few rows. nn.LSTM, which is oneDNN's, takes as long as it
        forward and longer in training. oneDNN does not take packed sequences, nor, on most
        processors, float16, nor bfloat16 on those without AVX-512, which are errors there.
        """
        if not self._runs_in_loops(x):
            return None
        trains = torch.is_grad_enabled() and self.layers.training
        if self.packed is not None and not (
            self.layers.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):
            return self._run_packed
        lacks = rows is not None or torch.is_autocast_enabled("cpu")
        return self._run if self.cell_type != "lstm" or trains or lacks else None

    def _run_packed(self, x: Tensor, rows: Rows | None) -> _States:
        packed = self.packed
        if packed is None or not packed.watch.holds():
            packed = self.packed = pack_layers(self._modules, self.cell_type)
        layers = self.layers
        outputs, hidden, cell = torch.ops.seq2seq_fast.recurrent_layers.default(
            x.contiguous(),
            None if rows is None else rows.lengths,
            *packed.weights,
            self.cell_type,
            layers.hidden_size,
            layers.bidirectional,
        )
        return outputs, hidden, cell if self.cell_type == "lstm" else None

    def _runs_in_loops(self, embedded: Tensor) -> bool:
        """Whether the library's loops can take the place of torch's module."""
        layers = self.layers
        return (
            type(layers) in (nn.LSTM, nn.GRU, nn.RNN)
            and plain_layers(layers, self.cell_type)
            and not (has_hooks(layers) or has_own_forward(layers))
            and embedded.is_cpu
            and embedded.dtype == torch.float32
            and not (
                torch.is_autocast_enabled("cpu")
                and torch.get_autocast_dtype("cpu") != torch.float16
                and _LSTM_TAKES_BFLOAT16
            )
            and asked_for(None) in (None, "native")
            and choose("attention_decoder", embedded, None) == "native"
        )

    def _run(self, x: Tensor, rows: Rows | None) -> _States:
        """What the layers make of x (B, S, E), in the decoder's loop.

        Rows of different lengths come to it the longest first, so that those that are over leave;
        but where a compiler or a trace knows no lengths.
        """
        if rows is None or not values_are_known():
            return self._run_in_order(x, rows)
        if len(x) > 0 and int(rows.lengths.min()) == x.shape[1]:
            return self._run_in_order(x, None)
        order, rows = rows.longest_first()
        back = order.argsort()
        outputs, hidden, cell = self._run_in_order(reordered(x, order, back), rows)
        outputs = reordered(outputs, back, order)
        return outputs, hidden[:, back], None if cell is None else cell[:, back]

    def _run_in_order(self, x: Tensor, rows: Rows | None) -> _States:
        layers, weights = self.layers, self.layers.all_weights
        dropout = rate_between_layers(layers)
        sizes = None if rows is None else rows.sizes
        if not layers.bidirectional and (rows is None or sizes is not None):
            out = self._through(x, weights, dropout, sizes)
            cut = out.outputs if rows is None else rows.cut(out.outputs)
            return cut, out.hidden, out.cell
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        directions = 2 if layers.bidirectional else 1
        for i in range(0, len(weights), directions):
            if i > 0 and dropout > 0:
                x = x * dropout_factors(x.shape, dropout, x)
            outputs = []
            for backwards in range(directions):
                found, h, c = self._one_way(x, weights[i + backwards], rows, backwards == 1)
                outputs.append(found)
                hidden.append(h)
                if c is not None:
                    cells.append(c)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, torch.cat(hidden), torch.cat(cells) if cells else None

    def _one_way(
        self, x: Tensor, weights: Sequence[Tensor], rows: Rows | None, backwards: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer in one direction: outputs (B, S, H), hidden and cell (1, B, H)."""
        if rows is None:
            out = self._through(x.flip(1) if backwards else x, [weights])
            return out.outputs.flip(1) if backwards else out.outputs, out.hidden, out.cell
        x = rows.turned(x) if backwards else x
        if rows.sizes is None and self.cell_type == "lstm":
            x, weights = rows.keeping_cells(x, weights)
        out = self._through(x, [weights], sizes=rows.sizes)
        outputs = rows.turned(out.outputs) if backwards else out.outputs
        hidden = rows.last(out.outputs)[None] if rows.sizes is None else out.hidden
        return rows.cut(outputs), hidden, out.cell

    def _through(
        self,
        x: Tensor,
        weights: Sequence[Sequence[Tensor]],
        dropout: float = 0.0,
        sizes: Sequence[int] | None = None,
    ) -> DecoderOutput:
        """One direction through the layers that have these weights."""
        zeros = x.new_zeros(len(weights), len(x), self.layers.hidden_size)
        return attention_decoder(
            x,
            zeros,
            # Not the same tensor, which torch.compile does not take twice
            zeros.clone() if self.cell_type == "lstm" else None,
            weights,
            context=x.new_empty(len(x), 0),
            cell_type=self.cell_type,
            dropout=dropout,
            batch_sizes=sizes,
        )

    def _both_directions(self, state: Tensor) -> Tensor:
        """(2 n_layers, B, H), forward and backward in turn -> (n_layers, B, 2 H)."""
        if not self.layers.bidirectional:
            return state
        return torch.cat([state[0::2], state[1::2]], -1)
