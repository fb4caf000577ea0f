"""Triton kernels and their launchers, by the name of the op."""

from collections.abc import Callable

from . import (
    additive_attention,
    additive_scores,
    additive_scores_backward,
    attention_decoder,
    attention_decoder_backward,
)
from .arithmetic import INTERPRETED

LAUNCHERS: dict[str, Callable] = {
    "additive_scores": additive_scores.additive_scores,
    "additive_scores_backward": additive_scores_backward.additive_scores_backward,
    "additive_attention": additive_attention.additive_attention,
    "additive_attention_backward": additive_attention.additive_attention_backward,
    "attention_decoder": attention_decoder.attention_decoder,
    "attention_decoder_backward": attention_decoder_backward.attention_decoder_backward,
}

__all__ = ["INTERPRETED", "LAUNCHERS"]
