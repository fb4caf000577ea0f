"""Additive attention with its projections."""

from torch import Tensor, nn

from ..ops.additive_attention import additive_attention


class Attention(nn.Module):
    """weights = softmax(Va tanh(Wa hidden + Ua encoder_outputs)); all widths are hidden_dim (H).

    Va's bias moves every score alike and therefore changes nothing; it is kept for the state dict.
    """

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.Wa = nn.Linear(hidden_dim, hidden_dim)
        self.Ua = nn.Linear(hidden_dim, hidden_dim)
        self.Va = nn.Linear(hidden_dim, 1)

    def forward(
        self, hidden: Tensor, encoder_outputs: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden (B, H), encoder_outputs (B, S, H), mask (B, S) bool, True = attend.

        Returns context (B, 1, H) and weights (B, S).
        """
        return self.attend(hidden, self.Ua(encoder_outputs), encoder_outputs, mask)

    def attend(
        self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As forward, with keys = Ua(encoder_outputs) made beforehand."""
        context, weights = additive_attention(
            self.Wa(hidden), keys, values, self.Va.weight[0], mask=mask
        )
        return context.unsqueeze(1), weights
