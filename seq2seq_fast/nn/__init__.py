"""Drop-in modules of the tutorial-form recurrent models with attention."""

from .attention import Attention, PreparedSource
from .decoder import Decoder, DecoderState
from .encoder import Encoder
from .seq2seq import Seq2Seq

__all__ = ["Attention", "Decoder", "DecoderState", "Encoder", "PreparedSource", "Seq2Seq"]
