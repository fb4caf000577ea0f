"""The recurrent layers that encoder and decoder hold."""

from torch import nn

from ..ops.decoder_checks import cell_type as check_cell_type

_MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def recurrent(
    cell_type: str,
    input_dim: int,
    hidden_dim: int,
    n_layers: int,
    dropout: float,
    bidirectional: bool = False,
) -> nn.LSTM | nn.GRU | nn.RNN:
    """PyTorch's module of a cell type, batch first."""
    check_cell_type(cell_type)
    between_layers = dropout if n_layers > 1 else 0.0  # torch warns where there is no between
    return _MODULES[cell_type](
        input_dim,
        hidden_dim,
        n_layers,
        dropout=between_layers,
        bidirectional=bidirectional,
        batch_first=True,
    )
