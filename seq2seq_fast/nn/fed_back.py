"""Steps that are fed the argmax of the one before, where the readout or the embedding of tokens is
more than its weight, and so has to be called."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention_decoder import DecoderOutput
from ..ops.modules import make_weights, reads_alone

if TYPE_CHECKING:
    from .attention import PreparedSource
    from .decoder import Decoder, DecoderState


def steps_by_calls(
    decoder: "Decoder",
    tokens: Tensor,
    state: "DecoderState",
    source: "Tensor | PreparedSource",
    table: Tensor | None,
    feedback: Sequence[int],
    batch_sizes: Sequence[int] | None,
) -> DecoderOutput:
    """`Decoder.steps`, in runs of which each but the first begins with a step that is fed back."""
    readout, read = decoder.fc_out, reads_alone(decoder.fc_out, nn.Linear)
    if read:
        make_weights(readout)  # once, and for the readout of all steps that comes later
    runs: list[DecoderOutput] = []
    rows, fed = [], []
    for begin, end in zip((0, *feedback), (*feedback, tokens.shape[1]), strict=True):
        part = tokens[:, begin:end]
        if begin > 0:
            with torch.no_grad():
                x = runs[-1].features[:, -1]
                logits = F.linear(x, readout.weight, readout.bias) if read else readout(x)
                token = logits.argmax(-1)
                if batch_sizes is not None:  # of rows that are over there are none
                    over = batch_sizes[begin - 1]
                    logits = torch.cat([logits[:over], torch.zeros_like(logits[over:])])
                    token = torch.cat([token[:over], torch.zeros_like(token[over:])])
            rows.append(logits)
            fed.append(token)
            part = torch.cat([token[:, None], part[:, 1:]], 1)
        sizes = None if batch_sizes is None else batch_sizes[begin:end]
        out = decoder.run_of_steps(part, state, source, table, (), sizes)
        context = out.contexts if out.vectors is None else out.vectors
        after = context[:, -1] if decoder.query_after else None
        state = type(state)(out.hidden, out.cell, after, out.location)
        runs.append(out)
    made = rows[0].new_zeros(len(tokens), tokens.shape[1] + 1, rows[0].shape[1])
    for t, logits in zip(feedback, rows, strict=True):
        made[:, t] = logits

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
        logits=made,
    )
