"""Encoders that read each row to its end and no further, against each row alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import seq2seq_fast as s2s
from seq2seq_fast.library import use_backend
from seq2seq_fast.nn.lengths import read_lengths

CELLS = ["lstm", "gru", "rnn"]
PAD, BOS, EOS = 0, 1, 2


def make(cell_type="lstm", H=24, layers=2, bidirectional=False, dropout=0.0, **more):
    torch.manual_seed(0)
    options = {"cell_type": cell_type, "bidirectional": bidirectional} | more
    return s2s.Encoder(13, 7, H, layers, dropout, **options)


def make_model(cell_type="lstm", bidirectional=False, **options):
    encoder = make(cell_type, bidirectional=bidirectional, bridge_dim=20)
    width = encoder.output_dim
    decoder = s2s.Decoder(11, 6, 20, 2, 0.0, cell_type=cell_type, encoder_dim=width)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(4)
    return s2s.Seq2Seq(encoder, decoder, PAD, **{"pack_padded": True} | options)


def sources(lengths, S):
    src = torch.randint(1, 13, (len(lengths), S))
    return src.masked_fill(torch.arange(S) >= torch.tensor(lengths)[:, None], PAD)


def alone(encoder, src, lengths):
    """What torch's module makes of each row by itself, put together."""
    layers = encoder.layers
    directions = 2 if layers.bidirectional else 1
    outputs = src.new_zeros((*src.shape, encoder.output_dim), dtype=encoder.embedding.weight.dtype)
    shape = layers.num_layers * directions, len(src), layers.hidden_size
    states = [outputs.new_zeros(shape), outputs.new_zeros(shape)]
    for b, n in enumerate(lengths):
        if n > 0:
            outputs[b, :n], state = layers(encoder.embedding(src[b, :n]))
            for i, s in enumerate(state if isinstance(state, tuple) else [state]):
                states[i][:, b] = s
    hidden, cell = (encoder._both_directions(s) for s in states)
    return (outputs, hidden, cell) if isinstance(layers, torch.nn.LSTM) else (outputs, hidden, None)


def results_and_gradients(encoder, run, seed=1):
    """run(encoder) -> (outputs, hidden, cell), and the parameters' gradients of sums of them."""
    found = [x for x in run(encoder) if x is not None]
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in found]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(found, weights, strict=True))
    return [*found, *torch.autograd.grad(loss, list(encoder.parameters()))]


def check_accuracy(ours, plain, exact):
    for found, theirs, want in zip(ours, plain, exact, strict=True):
        assert found.shape == want.shape and found.dtype == torch.float32
        # Sums over rows and steps cancel: rounding goes by their terms, which are about 1.
        rounding = 16 * torch.finfo(torch.float32).eps * want.abs().max().clamp_min(1)
        allowed = 2 * (theirs - want).abs().max() + rounding
        assert (found - want).abs().max() <= allowed


CONFIGURATIONS = {
    "cell_type": st.sampled_from(CELLS),
    "H": st.sampled_from([1, 7, 16, 33]),
    "layers": st.integers(1, 3),
    "bidirectional": st.booleans(),
    "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    "more": st.integers(0, 2),
}


@settings(max_examples=60, deadline=None)
@given(**CONFIGURATIONS, training=st.booleans())
def test_results_and_gradients_are_those_of_each_row_alone(
    cell_type, H, layers, bidirectional, lengths, more, training
):
    encoder = make(cell_type, H, layers, bidirectional).train(training)
    src = sources(lengths, max(lengths) + more)
    ends = torch.tensor(lengths)
    double = copy.deepcopy(encoder).double()
    exact = results_and_gradients(double, lambda e: alone(e, src, lengths))
    plain = results_and_gradients(encoder, lambda e: alone(e, src, lengths))
    check_accuracy(results_and_gradients(encoder, lambda e: e(src, ends)), plain, exact)
    with use_backend("reference"):
        check_accuracy(results_and_gradients(encoder, lambda e: e(src, ends.int())), plain, exact)


