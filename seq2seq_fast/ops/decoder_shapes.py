"""What the attention decoder's ops make of shapes."""

import torch

from ..reference_decoder import BLOCKS
from .kernels import fake


@fake("attention_decoder")
def forward(
    inputs,
    hidden,
    cell,
    layers,
    attention,
    mask,
    powers,
    context,
    dropout,
    cell_type,
    query_after,
    feedback,
    readout,
    input_dropout,
    batch_sizes=(),
):
    (T, B, _), (L, _, H), empty = inputs.shape, hidden.shape, inputs.new_empty
    queries, contexts, weights, logits = empty(0), empty(0), empty(0), empty(0)
    if attention:
        *_, keys, values, v = attention
        queries, weights = empty(T, B, v.shape[0]), empty(T, B, keys.shape[1])
        contexts = empty(T + 1, B, values.shape[2])
    if feedback:
        logits = empty(B, T + 1, readout[1].shape[0])
    return (
        empty(L, T + 1, B, H),
        empty(L, T + 1, B, H) if cell_type == "lstm" else empty(0),
        empty(L, T, B, BLOCKS[cell_type] * H),
        queries,
        contexts,
        weights,
        empty((len(feedback), B) if feedback else 0, dtype=torch.int64),
        logits,
    )


@fake("extended_decoder")
def extended(inputs, *args):
    location, _, _, vector = args[13:17]
    found = forward(inputs, *args[:13])
    (T, B, _) = inputs.shape
    states = (T + 1, *location[2].shape) if location else 0
    vectors = (T + 1, B, vector[0].shape[0]) if vector else 0
    return *found, inputs.new_empty(states), inputs.new_empty(vectors)


@fake("attention_decoder_backward")
def backward(
    grad_outputs,
    grad_contexts,
    grad_weights,
    grad_hidden,
    grad_cell,
    hiddens,
    cells,
    gates,
    queries,
    weights,
    *others,
):
    need_state = others[6]
    first = grad_contexts.new_empty(grad_contexts.shape[1:] or 0)
    same = (gates, queries, weights, grad_contexts)
    state = (x.new_empty(x.shape if need_state else 0) for x in (grad_hidden, grad_cell))
    return *(x.new_empty(x.shape) for x in same), *state, first


@fake("extended_decoder_backward")
def extended_backward(*args):
    of_decoder, (grad_location, location, _, _, _, grad_vectors, _, vector) = args[:17], args[17:25]
    *found, first = backward(*of_decoder)
    if vector:  # which is what the cells read before the first step
        first = grad_vectors.new_empty(grad_vectors.shape[1:])
    of_vectors = grad_vectors.new_empty(grad_vectors.shape)
    if not location:
        none = (grad_location.new_empty(0) for _ in range(5))
        return *found, first, *none, of_vectors
    *_, keys, _, v = of_decoder[11]
    of_location = (x.new_empty(x.shape) for x in (keys, v, *location[:2], grad_location))
    return *found, first, *of_location, of_vectors
