"""Decoding: greedy, beam search, sampling; scores of given targets. B batch, n generated tokens."""

import contextlib
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..library import asked_for, use_backend
from ..ops.checks import flag, tensor, whole
from ..ops.linear import linear
from . import graphed, native, stepwise
from .options import DecodingOptions, checked, token_ids
from .packing import DTYPES, PackedDecoder, pack_decoder
from .results import Generated, Scored

if TYPE_CHECKING:
    from ..nn.attention import PreparedSource
    from ..nn.decoder import Decoder, DecoderState

__all__ = ["DecodingOptions", "Generated", "PackedDecoder", "Scored", "generate", "score"]
_warned = False


def generate(
    decoder: "Decoder",
    source: "Tensor | PreparedSource",
    state: "DecoderState",
    *,
    backend: str | None = None,
    **options: Any,
) -> Generated:
    """Decodes from the state that an encoder of any kind has left.

    Args:
        decoder: a `Decoder`.
        source: encoder outputs (B, S, D), or what `decoder.source` made of them, with a mask say;
            the context (B, D) of a decoder without attention.
        state: `DecoderState` before the first token.
        backend: None for the best there is: one compiled call on the CPU, which runs without the
            GIL, and CUDA graphs of fused kernels on a GPU, both in float32, whatever the decoder
            is; float64 is PyTorch step by step. "native" for the former, else an error;
            "reference" for plain PyTorch.
        options: of `DecodingOptions`; bos, eos and max_length must be given.

    Returns:
        `Generated`. A source that is masked everywhere is decoded from contexts of zero; an empty
        batch gives empty tensors.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        KeyboardInterrupt: within a step or a fifth of a second of Ctrl-C, as whatever else the
            handler of a signal raises meanwhile.
    """
    try:
        found = _at_once(decoder, source, state, backend, options)
        if found is not None:
            return found
        B = _rows(decoder, state)
        with torch.no_grad(), evaluating(decoder):
            asked = checked(options, B, decoder.output_dim, decoder.attention is not None)
            prepared = decoder.source(source)
            decoder.check_state(state, prepared)
            packed = _ready(decoder, backend)
            engine = packed is not None or native.chosen(decoder, backend)
            if B == 0:
                return _wanted(_nothing(asked, prepared, state), asked)
            if engine and not state.hidden.is_cuda:
                packed = packed or _packed(decoder)
                found = native.generate(decoder, packed, prepared, state, asked)
            else:
                given = prepared, state, asked
                if asked.n_samples > 1:
                    given = stepwise.repeated(*given)
                with (
                    use_backend("reference") if backend == "reference" else contextlib.nullcontext()
                ):
                    found = (graphed if engine else stepwise).generate(decoder, *given)
        return _wanted(_by_source(found, asked.n_samples), asked)
    except native.Interrupted as stopped:
        raised = stopped.__cause__
    assert raised is not None
    raise raised  # not in the block above, whose exception would become its context


def _wanted(found: Generated, asked: DecodingOptions) -> Generated:
    return found if asked.return_scores else found._replace(log_probs=None, scores=None)


def _by_source(found: Generated, n_samples: int) -> Generated:
    if n_samples == 1:
        return found

    def split(x: Any) -> Any:
        return None if x is None else x.unflatten(0, (-1, n_samples))

    return Generated(*map(split, found))


