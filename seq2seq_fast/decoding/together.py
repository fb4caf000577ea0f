"""Greedy decoding on a GPU in one launch, see csrc/cuda/decode_greedy.cuh.

Weights of products are read as the decoder has them, in 16 bits too; all else is float32.
"""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import graphed, stepwise
from .options import DecodingOptions
from .results import Generated

if TYPE_CHECKING:
    from ..nn.decoder import Decoder, DecoderState


def wanted(options: DecodingOptions) -> bool:
    """Whether a call may be one launch: the environment's SEQ2SEQ_FAST_GPU_LOOP is "together"."""
    return (
        os.environ.get("SEQ2SEQ_FAST_GPU_LOOP") == "together"
        and options.beam_size == 1
        and not options.sample
        and options.no_repeat_ngram == 0
        and options.coverage_penalty == 0
    )


def _weights(decoder: "Decoder", loops: "graphed.Loops") -> list[Tensor]:
    dtype = decoder.fc_out.weight.dtype
    with loops.lock:
        return loops.weights_of(decoder, dtype, 16 // dtype.itemsize)


def generate(
    decoder: "Decoder",
    loops: "graphed.Loops",
    source: "stepwise.Source",
    state: "DecoderState",
    options: DecodingOptions,
) -> Generated | None:
    """`generate` of a call that is `wanted`, or None where a block has too little memory."""
    B, device = state.hidden.shape[1], state.hidden.device

    def cast(x: Tensor) -> Tensor:
        return x.float().contiguous()

    context = source if isinstance(source, Tensor) else state.context
    from_source: list[Tensor] = []
    mask = None
    if not isinstance(source, Tensor):
        keys, powers = source.keys
        if powers is None or not powers.numel():
            powers = graphed._ops.prepare_keys(keys)
        from_source = [cast(keys), powers, cast(source.values), cast(source.v)]
        mask = source.mask
    relative = options.max_length_ratio is not None
    tokens, lengths, log_probs, scores, finished, weights = graphed._ops.decode_greedy(
        cast(state.hidden),
        state.hidden.new_empty(0) if state.cell is None else cast(state.cell),
        None if context is None else cast(context),
        _weights(decoder, loops),
        decoder.cell_type,
        decoder.query_after,
        from_source,
        mask,
        stepwise.row_limits(source, options, B).to(device) if relative else None,
        stepwise.forced(options, B, device).contiguous(),
        options.whole,
        float(options.length_penalty),
        options.return_weights,
        options.max_length,
        options.bos_of_rows(device),
    )
    if not tokens.numel():
        return None
    n = int(lengths.max())
    kept = None
    if options.return_weights and not isinstance(source, Tensor):
        there = torch.arange(n, device=device) < lengths[:, None]
        kept = weights[:n].transpose(0, 1).where(there[..., None], 0.0).to(source.values.dtype)
    return Generated(tokens[:, :n].contiguous(), lengths, log_probs, scores, finished, kept)
