"""A recurrent decoder with attention inside its recurrence, over T steps.

A loop on the host, which only launches: a step of L layers takes 2 L + 2 launches, the query's
product, attention, and for each layer the product of [x | hidden state] with its weights side by
side, then its cell. Everything is allocated before the first step, and nothing waits for the GPU or
is copied to it, so that a CUDA graph can hold it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cells
from .one_query import OneQuery


def side_by_side(layers: list[Tensor], attention: list[Tensor], G: int) -> list[Tensor]:
    """Each layer's weights of x and of the hidden state, (G, width + H), where the first layer's x
    is the context. Blocks that one of the two lacks are zero."""
    found = []
    for i in range(0, len(layers), 3):
        w_hidden = layers[i + 1]
        w_x = layers[i] if i > 0 else attention[0] if attention else w_hidden[:, :0]
        w = w_hidden.new_zeros(G, w_x.shape[1] + w_hidden.shape[1])
        w[: len(w_x), : w_x.shape[1]] = w_x
        w[G - len(w_hidden) :, w_x.shape[1] :] = w_hidden
        found.append(w)
    return found


def split(rows: list[Tensor], H: int) -> tuple[list[Tensor], list[Tensor]]:
    """x and hidden state of each layer's [x | hidden state]."""
    return [x[:, :-H] for x in rows], [x[:, -H:] for x in rows]


def by_step(x: Tensor) -> list[tuple[Tensor, ...]]:
    """[layer][step] of x (L, T, B, width): views, made at once, which costs the host least."""
    return [y.unbind() for y in x.unbind()]


class _Forward:
    def __init__(
        self, inputs, hidden, cell, layers, attention, mask, context, dropout, cell_type,
        query_after, feedback, readout, input_dropout,
    ):  # fmt: skip
        (T, B, _), (L, _, H), new = inputs.shape, hidden.shape, inputs.new_empty
        G = layers[2].shape[-1]
        self.inputs, self.w_input, self.L = inputs, layers[0].T, L
        self.cell_type, self.query_after = cell_type, query_after

        self.hiddens, self.gates, self.cells = new(L, T + 1, B, H), new(L, T, B, G), new(0)
        self.hiddens[:, 0] = hidden
        self.hidden, self.gate = by_step(self.hiddens), by_step(self.gates)
        if cell_type == "lstm":
            self.cells = new(L, T + 1, B, H)
            self.cells[:, 0] = cell
            self.cell = by_step(self.cells)
        weights = side_by_side(layers, attention, G)
        self.weights = [w.T for w in weights]
        self.biases = [x.contiguous() for x in layers[2::3]]
        self.operands = [new(B, w.shape[1]) for w in weights]
        self.to_x, self.to_self = split(self.operands, H)
        self.product = new(B, G)
        for n in range(L):
            self.to_self[n].copy_(hidden[n])
        self.factors = None if dropout is None else by_step(dropout.contiguous())

        self.queries, self.contexts, self.attended = new(0), new(0), new(0)
        self.context, self.attends = context, bool(attention)
        if attention:
            self._attend_to(*attention[1:], mask)
        self.tokens, self.logits = new(0, dtype=torch.int64), new(0)
        self.feedback, self.readout, self.input_dropout = feedback, readout, input_dropout
        if feedback:
            self.tokens = new(len(feedback), B, dtype=torch.int64)
            self.logits, self.fed = new(B, T + 1, len(readout[1])), new(B, inputs.shape[2])

    def _attend_to(self, w_query, b_query, keys, values, v, mask):
        (T, B, _), new = self.inputs.shape, self.inputs.new_empty
        keys = keys.contiguous()
        self.queries, self.attended = new(T, B, v.shape[0]), new(T, B, keys.shape[1])
        self.contexts = new(T + 1, B, values.shape[2])
        if self.context is None:
            self.contexts[0].zero_()
        else:
            self.contexts[0].copy_(self.context)
        if self.query_after:
            self.to_x[0].copy_(self.contexts[0])
        self.w_query, self.b_query = w_query.T, b_query
        self.steps = [x.unbind() for x in (self.queries, self.contexts[1:], self.attended)]
        rows = None if mask is None else mask.unsqueeze(1)
        powers = (2 * keys).exp_() if T > 1 else None
        self.one_query = OneQuery(keys, values, v, rows, None, 1.0, powers)

    def run(self):
        T, B, E = self.inputs.shape
        # The input's part of all gates, where the gates themselves will lie.
        of_input = self.gates[0].view(T * B, -1)[:, : self.w_input.shape[1]]
        torch.mm(self.inputs.reshape(T * B, E), self.w_input, out=of_input)
        fed_back = 0
        for t in range(T):
            if fed_back < len(self.feedback) and t == self.feedback[fed_back]:
                self.feed(t, self.tokens[fed_back])
                fed_back += 1
            if self.attends and not self.query_after:
                self.attend(t, t)
            for n in range(self.L):
                self.advance(n, t)
            if self.attends and self.query_after:
                self.attend(t, t + 1)
        return (
            self.hiddens, self.cells, self.gates, self.queries, self.contexts, self.attended,
            self.tokens, self.logits,
        )  # fmt: skip

    def feed(self, t, token):
        """The argmax of what step t - 1 made in place of step t's input."""
        embedding, weight, bias = self.readout
        context = self.contexts[t] if self.attends else self.context
        features = torch.cat([self.hidden[-1][t], context], 1)
        torch.addmm(bias, features, weight.T, out=self.logits[:, t])
        torch.argmax(self.logits[:, t], 1, out=token)
        torch.index_select(embedding, 0, token, out=self.fed)
        if self.input_dropout is not None:
            self.fed.mul_(self.input_dropout[t])
        torch.mm(self.fed, self.w_input, out=self.gate[0][t][:, : self.w_input.shape[1]])

    def attend(self, t, state):
        """Step t's query is the top layer's hidden state `state`."""
        query, context, weights = (x[t] for x in self.steps)
        torch.addmm(self.b_query, self.hidden[-1][state], self.w_query, out=query)
        self.one_query(query, context, weights, self.to_x[0])

    def advance(self, n, t):
        torch.mm(self.operands[n], self.weights[n], out=self.product)
        lstm, last = self.cell_type == "lstm", n + 1 == self.L
        cells.advance(
            self.cell_type,
            self.product,
            self.biases[n],
            self.gate[n][t],
            (self.hidden[n][t], self.cell[n][t] if lstm else None),
            (self.hidden[n][t + 1], self.cell[n][t + 1] if lstm else None),
            self.to_self[n],
            None if last else self.to_x[n + 1],
            None if last or self.factors is None else self.factors[n][t],
            has_input=n == 0,
        )


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
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Of powers, what other kernels derive from keys, these have no use; batch_sizes are empty."""
    return _Forward(
        inputs, hidden, cell, layers, attention, mask, context, dropout, cell_type, query_after,
        feedback, readout, input_dropout,
    ).run()  # fmt: skip
