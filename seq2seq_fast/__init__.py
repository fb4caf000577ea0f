"""Fast additive (Bahdanau) attention for recurrent encoder-decoder models."""

from .library import backends, use_backend
from .ops.additive_attention import additive_attention, additive_scores

__all__ = ["additive_attention", "additive_scores", "backends", "use_backend"]
__version__ = "0.1.0"