@settings(max_examples=60, deadline=None)
@given(**CONFIGURATIONS)
@torch.no_grad()
def test_packed_layers_make_the_same_bits_of_a_row_alone(
    cell_type, H, layers, bidirectional, lengths, more
):
    encoder = make(cell_type, H, layers, bidirectional).eval().prepare_inference()
    src = sources(lengths, max(lengths) + more)
    outputs, hidden, cell = encoder(src, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        assert not outputs[b, n:].any()
        if n == 0:
            assert not hidden[:, b].any() and (cell is None or not cell[:, b].any())
            continue
        row = encoder(src[b : b + 1, :n])
        assert torch.equal(outputs[b, :n], row[0][0])
        assert torch.equal(hidden[:, b], row[1][:, 0])
        assert cell is None or torch.equal(cell[:, b], row[2][:, 0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", CELLS)
@torch.no_grad()
def test_a_source_is_decoded_alike_alone_and_padded(cell_type, bidirectional):
    lengths = [9, 1, 4, 6, 2, 9, 3]
    model = make_model(cell_type, bidirectional).eval().prepare_inference()
    src = sources(lengths, 11)
    for options in ({}, {"beam_size": 3, "length_penalty": 0.7}):
        options |= {"bos": BOS, "eos": EOS, "max_length": 12, "return_weights": True}
        together = model.generate(src, **options)
        for b, n in enumerate(lengths):
            row = model.generate(src[b : b + 1, :n], **options)
            T = row.tokens.shape[-1]
            assert torch.equal(together.tokens[b, ..., :T], row.tokens[0])
            # Keys are a product with all rows, which PyTorch's BLAS may round by their number.
            assert_close(together.log_probs[b], row.log_probs[0], rtol=1e-5, atol=1e-5)
            assert_close(together.weights[b, ..., :T, :n], row.weights[0], rtol=1e-5, atol=1e-6)
    plain = model.generate(src, backend="reference", bos=BOS, eos=EOS, max_length=12)
    ours = model.generate(src, bos=BOS, eos=EOS, max_length=12)
    assert torch.equal(ours.tokens, plain.tokens)


def test_padding_is_read_only_where_it_is_not_packed():
    src, trg = sources([5, 3], 5), torch.randint(3, 11, (2, 6))
    for pack in (True, False):
        model = make_model(pack_padded=pack).eval()
        before, score = model(src, trg, 1.0), model.score(src, trg).log_probs
        with torch.no_grad():
            model.encoder.embedding.weight[PAD] += 1
        after = model(src, trg, 1.0)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1]) == pack
        assert torch.equal(score, model.score(src, trg).log_probs) == pack
        model.train().loss(src, trg, 1.0).backward()
        assert model.encoder.embedding.weight.grad[PAD].any() != pack


def test_lengths_are_where_the_last_padding_begins():
    src = torch.tensor([[5, 0, 3, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 4, 0, 0, 0]])
    assert read_lengths(src, PAD).tolist() == [3, 0, 5, 2]
    assert read_lengths(src.int(), 5).tolist() == [5, 5, 4, 5]


@pytest.mark.parametrize("cell_type", CELLS)
def test_dropout_comes_from_the_seed(cell_type):
    encoder, src = make(cell_type, dropout=0.5, bidirectional=True), sources([6, 2], 6)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(encoder(src, torch.tensor([6, 2]))[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not found[0][1, 2:].any()


@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_a_batch_of_nothing_and_rows_of_nothing(prepared):
    model = make_model().eval()
    if prepared:
        model.prepare_inference()
    options = {"bos": BOS, "eos": EOS, "max_length": 4}
    for backend in (None, "reference"):
        found = model.generate(torch.zeros(0, 3, dtype=torch.int64), backend=backend, **options)
        assert found.tokens.shape == (0, 0)
        found = model.generate(sources([0, 3], 3), backend=backend, **options)
        assert found.tokens.shape[0] == 2 and found.log_probs.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell_type", ["lstm", "gru"])
def test_it_compiles_in_one_graph(cell_type, training):
    model, src = make_model(cell_type, True).train(training), sources([5, 3, 4], 5)
    trg = torch.randint(3, 11, (3, 6))
    want = model(src, trg, 1.0)
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(src, trg, 1.0)
    assert_close(found, want)


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        ([5, 3], TypeError, "lengths: got list, expected a Tensor"),
        (torch.tensor([5.0, 3.0]), TypeError, "lengths: got torch.float32, expected int64"),
        (torch.tensor([5]), ValueError, r"lengths: got shape \(1,\), expected \(B,\) = \(2,\)"),
        (torch.tensor([5, 6]), ValueError, "lengths: got 6, expected 0 to S = 5"),
        (torch.tensor([-1, 5]), ValueError, "lengths: got -1, expected 0 to S = 5"),
        (torch.tensor([5, 3], device="meta"), ValueError, "lengths: is on meta, expected cpu"),
    ],
)
def test_wrong_lengths_are_named(lengths, error, message):
    with pytest.raises(error, match=message):
        make()(sources([5, 3], 5), lengths)


def test_wrong_arguments_of_a_model_are_named():
    with pytest.raises(ValueError, match="pack_padded: got True without a pad_idx"):
        s2s.Seq2Seq(make(), s2s.Decoder(11, 6, 24, 2, 0.0), pack_padded=True)
    with pytest.raises(TypeError, match="pack_padded: got int, expected True or False"):
        s2s.Seq2Seq(make(), s2s.Decoder(11, 6, 24, 2, 0.0), PAD, pack_padded=1)
    for src, error in (([[1]], TypeError), (torch.ones(3).long(), ValueError)):
        with pytest.raises(error, match="src: got"):
            make_model().eval().generate(src, bos=BOS, eos=EOS, max_length=3)
    with pytest.raises(ValueError, match="src: got an empty source"):
        make_model().eval().generate(torch.ones(2, 0).long(), bos=BOS, eos=EOS, max_length=3)
