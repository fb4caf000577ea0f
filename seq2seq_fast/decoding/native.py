"""The way to the compiled engines: on the CPU one call runs the whole loop, without Python and the
GIL; on a GPU see graphed.py."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..library import HAS_KERNEL, interruption, is_reference
from ..ops.location import accumulates
from ..ops.modules import make_weights
from . import sampling, stepwise
from .options import DecodingOptions
from .packing import PackedDecoder
from .results import Generated

if TYPE_CHECKING:
    from ..nn.attention import PreparedSource
    from ..nn.decoder import Decoder, DecoderState


OPS = {"cpu": "decode", "cuda": "decode_steps"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of decoders; all is float32 all the same
WIDEST = 4096  # attention that one block of a GPU has room for: kMostFeaturesInShared


class Interrupted(BaseException):
    """A signal's handler raised the cause of this while the engine ran, and so ended it. Not an
    `Exception`: who catches what an engine refuses must not catch Ctrl-C."""


def refusal(decoder: "Decoder") -> str | None:
    """Why no engine can run it, or None."""
    weight, attention = decoder.like, decoder.attention
    device = weight.device.type
    if device not in OPS:
        return f"the decoder is on {weight.device}"
    if not HAS_KERNEL[OPS[device], device]:
        return f"the compiled extension has none for {device}"
    if weight.dtype not in DTYPES:
        return f"the decoder is {weight.dtype}"
    if device == "cuda" and attention is not None and attention.Wa.weight.shape[0] > WIDEST:
        return f"the attention is wider than {WIDEST}"
    return decoder.refusal()


def chosen(decoder: "Decoder", backend: str | None) -> bool:
    """Whether an engine decodes this; asked for and not able to, it raises."""
    weight = decoder.like
    why = refusal(decoder)
    if backend == "native" and why is not None:
        raise ValueError(f"backend: 'native' was asked for, but {why}")
    op = OPS.get(weight.device.type, "decode")
    return not is_reference(op, weight, backend) and why is None


def _floats(x: Tensor) -> Tensor:
    """Contiguous and float32, which autocast's tensors are not."""
    return x.float().contiguous()


def _states(state: "DecoderState") -> tuple[Tensor, Tensor]:
    hidden = _floats(state.hidden)
    return hidden, hidden.new_empty(0) if state.cell is None else _floats(state.cell)


class _Attended(NamedTuple):
    """What the engine attends to: nothing without attention."""

    parts: list[Tensor]  # of the source, and how a location is seen in it
    mask: Tensor | None
    accumulates: tuple[int, ...]  # of each channel of the location


def _source(
    decoder: "Decoder", source: "stepwise.Source", state: "DecoderState"
) -> tuple[Tensor | None, _Attended]:
    """Context before the first step, and what is attended to."""
    if isinstance(source, Tensor):
        return _floats(source), _Attended([], None, ())
    keys, powers = source.keys
    keys = keys.float()
    powers = keys.new_empty(0) if powers is None else powers
    context = None if state.context is None else _floats(state.context)
    parts = [keys, powers, _floats(source.values), _floats(source.v)]
    location, adds_up = located(decoder, source, state)
    return context, _Attended(parts + location, source.mask, adds_up)


def vector_of(decoder: "Decoder") -> tuple[int, ...]:
    """Width of attentional vectors and whether they are tanh's, or nothing."""
    if decoder.attentional_dim is None:
        return ()
    return decoder.fed_dim, int(decoder.attentional_activation == "tanh")


def _channels(decoder: "Decoder") -> tuple[str, ...]:
    return getattr(decoder._modules.get("attention"), "location", ())


