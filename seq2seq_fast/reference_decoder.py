"""The specification of the attention decoder, forward and backward, in plain PyTorch.

Time comes first inside: inputs (T, B, E), hidden and cell (L, B, H) for L layers. A layer has
w_input (I, its input's width), w_hidden (J, H) and bias (G,) or (B, G), over these blocks of gates:

    lstm   i  f  g  o      I = J = G = 4 H
    gru    n  r  z  m      I = 3 H from the left, J = 3 H from the right, G = 4 H
    rnn    h               I = J = G = H

where GRU's m is the hidden state's part of n, which r multiplies: that is why it stands alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference

BLOCKS = {"lstm": 4, "gru": 4, "rnn": 1}


class Run(NamedTuple):
    """What a run over T steps leaves: what backward needs, results among it."""

    hiddens: Tensor  # (L, T + 1, B, H), the initial state first
    cells: Tensor  # (L, T + 1, B, H), of an LSTM
    gates: Tensor  # (L, T, B, G), after their nonlinearities
    queries: Tensor  # (T, B, A)
    contexts: Tensor  # (T + 1, B, D), the one before the first step first
    weights: Tensor  # (T, B, S)
    tokens: Tensor  # (F, B), what was fed back in each of F steps
    logits: Tensor  # (B, T + 1, V); [:, t] is written for the steps t that were fed its argmax
    locations: Tensor  # (T + 1, B, C, S), where was attended before each step
    vectors: Tensor  # (T + 1, B, O), attentional vectors, the one before the first step first


def activate(cell_type: str, gates: Tensor) -> Tensor:
    """Nonlinearities of gates (..., G)."""
    if cell_type == "rnn":
        return gates.tanh()
    a, b, c, d = gates.chunk(4, -1)
    if cell_type == "lstm":
        return torch.cat([a.sigmoid(), b.sigmoid(), c.tanh(), d.sigmoid()], -1)
    r = b.sigmoid()
    return torch.cat([(a + r * d).tanh(), r, c.sigmoid(), d], -1)


def advance(cell_type: str, gates: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The next hidden and cell state, given activated gates; only an LSTM changes `cell`."""
    if cell_type == "rnn":
        return gates, cell
    if cell_type == "gru":
        n, _, z, _ = gates.chunk(4, -1)
        return n + z * (hidden - n), cell
    i, f, g, o = gates.chunk(4, -1)
    cell = f * cell + i * g
    return o * cell.tanh(), cell


def first_rows(x: Tensor, n: int, instead: Tensor | None = None) -> Tensor:
    """x (B, ...), from the nth row on that of `instead`, or zeros."""
    instead = torch.zeros_like(x) if instead is None else instead
    return torch.cat([x[:n], instead[n:]])


def layer_gates(x: Tensor, hidden: Tensor, w_input: Tensor, w_hidden: Tensor, bias: Tensor):
    """Gates (..., G) before their nonlinearities, of x and the hidden state before the step."""
    G = bias.shape[-1]
    from_input, from_hidden = x @ w_input.T, hidden @ w_hidden.T
    return (
        bias
        + F.pad(from_input, (0, G - from_input.shape[-1]))
        + F.pad(from_hidden, (G - from_hidden.shape[-1], 0))
    )


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None):
    """Context (B, D) and weights (B, S) of queries (B, A); mask (B, S)."""
    rows = None if mask is None else mask.unsqueeze(1)
    args = (query.unsqueeze(1), keys, values, v, rows, None, 1.0)
    context, weights = reference.additive_attention(*args)
    return context.squeeze(1), weights.squeeze(1)


