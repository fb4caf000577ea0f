"""The attention LSTM in the tutorial's form; B batch, S source, T target length, batch first."""

import random

import torch
from torch import Tensor, nn

from .attention import Attention


class Encoder(nn.Module):
    """src (B, S) token ids -> outputs (B, S, H), hidden and cell (n_layers, B, H)."""

    def __init__(
        self, input_dim: int, emb_dim: int, hidden_dim: int, n_layers: int, dropout: float
    ):
        super().__init__()
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.lstm = nn.LSTM(
            emb_dim,
            hidden_dim,
            n_layers,
            dropout=dropout if n_layers > 1 else 0.0,
            batch_first=True,
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, (hidden, cell) = self.lstm(self.dropout(self.embedding(src)))
        return outputs, hidden, cell


class Decoder(nn.Module):
    """One step; the query is the top layer's hidden state before it."""

    def __init__(
        self, output_dim: int, emb_dim: int, hidden_dim: int, n_layers: int, dropout: float
    ):
        super().__init__()
        self.output_dim = output_dim
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.attention = Attention(hidden_dim)
        self.lstm = nn.LSTM(
            emb_dim + hidden_dim,
            hidden_dim,
            n_layers,
            dropout=dropout if n_layers > 1 else 0.0,
            batch_first=True,
        )
        self.fc_out = nn.Linear(2 * hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input: Tensor,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """input (B,) ids -> logits (B, V), hidden and cell (n_layers, B, H); mask (B, S) bool."""
        keys = self.attention.Ua(encoder_outputs)
        return self.step(input, hidden, cell, keys, encoder_outputs, mask)

    def step(
        self,
        input: Tensor,
        hidden: Tensor,
        cell: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As forward, with keys = attention.Ua(values) made beforehand."""
        if hidden.shape[0] != self.lstm.num_layers:
            raise ValueError(f"hidden: {hidden.shape[0]} layers, expected {self.lstm.num_layers}")
        embedded = self.dropout(self.embedding(input)).unsqueeze(1)
        context, _ = self.attention.attend(hidden[-1], keys, values, mask)
        output, (hidden, cell) = self.lstm(torch.cat([embedded, context], -1), (hidden, cell))
        logits = self.fc_out(torch.cat([output, context], -1).squeeze(1))
        return logits, hidden, cell


class Seq2Seq(nn.Module):
    """Encoder and decoder over whole sequences, keys projected once per source."""

    def __init__(self, encoder: Encoder, decoder: Decoder, pad_idx: int | None = None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.pad_idx = pad_idx

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """src (B, S), trg (B, T) ids -> logits (B, T, V), zeros at t = 0.

        One random.random() draw per step decides for the whole batch; src equal to pad_idx is
        never attended to.
        """
        mask = None if self.pad_idx is None else src != self.pad_idx
        values, hidden, cell = self.encoder(src)
        keys = self.decoder.attention.Ua(values)
        token = trg[:, 0]
        steps = [values.new_zeros(trg.shape[0], self.decoder.output_dim)]
        for t in range(1, trg.shape[1]):
            logits, hidden, cell = self.decoder.step(token, hidden, cell, keys, values, mask)
            steps.append(logits)
            token = trg[:, t] if random.random() < teacher_forcing_ratio else logits.argmax(-1)
        return torch.stack(steps, 1)
