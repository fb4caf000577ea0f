"""Steps that are fed the argmax of the one before, by modules that are more than their weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.attention_decoder import DecoderOutput
from ..ops.linear import linear

if TYPE_CHECKING:
    from .attention import PreparedSource
    from .decoder import Decoder, DecoderState


def steps_by_calls(
    decoder: "Decoder",
    tokens: Tensor,
    state: "DecoderState",
    source: "Tensor | PreparedSource",
    feedback: Sequence[int],
    batch_sizes: Sequence[int] | None,
) -> DecoderOutput:
    """`Decoder.steps`, whose readout and embedding are called, not read: a run of steps begins with
    each that is fed back."""
    runs: list[DecoderOutput] = []
    rows, fed = [], []
    for begin, end in zip((0, *feedback), (*feedback, tokens.shape[1]), strict=True):
        part = tokens[:, begin:end]
        if begin > 0:
            with torch.no_grad():
                rows.append(linear(decoder.fc_out, runs[-1].features[:, -1]))
                fed.append(rows[-1].argmax(-1))
            part = torch.cat([fed[-1][:, None], part[:, 1:]], 1)
        sizes = None if batch_sizes is None else batch_sizes[begin:end]
        out = decoder.steps(part, state, source, (), sizes)
        read = out.contexts if out.vectors is None else out.vectors
        context = read[:, -1] if decoder.query_after else None
        state = type(state)(out.hidden, out.cell, context, out.location)
        runs.append(out)
    logits = rows[0].new_zeros(len(tokens), tokens.shape[1] + 1, rows[0].shape[1])
    for t, x in zip(feedback, rows, strict=True):
        logits[:, t] = x

    def joined(name: str) -> Tensor | None:
        found = [getattr(out, name) for out in runs]
        return None if found[0] is None else torch.cat(found, 1)

    outputs, contexts = joined("outputs"), joined("contexts")
    assert outputs is not None and contexts is not None
    return runs[-1]._replace(
        outputs=outputs,
        contexts=contexts,
        weights=joined("weights"),
        vectors=joined("vectors"),
        tokens=torch.stack(fed, 1),
        logits=logits,
    )