def _at_once(
    decoder: "Decoder",
    source: Any,  # a PreparedSource, or this is not the way
    state: "DecoderState",
    backend: str | None,
    options: dict[str, Any],
) -> Generated | None:
    """`generate` of what is asked for most often at batch 1, a prepared source with prepared
    weights, without the questions that the engine asks too: to ask them in Python takes as long as
    a step or two of decoding. None where it is something else, or wrong, as those then tell."""
    try:
        packed = _ready(decoder, backend)
        if packed is None or decoder.training:
            return None
        if decoder.like.dtype != torch.float32:  # as source and state must be
            return None
        if state.location is not None or (state.context is not None and not decoder.query_after):
            return None
        widths = state.hidden.shape[2], source.values.shape[2], source.v.shape[0]
        if widths != packed.widths:
            return None
        asked = checked(options, 0, decoder.output_dim, True)
        # What is checked against the rows that there are, and what asks a generator for a number,
        # which must not be asked again should the engine refuse.
        if asked.prefix is not None or asked.max_length_ratio is not None or asked.sample:
            return None
        with torch.no_grad():
            return _wanted(native.generate_as_is(decoder, packed, source, state, asked), asked)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def prepare_inference(decoder: "Decoder", dtype: str | None, project_values: bool = False) -> None:
    """See `Seq2Seq.prepare_inference`."""
    if dtype is None:
        decoder.packed = decoder.loops = None
        return
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {list(DTYPES)} or None")
    flag(project_values=project_values)
    weight = decoder.like
    if weight.dtype not in native.DTYPES or weight.device.type not in native.OPS:
        raise ValueError(
            f"decoder: is {weight.dtype} on {weight.device}, expected float32, bfloat16 or float16"
            " on the CPU or a GPU"
        )
    why = native.refusal(decoder) if weight.is_cuda else decoder.refusal()
    if why is not None:
        raise ValueError(f"decoder: cannot be prepared: {why}")
    if weight.is_cuda:
        if dtype != "float32":
            raise ValueError(f"dtype: got {dtype!r}, expected 'float32' on {weight.device}")
        if project_values:
            raise ValueError(f"project_values: got True, expected False on {weight.device}")
        graphed.prepare(decoder)
        return
    if project_values and decoder.attention is None:
        raise ValueError("project_values: got True, expected False of a decoder without attention")
    if project_values and decoder.attentional_dim is not None:
        raise ValueError("project_values: got True, expected False with attentional vectors")
    decoder.packed = pack_decoder(decoder, dtype, project_values=project_values)


def _ready(decoder: "Decoder", backend: str | None) -> PackedDecoder | None:
    """decoder's weights, if they lie prepared for this call: then it needs no other question."""
    kept: PackedDecoder | None = decoder.packed
    if kept is None or asked_for(backend) not in (None, "native"):
        return None
    return kept if kept.watch.holds() and decoder.refusal() is None else None


def _packed(decoder: "Decoder") -> PackedDecoder:
    """decoder's weights packed anew: kept where they were prepared, else for this call."""
    kept: PackedDecoder | None = decoder.packed
    if kept is None:
        return pack_decoder(decoder, "float32", seek=False)  # which takes longer than it saves
    again = pack_decoder(decoder, kept.dtype, project_values=kept.projects_values)
    decoder.packed = again
    return again


def score(
    decoder: "Decoder",
    source: "Tensor | PreparedSource",
    state: "DecoderState",
    trg: Tensor,
    *,
    eos: int | None = None,
) -> Scored:
    """log P of given targets: sum_t log P(trg[t] | trg[:t], source) over t from 1 on.

    Args:
        decoder, source, state: as of `generate`.
        trg: (B, T) ids, fed from the first one on, which is bos usually; T at least 1.
        eos: what follows the first eos after trg[:, 0] counts nothing; None counts all.

    Returns:
        `Scored`, with gradients.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    B = _rows(decoder, state)
    check_targets(decoder, trg, eos)
    if trg.shape[0] != B:
        raise ValueError(
            f"trg: got shape {tuple(trg.shape)}, expected (B, T) with B = {B} as the source has"
        )
    prepared = decoder.source(source)
    decoder.check_state(state, prepared)
    fed, wanted = trg[:, :-1], trg[:, 1:].long()
    out = decoder.steps(fed, state, prepared)
    logits = linear(decoder.fc_out, out.features)
    if logits.dtype != torch.float64:
        logits = logits.float()
    log_probs = -F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    log_probs = log_probs.view(wanted.shape)
    weights = out.weights
    if eos is not None:
        ended = (wanted == eos).long().cumsum(1) - (wanted == eos).long() > 0
        log_probs = log_probs.masked_fill(ended, 0)
        weights = None if weights is None else weights.masked_fill(ended[..., None], 0)
    return Scored(log_probs, log_probs.sum(1), weights)


def check_targets(decoder: "Decoder", trg: object, eos: object) -> None:
    """What `score` asks of them, but for the rows of a source."""
    device = decoder.like.device
    token_ids("trg", trg, decoder.output_dim)
    assert isinstance(trg, Tensor)
    if trg.dim() != 2 or trg.shape[1] == 0:
        raise ValueError(f"trg: got shape {tuple(trg.shape)}, expected (B, T) with T above 0")
    if trg.device != device:
        raise ValueError(f"trg: is on {trg.device}, expected {device} as the decoder is")
    if eos is not None:
        whole("eos", eos, 0, decoder.output_dim - 1)


def check(
    decoder: "Decoder", batch: int | None, backend: str | None, options: dict[str, Any]
) -> None:
    """What can be asked of the arguments of `generate` before the source has been encoded; batch is
    None where the source cannot tell."""
    attends = decoder.attention is not None
    if batch is not None:
        checked(options, batch, decoder.output_dim, attends)
    else:  # no source that a prefix or bos could have rows for, as the encoder will say
        bos = options.get("bos")
        of_rows = {"prefix": None} | ({"bos": 0} if isinstance(bos, Tensor) else {})
        checked(options | of_rows, 0, decoder.output_dim, attends)
    if _ready(decoder, backend) is None:
        native.chosen(decoder, backend)


def _training(model: nn.Module) -> bool:
    """Whether any module is in training mode. `modules` would take as long as a step."""
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is None:
            continue
        if module.training:
            return True
        left += module._modules.values()
    return False


def _levels_outside() -> int:
    """What `warnings.warn` of this function's caller calls the first frame that is neither this
    library's nor PyTorch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    return level


