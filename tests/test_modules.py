"""The modules against their plain twin, by the accuracy rule, and against bad input."""

import copy
import functools
import io
import pickle
import random
import statistics
import threading

import plain
import pytest
import torch
from torch import nn

import seq2seq_fast as s2s

SIZES = [  # B, S, T, H, layers
    (3, 7, 5, 13, 2),
    (1, 1, 2, 1, 1),
    (5, 19, 11, 33, 3),
    (2, 40, 3, 64, 1),
]
V_SRC, V_TRG, EMB = 11, 9, 6


def pair(H=8, layers=2, pad_idx=0, dropout=0.0, seed=0):
    """Our model and its twin with the same weights."""
    models = []
    for kind in (s2s, plain):
        torch.manual_seed(seed)
        encoder = kind.Encoder(V_SRC, EMB, H, layers, dropout)
        decoder = kind.Decoder(V_TRG, EMB, H, layers, dropout)
        models.append(kind.Seq2Seq(encoder, decoder, pad_idx))
    models[0].load_state_dict(models[1].state_dict())
    return models


def tokens(B, S, T, seed=0):
    """src with padding at the end of every row but the first, trg."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(1, V_SRC, (B, S), generator=g)
    lengths = torch.randint(1, S + 1, (B, 1), generator=g)
    lengths[0] = S
    src[torch.arange(S) >= lengths] = 0
    return src, torch.randint(0, V_TRG, (B, T), generator=g)


def results(model, src, trg, ratio=0.5):
    """{name: tensor}: logits, loss and the gradient of every parameter."""
    random.seed(3)
    logits = model(src, trg, ratio)
    loss = nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), trg[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"logits": logits, "loss": loss} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("pad_idx", [0, None])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore:dropout option")
def test_outputs_loss_and_gradients_keep_the_accuracy_rule(sizes, ratio, pad_idx):
    """Errors against the twin in float64, ours at most twice the twin's plus rounding: the median
    of five draws, as the gradients of attention nearly cancel and one draw's errors are luck."""
    B, S, T, H, layers = sizes
    eps = torch.finfo(torch.float32).eps
    used = {}
    for seed in range(5):
        ours, twin = pair(H, layers, pad_idx, seed=seed)
        src, trg = tokens(B, S, T, seed)
        exact = results(copy.deepcopy(twin).double(), src, trg, ratio)
        got, plain_form = results(ours, src, trg, ratio), results(twin, src, trg, ratio)
        assert got.keys() == plain_form.keys() == exact.keys()
        assert (got["logits"][:, 0] == 0).all() and got["logits"].shape == (B, T, V_TRG)
        for name, want in exact.items():
            error, allowed = ((x[name] - want).abs().max().item() for x in (got, plain_form))
            # A sum over a sequence is rounded at each of its steps.
            rounding = 4 * eps * max(want.abs().max().item(), 1e-3)
            used.setdefault(name, []).append(error / (2 * allowed + rounding))
    medians = {name: statistics.median(ratios) for name, ratios in used.items()}
    assert max(medians.values()) <= 1, medians


def test_state_dicts_load_both_ways_and_the_names_are_the_tutorials():
    ours, twin = pair()
    assert set(ours.state_dict()) == set(twin.state_dict())
    twin.load_state_dict(ours.state_dict())
    attention = {n for n, _ in ours.decoder.attention.named_parameters()}
    assert attention == {f"{m}.{p}" for m in ("Wa", "Ua", "Va") for p in ("weight", "bias")}


def test_dropout_is_drawn_from_a_seed_and_alike_for_all_backends():
    """In training; in evaluation nothing is dropped."""
    ours, twin = pair(dropout=0.5)
    ours.encoder.eval()  # whose layers are torch's in one case, and draw for themselves
    src, trg = tokens(3, 7, 5)

    def out(model, backend="native"):
        torch.manual_seed(5)
        random.seed(5)
        with s2s.use_backend(backend):
            return model(src, trg)

    assert torch.equal(out(ours), out(ours))
    torch.testing.assert_close(out(ours), out(ours, "reference"))
    random.seed(5)
    assert not torch.equal(ours(src, trg), out(ours))
    torch.testing.assert_close(out(ours.eval()), out(twin.eval()))
    assert torch.equal(ours(src, trg, 1.0), ours(src, trg, 1.0))