def located(
    decoder: "Decoder", source: "PreparedSource", state: "DecoderState"
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Filters, their projection, and the state before the first step, if there are any; which of
    its channels add up."""
    channels = _channels(decoder)
    if not channels:
        return [], ()
    attention = decoder.attention
    assert attention is not None
    before = state.location
    if before is None:
        B, S, _ = source.values.shape
        before = source.values.new_zeros(B, len(channels), S)
    make_weights(attention.location_conv, attention.location_dense)
    weights = attention.location_conv.weight, attention.location_dense.weight
    return [_floats(x) for x in (*weights, before)], accumulates(channels)


def generate(
    decoder: "Decoder",
    packed: PackedDecoder,
    source: "stepwise.Source",
    state: "DecoderState",
    options: DecodingOptions,
) -> Generated:
    """See `seq2seq_fast.generate`; arguments are checked already. Of draws (B * n_samples, ...)."""
    B = state.hidden.shape[1]
    limits = prefix = None
    if options.max_length_ratio is not None:
        limits = stepwise.row_limits(source, options, B).contiguous()
    if options.prefix is not None:
        prefix = stepwise.forced(options, B, state.hidden.device).contiguous()
    hidden, cell = _states(state)
    context, attended = _source(decoder, source, state)
    return _decode(decoder, packed, hidden, cell, context, attended, limits, prefix, options)


def generate_as_is(
    decoder: "Decoder",
    packed: PackedDecoder,
    source: "PreparedSource",
    state: "DecoderState",
    options: DecodingOptions,
) -> Generated:
    """`generate` of arguments that nobody has checked: the engine does, and raises a RuntimeError
    of those that are wrong or not in float32. Options have no prefix and no max_length_ratio."""
    hidden, cell, context, _ = state
    hidden = hidden.contiguous()
    cell = hidden.new_empty(0) if cell is None else cell.contiguous()
    keys, powers = source.keys
    powers = keys.new_empty(0) if powers is None else powers
    parts = [keys, powers, source.values.contiguous(), source.v.contiguous()]
    location, adds_up = located(decoder, source, state)
    attended = _Attended(parts + location, source.mask, adds_up)
    return _decode(decoder, packed, hidden, cell, context, attended, None, None, options)


def _decode(
    decoder: "Decoder",
    packed: PackedDecoder,
    hidden: Tensor,
    cell: Tensor,
    context: Tensor | None,
    attended: _Attended,
    limits: Tensor | None,
    prefix: Tensor | None,
    options: DecodingOptions,
) -> Generated:
    try:
        found = torch.ops.seq2seq_fast.decode.default(  # spares the choice among overloads
            *packed.weights,
            decoder.cell_type,
            decoder.query_after,
            hidden,
            cell,
            context,
            attended.parts,
            attended.mask,
            limits,
            prefix,
            options.max_length,
            [*options.whole, options.n_samples],
            float(options.length_penalty),
            float(options.coverage_penalty),
            options.return_weights,
            options.return_scores,
            packed.projects_values,
            sampling.seed_of(options, hidden.device) if options.sample else None,
            float(options.temperature),
            min(options.top_k, decoder.output_dim),
            float(options.top_p),
            attended.accumulates,
            vector_of(decoder),
            options.bos_of_rows("cpu"),
        )
    except RuntimeError:
        raised = interruption()
        if raised is not None:
            raise Interrupted from raised
        raise
    tokens, lengths, log_probs, scores, finished, weights = found
    kept = weights.to(decoder.like.dtype) if options.return_weights else None
    return Generated(tokens, lengths, log_probs, scores, finished, kept)


def step(
    decoder: "Decoder",
    packed: PackedDecoder,
    tokens: Tensor,
    state: "DecoderState",
    source: "stepwise.Source",
) -> tuple[Tensor, "DecoderState", Tensor | None]:
    """`Decoder.step` from packed weights."""
    context, attended = _source(decoder, source, state)
    logits, hidden, cell, after, weights, location = torch.ops.seq2seq_fast.decoder_step.default(
        *packed.weights,
        decoder.cell_type,
        decoder.query_after,
        tokens.long().contiguous(),
        *_states(state),
        context,
        *attended,
        vector_of(decoder),
    )
    state = type(state)(
        hidden,
        None if state.cell is None else cell,
        after if decoder.query_after else None,
        location if attended.accumulates else None,
    )
    return logits, state, None if isinstance(source, Tensor) else weights
