"""The recurrence of the attention decoder backward. A step of L layers takes 2 L + 2 launches: for
each layer its cell and the product of the gates' gradient with [w_x | w_hidden], whose parts the
next kernels add up; attention, and the query's product. Gradients of weights, keys and values are
products over all steps, which are left to the caller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cells
from .attention_decoder import by_step, side_by_side, split
from .one_query_backward import OneQueryBackward


class _Backward:
    def __init__(
        self, grad_outputs, grad_contexts, grad_weights, grad_hidden, grad_cell, hiddens, cells,
        gates, queries, weights, layers, attention, dropout, cell_type, query_after,
    ):  # fmt: skip
        (self.L, self.T, B, G), H = gates.shape, hiddens.shape[3]
        self.cell_type, self.query_after = cell_type, query_after
        self.grad_outputs = grad_outputs.unbind()
        self.d_gates, self.d_queries, self.d_scores, self.d_contexts, self.d_hidden, self.d_cell = (
            torch.empty_like(x)
            for x in (gates, queries, weights, grad_contexts, grad_hidden, grad_cell)
        )
        self.hidden, self.gate, self.d_gate = map(by_step, (hiddens, gates, self.d_gates))
        if cell_type == "lstm":
            self.cell = by_step(cells)
            self.d_cell.copy_(grad_cell)
        elif cell_type == "gru":  # what passes the gates by
            self.d_hidden.zero_()
        self.factors = None if dropout is None else by_step(dropout.contiguous())
        self.weights = side_by_side(layers, attention, G)
        # Gradients of [x | hidden state] of the step after; of the last one's, what is given.
        self.products = [gates.new_zeros(B, w.shape[1]) for w in self.weights]
        self.of_x, self.of_self = split(self.products, H)
        for n in range(self.L):
            self.of_self[n].copy_(grad_hidden[n])
        self.of_query = None
        if attention:
            self.of_query, self.w_query = gates.new_zeros(B, H), attention[1]
            given, kept = (grad_contexts, grad_weights), (weights, queries)
            found = (self.d_contexts, self.d_scores, self.d_queries)
            self.steps = [x.unbind() for x in (*given, *kept, *found)]
            self.one_query_backward = OneQueryBackward(*attention[3:])

    def run(self):
        attends = self.of_query is not None
        for t in range(self.T - 1, -1, -1):
            if attends and self.query_after:
                self.attend(t)
            for n in range(self.L - 1, -1, -1):
                self.retreat(n, t)
            if attends and not self.query_after:
                self.attend(t)
        for n in range(self.L):
            if self.cell_type == "gru":
                self.d_hidden[n].add_(self.of_self[n])
            else:
                self.d_hidden[n].copy_(self.of_self[n])
        d_context = self.of_x[0].new_zeros(self.of_x[0].shape if attends else 0)
        if attends and self.query_after:
            d_context.copy_(self.of_x[0])
        elif attends:
            self.d_hidden[-1].add_(self.of_query)
        return (
            self.d_gates, self.d_queries, self.d_scores, self.d_contexts, self.d_hidden,
            self.d_cell, d_context,
        )  # fmt: skip

    def retreat(self, n, t):
        lstm, top = self.cell_type == "lstm", n + 1 == self.L
        cells.retreat(
            self.cell_type,
            self.of_self[n],
            None if top else self.of_x[n + 1],
            None if top or self.factors is None else self.factors[n][t],
            self.of_query if top else None,
            self.grad_outputs[t] if top else None,
            self.d_hidden[n] if self.cell_type == "gru" else None,
            self.gate[n][t],
            (self.hidden[n][t], self.cell[n][t] if lstm else None),
            self.cell[n][t + 1] if lstm else None,
            self.d_cell[n] if lstm else None,
            self.d_gate[n][t],
        )
        torch.mm(self.d_gate[n][t], self.weights[n], out=self.products[n])

    def attend(self, t):
        """From the context's gradient to the query's, and on to the top layer's hidden state."""
        of_context, *others, d_query = (x[t] for x in self.steps)
        self.one_query_backward(of_context, self.of_x[0], *others, d_query)
        torch.mm(d_query, self.w_query, out=self.of_query)


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
) -> tuple[Tensor, ...]:
    """Of powers, what other kernels derive from keys, these have no use; batch_sizes are empty."""
    *found, d_hidden, d_cell, d_context = _Backward(
        grad_outputs, grad_contexts, grad_weights, grad_hidden, grad_cell, hiddens, cells, gates,
        queries, weights, layers, attention, dropout, cell_type, query_after,
    ).run()  # fmt: skip
    if not need_state:
        d_hidden, d_cell = d_hidden.new_empty(0), d_cell.new_empty(0)
    return *found, d_hidden, d_cell, d_context