@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_encoders_are_torchs_layers(cell_type, bidirectional, monkeypatch):
    """Errors are against them in float64; calls of _run tell which are in the decoder's loop."""
    torch.manual_seed(0)
    encoder = s2s.Encoder(V_SRC, EMB, 13, 2, 0.0, cell_type=cell_type, bidirectional=bidirectional)
    src, _ = tokens(3, 7, 5)
    calls, run = [], s2s.Encoder._run
    monkeypatch.setattr(s2s.Encoder, "_run", lambda *a: calls.append(1) or run(*a))

    def results(model, backend):
        with s2s.use_backend(backend):
            outputs = [x for x in model(src) if x is not None]
        grads = torch.autograd.grad(sum(x.sin().sum() for x in outputs), list(model.parameters()))
        return [*outputs, *grads]

    ours = results(encoder, "native")
    assert len(calls) == 1
    plain_form = results(encoder, "reference")
    exact = results(copy.deepcopy(encoder).double(), "reference")
    with torch.no_grad(), s2s.use_backend("native"):
        torch.testing.assert_close(encoder.eval()(src)[0], ours[0])
    assert len(calls) == (1 if cell_type == "lstm" else 2)
    for got, theirs, want in zip(ours, plain_form, exact, strict=True):
        error, allowed = ((x - want).abs().max().item() for x in (got, theirs))
        # A sum over a sequence is rounded at each of its steps.
        rounding = 4 * torch.finfo(torch.float32).eps * src.shape[1]
        assert error <= 2 * allowed + rounding * max(want.abs().max().item(), 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_encoder_in_the_decoders_loop_drops_between_layers_in_training_alone(bidirectional):
    encoder = s2s.Encoder(V_SRC, EMB, 8, 2, 0.5, cell_type="gru", bidirectional=bidirectional)
    encoder.dropout.p = 0.0  # of what is embedded
    src, _ = tokens(3, 7, 5)

    def run():
        torch.manual_seed(1)
        return encoder(src)[0]

    assert torch.equal(run(), run()) and not torch.equal(encoder(src)[0], run())
    with s2s.use_backend("reference"):
        want = encoder.eval()(src)[0]
    torch.testing.assert_close(run(), want)
    encoder.gru.register_forward_hook(lambda module, args, out: (out[0] * 0, out[1]))
    assert (encoder(src)[0] == 0).all()


@pytest.mark.parametrize("through", ["pickle", "deepcopy", "torch.save"])
def test_copies_compute_the_same(through):
    model, _ = pair()
    if through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    src, trg = tokens(3, 7, 5)
    assert torch.equal(model(src, trg, 1.0), twin(src, trg, 1.0))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(model(src, trg, 1.0), twin(src, trg, 1.0))


def test_a_prepared_source_gives_the_same_steps_and_gradients():
    torch.manual_seed(0)
    decoder = s2s.Decoder(V_TRG, EMB, 8, 2, 0.0)
    hidden, cell = torch.randn(2, 2, 3, 8)
    values = torch.randn(3, 6, 8, requires_grad=True)
    mask = torch.rand(3, 6) < 0.7
    results = []
    for prepare in (False, True):
        args = (values, mask)
        if prepare:
            args = (decoder.attention.precompute(values, mask),)
            assert isinstance(args[0], s2s.PreparedSource)
        h, c, out = hidden, cell, []
        for token in torch.tensor([[1, 2, 3], [4, 5, 6]]):
            logits, h, c = decoder(token, h, c, *args)
            out.append(logits)
        loss = torch.stack(out).square().sum() + decoder.attention(h[-1], *args)[1][0, 0]
        leaves = [values, *decoder.parameters()]
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_are_projected_once_per_source():
    model, _ = pair()
    calls = []
    model.decoder.attention.Ua.register_forward_hook(lambda *_: calls.append(1))
    model(*tokens(3, 7, 5))
    assert len(calls) == 1


def test_padding_changes_no_decoder_step():
    torch.manual_seed(0)
    decoder = s2s.Decoder(9, 5, 8, 1, 0.0)
    state, values = torch.randn(2, 1, 2, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, True, False]] * 2)
    a = decoder(torch.tensor([1, 2]), *state, values, mask)[0]
    values[:, 3] = 100.0
    b = decoder(torch.tensor([1, 2]), *state, values, mask)[0]
    torch.testing.assert_close(a, b)  # the block's path may change, and with it the last bit


