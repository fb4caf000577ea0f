"""Fast additive (Bahdanau) attention for recurrent encoder-decoder models."""

from . import training
from .decoding import DecodingOptions, Generated, Scored, generate, score
from .library import backends, use_backend
from .nn import Attention, Decoder, DecoderState, Encoder, PreparedSource, Seq2Seq
from .ops.additive_attention import PreparedKeys, additive_attention, additive_scores, prepare_keys
from .ops.attention_decoder import DecoderOutput, Feedback, attention_decoder
from .ops.attentional_vector import AttentionalVector
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.location import Location, location_attention

__all__ = [
    "Attention",
    "AttentionalVector",
    "Decoder",
    "DecoderOutput",
    "DecoderState",
    "DecodingOptions",
    "Encoder",
    "Feedback",
    "Generated",
    "Location",
    "PreparedKeys",
    "PreparedSource",
    "Scored",
    "Seq2Seq",
    "additive_attention",
    "additive_scores",
    "attention_decoder",
    "backends",
    "generate",
    "linear_cross_entropy",
    "location_attention",
    "prepare_keys",
    "score",
    "training",
    "use_backend",
]
__version__ = "0.1.0"
