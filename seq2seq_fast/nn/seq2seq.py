"""The attention LSTM in the tutorial's form; B batch, S source, T target length, batch first."""

import random

import torch
from torch import Tensor, nn

from . import checks
from .attention import Attention, PreparedSource


def _lstm(input_dim: int, hidden_dim: int, n_layers: int, dropout: float) -> nn.LSTM:
    between_layers = dropout if n_layers > 1 else 0.0  # torch warns where there is no between
    return nn.LSTM(input_dim, hidden_dim, n_layers, dropout=between_layers, batch_first=True)


class Encoder(nn.Module):
    """Embedding, dropout and an LSTM over the source.

    Args:
        input_dim: size of the vocabulary.
        emb_dim, hidden_dim (H), n_layers: widths and depth.
        dropout: on the embedded source and between layers.
    """

    def __init__(
        self, input_dim: int, emb_dim: int, hidden_dim: int, n_layers: int, dropout: float
    ):
        super().__init__()
        checks.at_least_one(
            input_dim=input_dim, emb_dim=emb_dim, hidden_dim=hidden_dim, n_layers=n_layers
        )
        checks.probability("dropout", dropout)
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.lstm = _lstm(emb_dim, hidden_dim, n_layers, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """src (B, S) token ids -> outputs (B, S, H), hidden and cell (n_layers, B, H).

        Raises:
            TypeError, ValueError: src is not (B, S) whole numbers in the vocabulary with S above 0.
        """
        checks.tokens("src", src, "(B, S)", 2, self.embedding.num_embeddings)
        if src.shape[1] == 0:
            raise ValueError("src: got an empty source (S = 0), expected S above 0")
        outputs, (hidden, cell) = self.lstm(self.dropout(self.embedding(src)))
        return outputs, hidden, cell


class Decoder(nn.Module):
    """One step; the query is the top layer's hidden state before it.

    Args:
        output_dim: size of the vocabulary (V).
        emb_dim, hidden_dim (H), n_layers: widths and depth; H and n_layers as the encoder's.
        dropout: on the embedded token and between layers.
    """

    def __init__(
        self, output_dim: int, emb_dim: int, hidden_dim: int, n_layers: int, dropout: float
    ):
        super().__init__()
        checks.at_least_one(
            output_dim=output_dim, emb_dim=emb_dim, hidden_dim=hidden_dim, n_layers=n_layers
        )
        checks.probability("dropout", dropout)
        self.output_dim = output_dim
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.attention = Attention(hidden_dim)
        self.lstm = _lstm(emb_dim + hidden_dim, hidden_dim, n_layers, dropout)
        self.fc_out = nn.Linear(2 * hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input: Tensor,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor | PreparedSource,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token further.

        Args:
            input: (B,) token ids.
            hidden, cell: (n_layers, B, H).
            encoder_outputs: (B, S, H), or what `attention.precompute` made of them, which spares
                every step but the first the projection of the keys.
            mask: (B, S) bool, True = attend; given to `precompute` where that was used.

        Returns:
            logits (B, V), hidden and cell (n_layers, B, H).

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        source = self.attention.source(encoder_outputs, mask)
        checks.tokens("input", input, "(B,)", 1, self.output_dim)
        B = source.values.shape[0]
        if input.shape[0] != B:
            raise ValueError(f"input: got batch {input.shape[0]}, expected {B} as the source has")
        shape = (self.lstm.num_layers, B, self.lstm.hidden_size)
        weight = self.fc_out.weight
        checks.state("hidden", hidden, shape, weight)
        checks.state("cell", cell, shape, weight)
        return self._step(input, hidden, cell, source)

    def _step(
        self, input: Tensor, hidden: Tensor, cell: Tensor, source: PreparedSource
    ) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.dropout(self.embedding(input)).unsqueeze(1)
        context, _ = self.attention(hidden[-1], source)
        output, (hidden, cell) = self.lstm(torch.cat([embedded, context], -1), (hidden, cell))
        logits = self.fc_out(torch.cat([output, context], -1).squeeze(1))
        return logits, hidden, cell


class Seq2Seq(nn.Module):
    """Encoder and decoder over whole sequences, keys prepared once per source.

    Args:
        encoder, decoder: of one hidden_dim and n_layers.
        pad_idx: source token that is never attended to, or None.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, pad_idx: int | None = None):
        super().__init__()
        for name in ("hidden_size", "num_layers"):
            ours, theirs = getattr(decoder.lstm, name), getattr(encoder.lstm, name)
            if ours != theirs:
                raise ValueError(f"decoder: has {name} {ours}, expected {theirs} as encoder has")
        vocabulary = encoder.embedding.num_embeddings
        if pad_idx is not None and not 0 <= pad_idx < vocabulary:
            raise ValueError(f"pad_idx: got {pad_idx}, expected 0 to {vocabulary - 1} or None")
        self.encoder = encoder
        self.decoder = decoder
        self.pad_idx = pad_idx

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """src (B, S), trg (B, T) ids -> logits (B, T, V), zeros at t = 0.

        One random.random() draw per step decides for the whole batch whether the next input is
        trg's token or the model's own argmax; src equal to pad_idx is never attended to.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.probability("teacher_forcing_ratio", teacher_forcing_ratio)
        checks.tokens("trg", trg, "(B, T)", 2, self.decoder.output_dim)
        values, hidden, cell = self.encoder(src)
        if trg.shape[0] != src.shape[0] or trg.shape[1] == 0:
            raise ValueError(
                f"trg: got shape {tuple(trg.shape)}, expected (B, T) with B = {src.shape[0]} as"
                " src has and T above 0"
            )
        mask = None if self.pad_idx is None else src != self.pad_idx
        source = self.decoder.attention.precompute(values, mask)
        token = trg[:, 0]
        steps = [values.new_zeros(trg.shape[0], self.decoder.output_dim)]
        for t in range(1, trg.shape[1]):
            logits, hidden, cell = self.decoder._step(token, hidden, cell, source)
            steps.append(logits)
            token = trg[:, t] if random.random() < teacher_forcing_ratio else logits.argmax(-1)
        return torch.stack(steps, 1)
