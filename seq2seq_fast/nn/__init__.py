"""Drop-in modules of the tutorial-form attention LSTM."""

from .attention import Attention, PreparedSource
from .seq2seq import Decoder, Encoder, Seq2Seq

__all__ = ["Attention", "Decoder", "Encoder", "PreparedSource", "Seq2Seq"]
