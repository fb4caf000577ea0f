"""The attention decoder: parity with its reference in plain PyTorch, machinery, bad input."""

import itertools
import random
import statistics
import subprocess
import sys
from types import SimpleNamespace

import plain
import pytest
import torch
from decoder_draws import problems
from decoder_problems import (
    MODULES,
    ORDERS,
    accuracy,
    cast,
    check_in_float64,
    ops_called,
    problem,
    results,
    tensors,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import seq2seq_fast as s2s
from seq2seq_fast.training import train


@settings(max_examples=25, deadline=None)
@given(problems(ragged=True, ids=True), st.booleans())
def test_outputs_and_every_gradient_keep_the_accuracy_rule(drawn, recompute):
    used = accuracy(drawn, recompute=recompute)
    assume(used is not None)
    assert max(used.values()) <= 1, used


def test_what_passes_a_gru_s_gates_by_does_not_round_the_rest():
    """A gradient that it adds to first costs every small term of a product its last digits."""
    ratios = []
    for seed in range(20):
        args = problem("gru", L=1, B=1, T=1, H=64, attention=False, D=1, seed=seed)
        found = [
            results(cast(args, dtype), backend=backend)[0]["dhidden"].double()
            for dtype, backend in (
                (torch.float64, "reference"),
                (torch.float32, "native"),
                (torch.float32, "reference"),
            )
        ]
        want, ours, theirs = found
        ratios.append(((ours - want).norm() / (theirs - want).norm()).item())
    assert statistics.median(ratios) < 1.5, ratios


@pytest.mark.parametrize("x", [float("nan"), float("inf"), 1e4, -1e4, 1e-30])
@pytest.mark.parametrize("cell_type", [*MODULES])
def test_cells_take_numbers_of_any_size_as_plain_pytorch_does(cell_type, x):
    args = cast(problem(cell_type, B=3, T=5, H=37, attention=False, seed=0), torch.float32)
    args["inputs"].data[1, 2] = x
    ours, _ = results(args)
    theirs, _ = results(args, backend="reference")
    for name, got in ours.items():
        torch.testing.assert_close(got, theirs[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert ours["outputs"][::2].isfinite().all()  # the other sequences


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("cell_type", "after"), ORDERS)
def test_a_first_state_of_zeros_with_and_without_a_gradient(cell_type, after, attention):
    """As an encoder begins: a kernel spares the products with it, and those of its gradient."""
    args = problem(cell_type, after=after and attention, attention=attention, dropout=True)
    for name in ("hidden", "cell"):
        args[name] = None if args[name] is None else torch.zeros_like(args[name])
    args = cast(args, torch.float32)
    want = {}
    for wanted in (True, False):
        for name in ("hidden", "cell"):
            if args[name] is not None:
                args[name].requires_grad_(wanted)
        found, _ = results(args)
        want = want or results(args, backend="reference")[0]
        assert ("dhidden" in found) == wanted
        for name, x in found.items():
            torch.testing.assert_close(x, want[name], msg=name, rtol=1e-4, atol=1e-5)


def test_without_attention_or_context_it_is_a_recurrent_network():
    lstm, x = nn.LSTM(3, 8, 2, batch_first=True), torch.randn(4, 5, 3)
    zeros = torch.zeros(2, 4, 8)
    out = s2s.attention_decoder(x, zeros, zeros, lstm.all_weights)
    torch.testing.assert_close(out.outputs, lstm(x)[0])
    assert out.contexts.shape == (4, 5, 0)


def test_gradients_of_outputs_may_be_parts_of_longer_rows():
    args = cast(problem(), torch.float32)
    leaves = [*tensors(args).values()]
    outputs, contexts = s2s.attention_decoder(**args)[:2]
    whole = torch.randn(3, 5, 7 + 3 + 2)
    want = torch.autograd.grad(
        (outputs, contexts), leaves, (whole[..., :7].clone(), whole[..., 7:10].clone()), True
    )
    found = torch.autograd.grad((outputs, contexts), leaves, (whole[..., :7], whole[..., 7:10]))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@settings(max_examples=60, deadline=None)
@given(problems(ragged=True, ids=True), st.booleans())
def test_in_float64_it_is_the_reference(drawn, recompute):
    check_in_float64(drawn, recompute=recompute)


@pytest.mark.parametrize(("cell_type", "after"), ORDERS)
def test_gradcheck(cell_type, after):
    args = problem(cell_type, B=2, T=3, S=3, E=2, H=3, A=2, D=2, after=after, dropout=True)
    leaves = tensors(args)

    def run(*_):
        out = s2s.attention_decoder(**args)
        return tuple(x for x in out[:5] if x is not None)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


DECODERS = [
    (cell_type, attention, after)
    for cell_type, attention, after in itertools.product(MODULES, (True, False), (False, True))
    if attention or not after
]


def decoder_and_source(cell_type, attention, after, B=3, S=6):
    torch.manual_seed(0)
    decoder = s2s.Decoder(
        9, 4, 7, 2, 0.0, cell_type=cell_type, attention=attention, query_after=after,
        encoder_dim=10, attention_dim=5,
    )  # fmt: skip
    hidden = torch.randn(2, B, 7)
    cell = torch.randn(2, B, 7) if cell_type == "lstm" else None
    if not attention:
        return decoder, hidden, cell, (torch.randn(B, 10),)
    mask = torch.rand(B, S) < 0.7
    mask[:, 0] = True
    return decoder, hidden, cell, (torch.randn(B, S, 10), mask)


@pytest.mark.parametrize(("cell_type", "attention", "after"), DECODERS)
def test_the_sequence_is_its_steps(cell_type, attention, after):
    """Decoder.forward token by token, its argmax fed back or not, against one call."""
    decoder, hidden, cell, source = decoder_and_source(cell_type, attention, after)
    tokens, feedback = torch.randint(9, (3, 6)), [2, 3, 5]
    state, logits = (hidden, cell), []
    context = {}
    for t in range(6):
        token = logits[-1].argmax(-1) if t in feedback else tokens[:, t]
        step, *state = decoder(token, *state[:2], *source, **context)
        context = {"context": state[2]} if after else {}
        logits.append(step)
    out = decoder.run(tokens, s2s.DecoderState(hidden, cell), decoder.source(*source), feedback)
    features = torch.cat([out.outputs, out.contexts], -1)
    torch.testing.assert_close(decoder.fc_out(features), torch.stack(logits, 1))
    torch.testing.assert_close(out.hidden, state[0])
    if cell is not None:
        torch.testing.assert_close(out.cell, state[1])
    assert torch.equal(out.tokens, torch.stack([logits[t - 1].argmax(-1) for t in feedback], 1))
    for t in feedback:
        torch.testing.assert_close(out.logits[:, t], logits[t - 1])


MODELS = {
    "gru, query after, all widths apart": dict(
        cell_type="gru", bidirectional=True, bridge_dim=11, H=11, encoder_dim=16, attention_dim=5,
        query_after=True,
    ),
    "lstm, bidirectional, bridge": dict(
        cell_type="lstm", bidirectional=True, bridge_dim=11, H=11, encoder_dim=16
    ),
    "rnn, bidirectional": dict(cell_type="rnn", bidirectional=True, H=16),
    "lstm, no attention": dict(cell_type="lstm", H=8, attention=False),
    "lstm, recompute": dict(cell_type="lstm", H=8, recompute=True),
}  # fmt: skip


def model(options, dropout=0.0):
    options = dict(options)
    H, cell_type = options.pop("H"), options["cell_type"]
    of_encoder = {k: options.pop(k) for k in ("bidirectional", "bridge_dim") if k in options}
    torch.manual_seed(0)
    encoder = s2s.Encoder(11, 6, 8, 2, dropout, cell_type=cell_type, **of_encoder)
    return s2s.Seq2Seq(encoder, s2s.Decoder(9, 6, H, 2, dropout, **options), pad_idx=0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_models_of_all_kinds_against_plain_pytorch(options, ratio):
    torch.manual_seed(1)
    src, trg = torch.randint(1, 11, (3, 7)), torch.randint(9, (3, 6))
    src[1, 4:] = 0
    found = []
    for backend in ("native", "reference"):
        m = model(options, dropout=0.3).double()
        torch.manual_seed(2)
        random.seed(2)
        with s2s.use_backend(backend):
            logits = m(src, trg, ratio)
            loss = F.cross_entropy(logits[:, 1:].flatten(0, 1), trg[:, 1:].flatten())
            loss.backward()
        assert (logits[:, 0] == 0).all()
        # Parameters that play no part (Va's bias, a bridge's cell) have no gradient or zero.
        grads = {n: p.grad if p.grad is not None else p * 0 for n, p in m.named_parameters()}
        found.append({"logits": logits, **grads})
        with torch.no_grad(), s2s.use_backend(backend):
            random.seed(2)
            torch.manual_seed(2)
            torch.testing.assert_close(m(src, trg, ratio), logits)
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, msg=name)


def test_training_curves_are_those_of_plain_pytorch():
    """200 steps of the fused model, its reference and the tutorial's code: the same losses."""
    src, trg = torch.randint(1, 11, (4, 16, 6)), torch.randint(9, (4, 16, 5))
    batches = [SimpleNamespace(src=x, trg=y) for x, y in zip(src, trg, strict=True)] * 2
    curves = []
    torch.manual_seed(0)
    start = plain.Seq2Seq(
        plain.Encoder(11, 6, 16, 2, 0), plain.Decoder(9, 6, 16, 2, 0)
    ).state_dict()
    for kind, backend in ((s2s, "native"), (s2s, "reference"), (plain, "native")):
        m = kind.Seq2Seq(kind.Encoder(11, 6, 16, 2, 0), kind.Decoder(9, 6, 16, 2, 0))
        m.load_state_dict(start)
        optimizer = torch.optim.Adam(m.parameters(), 3e-3)
        random.seed(0)
        with s2s.use_backend(backend):
            criterion = nn.CrossEntropyLoss()
            curves.append([train(m, batches, optimizer, criterion, 1.0) for _ in range(25)])
    fused, reference, tutorial = torch.tensor(curves)
    assert fused[-1] < 0.8 * fused[0]
    assert (fused[:5] - reference[:5]).abs().max() < 1e-5
    # Rounding grows with the steps: as far apart as two spellings in plain PyTorch are.
    room = 1e-4 + 10 * (reference - tutorial).abs().max()
    assert (fused - reference).abs().max() < room


def test_a_query_without_a_bias():
    args = problem()
    weight, bias = args["query"]
    found = s2s.attention_decoder(**args | {"query": (weight, None)})
    want = s2s.attention_decoder(**args | {"query": (weight, torch.zeros_like(bias))})
    assert torch.equal(found.weights, want.weights)


@pytest.mark.unsanitized
def test_the_compiler_is_given_one_tensor_as_two_arguments():
    args = cast(problem(), torch.float32)
    args |= {"cell": args["hidden"], "values": args["keys"]}
    args["layers"] = [[X(28, 9), *args["layers"][0][1:]], args["layers"][1]]
    compiled = torch.compile(s2s.attention_decoder, fullgraph=True, backend="aot_eager")
    found, want = compiled(**args), s2s.attention_decoder(**args)
    torch.testing.assert_close(found.outputs, want.outputs)
    q, k, v = args["keys"][:, 0], args["keys"], args["v"]
    compiled = torch.compile(s2s.additive_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(k, k, k, v), s2s.additive_attention(k, k, k, v))
    place = s2s.Location(torch.randn(2, 1, 3), torch.randn(5, 2))
    compiled = torch.compile(s2s.location_attention, fullgraph=True, backend="aot_eager")
    want = s2s.location_attention(q, k, k, v, place)
    torch.testing.assert_close(compiled(q, k, k, v, place), want)


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("attention", [True, False])
def test_no_step_and_one_step(T, attention):
    args = cast(problem(T=T, attention=attention), torch.float32)
    out = s2s.attention_decoder(**args)
    assert out.outputs.shape == (3, T, 7) and out.contexts.shape == (3, T, 3)
    if T == 0:
        assert torch.equal(out.hidden, args["hidden"]) and torch.equal(out.cell, args["cell"])
    found, want = results(args), results(args, backend="reference")
    for name, x in want[0].items():
        torch.testing.assert_close(found[0][name], x, msg=name)


def test_a_source_masked_everywhere_gives_contexts_of_zero_and_no_gradient():
    args = cast(problem(), torch.float32)  # whose first source is
    found, _ = results(args)
    assert (found["contexts"][0] == 0).all() and (found["weights"][0] == 0).all()
    assert all((found[name][0] == 0).all() for name in ("dkeys", "dvalues"))
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    args = cast(problem(dropout=True, after=True, feedback=[2]), dtype)
    (found, tokens), (want, same) = results(args), results(cast(args, torch.float32))
    assert torch.equal(tokens, same)
    for name, x in found.items():
        assert x.dtype == dtype
        if not name.startswith("d"):  # gradients: of outputs whose cotangents were rounded too
            torch.testing.assert_close(x, want[name].to(dtype), msg=name)
        else:
            scale = want[name].abs().max().item()
            torch.testing.assert_close(x.float(), want[name], rtol=0.05, atol=0.02 * scale)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_autocast_of_a_model(ratio):
    m = model({"cell_type": "lstm", "H": 8})
    src, trg = torch.randint(1, 11, (3, 7)), torch.randint(9, (3, 6))
    want = m(src, trg, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = m(src, trg, ratio)
        logits.float().square().mean().backward()  # inside, where products would be cast
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in m.parameters())
    if ratio == 1.0:
        torch.testing.assert_close(logits.float(), want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_results_alone(dtype):
    args = cast(problem(), torch.float32)
    want = s2s.attention_decoder(**args)
    with torch.autocast("cpu", dtype):
        found = s2s.attention_decoder(**args | {"keys": args["keys"].to(dtype).float()})
        mixed = s2s.attention_decoder(**args | {"keys": args["keys"].to(dtype)})
        double = s2s.attention_decoder(**problem())
    for a, b, c, d in zip(found[:5], mixed[:5], double[:5], want[:5], strict=True):
        assert a.dtype == dtype and c.dtype == torch.float64 and torch.equal(a, b)
        torch.testing.assert_close(a.float(), d, rtol=0.05, atol=0.05)


def test_each_gradient_alone_is_the_one_of_all():
    args = problem(after=True, dropout=True)
    every = results(args)[0]
    for name, leaf in tensors(args).items():
        frozen = [x for x in tensors(args).values() if x is not leaf]
        for x in frozen:
            x.requires_grad_(False)
        out = results(args)[0]
        assert [n for n in out if n.startswith("d")] == [f"d{name}"]
        torch.testing.assert_close(out[f"d{name}"], every[f"d{name}"], rtol=0, atol=0)
        for x in frozen:
            x.requires_grad_()


def test_double_backward_raises():
    args = problem()
    out = s2s.attention_decoder(**args)
    (grad,) = torch.autograd.grad(out.outputs.square().sum(), args["inputs"], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        grad.sum().backward()
    out = s2s.attention_decoder(**args, backend="reference")
    (grad,) = torch.autograd.grad(out.outputs.square().sum(), args["inputs"], create_graph=True)
    grad.sum().backward()


def test_prepared_keys_and_a_second_backward_change_nothing():
    args = cast(problem(), torch.float32)
    out = s2s.attention_decoder(**args)
    prepared = s2s.attention_decoder(**args | {"keys": s2s.prepare_keys(args["keys"])})
    leaves = list(tensors(args).values())
    want = torch.autograd.grad(out.outputs.sum(), leaves, retain_graph=True)
    for again in (out, prepared):
        found = torch.autograd.grad(again.outputs.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_dropout_is_torchs_and_reproducible():
    args = cast(problem(T=50, H=64), torch.float32)
    torch.manual_seed(3)
    a = s2s.attention_decoder(**args, dropout=0.5).outputs
    torch.manual_seed(3)
    b = s2s.attention_decoder(**args, dropout=0.5).outputs
    c = s2s.attention_decoder(**args, dropout=0.5).outputs
    assert torch.equal(a, b) and not torch.equal(b, c)


@pytest.mark.parametrize("cell_type", MODULES)
def test_dropped_states_are_those_of_a_loop_over_pytorch_s_cells(cell_type):
    """h = dropout(cell(x, h)), which the next step, the next layer and the output read; and its
    probability means that rate."""
    torch.manual_seed(0)
    T, B, E, H = 5, 3, 4, 7
    kept = (torch.rand(2, B, T, H) < 0.7).double() / 0.7
    kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[cell_type]
    cells = [kind(E + 2, H).double(), kind(H, H).double()]
    x, fixed = torch.randn(B, T, E).double(), torch.randn(B, 2).double()
    states = [torch.randn(B, H).double() for _ in cells]
    memories, outputs = [torch.randn(B, H).double() for _ in cells], []
    args = dict(
        inputs=x, hidden=torch.stack(states), cell_type=cell_type, context=fixed,
        cell=torch.stack(memories) if cell_type == "lstm" else None,
        layers=[[*c.parameters()] for c in cells],
    )  # fmt: skip
    out = s2s.attention_decoder(**args, state_dropout=kept)
    for t in range(T):
        below = torch.cat([x[:, t], fixed], 1)
        for i, cell in enumerate(cells):
            if cell_type == "lstm":
                states[i], memories[i] = cell(below, (states[i], memories[i]))
            else:
                states[i] = cell(below, states[i])
            below = states[i] = states[i] * kept[i, :, t]
        outputs.append(below)
    torch.testing.assert_close(out.outputs, torch.stack(outputs, 1))
    torch.testing.assert_close(out.hidden, torch.stack(states))
    many = args | {"inputs": x.repeat(1, 400, 1)}
    dropped = s2s.attention_decoder(**many, state_dropout=0.25).outputs == 0
    assert 0.23 < dropped.double().mean() < 0.27


@pytest.mark.parametrize("options", [{}, {"after": True, "dropout": True}, {"attention": False}])
@pytest.mark.parametrize("cell_type", MODULES)
def test_opcheck(cell_type, options):
    """The ops as they are called, forward and backward, with what they are called with."""
    args = cast(problem(cell_type, feedback=[2], **options), torch.float32)
    called = ops_called("seq2seq_fast::attention_decoder", lambda: results(args))
    assert {f.name().removesuffix("_triton") for f, _ in called} == {
        "seq2seq_fast::attention_decoder",
        "seq2seq_fast::attention_decoder_backward",
    }
    for function, arguments in called:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    args = cast(problem(dropout=True), torch.float32)
    leaves = list(tensors(args).values())

    def run(args):
        out = s2s.attention_decoder(**args)
        return out.outputs.sin().sum() + out.contexts.sum() + out.cell.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    found = []
    for f in (run, compiled):
        loss = f(args)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


MEMORY = """
import torch, seq2seq_fast as s2s
B, T, S, H = 8, 128, 256, 256
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
def run(B, T, S):
    decoder = s2s.Decoder(9, 8, H, 2, 0.0)
    values = torch.randn(B, S, H, requires_grad=True)
    state = s2s.DecoderState(torch.zeros(2, B, H), torch.zeros(2, B, H))
    out = decoder.run(torch.zeros(B, T, dtype=torch.int64), state, decoder.source(values))
    out.outputs.sum().backward()
run(1, 2, 3)  # the libraries' own memory
before = peak()
run(B, T, S)
print((peak() - before) * 1024 / 4)
"""


@pytest.mark.unsanitized
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc")
def test_memory_grows_with_states_and_weights_alone():
    """Peak of forward and backward beyond what is there, in float32 numbers, in a new process."""
    B, T, S, H, L = 8, 128, 256, 256, 2
    command = [sys.executable, "-c", MEMORY]
    numbers = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    of_source = 6 * B * S * H  # values, keys, their exponentials, gradients
    of_steps = B * T * (L * (2 * 4 * H + 2 * H) + 6 * H + 4 * S)
    of_weights = 4 * L * 4 * H * 2 * H
    assert numbers < 1.5 * (of_source + of_steps + of_weights) < B * T * S * H / 2


def good():
    return cast(problem(B=2, T=3), torch.float32)


def with_args(**changes):
    return lambda: s2s.attention_decoder(**(good() | changes))


X = torch.zeros
FEED = s2s.Feedback([1], X(9, 4), X(9, 10), X(9))
BAD = {
    "cell_type": (with_args(cell_type="lsm"), ValueError, "cell_type: got 'lsm', expected one of"),
    "inputs rank": (with_args(inputs=X(2, 4)), ValueError, r"inputs: got shape \(2, 4\)"),
    "inputs ids": (with_args(inputs=X(2, 3, dtype=torch.int64)), TypeError, "inputs: got torch.i"),
    "hidden layers": (
        with_args(hidden=X(1, 2, 7)),
        ValueError,
        r"hidden: got shape \(1, 2, 7\), expected \(L, B, H\) = \(2, 2, any\)",
    ),
    "hidden list": (with_args(hidden=[1]), TypeError, "hidden: got list"),
    "hidden device": (with_args(hidden=X(2, 2, 7, device="meta")), ValueError, "hidden: is on me"),
    "hidden sparse": (
        with_args(hidden=X(2, 2, 7).to_sparse()),
        TypeError,
        "hidden: got a Tensor that is torch.sparse_coo, expected a strided one",
    ),
    "no layers at all": (with_args(layers=None), TypeError, "layers: got NoneType"),
    "layers once": (with_args(layers=iter([])), TypeError, "layers: got list_iterator"),
    "layers of numbers": (with_args(layers=[1, 2]), TypeError, r"layers\[0\]: got int"),
    "layers flat": (
        with_args(layers=[*good()["layers"][0]], hidden=X(1, 2, 7), cell=X(1, 2, 7)),
        TypeError,
        r"layers\[0\]: got Tensor, expected weight_ih, weight_hh, bias_ih, bias_hh",
    ),
    "cell_type list": (with_args(cell_type=["lstm"]), ValueError, r"cell_type: got \['lstm'\]"),
    "query_after": (with_args(query_after="x"), TypeError, "query_after: got str"),
    "recompute": (with_args(recompute=None), TypeError, "recompute: got NoneType"),
    "cell missing": (with_args(cell=None), TypeError, "cell: got NoneType"),
    "cell of a gru": (with_args(cell_type="gru"), ValueError, "cell: got a Tensor, expected None"),
    "no layers": (with_args(layers=[], hidden=X(0, 2, 7), cell=X(0, 2, 7)), ValueError, "L and H"),
    "a layer's tensors": (with_args(layers=[[X(1)]] * 2), ValueError, r"layers\[0\]: got 1"),
    "a layer's width": (
        with_args(layers=[[X(28, 8), *good()["layers"][0][1:]]] * 2),
        ValueError,
        r"layers\[0\]\[0\]: got shape \(28, 8\), expected \(gates, inputs\) = \(28, 7\)",
    ),
    "keys missing": (with_args(keys=None), ValueError, "keys: got None, expected all of"),
    "keys batch": (with_args(keys=X(3, 6, 5)), ValueError, "keys: got shape"),
    "keys dtype": (with_args(keys=X(2, 6, 5).double()), TypeError, "keys: got torch.float64"),
    "keys empty": (
        with_args(keys=X(2, 0, 5), values=X(2, 0, 3)),
        ValueError,
        "keys: .* S and A above 0",
    ),
    "values": (with_args(values=X(2, 5, 3)), ValueError, "values: got shape"),
    "powers": (
        with_args(keys=s2s.PreparedKeys(X(2, 6, 5), X(2, 7))),
        ValueError,
        r"keys.powers: got torch.float32 of shape \(2, 7\)",
    ),
    "powers empty": (
        with_args(keys=s2s.PreparedKeys(X(2, 6, 5), X(0))),
        ValueError,
        r"keys.powers: got torch.float32 of shape \(0,\)",
    ),
    "powers device": (
        with_args(keys=s2s.PreparedKeys(X(2, 6, 5), X(2, 112, device="meta"))),
        ValueError,
        "keys.powers: got .* on meta",
    ),
    "powers str": (
        with_args(keys=s2s.PreparedKeys(X(2, 6, 5), "x")),
        ValueError,
        "keys.powers: got str",
    ),
    "query Tensor": (with_args(query=X(5, 7)), TypeError, "query: got Tensor"),
    "query alone": (with_args(query=(X(5, 7),)), ValueError, "query: got 1 tensors, expected wei"),
    "query and more": (with_args(query=(X(5, 7), X(5), X(5))), ValueError, "query: got 3 tensors"),
    "query": (with_args(query=(X(5, 6), X(5))), ValueError, r"query\[0\]: got shape"),
    "v": (with_args(v=X(6)), ValueError, "v: got shape"),
    "mask dtype": (with_args(mask=X(2, 6)), TypeError, "mask: got torch.float32"),
    "mask shape": (with_args(mask=X(2, 5).bool()), ValueError, "mask: got shape"),
    "context": (with_args(context=X(2, 4)), ValueError, "context: got shape"),
    "dropout": (with_args(dropout=1.5), ValueError, "^dropout: got 1.5"),
    "state_dropout": (with_args(state_dropout=-1), ValueError, "state_dropout: got -1"),
    "state_dropout shape": (
        with_args(state_dropout=X(1, 2, 3, 7)),
        ValueError,
        r"state_dropout: got shape \(1, 2, 3, 7\), expected \(L, B, T, H\) = \(2, 2, 3, 7\)",
    ),
    "dropout str": (with_args(dropout="x"), TypeError, "dropout: got str, expected a number"),
    "dropout none": (with_args(dropout=None), TypeError, "dropout: got NoneType"),
    "dropout shape": (with_args(dropout=X(1, 2, 4, 7)), ValueError, "dropout: got shape"),
    "feedback first": (with_args(feedback=FEED._replace(steps=[0])), ValueError, "feedback.steps"),
    "feedback last": (with_args(feedback=FEED._replace(steps=[3])), ValueError, "feedback.steps"),
    "feedback order": (
        with_args(feedback=FEED._replace(steps=[2, 1])),
        ValueError,
        r"feedback.steps: got \[2, 1\], expected steps 1 to 2, ascending",
    ),
    "feedback once": (
        with_args(feedback=FEED._replace(steps=iter([1]))),
        TypeError,
        "feedback.steps: got .*, expected a sequence of whole numbers",
    ),
    "feedback float": (
        with_args(feedback=FEED._replace(steps=[1.0])),
        TypeError,
        r"feedback.steps: got \[1.0\]",
    ),
    "feedback int": (with_args(feedback=FEED._replace(steps=1)), TypeError, "feedback.steps: got"),
    "feedback str": (with_args(feedback=FEED._replace(steps="1")), TypeError, "feedback.steps"),
    "feedback tuple": (with_args(feedback=(1, 2)), TypeError, "feedback: got tuple, expected Fe"),
    "feedback list": (with_args(feedback=[]), TypeError, "feedback: got list"),
    "feedback of no tokens": (
        with_args(feedback=s2s.Feedback([1], X(0, 4), X(0, 10), X(0))),
        ValueError,
        "feedback.embedding: got V = 0",
    ),
    "feedback width": (
        with_args(feedback=FEED._replace(weight=X(9, 9))),
        ValueError,
        "feedback.weight: got shape",
    ),
    "backend": (with_args(backend="fast"), ValueError, "backend: got 'fast'"),
    "decoder's cell": (lambda: s2s.Decoder(9, 4, 7, 2, 0, cell_type="x"), ValueError, "cell"),
    "encoder's bridge": (lambda: s2s.Encoder(9, 4, 7, 2, 0, bridge_dim=0), ValueError, "bridge"),
    "attention's key_dim": (lambda: s2s.Attention(7, key_dim=-1), ValueError, "key_dim: got -1"),
    "model's cell types": (
        lambda: s2s.Seq2Seq(
            s2s.Encoder(9, 4, 7, 2, 0.0), s2s.Decoder(9, 4, 7, 2, 0.0, cell_type="gru")
        ),
        ValueError,
        "decoder: has cell_type gru, expected lstm",
    ),
    "model's encoder width": (
        lambda: s2s.Seq2Seq(
            s2s.Encoder(9, 4, 7, 2, 0.0, bidirectional=True, bridge_dim=7),
            s2s.Decoder(9, 4, 7, 2, 0.0),
        ),
        ValueError,
        "decoder: has encoder_dim 7, expected 14",
    ),
    "a step's context": (
        lambda: s2s.Decoder(9, 4, 7, 1, 0.0)(
            torch.ones(2, dtype=torch.long), X(1, 2, 7), X(1, 2, 7), X(2, 3, 7), context=X(2, 7)
        ),
        ValueError,
        "context: got a Tensor, expected None without query_after",
    ),
    "a mask without attention": (
        lambda: s2s.Decoder(9, 4, 7, 1, 0.0, attention=False).source(X(2, 7), X(2, 3).bool()),
        ValueError,
        "mask: got a Tensor, expected None",
    ),
    "a fixed context's width": (
        lambda: s2s.Decoder(9, 4, 7, 1, 0.0, attention=False).source(X(2, 8)),
        ValueError,
        r"encoder_outputs: got shape \(2, 8\), expected \(B, D\) = \(any, 7\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