@torch._dynamo.config.patch(allow_rnn=True)  # torch.compile refuses nn.LSTM otherwise
def test_a_decoder_step_compiles_whole():
    torch.manual_seed(0)
    decoder = s2s.Decoder(9, 5, 8, 1, 0.0)
    hidden, cell, values = torch.randn(1, 2, 8), torch.randn(1, 2, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, True, False]] * 2)
    token = torch.tensor([1, 2])
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for source in ((values, mask), (decoder.attention.precompute(values, mask),)):
        want, got = decoder(token, hidden, cell, *source), compiled(token, hidden, cell, *source)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b)


@torch._dynamo.config.patch(allow_rnn=True)
@pytest.mark.parametrize(
    ("cell_type", "attention"), [("lstm", True), ("lstm", False), ("gru", False), ("rnn", True)]
)
def test_a_whole_model_compiles(cell_type, attention):
    """Where no draw decides on feedback."""
    torch.manual_seed(0)
    model = s2s.Seq2Seq(
        s2s.Encoder(9, 5, 8, 2, 0.0, cell_type=cell_type),
        s2s.Decoder(9, 5, 8, 2, 0.0, cell_type=cell_type, attention=attention),
        pad_idx=0,
    )
    src, trg = torch.randint(1, 9, (3, 4)), torch.randint(1, 9, (3, 5))
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(src, trg, 0.0)
    torch.testing.assert_close(got, model(src, trg, 0.0))
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(src, trg, 1.0)
    leaves, want = list(model.parameters()), model.loss(src, trg, 1.0)
    torch.testing.assert_close(loss, want)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_two_python_threads_at_once():
    model, _ = pair(H=32)
    batches = [tokens(4, 13, 6, seed) for seed in range(2)]
    want = [results(model, *batch, 1.0) for batch in batches]
    wrong = []

    def work(i):
        for _ in range(10):
            got = results(model, *batches[i], 1.0)
            wrong.extend(n for n, x in got.items() if not torch.equal(x, want[i][n]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


DECODER, ATTENTION = s2s.Decoder(9, 5, 8, 2, 0.0), s2s.Attention(8)
ENCODER = s2s.Encoder(11, 5, 8, 2, 0.0)
MODEL = s2s.Seq2Seq(ENCODER, DECODER, pad_idx=0)
IDS, STATE, OUTPUTS = torch.tensor([1, 2]), torch.zeros(2, 2, 8), torch.zeros(2, 4, 8)
MASK = torch.ones(2, 4, dtype=torch.bool)
SRC, TRG = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
SOURCE = ATTENTION.precompute(OUTPUTS, MASK)

BAD = {
    "encoder sizes": (lambda: s2s.Encoder(11, 5, 0, 2, 0.0), ValueError, "hidden_dim: got 0"),
    "encoder size True": (
        lambda: s2s.Encoder(True, 5, 8, 2, 0.0),
        ValueError,
        "input_dim: got True",
    ),
    "encoder cell list": (
        lambda: s2s.Encoder(11, 5, 8, 2, 0.0, cell_type=["lstm"]),
        ValueError,
        r"cell_type: got \['lstm'\]",
    ),
    "encoder flag": (
        lambda: s2s.Encoder(11, 5, 8, 2, 0.0, bidirectional="x"),
        TypeError,
        "bidirectional: got str",
    ),
    "decoder flag": (
        lambda: s2s.Decoder(11, 5, 8, 2, 0.0, query_after="x"),
        TypeError,
        "query_after: got str",
    ),
    "encoder dropout type": (
        lambda: s2s.Encoder(11, 5, 8, 2, None),
        TypeError,
        "dropout: got NoneType, expected a number",
    ),
    "encoder dropout bool": (
        lambda: s2s.Encoder(11, 5, 8, 1, True),
        TypeError,
        "dropout: got bool, expected a number",
    ),
    "encoder dropout": (lambda: s2s.Encoder(11, 5, 8, 2, 1.5), ValueError, "dropout: got 1.5"),
    "decoder sizes": (lambda: s2s.Decoder(0, 5, 8, 2, 0.0), ValueError, "output_dim: got 0"),
    "attention size": (lambda: s2s.Attention(0), ValueError, "hidden_dim: got 0"),
    "src floats": (lambda: ENCODER(SRC.float()), TypeError, "src: got torch.float32"),
    "src rank": (lambda: ENCODER(IDS), ValueError, r"src: got shape \(2,\), expected \(B, S\)"),
    "src no tensor": (lambda: ENCODER([[1]]), TypeError, "src: got list"),
    "src empty": (lambda: ENCODER(SRC[:, :0]), ValueError, "src: .*S = 0"),
    "src device": (
        lambda: ENCODER(SRC.to("meta")),
        ValueError,
        "src: is on meta, expected cpu as the module is",
    ),
    **{
        f"src nested, {name}": (
            functools.partial(call, torch.nested.nested_tensor([*SRC], layout=torch.jagged)),
            TypeError,
            "src: got a Tensor that is nested",
        )
        for name, call in {
            "forward": lambda src: MODEL(src, SRC),
            "score": lambda src: MODEL.score(src, SRC),
            "generate": lambda src: (
                copy.deepcopy(MODEL).eval().generate(src, bos=1, eos=2, max_length=3)
            ),
        }.items()
    },
    "src sparse": (lambda: ENCODER(SRC.to_sparse()), TypeError, "src: got a Tensor that is .*coo"),
    "src id": (lambda: ENCODER(SRC + 10), ValueError, "src: got token id 11, expected 0 to 10"),
    "src negative": (lambda: ENCODER(SRC - 2), ValueError, "src: got token id -1"),
    "input id": (
        lambda: DECODER(IDS + 8, STATE, STATE, OUTPUTS),
        ValueError,
        "input: got token id 10, expected 0 to 8",
    ),
    "input device": (
        lambda: DECODER(IDS.to("meta"), STATE, STATE, OUTPUTS),
        ValueError,
        "input: is on meta",
    ),
    "input rank": (lambda: DECODER(SRC, STATE, STATE, OUTPUTS), ValueError, "input: got shape"),
    "input batch": (
        lambda: DECODER(torch.ones(3, dtype=torch.long), STATE, STATE, OUTPUTS),
        ValueError,
        "input: got batch 3, expected 2",
    ),
    "hidden layers": (
        lambda: DECODER(IDS, STATE[:1], STATE, OUTPUTS),
        ValueError,
        r"hidden: got shape \(1, 2, 8\), expected \(n_layers, B, H\) = \(2, 2, 8\)",
    ),
    "cell width": (
        lambda: DECODER(IDS, STATE, STATE[..., :5], OUTPUTS),
        ValueError,
        "cell: got shape",
    ),
    "cell missing": (lambda: DECODER(IDS, STATE, None, OUTPUTS), TypeError, "cell: got NoneType"),
    "outputs width": (
        lambda: DECODER(IDS, STATE, STATE, OUTPUTS[..., :5]),
        ValueError,
        "encoder_outputs: got shape",
    ),
    "outputs empty": (
        lambda: DECODER(IDS, STATE, STATE, OUTPUTS[:, :0]),
        ValueError,
        "encoder_outputs: .*S = 0",
    ),
    "outputs integer": (
        lambda: ATTENTION(STATE[0], OUTPUTS.long()),
        TypeError,
        "encoder_outputs: got torch.int64",
    ),
    "outputs dtype": (
        lambda: ATTENTION(STATE[0], OUTPUTS.double()),
        TypeError,
        "encoder_outputs: got torch.float64, expected torch.float32",
    ),
    "hidden dtype": (
        lambda: ATTENTION(STATE[0].double(), OUTPUTS),
        TypeError,
        "hidden: got torch.float64, expected torch.float32",
    ),
    "hidden rank": (lambda: ATTENTION(STATE, OUTPUTS), ValueError, "hidden: got shape"),
    "mask dtype": (lambda: ATTENTION(STATE[0], OUTPUTS, MASK.float()), TypeError, "mask: got"),
    "outputs of oneDNN": (
        lambda: ATTENTION(STATE[0], OUTPUTS.to_mkldnn()),
        TypeError,
        "encoder_outputs: got a Tensor that is torch._mkldnn, expected a strided one",
    ),
    "mask sparse": (
        lambda: ATTENTION(STATE[0], OUTPUTS, MASK.to_sparse()),
        TypeError,
        "mask: got a Tensor that is torch.sparse_coo",
    ),
    "mask shape": (lambda: ATTENTION(STATE[0], OUTPUTS, MASK[:, :3]), ValueError, "mask: got"),
    "mask list": (lambda: ATTENTION(STATE[0], OUTPUTS, [True]), TypeError, "mask: got list"),
    "mask device": (
        lambda: ATTENTION(STATE[0], OUTPUTS, MASK.to("meta")),
        ValueError,
        "mask: is on meta",
    ),
    "hidden device": (
        lambda: ATTENTION(STATE[0].to("meta"), OUTPUTS),
        ValueError,
        "hidden: is on meta",
    ),
    "mask twice": (lambda: ATTENTION(STATE[0], SOURCE, MASK), ValueError, "mask: got a Tensor"),
    "trg id": (lambda: MODEL(SRC, TRG + 8), ValueError, "trg: got token id 9"),
    "trg batch": (lambda: MODEL(SRC, TRG[:1]), ValueError, "trg: got shape"),
    "trg empty": (lambda: MODEL(SRC, TRG[:, :0]), ValueError, "trg: got shape"),
    "trg floats": (lambda: MODEL(SRC, TRG.double()), TypeError, "trg: got torch.float64"),
    "ratio": (lambda: MODEL(SRC, TRG, 1.2), ValueError, "teacher_forcing_ratio: got 1.2"),
    "trg device": (lambda: MODEL(SRC, TRG.to("meta")), ValueError, "trg: is on meta"),
    "ratio str": (lambda: MODEL(SRC, TRG, "x"), TypeError, "teacher_forcing_ratio: got str"),
    "ratio Tensor": (lambda: MODEL(SRC, TRG, IDS), TypeError, "teacher_forcing_ratio: got Tensor"),
    "no encoder": (lambda: s2s.Seq2Seq(None, DECODER), TypeError, "encoder: got NoneType"),
    "no decoder": (lambda: s2s.Seq2Seq(ENCODER, None), TypeError, "decoder: got NoneType"),
    "swapped": (lambda: s2s.Seq2Seq(DECODER, ENCODER), TypeError, "encoder: got Decoder"),
    "widths differ": (
        lambda: s2s.Seq2Seq(ENCODER, s2s.Decoder(9, 5, 7, 2, 0.0)),
        ValueError,
        "decoder: has hidden_size 7, expected 8",
    ),
    "depths differ": (
        lambda: s2s.Seq2Seq(ENCODER, s2s.Decoder(9, 5, 8, 1, 0.0)),
        ValueError,
        "decoder: has num_layers 1, expected 2",
    ),
    "pad_idx": (
        lambda: s2s.Seq2Seq(ENCODER, DECODER, pad_idx=11),
        ValueError,
        "pad_idx: got 11, expected 0 to 10",
    ),
    "pad_idx float": (
        lambda: s2s.Seq2Seq(ENCODER, DECODER, pad_idx=0.5),
        TypeError,
        "pad_idx: got float, expected a whole number",
    ),
    "pad_idx Tensor": (
        lambda: s2s.Seq2Seq(ENCODER, DECODER, pad_idx=IDS),
        TypeError,
        "pad_idx: got Tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_on_meta_makes_shapes():
    model, _ = pair()
    src, trg = (x.to("meta") for x in tokens(3, 7, 5))
    logits = model.to("meta")(src, trg)
    assert logits.is_meta and logits.shape == (3, 5, V_TRG)
    model.loss(src, trg).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)


def test_dropout_is_drawn_on_the_models_device():
    model, _ = pair(dropout=0.5)
    inputs = tokens(3, 7, 5)
    with torch.device("meta"):
        assert model(*inputs).isfinite().all()


@pytest.mark.parametrize("query_after", [False, True])
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
def test_batches_of_nothing(cell_type, query_after):
    """Have results of nothing, and gradients of zero."""
    torch.manual_seed(0)
    parts = {"cell_type": cell_type}
    model = s2s.Seq2Seq(
        s2s.Encoder(13, 6, 20, 2, 0.1, bidirectional=True, bridge_dim=17, **parts),
        s2s.Decoder(11, 6, 17, 2, 0.1, encoder_dim=40, query_after=query_after, **parts),
        pad_idx=0,
    )
    src, trg = torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 7, dtype=torch.int64)
    for ratio in (0.0, 0.5, 1.0):
        logits = model(src, trg, ratio)
        assert logits.shape == (0, 7, 11)
        logits.sum().backward()
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    for prepared in (False, True):
        if prepared:
            model.prepare_inference()
        with torch.no_grad():
            source, state = model.encode(src)
            for T in (1, 3):
                out = model.decoder.run(trg[:, :T], state, source)
                assert out.outputs.shape == (0, T, 17)
            assert model.decoder.step(trg[:, 0], state, source)[0].shape == (0, 11)
            assert model.score(src, trg).log_probs.shape == (0,)
