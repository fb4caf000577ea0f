"""Attentional vectors: what decoders of Luong's kind, JoeyNMT's and OpenNMT-py's feed and read."""

import random

import pytest
import torch
from decoder_draws import problems
from decoder_problems import accuracy, cast, check_in_float64, ops_called, problem, results, tensors
from decoding_models import BOS, EOS, V_SRC, check_same, sources
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import seq2seq_fast as s2s
from seq2seq_fast.decoding import stepwise

X = torch.zeros
B, S, E, H, D, A, O, V = 3, 6, 4, 7, 10, 5, 9, 11  # noqa: E741


@st.composite
def joined(draw):
    drawn = draw(problems(attention=True, vectors=True, ragged=True, ids=True))
    sizes = {"after": True, "O": draw(st.integers(1, 70))}
    sizes |= {f"{x}_dropped": draw(st.booleans()) for x in ("vectors", "features")}
    channels = draw(st.sampled_from([(), (), ("previous",)]))
    return drawn | sizes | {"joined": draw(st.sampled_from(["tanh", "none"])), "channels": channels}


@settings(max_examples=25, deadline=None)
@given(joined(), st.booleans())
def test_outputs_and_every_gradient_keep_the_accuracy_rule(drawn, recompute):
    used = accuracy(drawn, recompute=recompute)
    assume(used is not None)
    assert max(used.values()) <= 1, used


@settings(max_examples=50, deadline=None)
@given(joined(), st.booleans())
def test_in_float64_it_is_the_reference(drawn, recompute):
    check_in_float64(drawn, recompute=recompute)


@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
def test_gradcheck(cell_type, activation):
    args = problem(
        cell_type, B=2, T=3, S=3, E=2, H=3, A=2, D=2, O=4, after=True, joined=activation,
        vectors_dropped=True, features_dropped=True,
    )  # fmt: skip
    leaves = tensors(args)

    def run(*_):
        out = s2s.attention_decoder(**args)
        return out.outputs, out.contexts, out.hidden, out.vectors

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("T", [0, 1])
def test_no_step_and_one_step(T):
    args = cast(problem(T=T, after=True, joined="tanh"), torch.float32)
    assert s2s.attention_decoder(**args).vectors.shape == (3, T, 6)
    found, want = results(args), results(args, backend="reference")
    for name, x in want[0].items():
        torch.testing.assert_close(found[0][name], x, msg=name)


def test_the_ops_tell_their_shapes():
    args = cast(problem(after=True, joined="tanh", channels=("previous",)), torch.float32)

    def call():
        out = s2s.attention_decoder(**args)
        (out.outputs.sum() + out.vectors.sum()).backward()

    called = ops_called("seq2seq_fast::extended_decoder", call)
    assert len(called) == 2
    for function, arguments in called:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


def decoder(cell_type="lstm", layers=2, activation="tanh", dropout=0.0, location=(), vocabulary=V):
    torch.manual_seed(0)
    return s2s.Decoder(
        vocabulary, E, H, layers, dropout, cell_type=cell_type, query_after=True, encoder_dim=D,
        attention_dim=A, attentional_dim=O, attentional_activation=activation, location=location,
        location_filters=3, location_kernel_size=3,
    )  # fmt: skip


def start(cell_type="lstm", layers=2):
    torch.manual_seed(1)
    mask = torch.rand(B, S) < 0.7
    mask[:, 0] = True
    hidden = torch.randn(layers, B, H)
    cell = torch.randn(layers, B, H) if cell_type == "lstm" else None
    return torch.randint(V, (B, 6)), torch.randn(B, S, D), mask, s2s.DecoderState(hidden, cell)


class Loop(nn.Module):
    """The decoders of JoeyNMT (tanh) and OpenNMT-py ("mlp": none), a step after the other, of
    PyTorch's cells: rnn over [embedding; vector of the step before], attention with its output,
    vector = dropout(activation(linear [output; context])), logits of the vector."""

    def __init__(self, ours: s2s.Decoder):
        super().__init__()
        self.ours = ours

    def forward(self, tokens, values, mask, state, factors=None):
        ours, a = self.ours, self.ours.attention
        cells = self.cells()
        hidden = list(state.hidden)
        memory = list(hidden if state.cell is None else state.cell)
        vector, logits = values.new_zeros(len(values), O), []
        for t, token in enumerate(tokens.T):
            x = torch.cat([ours.embedding(token), vector], 1)
            for i, cell in enumerate(cells):
                if ours.cell_type == "lstm":
                    hidden[i], memory[i] = cell(x, (hidden[i], memory[i]))
                else:
                    hidden[i] = cell(x, hidden[i])
                x = hidden[i]
            energy = torch.tanh(a.Wa(x).unsqueeze(1) + a.Ua(values))
            scores = a.Va(energy).squeeze(2).masked_fill(~mask, -torch.inf)
            context = torch.bmm(scores.softmax(1).unsqueeze(1), values).squeeze(1)
            vector = ours.attentional(torch.cat([x, context], 1))
            vector = vector.tanh() if ours.attentional_activation == "tanh" else vector
            vector = vector if factors is None else vector * factors[:, t]
            logits.append(ours.fc_out(vector))
        return torch.stack(logits, 1)

    def cells(self):
        ours = self.ours
        kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[ours.cell_type]
        cells = [kind(E + O if i == 0 else H, H) for i in range(ours.n_layers)]
        for cell, weights in zip(cells, ours.layers.all_weights, strict=True):
            cell.double()
            for name, w in zip(
                ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True
            ):
                del cell._parameters[name]
                setattr(cell, name, w)
        return cells


