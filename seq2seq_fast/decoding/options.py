"""How to decode, checked before anything is computed."""

import functools
import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import above_zero, flag, in_vocabulary, instance, number, tensor, whole

MOST_ROWS = 2**31 - 1  # of sources, each as often as it is drawn for
FARTHEST = 2.0**62  # that a length may be, so that it stays whole in 64 bits


@dataclass(frozen=True)
class DecodingOptions:
    """What `generate` may be asked for, by keyword. |Y| counts a hypothesis' tokens, its eos among
    them.

    Args:
        bos, eos: token ids, fed first and ending a hypothesis. bos may be a Tensor (B,), one of
            each source: of its language, say.
        max_length: most tokens of a hypothesis.
        max_length_ratio: the same relative to the source: at most floor(ratio |X|), where |X|
            counts the positions that may be attended to, but at least 1 and the prefix.
        min_length: no eos before this many tokens, itself among them.
        pad_idx: fills tokens after the end; None for eos.
        beam_size: 1 for greedy decoding. More: beam search. Of all continuations of a row's live
            hypotheses, by summed log-probability, those with eos among the first beam_size end,
            and the first beam_size others live on.
        n_best: hypotheses returned of each row, at most beam_size.
        length_penalty, coverage_penalty: alpha and beta of Wu et al. 2016, by which ended
            hypotheses are ranked:
                s(Y, X) = log P(Y | X) / lp(Y) + cp(X, Y),  lp(Y) = ((5 + |Y|) / 6)^alpha,
                cp(X, Y) = beta sum_s log min(sum_t w[t, s], 1), over s that may be attended to.
            A row's search stops as soon as none of its live hypotheses can come among its n_best.
        no_repeat_ngram: no n-gram of this many tokens comes twice in a hypothesis; 0 for no rule.
        sample: draw each token instead of taking the most probable one.
        temperature, top_k, top_p: draw from softmax(log p / temperature), of the top_k most
            probable tokens (0: of all) and those as probable as the last of them, of the fewest
            whose probabilities reach top_p (Holtzman et al. 2020).
        n_samples: how often each source is drawn for; more than 1 give (B, n_samples, ...). The
            draws of a source are those that so many sources like it, side by side, would have; on
            the CPU they share its keys and values.
        generator: of the draws, which is asked for one number; None for torch's own. A draw hangs
            on that number, on the row's place in the batch and on the step alone.
        prefix: (B, P) or (P,) ids that every hypothesis begins with, parts of its tokens, length
            and score. Beam search has no hypotheses of probability zero: where the prefix is one,
            none is returned.
        return_weights: the attention weights of every token.
        return_scores: False spares the log-probabilities, where the tokens alone are wanted: greedy
            decoding of a large vocabulary on the CPU then never makes all the logits of a step.

    Where min_length or no_repeat_ngram leave a hypothesis no token, it ends with eos. They change
    what may be chosen, not the log-probabilities of what is.
    """

    bos: int | Tensor
    eos: int
    max_length: int
    max_length_ratio: float | None = None
    min_length: int = 0
    pad_idx: int | None = None
    beam_size: int = 1
    n_best: int = 1
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    no_repeat_ngram: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n_samples: int = 1
    generator: torch.Generator | None = None
    prefix: Tensor | None = None
    return_weights: bool = False
    return_scores: bool = True

    @property
    def fill(self) -> int:
        return self.eos if self.pad_idx is None else self.pad_idx

    @property
    def whole(self) -> list[int]:
        """Those that are whole numbers, in the order of the compiled engines; 0 where each row has
        its own bos."""
        return [
            0 if isinstance(self.bos, Tensor) else self.bos, self.eos, self.fill, self.min_length,
            self.beam_size, self.n_best, self.no_repeat_ngram,
        ]  # fmt: skip

    def bos_of_rows(self, device: torch.device | str) -> Tensor | None:
        """(B,) int64 where each row has its own bos."""
        if not isinstance(self.bos, Tensor):
            return None
        return self.bos.to(device, torch.int64).contiguous()

    def limits(self, lengths: Tensor) -> Tensor:
        """The most tokens of each row, given the length of its source."""
        most = torch.full_like(lengths, self.max_length)
        if self.max_length_ratio is not None:
            relative = (self.max_length_ratio * lengths.double()).floor()
            relative = relative.clamp_max(FARTHEST).long()
            most = torch.minimum(most, relative)
        least = 1 if self.prefix is None else max(1, self.prefix.shape[-1])
        return most.clamp_min(least)


def checked(given: dict[str, Any], batch: int, vocabulary: int, attention: bool) -> DecodingOptions:
    """`DecodingOptions` of what was given. Those that have been found good, call after call the
    same most often, are not checked again, but where they are tensors and such.

    Raises:
        TypeError, ValueError: naming the option, what came and what was expected.
    """
    if all(type(x) in _PLAIN for x in given.values()):
        options = _checked_before(vocabulary, attention, **given)
    else:
        options = _named({name: _plain(x) for name, x in given.items()})
        check(options, batch, vocabulary, attention)
    if batch * options.n_samples > MOST_ROWS:
        most = MOST_ROWS // batch
        raise ValueError(f"n_samples: got {options.n_samples}, expected at most {most}, by {batch}")
    return options


