"""Fast additive (Bahdanau) attention for recurrent encoder-decoder models."""

from . import training
from .library import backends, use_backend
from .nn import Attention, Decoder, Encoder, PreparedSource, Seq2Seq
from .ops.additive_attention import PreparedKeys, additive_attention, additive_scores, prepare_keys

__all__ = [
    "Attention",
    "Decoder",
    "Encoder",
    "PreparedKeys",
    "PreparedSource",
    "Seq2Seq",
    "additive_attention",
    "additive_scores",
    "backends",
    "prepare_keys",
    "training",
    "use_backend",
]
__version__ = "0.1.0"