def location_features(state: Tensor, conv: Tensor) -> Tensor:
    """(B, S, N) of where was attended before (B, C, S) and filters (N, C, K), K odd, with zeros
    beyond the ends (Chorowski et al., "Attention-based models for speech recognition", 2015)."""
    return F.conv1d(state, conv, padding=conv.shape[2] // 2).transpose(1, 2)


def next_location(
    state: Tensor, weights: Tensor, accumulates: Sequence[int], detach: bool
) -> Tensor:
    """state (B, C, S) after a step with weights (B, S), which its channels take or add up."""
    weights = weights.detach() if detach else weights
    channels = zip(state.unbind(1), accumulates, strict=True)
    return torch.stack([x + weights if adds else weights for x, adds in channels], 1)


def attention_decoder(
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    layers: list[Tensor],
    attention: list[Tensor],
    mask: Tensor | None,
    powers: Tensor | None,
    context: Tensor | None,
    dropout: Tensor | None,
    cell_type: str,
    query_after: bool,
    feedback: list[int],
    readout: list[Tensor],
    input_dropout: Tensor | None,
    location: Sequence[Tensor] = (),
    accumulates: Sequence[int] = (),
    detach: bool = False,
    state_dropout: Tensor | None = None,
    vector: Sequence[Tensor] = (),
    activation: str = "tanh",
    vector_dropout: Tensor | None = None,
    context_dropout: Tensor | None = None,
    features_dropout: Tensor | None = None,
    batch_sizes: Sequence[int] = (),
) -> Run:
    """A decoder over T steps with attention inside its recurrence.

    Args:
        hidden, cell: (L, B, H), before the first step; cell is empty unless it is an LSTM's.
        layers: w_input, w_hidden and bias of each layer in turn.
        attention: w_context (I, D), w_query (A, H), b_query (A,), keys (B, S, A), values (B, S, D)
            and v (A,); or nothing for a decoder without attention.
        mask: (B, S) bool, True = attend.
        context: (B, D), what the first step's cells read if the query comes after them, which is
            (B, O) where there are attentional vectors; without attention what the readout reads at
            every step.
        dropout: (L - 1, T, B, H), factors of what a layer hands to the next one.
        query_after: the query is the top layer's hidden state after the step, and the cells read
            the context of the step before; otherwise it is the state before the step, and they
            read that step's own context.
        feedback: the steps whose input is the argmax of the step before, read out by
            readout = [embedding (V, E), weight (V, H + D) or (V, O), bias (V,)] and multiplied by
            input_dropout (T, B, E).
        location: nothing, or filters (N, C, K), their projection (A, N), and where was attended
            before the first step (B, C, S). What the projection makes of `location_features`
            is added to the keys of a step.
        accumulates: of each channel whether it is the sum of all weights before, and not those of
            the step before.
        detach: no gradient flows from a step to the weights of those before by the location.
        state_dropout: (L, T, B, H), factors of each layer's hidden state after a step, wherever it
            is read.
        vector: nothing, or weight (O, H + D) and bias (O,) of the attentional vector: activation(
            weight [output; context] + bias) after a step, "tanh" or "none", times vector_dropout
            (T, B, O). The cells read that of the step before in place of its context, so that
            w_context is (I, O), and the readout reads it alone. With query_after alone.
        context_dropout: (T, B, D) or (T, B, O), factors of the context, or vector, that the cells
            read at a step.
        features_dropout: (T, B, H + D), factors of [output; context] as the attentional vector
            reads them.
        batch_sizes: of B rows those that each step has, fewer and fewer, the first ones, as those
            of a PackedSequence; nothing where all have all. Behind its last step a row's state
            stays; its queries, contexts, weights and vectors are 0, and so are logits and tokens.
    """
    T, B, _ = inputs.shape
    L = hidden.shape[0]
    lstm = cell_type == "lstm"
    hiddens, cells = [hidden.unbind()], [cell.unbind() if lstm else (cell,) * L]
    gates, queries, weights, tokens = [], [], [], []
    contexts: list[Tensor] = []
    logits, (A, S) = inputs.new_empty(0), (0, 0)
    if attention:
        w_context, w_query, b_query, keys, values, v = attention
        A, S = v.shape[0], keys.shape[1]
        layers = [torch.cat([layers[0], w_context], 1), *layers[1:]]
        if context is None:
            context = values.new_zeros(B, vector[0].shape[0] if vector else values.shape[2])
    vectors: list[Tensor] = []
    if context is not None:
        (vectors if vector else contexts).append(context)
    if vector:
        contexts.append(values.new_zeros(B, values.shape[2]))
    conv, projection, *locations = location or (None, None)

    def over(x, t, instead=None):
        return x if not batch_sizes else first_rows(x, batch_sizes[t], instead)

    def attend(t):
        queries.append(F.linear(hiddens[-1][-1], w_query, b_query))
        placed = keys
        if locations:
            placed = keys + location_features(locations[-1], conv) @ projection.T
        c, w = plain_attention(queries[-1], placed, values, v, mask)
        queries[-1] = over(queries[-1], t)
        contexts.append(over(c, t))
        weights.append(over(w, t))
        if locations:
            after = next_location(locations[-1], w, accumulates, detach)
            locations.append(over(after, t, locations[-1]))

    def features():
        """What the readout reads after a step, and without attention before all of them too."""
        return vectors[-1] if vector else torch.cat([hiddens[-1][-1], contexts[-1]], -1)

    def join(t):
        x = torch.cat([hiddens[-1][-1], contexts[-1]], -1)
        x = F.linear(x if features_dropout is None else x * features_dropout[t], *vector)
        x = x.tanh() if activation == "tanh" else x
        vectors.append(over(x if vector_dropout is None else x * vector_dropout[t], t))

    if feedback:
        embedding, w_out, b_out = readout
        logits = inputs.new_zeros(B, T + 1, w_out.shape[0])
    for t in range(T):
        x = inputs[t]
        if t in feedback:
            logits[:, t] = over(F.linear(features(), w_out, b_out).detach(), t - 1)
            tokens.append(logits[:, t].argmax(-1))
            x = F.embedding(tokens[-1], embedding)
            x = x if input_dropout is None else x * input_dropout[t]
        if attention and not query_after:
            attend(t)
        if attention:
            fed = vectors[-1] if vector else contexts[-1]
            x = torch.cat([x, fed if context_dropout is None else fed * context_dropout[t]], -1)
        step: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(L):
            if i > 0:
                x = step[-1][1] if dropout is None else step[-1][1] * dropout[i - 1, t]
            g = activate(cell_type, layer_gates(x, hiddens[-1][i], *layers[3 * i : 3 * i + 3]))
            state, memory = advance(cell_type, g, hiddens[-1][i], cells[-1][i])
            if state_dropout is not None:
                state = state * state_dropout[i, t]
            state = over(state, t, hiddens[-1][i])
            memory = over(memory, t, cells[-1][i]) if lstm else memory
            step.append((g, state, memory))
        activated, states, memories = zip(*step, strict=True)
        gates.append(torch.stack(activated))
        hiddens.append(states)
        cells.append(memories)
        if attention and query_after:
            attend(t)
        if vector:
            join(t)

    def stack(rows, *empty, dim=0, wanted=bool(attention)):
        if not wanted:
            return inputs.new_empty(0)
        return torch.stack(rows, dim) if rows else inputs.new_empty(empty)

    G = layers[2].shape[-1]
    return Run(
        torch.stack([torch.stack(x) for x in hiddens], 1),
        torch.stack([torch.stack(x) for x in cells], 1) if lstm else inputs.new_empty(0),
        stack(gates, L, 0, B, G, dim=1, wanted=True),
        stack(queries, 0, B, A),
        stack(contexts),
        stack(weights, 0, B, S),
        torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=inputs.device),
        logits,
        torch.stack(locations) if locations else inputs.new_empty(0),
        torch.stack(vectors) if vectors else inputs.new_empty(0),
    )


