"""The recurrent encoder; B batch, S source, batch first."""

import torch
from torch import Tensor, nn

from ..decoding.fits import plain_layers
from ..decoding.packing import PackedLayers, pack_layers
from ..library import asked_for, choose
from ..ops.attention_decoder import DecoderOutput, attention_decoder
from ..ops.checks import flag
from ..ops.dropout import dropout_factors
from . import checks
from .cells import recurrent


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
        checks.probability("dropout", dropout)
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

    def forward(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """src (B, S) token ids -> outputs (B, S, output_dim), hidden and cell
        (n_layers, B, state_dim); cell is None unless the layers are an LSTM.

        Raises:
            TypeError, ValueError: src is not (B, S) whole numbers in the vocabulary with S above 0.
        """
        table = self.embedding
        checks.tokens("src", src, "(B, S)", 2, table.num_embeddings, table.weight.device)
        if src.shape[1] == 0:
            raise ValueError("src: got an empty source (S = 0), expected S above 0")
        embedded = self.embedding(src)
        if self.training and self.dropout.p > 0:
            embedded = embedded * dropout_factors(embedded.shape, self.dropout.p, embedded)
        if self._runs_packed(embedded):
            outputs, hidden, cell = self._run_packed(embedded)
        elif self._runs_in_decoder(embedded):
            outputs, hidden, cell = self._run(embedded)
        else:
            outputs, state = self.layers(embedded)
            hidden, cell = state if self.cell_type == "lstm" else (state, None)
        hidden = self._both_directions(hidden)
        cell = None if cell is None else self._both_directions(cell)
        if hasattr(self, "bridge_hidden"):
            hidden = torch.tanh(self.bridge_hidden(hidden))
            cell = None if cell is None else self.bridge_cell(cell)
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

    def _runs_packed(self, embedded: Tensor) -> bool:
        return (
            not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and self.packed is not None
            and self._runs_in_loops(embedded)
        )

    def _run_packed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        packed = self.packed
        if packed is None or not packed.watch.holds():
            packed = self.packed = pack_layers(self._modules, self.cell_type)
        layers = self.layers
        outputs, hidden, cell = torch.ops.seq2seq_fast.recurrent_layers.default(
            x.contiguous(),
            *packed.weights,
            self.cell_type,
            layers.hidden_size,
            layers.bidirectional,
        )
        return outputs, hidden, cell if self.cell_type == "lstm" else None

    def _runs_in_decoder(self, embedded: Tensor) -> bool:
        """Whether the decoder's loop, which needs no attention, is the faster one. On the CPU it
        takes 20 to 90 % of the time of nn.GRU and nn.RNN, the least with few rows. nn.LSTM, which
        is oneDNN's, takes as long as it forward and longer in training."""
        trains = torch.is_grad_enabled() and self.training
        return (self.cell_type != "lstm" or trains) and self._runs_in_loops(embedded)

    def _runs_in_loops(self, embedded: Tensor) -> bool:
        """Whether the library's loops can take the place of torch's module."""
        layers = self.layers
        return (
            type(layers) in (nn.LSTM, nn.GRU, nn.RNN)
            and plain_layers(layers, self.cell_type)
            and not (layers._forward_hooks or layers._forward_pre_hooks)
            and embedded.is_cpu
            and embedded.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and asked_for(None) in (None, "native")
            and choose("attention_decoder", embedded, None) == "native"
        )

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the layers make of x (B, S, E), in the decoder's loop."""
        layers, weights = self.layers, self.layers.all_weights
        dropout = layers.dropout if self.training else 0.0
        if not layers.bidirectional:
            out = self._through(x, weights, dropout)
            return out.outputs, out.hidden, out.cell
        found: list[DecoderOutput] = []
        for i in range(0, len(weights), 2):
            if i > 0 and dropout > 0:
                x = x * dropout_factors(x.shape, dropout, x)
            found.append(self._through(x, weights[i : i + 1]))
            found.append(self._through(x.flip(1), weights[i + 1 : i + 2]))
            x = torch.cat([found[-2].outputs, found[-1].outputs.flip(1)], -1)
        cells = [out.cell for out in found if out.cell is not None]
        return x, torch.cat([out.hidden for out in found]), torch.cat(cells) if cells else None

    def _through(self, x: Tensor, weights: list, dropout: float = 0.0) -> DecoderOutput:
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
        )

    def _both_directions(self, state: Tensor) -> Tensor:
        """(2 n_layers, B, H), forward and backward in turn -> (n_layers, B, 2 H)."""
        if not self.layers.bidirectional:
            return state
        return torch.cat([state[0::2], state[1::2]], -1)
