"""The attention decoder over T steps: autograd and the public function.

The ops are the recurrence alone, time first; every product over all T steps is here, around them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference_decoder as reference
from ..library import choose
from ..reference_decoder import Run
from . import decoder_checks as checks
from . import decoder_shapes  # noqa: F401, which registers them
from .additive_attention import PreparedKeys
from .attentional_vector import AttentionalVector
from .autograd import autocast_off, autocast_on, distinct, needs_grad, once, wanted
from .checks import instance
from .dropout import dropout_factors
from .kernels import OPS, product, products
from .location import Location, accumulates, parts
from .modules import bias_of


class Feedback(NamedTuple):
    """How a step is fed the model's own argmax: which steps, and what reads and embeds it.

    Args:
        steps: whole numbers, ascending, from 1 on.
        embedding: (V, E).
        weight, bias: (V, H + D) and (V,), of the readout over [output; context]; (V, O) over an
            attentional vector.
        dropout: (B, T, E), factors of the embedded tokens, or None.
    """

    steps: Sequence[int]
    embedding: Tensor
    weight: Tensor
    bias: Tensor
    dropout: Tensor | None = None


class DecoderOutput(NamedTuple):
    """What `attention_decoder` returns.

    Args:
        outputs: (B, T, H), of the top layer.
        contexts: (B, T, D).
        weights: (B, T, S); None without attention.
        hidden, cell: (L, B, H), after the last step; cell is None but of an LSTM.
        tokens: (B, F), what was fed back at each of F steps, or None.
        logits: (B, T + 1, V), of which [:, t] has been made for feedback's steps t, or None.
        location: (B, C, S), the location's state after the last step, or None; of float32 at least.
        vectors: (B, T, O), attentional vectors, or None.
    """

    outputs: Tensor
    contexts: Tensor
    weights: Tensor | None
    hidden: Tensor
    cell: Tensor | None
    tokens: Tensor | None
    logits: Tensor | None
    location: Tensor | None
    vectors: Tensor | None

    @property
    def features(self) -> Tensor:
        """(B, T, H + D), or (B, T, O) where there are attentional vectors: what a readout reads."""
        if self.vectors is not None:
            return self.vectors
        return torch.cat([self.outputs, self.contexts], -1)


class _Decoder(torch.autograd.Function):
    """weights are those of `_split`."""

    @staticmethod
    def forward(
        ctx, inputs, hidden, cell, context, mask, powers, dropout, state_dropout, vector_dropout,
        context_dropout, features_dropout, options, run, *weights,
    ):  # fmt: skip
        if run is None:
            factors = dropout, state_dropout, vector_dropout, context_dropout, features_dropout
            run = _run(options, inputs, hidden, cell, weights, mask, powers, context, factors)
        gates = None if options.recompute else run.gates
        if options.multiplied and not options.recompute:
            inputs = inputs.new_empty(*inputs.shape[:2], 0)
        ctx.save_for_backward(
            inputs, run.hiddens, run.cells, gates, run.queries, run.contexts, run.weights,
            run.locations, run.vectors, powers, dropout, state_dropout, vector_dropout,
            context_dropout, features_dropout, *weights,
        )  # fmt: skip
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _results(run)

    @staticmethod
    def backward(ctx, *grads):
        needs = dict(zip(_INPUTS, ctx.needs_input_grad, strict=False))
        needs["weights"] = ctx.needs_input_grad[len(_INPUTS) :]
        saved = ctx.saved_tensors  # once: checkpointing makes them anew each time
        with torch.no_grad(), autocast_off(saved[0]):
            found = _backward(ctx.options, needs, grads, *saved)
        known = [x for x in (*grads, *saved) if x is not None]
        return once(wanted(found, ctx.needs_input_grad), known)


_INPUTS = (
    "inputs", "hidden", "cell", "context", "mask", "powers", "dropout", "state_dropout",
    "vector_dropout", "context_dropout", "features_dropout", "options", "run",
)  # fmt: skip


class _Options(NamedTuple):
    cell_type: str
    query_after: bool
    recompute: bool
    backend: str
    accumulates: tuple[int, ...] = ()  # of each channel of a location; none where there is none
    detach: bool = False
    activation: str = ""  # of an attentional vector; none where there is none
    batch_sizes: tuple[int, ...] = ()  # of steps, where not all rows have all of them
    multiplied: bool = False  # what comes as inputs is their part of the first layer's gates


def _run(
    options, inputs, hidden, cell, weights, mask, powers, context, factors, feedback=([], [], None)
):  # fmt: skip
    """`Run` of the backend's op; factors are those of dropout between layers, of states, of
    attentional vectors, of contexts and of what vectors are made of."""
    layers, attention, location, vector = _split(options, weights, inputs, hidden)
    dropout, state_dropout, vector_dropout, context_dropout, features_dropout = factors
    adds = options.accumulates
    of_vector = vector, options.activation or "none", vector_dropout
    args = (
        inputs, hidden, cell, layers, attention, mask, powers, context, dropout, *options[:2],
        *feedback,
    )  # fmt: skip
    if options.backend == "reference":
        of_location = (location, adds, options.detach)
        others = state_dropout, *of_vector, context_dropout, features_dropout, options.batch_sizes
        return reference.attention_decoder(*args, *of_location, *others)
    if location or vector or state_dropout is not None or context_dropout is not None:
        op = OPS["extended_decoder", options.backend]
        of_read = context_dropout, features_dropout
        others = location, adds, state_dropout, *of_vector, *of_read, options.batch_sizes
        return Run(*op(*args, *others))
    op = OPS["attention_decoder", options.backend]
    return Run(*op(*args, options.batch_sizes), *(inputs.new_empty(0) for _ in range(2)))


def _split(options, weights, inputs, hidden):
    """The ops' layers, attention, location and vector, of weights of which the first is over
    [input; context]: a gradient of its parts would be put together in passes over all of it."""
    n, E = 3 * hidden.shape[0], 0 if options.multiplied else inputs.shape[2]
    layers, attention, others = list(weights[:n]), list(weights[n : n + 5]), list(weights[n + 5 :])
    vector = [others.pop(), others.pop()][::-1] if options.activation else []
    if attention:
        attention = [layers[0][:, E:], *attention]
        layers[0] = layers[0][:, :E]
    return layers, attention, others, vector


def _results(run: Run):
    """What a caller sees of a run, time first; empty tensors for what there is not, since
    torch.compile takes no None from a Function."""
    has_cells = run.cells.dim() > 1
    return (
        run.hiddens[-1, 1:],
        run.contexts[1:],
        run.weights,
        run.hiddens[:, -1].clone(),  # not a part of the outputs' memory, which callers may change
        run.cells[:, -1] if has_cells else run.cells,
        run.locations[-1].clone() if len(run.locations) else run.locations,
        run.vectors[1:] if len(run.vectors) else run.vectors,
    )


def _products(a: Tensor, b: list[Tensor], sizes: Sequence[int], sums: bool = False) -> list[Tensor]:
    """Gradients of weights: sums over steps and batch, in so many rows of each step, of a (T, B, N)
    times each b (T, B, M), and if it is wanted that of a bias."""
    return products(a.flatten(0, 1).T, [x.flatten(0, 1) for x in b], sums, sizes)


def _layer_inputs(inputs, hiddens, dropout, i):
    if i == 0:
        return inputs
    return hiddens[i - 1, 1:] if dropout is None else hiddens[i - 1, 1:] * dropout[i - 1]


def _recomputed(cell_type, inputs, made, hiddens, fed, dropout, layers, attention):
    """Activated gates (L, T, B, G): one product each, now that all states are known. `made` is what
    the first layer has made of inputs that it reads no more, or None."""
    gates = []
    for i in range(len(layers) // 3):
        x, w_input = _layer_inputs(inputs, hiddens, dropout, i), layers[3 * i]
        if i == 0 and attention:
            x, w_input = torch.cat([x, fed], -1), torch.cat([w_input, attention[0]], 1)
        g = reference.layer_gates(x, hiddens[i, :-1], w_input, *layers[3 * i + 1 : 3 * i + 3])
        if i == 0 and made is not None:
            g[..., : made.shape[-1]] += made
        gates.append(reference.activate(cell_type, g))
    return torch.stack(gates)


def _backward(
    options, needs, grads, inputs, hiddens, cells, gates, queries, contexts, w, locations, vectors,
    powers, dropout, state_dropout, vector_dropout, context_dropout, features_dropout, *weights,
):  # fmt: skip
    """Gradients of `_Decoder.forward`'s arguments."""
    layers, attention, location, vector = _split(options, weights, inputs, hiddens)
    made = inputs if options.multiplied else None
    inputs = inputs[..., :0] if options.multiplied else inputs
    fed = vectors if vector else contexts
    fed = fed[:-1] if options.query_after else fed[1:]
    fed = fed if context_dropout is None else fed * context_dropout
    if gates is None:
        of_states = hiddens, fed, dropout, layers, attention
        gates = _recomputed(options.cell_type, inputs, made, *of_states)
    need_state = needs["hidden"] or needs["cell"]
    run = hiddens, cells, gates, queries, contexts, w, locations, vectors
    factors = dropout, state_dropout, vector_dropout, context_dropout, features_dropout
    steps, of_location, dvectors = _recurrence_backward(
        options, grads, run, layers, attention, location, vector, powers, factors, need_state
    )
    dgates, dq, ds, dcontexts, dhidden, dcell, dcontext = steps
    dx, fed = dgates[..., : layers[0].shape[0]], fed if attention else None
    sizes = options.batch_sizes
    found = _layer_gradients(needs["weights"], dgates, inputs, hiddens, fed, dropout, layers, sizes)
    if attention:
        _, _, _, keys, values, v = attention
        need_query, need_bias, need_keys, _, need_v = needs["weights"][len(layers) :][:5]
        state = hiddens[-1, 1:] if options.query_after else hiddens[-1, :-1]
        need = need_query or need_bias
        found += _products(dq, [state], sizes, sums=True) if need else [None, None]
        if location:
            dkeys, dv, *of_location = of_location
        else:
            _, dkeys, dv = OPS["additive_scores_backward", options.backend](
                ds.transpose(0, 1), queries.transpose(0, 1), keys, v, False, need_keys, need_v
            )
        dvalues = torch.bmm(w.permute(1, 2, 0), dcontexts.transpose(0, 1))
        found += [dkeys, dvalues, dv, *(of_location if location else [])]
        if vector and any(needs["weights"][-2:]):
            features = torch.cat([hiddens[-1, 1:], contexts[1:]], -1)
            if features_dropout is not None:
                features *= features_dropout
            found += _products(dvectors, [features], sizes, sums=True)
        elif vector:
            found += [None, None]
    dinputs = None
    if needs["inputs"] and options.multiplied:
        dinputs = dx[0]
    elif needs["inputs"]:
        dinputs = product(dx[0].flatten(0, 1), layers[0]).unflatten(0, inputs.shape[:2])
    dcontext = dcontext if options.query_after else None
    return dinputs, dhidden, dcell, dcontext, *9 * [None], *found


