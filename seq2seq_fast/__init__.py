"""Fast additive (Bahdanau) attention for recurrent encoder-decoder models."""

from .library import backends, use_backend
from .nn import Attention, Decoder, Encoder, Seq2Seq
from .ops.additive_attention import PreparedKeys, additive_attention, additive_scores, prepare_keys

__all__ = [
    "Attention",
    "Decoder",
    "Encoder",
    "PreparedKeys",
    "Seq2Seq",
    "additive_attention",
    "additive_scores",
    "backends",
    "prepare_keys",
    "use_backend",
]
__version__ = "0.1.0"
