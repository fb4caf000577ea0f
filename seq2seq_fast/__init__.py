"""Fast additive (Bahdanau) attention for recurrent encoder-decoder models."""

from .library import backends, use_backend
from .nn import Attention, Decoder, Encoder, Seq2Seq
from .ops.additive_attention import additive_attention, additive_scores

__all__ = [
    "Attention",
    "Decoder",
    "Encoder",
    "Seq2Seq",
    "additive_attention",
    "additive_scores",
    "backends",
    "use_backend",
]
__version__ = "0.1.0"