def _plain(x: Any) -> Any:
    """Whole numbers of NumPy, say, as Python's."""
    return int(x) if isinstance(x, Integral) and not isinstance(x, bool) else x


def _named(given: dict[str, Any]) -> DecodingOptions:
    known = [field.name for field in fields(DecodingOptions)]
    for name in given:
        if name not in known:
            raise TypeError(f"{name}: got an option that is not known, expected one of {known}")
    for name in ("bos", "eos", "max_length"):
        if name not in given:
            raise TypeError(f"{name}: got nothing, expected a whole number")
    return DecodingOptions(**given)


_PLAIN = (int, float, bool, type(None))


@functools.lru_cache(maxsize=64, typed=True)
def _checked_before(vocabulary: int, attention: bool, /, **given: Any) -> DecodingOptions:
    options = _named(given)
    check(options, 0, vocabulary, attention)
    return options


def check(options: DecodingOptions, batch: int, vocabulary: int, attention: bool) -> None:
    """Raises TypeError or ValueError, naming the option, what came and what was expected."""
    if isinstance(options.bos, Tensor):
        _ids_to_read("bos", options.bos, vocabulary)
        if options.bos.shape != (batch,):
            got = tuple(options.bos.shape)
            raise ValueError(f"bos: got shape {got}, expected (B,) = ({batch},)")
    else:
        whole("bos", options.bos, 0, vocabulary - 1)
    whole("eos", options.eos, 0, vocabulary - 1)
    if options.pad_idx is not None:
        whole("pad_idx", options.pad_idx, 0, vocabulary - 1)
    whole("max_length", options.max_length, 1)
    whole("min_length", options.min_length, 0, options.max_length)
    whole("beam_size", options.beam_size, 1, vocabulary)
    whole("n_best", options.n_best, 1)
    if options.n_best > options.beam_size:
        raise ValueError(
            f"n_best: got {options.n_best}, expected at most beam_size = {options.beam_size}"
        )
    whole("no_repeat_ngram", options.no_repeat_ngram, 0)
    whole("top_k", options.top_k, 0)
    whole("n_samples", options.n_samples, 1)
    _not_below_zero("length_penalty", options.length_penalty)
    _not_below_zero("coverage_penalty", options.coverage_penalty)
    above_zero("temperature", options.temperature)
    flag(
        sample=options.sample,
        return_weights=options.return_weights,
        return_scores=options.return_scores,
    )
    if options.max_length_ratio is not None:
        above_zero("max_length_ratio", options.max_length_ratio)
    if not options.return_scores and options.beam_size > 1:
        raise ValueError(
            "return_scores: got False, expected True of beam search, which goes by them"
        )
    number("top_p", options.top_p)
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p: got {options.top_p}, expected above 0 and at most 1")
    _sampling(options)
    if not attention:
        for name in ("coverage_penalty", "return_weights", "max_length_ratio"):
            if getattr(options, name):
                raise ValueError(
                    f"{name}: got {getattr(options, name)}, expected nothing of a decoder"
                    " without attention"
                )
    _prefix(options, batch, vocabulary)


def _not_below_zero(name: str, x: float) -> None:
    number(name, x)
    if not (math.isfinite(x) and x >= 0):
        raise ValueError(f"{name}: got {x}, expected a finite number, at least 0")


_OF_SAMPLING = {
    field.name: field.default
    for field in fields(DecodingOptions)
    if field.name in ("temperature", "top_k", "top_p", "n_samples", "generator")
}


def _sampling(options: DecodingOptions) -> None:
    if options.generator is not None:
        instance("generator", options.generator, torch.Generator)
    if options.sample:
        if options.beam_size > 1:
            raise ValueError(f"beam_size: got {options.beam_size}, expected 1 with sample")
        return
    for name, default in _OF_SAMPLING.items():
        if getattr(options, name) != default:
            raise ValueError(f"{name}: got {getattr(options, name)}, expected it only with sample")


def _prefix(options: DecodingOptions, batch: int, vocabulary: int) -> None:
    prefix: Any = options.prefix
    if prefix is None:
        return
    _ids_to_read("prefix", prefix, vocabulary)
    if prefix.dim() not in (1, 2) or (prefix.dim() == 2 and prefix.shape[0] != batch):
        raise ValueError(
            f"prefix: got shape {tuple(prefix.shape)}, expected (P,) or (B, P) with B = {batch}"
        )
    if prefix.shape[-1] > options.max_length:
        raise ValueError(
            f"prefix: got {prefix.shape[-1]} tokens, expected at most max_length ="
            f" {options.max_length}"
        )
    if bool((prefix == options.eos).any()):
        raise ValueError(f"prefix: got eos ({options.eos}) in it, expected none")


def _ids_to_read(name: str, x: Tensor, vocabulary: int) -> None:
    token_ids(name, x, vocabulary)
    if x.is_meta:
        raise ValueError(f"{name}: is on meta, expected ids that can be read")


def token_ids(name: str, x: object, vocabulary: int) -> None:
    """x: whole numbers below `vocabulary`, where there are numbers."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: got {got}, expected a Tensor of int64 or int32 token ids")
    tensor(name, x)
    if not x.is_meta:
        in_vocabulary(name, x, vocabulary)