def _recurrence_backward(
    options, grads, run, layers, attention, location, vector, powers, factors, need_state
):  # fmt: skip
    """What the backend's op makes of gradients of `_results`: those of gates, queries, scores,
    contexts and of the states before the first step; those of keys, v and a location, which it
    makes where there is one; and of attentional vectors before their activation."""
    hiddens, cells, gates, queries, contexts, w, locations, vectors = run
    cell_type, query_after, _, backend, adds, detach, activation, sizes, _ = options
    dropout, state_dropout, vector_dropout, context_dropout, features_dropout = factors

    def dense(grad, like):
        return torch.zeros_like(like) if grad is None else grad.contiguous()

    def rows_of(grad, like):  # which may be parts of longer ones
        in_place = backend == "native" and grad is not None and grad.stride(-1) == 1
        return grad if in_place else dense(grad, like)

    of_outputs, of_contexts, of_weights, of_hidden, of_cell, of_location, of_vectors = grads
    args = (
        rows_of(of_outputs, hiddens[-1, 1:]),
        rows_of(of_contexts, contexts[1:]),
        dense(of_weights, w),
        dense(of_hidden, hiddens[:, -1]),
        dense(of_cell, cells[:, -1]) if cell_type == "lstm" else cells,
        hiddens, cells, gates, queries, w, layers, attention, powers, dropout, cell_type,
        query_after, need_state,
    )  # fmt: skip
    if not location and not vector and state_dropout is None and context_dropout is None:
        return OPS["attention_decoder_backward", backend](*args, sizes), [], None
    if location:
        of_location, location = dense(of_location, locations[-1]), [*location[:2], locations]
    else:
        of_location = locations
    of_vectors = rows_of(of_vectors, vectors[1:]) if vector else vectors
    *found, dvectors = OPS["extended_decoder_backward", backend](
        *args, of_location, location, adds, detach, state_dropout, of_vectors, vectors, vector,
        activation or "none", vector_dropout, context_dropout, features_dropout, sizes,
    )  # fmt: skip
    return found[:7], found[7:], dvectors