_OURS = (__name__.partition(".")[0], "torch")


class evaluating:
    """Inside the block dropout is off, of the model, whichever thread runs it, until the last
    thread has left. Warns, once, if it had to be turned off."""

    # Modules that were in training mode, and how many blocks they are in
    _inside: ClassVar[dict[int, tuple[nn.Module, int]]] = {}
    _lock = threading.Lock()

    def __init__(self, model: nn.Module):
        self._modules: list[nn.Module] = []
        self._model = model

    def __enter__(self) -> None:
        global _warned
        with self._lock:  # or another thread could turn dropout on between question and answer
            trains = _training(self._model)
            if not trains and not self._inside:  # most often
                return
            if not trains or _warned:
                return self._turn_off()
        _warned = True
        warnings.warn(  # which may raise, and so comes first
            "decoding a model in training mode: dropout is turned off meanwhile, in all threads;"
            " call model.eval()",
            stacklevel=_levels_outside(),
        )
        with self._lock:
            self._turn_off()

    def _turn_off(self) -> None:
        self._modules = [m for m in self._model.modules() if m.training or id(m) in self._inside]
        for module in self._modules:
            blocks = self._inside.get(id(module), (module, 0))[1]
            self._inside[id(module)] = module, blocks + 1
            module.training = False

    def __exit__(self, *_: object) -> None:
        if not self._modules:
            return
        with self._lock:
            for module in self._modules:
                blocks = self._inside[id(module)][1]
                self._inside[id(module)] = module, blocks - 1
                if blocks == 1:
                    module.training = True
                    del self._inside[id(module)]


def _rows(decoder: "Decoder", state: "DecoderState") -> int:
    """B of a state, of which the rest is checked along with the source."""
    if not hasattr(decoder, "check_state"):
        raise TypeError(f"decoder: got {type(decoder).__name__}, expected a Decoder")
    if not hasattr(state, "hidden"):
        raise TypeError(f"state: got {type(state).__name__}, expected a DecoderState")
    hidden = tensor("hidden", state.hidden)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected (n_layers, B, H)")
    return hidden.shape[1]


def _nothing(
    options: DecodingOptions, source: "stepwise.Source", state: "DecoderState"
) -> Generated:
    each = options.n_best if options.beam_size > 1 else options.n_samples
    rows = (0,) if options.beam_size == 1 and each == 1 else (0, each)
    like = state.hidden
    weights = None
    if options.return_weights and not isinstance(source, Tensor):
        weights = like.new_empty(*rows, 0, source.values.shape[1])
    return Generated(
        like.new_empty((*rows, 0), dtype=torch.int64),
        like.new_empty(rows, dtype=torch.int64),
        like.new_empty(rows, dtype=torch.float32),
        like.new_empty(rows, dtype=torch.float32),
        like.new_empty(rows, dtype=torch.bool),
        weights,
    )
