"""The attention decoder: parity with its reference in plain PyTorch, machinery, bad input."""

import itertools
import random
from types import SimpleNamespace

import plain
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import seq2seq_fast as s2s
from seq2seq_fast.training import train

MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ORDERS = [(c, after) for c in MODULES for after in (False, True)]


def problem(
    cell_type="lstm", L=2, B=3, T=5, S=6, E=4, H=7, A=5, D=3, attention=True, after=False,
    dropout=False, feedback=(), strided=False, seed=0, V=9,
):  # fmt: skip
    """Arguments of attention_decoder in float64, {name: value}, gradients asked of them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if strided:
            x = torch.randn(*shape[:-1], 2 * shape[-1], generator=g, dtype=torch.float64)[..., ::2]
            return x.requires_grad_()
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    torch.manual_seed(seed)
    weights = MODULES[cell_type](E + D, H, L, dtype=torch.float64).all_weights
    args = {
        "inputs": draw(B, T, E),
        "hidden": draw(L, B, H),
        "cell": draw(L, B, H) if cell_type == "lstm" else None,
        "layers": [[w.detach().requires_grad_() for w in layer] for layer in weights],
        "cell_type": cell_type,
        "query_after": after,
    }
    if attention:
        args |= {"query": (draw(A, H), draw(A)), "keys": draw(B, S, A), "values": draw(B, S, D)}
        mask = torch.rand(B, S, generator=g) < 0.7
        mask[0] = False  # a source that is masked everywhere
        args |= {"v": draw(A), "mask": mask}
    if after or not attention:
        args["context"] = draw(B, D)
    if dropout:
        args["dropout"] = (torch.rand(L - 1, B, T, H, generator=g) < 0.7).double() / 0.7
    if feedback:
        factors = torch.rand(B, T, E, generator=g).double() if dropout else None
        args["feedback"] = s2s.Feedback(feedback, draw(V, E), draw(V, H + D), draw(V), factors)
    return args


def tensors(args):
    """Every tensor of a problem that has a gradient, {name: tensor}."""
    named = {k: x for k, x in args.items() if isinstance(x, torch.Tensor)}
    named |= {f"query[{i}]": x for i, x in enumerate(args.get("query", ()))}
    for i, layer in enumerate(args["layers"]):
        named |= {f"layers[{i}][{j}]": x for j, x in enumerate(layer)}
    if "feedback" in args:
        named["embedding"] = args["feedback"].embedding
    return {k: x for k, x in named.items() if x.requires_grad}


def cast(x, dtype):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        grad = x.requires_grad
        return x.detach().to(dtype).requires_grad_(grad)
    if isinstance(x, s2s.Feedback):
        return s2s.Feedback(*(cast(y, dtype) for y in x))
    if isinstance(x, (list, tuple)):
        return type(x)(cast(y, dtype) for y in x)
    return {k: cast(y, dtype) for k, y in x.items()} if isinstance(x, dict) else x


def results(args, **options):
    """{name: tensor}: outputs, and every gradient of a sum of all of them."""
    out = s2s.attention_decoder(**args, **options)._asdict()
    tokens = out.pop("tokens")
    out.pop("logits")
    out = {name: x for name, x in out.items() if x is not None}
    g = torch.Generator().manual_seed(7)
    loss = 0
    for x in out.values():
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum()
    leaves = tensors(args)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = {f"d{n}": zeros[n] if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return {n: x.detach() for n, x in (out | found).items()}, tokens


@st.composite
def problems(draw):
    largest = {"B": 5, "T": 9, "S": 40, "E": 9, "H": 37, "A": 37, "D": 20}
    sizes = {name: draw(st.integers(1, most)) for name, most in largest.items()}
    T, attention = sizes["T"], draw(st.booleans()) or draw(st.booleans())
    fed_back = draw(st.sets(st.integers(1, T - 1))) if T > 1 else ()
    return problem(
        draw(st.sampled_from([*MODULES])),
        L=draw(st.integers(1, 3)),
        **sizes,
        attention=attention,
        after=attention and draw(st.booleans()),
        dropout=draw(st.booleans()),
        feedback=sorted(fed_back),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    ), draw(st.booleans())


@settings(max_examples=80, deadline=None)
@given(problems())
def test_outputs_and_every_gradient_keep_the_accuracy_rule(drawn):
    """Errors against float64: at most twice plain PyTorch's in float32, plus rounding."""
    args, recompute = drawn
    args32 = cast(args, torch.float32)
    exact, tokens = results(args, backend="reference")
    ours, our_tokens = results(args32, recompute=recompute)
    theirs, their_tokens = results(args32, backend="reference")
    if tokens is not None:  # a tie that rounding decides is another problem
        assume(torch.equal(tokens, our_tokens) and torch.equal(tokens, their_tokens))
    eps, T = torch.finfo(torch.float32).eps, args["inputs"].shape[1]
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, want in exact.items():
        if want.numel() == 0:
            continue
        error, allowed = ((x[name] - want).abs().max().item() for x in (ours, theirs))
        rounding = 4 * eps * T * max(want.abs().max().item(), 1e-3)
        assert error <= 2 * allowed + rounding, (name, error, allowed, rounding)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_in_float64_it_is_the_reference(drawn):
    args, recompute = drawn
    want, ours = results(args, backend="reference"), results(args, recompute=recompute)
    if want[1] is not None:
        assert torch.equal(want[1], ours[1])
    for name, x in want[0].items():
        torch.testing.assert_close(ours[0][name], x, rtol=1e-9, atol=1e-9, msg=name)


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
