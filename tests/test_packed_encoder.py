"""An encoder whose layers were packed by `prepare_inference`, against torch's own modules."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s
from seq2seq_fast.library import use_backend

CELLS = ["lstm", "gru", "rnn"]


def make(cell_type="lstm", H=24, layers=2, bidirectional=False, dropout=0.3, **more):
    torch.manual_seed(0)
    options = {"cell_type": cell_type, "bidirectional": bidirectional} | more
    return s2s.Encoder(13, 7, H, layers, dropout, **options).eval()


def numbers(found):
    return [x for x in found if x is not None]


def runs_packed(encoder, src):
    """Whether a call reads the packed weights: wrong ones are noticed."""
    right = encoder.packed
    want = encoder(src)[0]
    memory = torch.zeros_like(right.weights.memory)
    encoder.packed = right._replace(weights=right.weights._replace(memory=memory))
    found = encoder(src)[0]
    encoder.packed = right
    return not torch.equal(found, want)


@settings(max_examples=60, deadline=None)
@given(
    cell_type=st.sampled_from(CELLS),
    H=st.sampled_from([1, 7, 16, 33, 70]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    B=st.sampled_from([0, 1, 2, 5, 49]),
    S=st.integers(1, 12),
)
@torch.no_grad()
def test_it_is_as_accurate_as_torch_s(cell_type, H, layers, bidirectional, B, S):
    encoder = make(cell_type, H, layers, bidirectional)
    src = torch.randint(13, (B, S))
    with use_backend("reference"):
        plain = numbers(encoder(src))
        exact = numbers(copy.deepcopy(encoder).double()(src))
    ours = numbers(encoder.prepare_inference()(src))
    assert len(ours) == len(plain) == (3 if cell_type == "lstm" else 2)
    for found, theirs, want in zip(ours, plain, exact, strict=True):
        assert found.shape == theirs.shape and found.dtype == torch.float32
        if B > 0:
            allowed = 2 * (theirs - want).abs().max() + 4 * torch.finfo(torch.float32).eps
            assert (found - want).abs().max() <= allowed


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", CELLS)
@torch.no_grad()
def test_a_row_is_encoded_alike_alone_in_any_batch_and_by_any_threads(cell_type, bidirectional):
    encoder = make(cell_type, 70, bidirectional=bidirectional).prepare_inference()
    src, threads = torch.randint(13, (53, 9)), torch.get_num_threads()
    together = encoder(src)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            for b in (0, 7, 52):
                outputs, hidden, cell = encoder(src[b : b + 1])
                assert torch.equal(outputs[0], together[0][b])
                assert torch.equal(hidden[:, 0], together[1][:, b])
                assert cell is None or torch.equal(cell[:, 0], together[2][:, b])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_it_follows_the_parameters():
    encoder, src = make().prepare_inference(), torch.randint(13, (3, 5))
    before, kept = encoder(src)[0], encoder.packed
    assert runs_packed(encoder, src) and encoder.packed is kept
    encoder.lstm.weight_hh_l1.mul_(-1)
    after = encoder(src)[0]
    assert encoder.packed is not kept
    with use_backend("reference"):
        torch.testing.assert_close(after, encoder(src)[0])
    encoder.lstm.bias_ih_l0 = torch.nn.Parameter(torch.ones(4 * 24))
    assert not torch.equal(encoder(src)[0], after)
    encoder.load_state_dict(make().state_dict())
    assert torch.equal(encoder(src)[0], before)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(src)[0], before)
        twin.lstm.weight_hh_l1.mul_(-1)
        assert torch.equal(twin(src)[0], after) and torch.equal(encoder(src)[0], before)
    assert "packed" not in "".join(encoder.state_dict())


def test_where_it_is_not_wanted():
    """Gradients, dropout, hooks, other dtypes and backends, torch.export."""
    encoder, src = make().prepare_inference(), torch.randint(13, (3, 5))
    encoder(src)[0].sum().backward()
    assert encoder.lstm.weight_ih_l0.grad.abs().sum() > 0
    with torch.no_grad():
        assert runs_packed(encoder, src)
        with use_backend("reference"):
            assert not runs_packed(encoder, src)
        encoder.train()
        assert not torch.equal(encoder(src)[0], encoder(src)[0])
        encoder.eval()
        called = []
        hook = encoder.lstm.register_forward_hook(lambda *_: called.append(1))
        encoder(src)
        assert called
        hook.remove()
        want = encoder(src)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nn.LSTM's own
            exported = torch.export.export(encoder, (src,)).module()
        torch.testing.assert_close(exported(src)[0], want)
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder(src)[0].dtype == torch.bfloat16
        double = copy.deepcopy(encoder).double()
        assert double(src)[0].dtype == torch.float64
        assert make().double().prepare_inference().packed is None


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", CELLS)
@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
def test_autocast(cell_type, bidirectional, lengths):
    """float16 too, which torch's LSTM refuses on most processors."""
    src, ends = torch.randint(13, (3, 5)), None if lengths is None else torch.tensor(lengths)
    for prepared in (False, True):
        encoder = make(cell_type, bidirectional=bidirectional, dropout=0.0)
        if prepared:
            encoder.prepare_inference()
        with torch.no_grad():
            want = numbers(encoder(src, ends))
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype):
                    found = numbers(encoder(src, ends))
                if dtype == torch.float16:
                    expected = torch.float32 if cell_type == "gru" else dtype  # as torch's modules
                    assert {x.dtype for x in found} == {expected}
                for x, y in zip(found, want, strict=True):
                    torch.testing.assert_close(x.float(), y, rtol=0.02, atol=0.02)
        encoder.train()
        with torch.autocast("cpu", torch.float16):
            loss = encoder(src, ends)[0].float().sum()
        loss.backward()
        grad = encoder.embedding.weight.grad
        assert grad.isfinite().all() and grad.any()


@torch.no_grad()
def test_inputs_of_another_width_are_refused():
    encoder = make().prepare_inference()
    encoder.embedding = torch.nn.Embedding(13, 90)
    with pytest.raises(RuntimeError, match="inputs as wide as a layer's weights"):
        encoder(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("cell_type", CELLS)
def test_a_model_s_encoder_is_prepared_with_it(cell_type):
    encoder = make(cell_type, bidirectional=True, bridge_dim=20)
    decoder = s2s.Decoder(11, 6, 20, 2, 0.0, cell_type=cell_type, encoder_dim=48).eval()
    model, src = s2s.Seq2Seq(encoder, decoder, pad_idx=0).eval(), torch.randint(1, 13, (4, 6))
    options = {"bos": 1, "eos": 2, "max_length": 7}
    want = model.generate(src, backend="reference", **options)
    found = model.prepare_inference().generate(src, **options)
    assert encoder.packed is not None
    assert torch.equal(found.tokens, want.tokens)
    torch.testing.assert_close(found.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(model.generate(src, **options).tokens, want.tokens)