def _layer_gradients(needs, dgates, inputs, hiddens, fed, dropout, layers, sizes):
    """Of weights and bias of each layer; the first one reads [inputs; fed] where fed is given."""
    n_in, n_hidden, G = layers[0].shape[0], layers[1].shape[0], dgates.shape[-1]
    dx, dh = dgates[..., :n_in], dgates[..., G - n_hidden :]
    found = []
    for i in range(len(layers) // 3):
        need_input, need_hidden, need_bias = needs[3 * i : 3 * i + 3]
        rows, state = _layer_inputs(inputs, hiddens, dropout, i), hiddens[i, :-1]
        if fed is not None and i == 0:
            rows = torch.cat([rows, fed], -1)
        one_bias = layers[3 * i + 2].dim() == 1
        if need_input and need_hidden and need_bias and one_bias and n_in == n_hidden == G:
            found += _products(dx[i], [rows, state], sizes, sums=True)
            continue
        found += _products(dx[i], [rows], sizes) if need_input else [None]
        found += _products(dh[i], [state], sizes) if need_hidden else [None]
        found.append(dgates[i].sum((0, 1) if one_bias else 0) if need_bias else None)
    return found


def layer_weights(layers: Iterable[Iterable[Tensor]], cell_type: str) -> list[Tensor]:
    """nn.LSTM's, nn.GRU's or nn.RNN's weights in the ops' order: w_input, w_hidden and bias of each
    layer, but the first w_input is over [input; context] still."""
    weights = []
    for w_input, w_hidden, b_input, b_hidden in layers:
        bias = b_input + b_hidden
        if cell_type == "gru":
            n = 2 * w_hidden.shape[1]
            w_input = torch.cat([w_input[n:], w_input[:n]])
            bias = torch.cat([b_input[n:], bias[:n], b_hidden[n:]])
        weights += [w_input, w_hidden, bias]
    return weights


def attention_decoder(
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    *,
    query: tuple[Tensor, Tensor | None] | None = None,
    keys: Tensor | PreparedKeys | None = None,
    values: Tensor | None = None,
    v: Tensor | None = None,
    mask: Tensor | None = None,
    context: Tensor | None = None,
    cell_type: str = "lstm",
    query_after: bool = False,
    dropout: float | Tensor = 0.0,
    state_dropout: float | Tensor = 0.0,
    context_dropout: float | Tensor = 0.0,
    feedback: Feedback | None = None,
    location: Location | None = None,
    vector: AttentionalVector | None = None,
    recompute: bool = False,
    batch_sizes: Sequence[int] | None = None,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> DecoderOutput:
    """A recurrent decoder over T steps, attention inside its recurrence, as one operation.

    At each step the top layer's hidden state is projected to a query, the source is attended to,
    and the first layer reads the step's input and a context.

    Args:
        inputs: (B, T, E), embedded tokens, floating point; (B, T) token ids where there is an
            embedding.
        hidden: (L, B, H), before the first step.
        cell: the same of an LSTM; None for other cells.
        layers: weight_ih, weight_hh, bias_ih, bias_hh of each layer, as in `nn.LSTM.all_weights`;
            the first weight_ih (G, E + D) is over [input; context].
        query: weight (A, H) and bias (A,), or None for no bias, of the query's projection.
        keys: (B, S, A), projected; or what `prepare_keys` made of them.
        values: (B, S, D).
        v: (A,).
        mask: (B, S) bool, True = attend. A row masked everywhere has contexts of zero.
        context: (B, D): with `query_after` what the first step reads (zeros if None), with `vector`
            that of the step before it (B, O). Without query, keys, values and v the decoder has no
            attention, and every step reads it, or if it is None inputs alone.
        cell_type: "lstm", "gru" or "rnn" (tanh), with PyTorch's formulas.
        query_after: the query is the hidden state after the step, and the first layer reads the
            context of the step before (input feeding). Otherwise the query is the state before
            the step, and the first layer reads the step's own context.
        dropout: between layers; the probability, or factors (L - 1, B, T, H).
        state_dropout: on each layer's hidden state after a step, wherever it is read from then on,
            as Tacotron 2 has it; the probability, or factors (L, B, T, H). An LSTM's cell is not
            dropped. It holds in evaluation too: 0 there. Triton has no kernels of it.
        context_dropout: on the context, or attentional vector, that the first layer reads, and not
            on what is returned, as SpeechBrain and JoeyNMT have it; the probability, or factors
            (B, T, D) or (B, T, O). As state_dropout otherwise.
        feedback: the steps whose input is the argmax of the step before in place of inputs.
        location: what makes the scores see where was attended before; see `Location`. Triton has
            no kernels of it.
        vector: what the layers and the readout read in place of the context, with `query_after`;
            the first weight_ih is (G, E + O) then. See `AttentionalVector`. Triton has no kernels
            of it.
        recompute: gates are made anew in backward, by one product per layer, rather than kept.
        batch_sizes: of the B rows how many each step has, in whole numbers that never grow, as
            `batch_sizes.tolist()` of a `torch.nn.utils.rnn.PackedSequence`: the first ones, so that
            the longest rows come first. A row that is over costs nothing. Its hidden, cell and
            location stay what they were, and its outputs repeat the last; what attention makes, and
            vectors, logits and tokens, are 0. None of these takes a gradient there. None where all
            rows have all steps. Kernels on the CPU and the reference alone have it.
        embedding: (V, E), of token ids. Where they are more than twice V, and feedback has no
            dropout, kernels on the CPU multiply its rows by the first layer's weights in place of
            each input.
        backend: None for the best there is, "native", "triton" or "reference".

    Returns:
        `DecoderOutput`. Gradients flow to all floating-point arguments, factors of dropout aside.

    Float16 and bfloat16 are computed in float32. Under autocast so is everything but float64, and
    the results have autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    keys, powers = keys if isinstance(keys, PreparedKeys) else (keys, None)
    if query is not None:
        checks.listed("query", query, "weight and bias", 2)
    if feedback is not None:
        instance("feedback", feedback, Feedback)
    like = inputs if embedding is None else embedding
    autocast = autocast_on(like)
    if query is not None and query[1] is None and isinstance(query[0], Tensor):
        query = query[0], query[0].new_zeros(query[0].shape[:1])
    attention = (*((None, None) if query is None else query), keys, values, v)
    checks.decoder(
        inputs, embedding, hidden, cell, layers, attention, powers, mask, context, cell_type,
        query_after, dropout, state_dropout, context_dropout, feedback, recompute, location, vector,
        batch_sizes, autocast,
    )  # fmt: skip
    if context is None and keys is None:
        context = like.new_empty(hidden.shape[1], 0)
    dtype = torch.get_autocast_dtype(like.device.type) if autocast else like.dtype
    dtype = torch.float64 if like.dtype == torch.float64 else dtype
    within = torch.float64 if dtype == torch.float64 else torch.float32
    drops = any(isinstance(p, Tensor) or p > 0 for p in (state_dropout, context_dropout))
    extended = drops or location is not None or vector is not None
    op = "extended_decoder" if extended else "attention_decoder"
    backend = choose(op, like, backend)
    on_cpu = backend == "native" and inputs.is_cpu
    if batch_sizes is not None and backend != "reference" and not on_cpu:
        raise ValueError(
            f"batch_sizes: got some for backend {backend!r} on {inputs.device}, expected None but"
            " of kernels on the CPU and of the reference"
        )
    adds_up = () if location is None else accumulates(location.channels)
    detach = location is not None and location.detach
    activation = "" if vector is None else vector.activation

    fed = layers[0][0].shape[1] - like.shape[-1]  # D, or O of attentional vectors

    def cast(x):  # a call of `to` takes longer than to see that it has nothing to do
        return x if x is None or x.dtype is within else x.to(within)

    with autocast_off(like):
        weights, first = layer_weights([map(cast, x) for x in layers], cell_type), cast(hidden)
        same = feedback is not None and feedback.embedding is embedding
        embedding, multiplied = cast(embedding), False
        if on_cpu and embedding is not None and _read_often(inputs, embedding, feedback):
            # A product over the vocabulary, and not over all steps' rows.
            E, multiplied = embedding.shape[1], True
            of_input, weights[0] = weights[0][:, :E].T, weights[0][:, E:]
            embedding = embedding @ of_input
            if feedback is not None:
                fed_back = embedding if same else cast(feedback.embedding) @ of_input
                feedback = feedback._replace(embedding=fed_back)
        if embedding is None:
            steps = cast(inputs).transpose(0, 1).contiguous()
        else:
            steps = F.embedding(inputs.T, embedding)
        first = first.contiguous()
        found = _decode(
            steps,
            first,
            like.new_empty(0, dtype=within) if cell is None else cast(cell).contiguous(),
            weights,
            [cast(x) for x in attention if x is not None],
            mask,
            powers,
            cast(context),
            (
                _factors(dropout, steps, first, len(layers) - 1),
                _factors(state_dropout, steps, first, len(layers)),
                None if vector is None else _row_factors(vector.dropout, steps, fed),
                _row_factors(context_dropout, steps, fed),
                None
                if vector is None
                else _row_factors(vector.input_dropout, steps, vector.weight.shape[1]),
            ),
            _Options(
                cell_type,
                query_after,
                recompute,
                backend,
                adds_up,
                detach,
                activation,
                tuple(batch_sizes or ()),
                multiplied,
            ),
            feedback and Feedback(list(feedback.steps), *(cast(x) for x in feedback[1:])),
            [] if location is None else [cast(x) for x in parts(location, attention[2])],
            [] if vector is None else [cast(vector.weight), cast(bias_of(vector)).contiguous()],
        )
    where = found[7]
    others = [
        x if x is None or x is where or x.dtype in (dtype, torch.int64) else x.to(dtype)
        for x in found
    ]
    return DecoderOutput(*others)


def _read_often(tokens: Tensor, embedding: Tensor, feedback: Feedback | None) -> bool:
    """Whether rows of an embedding are better multiplied once each than at each token (B, T)."""
    dropped = feedback is not None and feedback.dropout is not None
    return tokens.numel() > 2 * len(embedding) and not dropped


def _without_gradients_behind(outputs: Tensor, sizes: Sequence[int]) -> Tensor:
    """outputs (T, B, H) of the reference, which are states that stay: gradients of those would
    reach the last step that a row has, as kernels do not let them."""
    rows = torch.arange(outputs.shape[1], device=outputs.device)
    there = rows < torch.tensor(sizes, device=outputs.device)[:, None]
    return torch.where(there[..., None], outputs, outputs.detach())


def _row_factors(dropout: float | Tensor, inputs: Tensor, width: int) -> Tensor | None:
    """Factors (T, B, width) of one number of each row and step, or None."""
    if isinstance(dropout, Tensor):
        return dropout.to(inputs.dtype).transpose(0, 1).contiguous()
    if dropout == 0:
        return None
    return dropout_factors((*inputs.shape[:2], width), dropout, inputs)


def _factors(dropout: float | Tensor, inputs: Tensor, hidden: Tensor, n: int):
    """Factors (n, T, B, H) of n layers' hidden states, or None."""
    if isinstance(dropout, Tensor):
        return dropout.to(hidden.dtype).transpose(1, 2).contiguous()
    if dropout == 0 or n == 0:
        return None
    return dropout_factors((n, len(inputs), *hidden.shape[1:]), dropout, hidden)


def _replaced(inputs: Tensor, steps: Sequence[int], rows: Tensor) -> Tensor:
    """inputs (T, B, E) with rows (F, B, E) at steps.

    Stacked, since an index would have to be copied to a GPU, which no CUDA graph can hold.
    """
    stacked = list(inputs.unbind())
    for t, row in zip(steps, rows.unbind(), strict=True):
        stacked[t] = row
    return torch.stack(stacked)


def _decode(
    inputs, hidden, cell, layers, attention, mask, powers, context, factors, options, feedback,
    location, vector,
):  # fmt: skip
    weights = [*layers, *attention, *location, *vector]
    E = 0 if options.multiplied else inputs.shape[2]
    if not attention and weights[0].shape[1] > E:  # the same at every step: a part of the bias
        from_context, bias = context @ weights[0][:, E:].T, weights[2]
        weights[0] = weights[0][:, :E]
        weights[2] = bias + F.pad(from_context, (0, len(bias) - from_context.shape[1]))
    steps, readout, input_dropout = [], [], None
    if feedback:
        steps, *readout, input_dropout = feedback
        if input_dropout is not None:
            input_dropout = input_dropout.transpose(0, 1).contiguous()
    args = (hidden, cell, weights, mask, powers, context, factors)
    fed_back = (steps, readout, input_dropout)
    grad = needs_grad(inputs, hidden, cell, context, *weights, *readout)
    if options.backend == "reference" or not grad:
        run = _run(options, inputs, *args, fed_back)
        results = _results(run)
    else:
        run = None
        if steps:
            with torch.no_grad():
                run = _run(options, inputs, *args, fed_back)
            fed = F.embedding(run.tokens, readout[0])
            if input_dropout is not None:
                of_steps = input_dropout.unbind()
                fed = fed * torch.stack([of_steps[t] for t in steps])
            inputs = _replaced(inputs, steps, fed)
        results = _Decoder.apply(
            inputs, *distinct(hidden, cell), context if attention else None, mask, powers, *factors,
            options, run, *distinct(*weights),
        )  # fmt: skip
    outputs, contexts, weights, hidden, cell, where, vectors = results
    if options.batch_sizes and options.backend == "reference":
        outputs = _without_gradients_behind(outputs, options.batch_sizes)
    if options.cell_type != "lstm":
        cell = None
    if not attention:
        contexts, weights = context.unsqueeze(1).expand(-1, len(inputs), -1), None
    else:
        contexts, weights = contexts.transpose(0, 1), weights.transpose(0, 1)
    tokens, logits = (run.tokens.T, run.logits) if steps else (None, None)
    where = where if location else None
    vectors = vectors.transpose(0, 1) if vector else None
    return outputs.transpose(0, 1), contexts, weights, hidden, cell, tokens, logits, where, vectors