@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("dropped", [False, True])
def test_against_a_loop_over_pytorch_s_cells(cell_type, activation, dropped, monkeypatch):
    """Logits and every gradient in float64."""
    ours = decoder(cell_type, activation=activation, dropout=0.4 * dropped).double()
    tokens, values, mask, state = start(cell_type)
    state = s2s.DecoderState(*(None if x is None else x.double() for x in state))
    values = values.double().requires_grad_()
    ours.dropout.p, drawn = 0.0, []
    ours.layers.eval()
    if dropped:  # of vectors alone, and with known factors
        drawn.append((torch.rand(B, 6, O) < 0.6).double() / 0.6)
        vector = s2s.Decoder._vector
        monkeypatch.setattr(s2s.Decoder, "_vector", lambda self, _: vector(self, drawn[0]))
    out = ours.run(tokens, state, ours.source(values, mask))
    logits = ours.fc_out(out.features)
    want = Loop(ours)(tokens, values, mask, state, *drawn)
    torch.testing.assert_close(logits, want)
    leaves = [values, *ours.parameters()]
    found, expected = (
        torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in (logits, want)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("cell_type", ["lstm", "gru"])
def test_the_sequence_is_its_steps(cell_type, prepared):
    """Decoder.forward token by token, its argmax fed back or not, against one call."""
    ours, (tokens, values, mask, before) = decoder(cell_type).eval(), start(cell_type)
    if prepared:
        ours.prepare_inference()
    feedback, logits, vector = [2, 3, 5], [], None
    state = before[:2]
    with torch.no_grad():
        for t in range(6):
            token = logits[-1].argmax(-1) if t in feedback else tokens[:, t]
            step, *state, vector = ours(token, *state, values, mask, context=vector)
            logits.append(step)
        out = ours.run(tokens, before, ours.source(values, mask), feedback)
    assert vector.shape == (B, O)
    torch.testing.assert_close(vector, out.vectors[:, -1])
    torch.testing.assert_close(ours.fc_out(out.features), torch.stack(logits, 1))
    for t in feedback:
        torch.testing.assert_close(out.logits[:, t], logits[t - 1])


def model(cell_type="lstm", layers=1, activation="tanh", vocabulary=V, size=4.0, dropout=0.0):
    torch.manual_seed(0)
    encoder = s2s.Encoder(
        V_SRC, 5, 5, layers, dropout, cell_type=cell_type, bidirectional=True, bridge_dim=H
    )
    ours = decoder(cell_type, layers, activation, dropout, vocabulary=vocabulary)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.startswith(("fc_out", "embedding", "attention")):
                p.mul_(size)
    return s2s.Seq2Seq(encoder, ours, 0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cell_type", ["lstm", "gru"])
def test_a_model_and_its_loss_against_the_reference(cell_type, ratio):
    src, trg = sources(3, 7), torch.randint(V, (3, 6))
    found = []
    for backend in ("native", "reference"):
        m = model(cell_type, layers=2, dropout=0.3).double()
        torch.manual_seed(2)
        random.seed(2)
        with s2s.use_backend(backend):
            logits = m(src, trg, ratio)
            want = F.cross_entropy(logits[:, 1:].flatten(0, 1), trg[:, 1:].flatten())
            torch.manual_seed(2)
            random.seed(2)
            loss = m.loss(src, trg, ratio)
            loss.backward()
        torch.testing.assert_close(loss, want)
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        found.append({"logits": logits, **grads})
    assert "decoder.attentional.weight" in found[0]
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, msg=name)


@pytest.mark.parametrize("vocabulary", [V, 1100])
@pytest.mark.parametrize("options", [{}, {"beam_size": 3, "n_best": 2}, {"sample": True}], ids=str)
@pytest.mark.parametrize(
    ("cell_type", "layers", "activation"),
    [("lstm", 1, "tanh"), ("lstm", 2, "none"), ("gru", 1, "tanh"), ("rnn", 2, "tanh")],
)
def test_decoding_is_plain_pytorch_s(cell_type, layers, activation, options, vocabulary):
    m, src = model(cell_type, layers, activation, vocabulary).eval(), sources(5, 8)
    options = options | {"bos": BOS, "eos": EOS, "max_length": 9, "return_weights": True}
    for prepared in (False, True):
        if prepared:
            m.prepare_inference()
        results = []
        for backend in ("native", "reference"):
            torch.manual_seed(3)
            results.append(m.generate(src, backend=backend, **options))
        check_same(m, src, *results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_row_is_decoded_alike_alone_and_in_any_batch(dtype):
    """Bit for bit, from what an encoder made of it."""
    m, src = model().eval().prepare_inference(dtype), sources(67, 8)
    source, state = m.encode(src)
    for beam_size in (1, 2):
        options = {"bos": BOS, "eos": EOS, "max_length": 9, "beam_size": beam_size}
        together = s2s.generate(m.decoder, source, state, **options)
        for b in range(0, 67, 11):
            parts = stepwise.take_source(source, [b]), stepwise.take_state(state, [b])
            alone = s2s.generate(m.decoder, *parts, **options)
            n = alone.tokens.shape[-1]
            assert torch.equal(alone.tokens[0], together.tokens[b, ..., :n])
            assert torch.equal(alone.scores[0], together.scores[b])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reduced_weights_are_near(dtype):
    m, src = model(size=1.0).eval(), sources(20, 8)
    options = {"bos": BOS, "eos": EOS, "max_length": 1}
    want = m.generate(src, **options).log_probs
    found = m.prepare_inference(dtype).generate(src, **options).log_probs
    assert 0 < (found - want).abs().max() < 0.05


def test_a_call_goes_on_from_another_s_state():
    """bos is the last token, and the context its vector."""
    m, src = model().eval(), sources(4, 8)
    options = {"bos": BOS, "eos": EOS, "return_scores": True}
    source, state = m.encode(src)
    whole = s2s.generate(m.decoder, source, state, max_length=8, min_length=8, **options)
    with torch.no_grad():
        logits, *first, vector = m.decoder(torch.full((4,), BOS), *state[:2], source)
        token = logits.argmax(1)
    state = s2s.DecoderState(*first, vector)
    for backend in ("native", "reference"):
        rest = s2s.generate(
            m.decoder, source, state, max_length=7, min_length=7, backend=backend,
            prefix=whole.tokens[:, 1:2], **options | {"bos": int(token[0])},
        )  # fmt: skip
        assert torch.equal(rest.tokens[0], whole.tokens[0, 1:])


@pytest.mark.unsanitized
def test_it_compiles_in_one_graph():
    ours, (tokens, values, mask, state) = decoder(), start()

    def run(values):
        out = ours.run(tokens, state, ours.source(values, mask))
        return ours.fc_out(out.features)

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(values), run(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    args = cast(problem(after=True, joined="tanh"), dtype)
    half = s2s.attention_decoder(**args)
    whole = s2s.attention_decoder(**cast(args, torch.float32))
    assert half.vectors.dtype == dtype
    torch.testing.assert_close(half.vectors, whole.vectors.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        cast_later = s2s.attention_decoder(**cast(args, torch.float32))
    torch.testing.assert_close(cast_later.vectors, half.vectors)


@pytest.mark.parametrize("joined", ["none", "tanh"])
@pytest.mark.parametrize("name", ["context_dropout", "vector"])
def test_probabilities_draw_factors_from_a_seed(joined, name):
    args = cast(problem(T=40, after=True, joined=joined, seed=1), torch.float32)
    if name == "vector":
        drops = {"vector": args["vector"]._replace(dropout=0.4)}
    else:
        drops = {"context_dropout": 0.4}
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(s2s.attention_decoder(**args | drops).vectors)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    zeros = (found[0] == 0).float().mean()
    assert 0.3 < zeros < 0.5 if name == "vector" else zeros == 0


def test_bad_input_is_refused():
    args = cast(problem(after=True, joined="tanh"), torch.float32)
    vector = args["vector"]
    wrong = {
        "vector: got str, expected Attentional": {"vector": "x"},
        r"vector.weight: got shape \(6, 9\), expected \(O, H \+ D\)": {
            "vector": vector._replace(weight=X(6, 9))
        },
        "vector.weight: got O = 0": {"vector": vector._replace(weight=X(0, 10))},
        r"vector.bias: got shape \(5,\)": {"vector": vector._replace(bias=X(5))},
        "vector.activation: got 'relu'": {"vector": vector._replace(activation="relu")},
        "vector.dropout: got 2.0": {"vector": vector._replace(dropout=2.0)},
        r"vector.dropout: got shape \(3, 5, 7\)": {"vector": vector._replace(dropout=X(3, 5, 7))},
        "vector.input_dropout: got -0.1": {"vector": vector._replace(input_dropout=-0.1)},
        r"vector.input_dropout: got shape \(3, 5, 6\), expected \(B, T, H \+ D\)": {
            "vector": vector._replace(input_dropout=X(3, 5, 6))
        },
        r"context: got shape \(3, 3\), expected \(B, O\) = \(3, 6\)": {"context": X(3, 3)},
        "vector: got an AttentionalVector, expected None without query": {"query_after": False},
        r"context_dropout: got shape \(3, 5, 3\), expected .* \(3, 5, 6\)": {
            "context_dropout": X(3, 5, 3)
        },
        "context_dropout: got 1.5": {"context_dropout": 1.5},
        r"layers\[0\]\[0\]: got shape \(28, 10\), expected .* \(28, 7\)": {"vector": None,
            "context": None},
    }  # fmt: skip
    for message, change in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            s2s.attention_decoder(**args | change)
    bare = cast(problem(attention=False), torch.float32)
    with pytest.raises(ValueError, match="context_dropout: got one, expected 0 without keys"):
        s2s.attention_decoder(**bare, context_dropout=0.5)
    without = s2s.attention_decoder(**args | {"vector": vector._replace(bias=None)})
    zeros = s2s.attention_decoder(**args | {"vector": vector._replace(bias=X(6))})
    assert torch.equal(without.vectors, zeros.vectors)
    with pytest.raises(ValueError, match="attentional_dim: got 3, expected None without query"):
        s2s.Decoder(9, 4, 7, 1, 0.0, attentional_dim=3)
    with pytest.raises(ValueError, match="attentional_activation: got 'relu', expected one of"):
        s2s.Decoder(9, 4, 7, 1, 0.0, query_after=True, attentional_dim=3,
                    attentional_activation="relu")  # fmt: skip
    m, src = model().eval(), sources(2, 5)
    source, state = m.encode(src)
    with pytest.raises(ValueError, match=r"context: got shape \(2, 10\), expected .* \(2, 9\)"):
        s2s.generate(
            m.decoder, source, state._replace(context=X(2, D)), bos=BOS, eos=EOS, max_length=3
        )
    with pytest.raises(ValueError, match="project_values: got True, expected False with attention"):
        m.prepare_inference(project_values=True)
    for wrong, message in (
        (nn.Linear(H + D, O + 1), r"attentional.weight: got shape \(10, 17\), expected \(9, 17\)"),
        (nn.Sequential(nn.Linear(H + D, O)), "attentional.weight: got NoneType, expected a Tensor"),
        (None, "attentional.weight: got NoneType, expected a Tensor"),
    ):
        m.decoder.attentional = wrong
        m.eval()
        for call in (
            lambda: m.generate(src, bos=BOS, eos=EOS, max_length=3, backend="native"),
            lambda: m(src, torch.full((2, 4), 3)),
        ):
            with pytest.raises(ValueError, match="decoder." + message):
                call()
    with pytest.raises(ValueError, match="attentional_activation: got 'relu', expected one of"):
        s2s.Decoder(9, 4, 7, 1, 0.0, attentional_activation="relu")
    feedback = s2s.Feedback([2], X(9, 4), X(9, 11), X(9))
    with pytest.raises(ValueError, match=r"feedback.weight: got .* expected \(V, O\) = \(9, 6\)"):
        s2s.attention_decoder(**args, feedback=feedback)
    with pytest.raises(TypeError, match="vector: got bool, expected AttentionalVector"):
        s2s.attention_decoder(**args | {"query_after": False, "vector": True})


def test_the_ops_refuse_factors_of_another_shape():
    args = cast(problem(after=True, joined="tanh", vectors_dropped=True), torch.float32)

    def call():
        s2s.attention_decoder(**args).vectors.sum().backward()

    for function, arguments in ops_called("seq2seq_fast::extended_decoder", call):
        function(*arguments)
        for wrong in (X(1), X(5, 3, 7), X(5, 3, 6).double()):
            for i in range(3):  # of the vector, of what the layers read, of what the vector reads
                factors = [None, None, None]
                factors[i] = wrong
                with pytest.raises(RuntimeError, match="expected contiguous factors"):
                    function(*arguments[:-3], *factors)
