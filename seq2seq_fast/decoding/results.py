"""What decoding returns."""

from typing import NamedTuple

from torch import Tensor


class Generated(NamedTuple):
    """Hypotheses of each source; with beam search (B, n_best, ...), the best one first; of several
    draws (B, n_samples, ...), one as good as the other.

    n is the length of the longest. A place that no hypothesis fills, which only a small vocabulary
    or strict rules leave, has length 0 and a score of -inf.
    """

    tokens: Tensor  # (B, n) or (B, n_best, n) int64: without bos, eos kept, filled up after the end
    lengths: Tensor  # (B,) or (B, n_best) int64, eos counted
    # The same, float32: sum of the tokens' log-probabilities; None with return_scores=False
    log_probs: Tensor | None
    scores: Tensor | None  # the same, after length and coverage penalty
    finished: Tensor  # the same, bool: ended with eos, not at the greatest length
    weights: Tensor | None  # (B, n, S) or (B, n_best, n, S), zeros after the end; on request


class Scored(NamedTuple):
    """What a model makes of given targets; log-probabilities are float32, or a model's float64."""

    token_log_probs: Tensor  # (B, T - 1) of the tokens after the first, zeros after the end
    log_probs: Tensor  # (B,), their sum
    weights: Tensor | None  # (B, T - 1, S); None without attention