def cell_backward(cell_type, grad, grad_cell, gates, before, cell_before, cell):
    """Gradients of the gates before their nonlinearities, and what of grad and grad_cell goes to
    the hidden and the cell state before the step without passing the gates."""
    if cell_type == "rnn":
        return grad * (1 - gates * gates), torch.zeros_like(grad), grad_cell
    if cell_type == "gru":
        n, r, z, m = gates.chunk(4, -1)
        dn = grad * (1 - z) * (1 - n * n)
        dr = dn * m * r * (1 - r)
        dz = grad * (before - n) * z * (1 - z)
        return torch.cat([dn, dr, dz, dn * r], -1), grad * z, grad_cell
    i, f, g, o = gates.chunk(4, -1)
    tanh = cell.tanh()
    grad_cell = grad_cell + grad * o * (1 - tanh * tanh)
    di = grad_cell * g * i * (1 - i)
    df = grad_cell * cell_before * f * (1 - f)
    dg = grad_cell * i * (1 - g * g)
    do = grad * tanh * o * (1 - o)
    return torch.cat([di, df, dg, do], -1), torch.zeros_like(grad), grad_cell * f


def attention_decoder_backward(
    grad_outputs: Tensor,
    grad_contexts: Tensor,
    grad_weights: Tensor,
    grad_hidden: Tensor,
    grad_cell: Tensor,
    hiddens: Tensor,
    cells: Tensor,
    gates: Tensor,
    queries: Tensor,
    weights: Tensor,
    layers: list[Tensor],
    attention: list[Tensor],
    powers: Tensor | None,
    dropout: Tensor | None,
    cell_type: str,
    query_after: bool,
    need_state: bool,
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of `attention_decoder` backward; what is no recurrence is left to the caller.

    Args:
        grad_outputs (T, B, H), of the top layer; grad_contexts (T, B, D), grad_weights (T, B, S);
        grad_hidden, grad_cell (L, B, H), of the last step's state. The rest as in `Run`. Gradients
        of what rows return behind their last step are taken for 0.

    Returns:
        Gradients of the gates before their nonlinearities (L, T, B, G), of the queries (T, B, A),
        scores (T, B, S) and contexts (T, B, D) of each step, of the initial hidden and cell state
        (L, B, H), empty unless `need_state`, and of the context before the first step (B, D).
    """
    L, T = gates.shape[:2]
    lstm = cell_type == "lstm"
    dh, dc = list(grad_hidden.unbind()), list(grad_cell.unbind()) if lstm else [grad_cell] * L
    dgates = torch.empty_like(gates)
    dqueries, dscores = torch.empty_like(queries), torch.empty_like(weights)
    if batch_sizes:
        grad_outputs, grad_contexts, grad_weights = (
            torch.stack([first_rows(*x) for x in zip(grad, batch_sizes, strict=True)])
            if grad.numel() > 0
            else grad
            for grad in (grad_outputs, grad_contexts, grad_weights)
        )
    dcontexts = grad_contexts.clone()
    carried = torch.zeros_like(grad_contexts[0]) if T and attention else grad_contexts.new_empty(0)
    n_input, n_hidden, G = layers[0].shape[0], layers[1].shape[0], gates.shape[-1]

    def attend_backward(t):
        _, w_query, _, keys, values, v = attention
        found = reference.additive_attention_backward(
            dcontexts[t].unsqueeze(1),
            grad_weights[t].unsqueeze(1),
            queries[t].unsqueeze(1),
            keys,
            values,
            v,
            weights[t].unsqueeze(1),
            1.0,
        )
        dqueries[t], dscores[t] = found[0].squeeze(1), found[4].squeeze(1)
        dh[-1] = dh[-1] + dqueries[t] @ w_query

    for t in range(T - 1, -1, -1):
        dh[-1] = dh[-1] + grad_outputs[t]
        if attention and query_after:
            dcontexts[t] += carried
            attend_backward(t)
        for i in range(L - 1, -1, -1):
            w_input, w_hidden, _ = layers[3 * i : 3 * i + 3]
            memory = (cells[i, t], cells[i, t + 1]) if lstm else (cells, cells)
            gradients = dh[i], dc[i], gates[i, t]
            found = cell_backward(cell_type, *gradients, hiddens[i, t], *memory)
            if batch_sizes:  # of rows that are over, those of the states pass by
                n = batch_sizes[t]
                dgate, *states = found
                states = [first_rows(*x) for x in zip(states, (n, n), gradients, strict=False)]
                found = first_rows(dgate, n), *states
            dgates[i, t], dh[i], dc[i] = found
            dh[i] = dh[i] + dgates[i, t, :, G - n_hidden :] @ w_hidden
            if i > 0:
                dx = dgates[i, t, :, :n_input] @ w_input
                dh[i - 1] = dh[i - 1] + (dx if dropout is None else dx * dropout[i - 1, t])
        if attention:
            carried = dgates[0, t, :, :n_input] @ attention[0]
            if not query_after:
                dcontexts[t] += carried
                attend_backward(t)
    if not query_after:
        carried = torch.zeros_like(carried)
    none = grad_hidden.new_empty(0)
    dhidden = torch.stack(dh) if need_state else none
    dcell = torch.stack(dc) if need_state and lstm else none
    return dgates, dqueries, dscores, dcontexts, dhidden, dcell, carried
