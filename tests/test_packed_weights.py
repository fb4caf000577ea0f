"""A decoder's packed weights: reduced, with values projected, and after the decoder has changed."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, PROJECT, make, sources

import seq2seq_fast as s2s
from seq2seq_fast.decoding import packing, stepwise
from seq2seq_fast.decoding.packing import FEW_TOKENS, pack_decoder, pack_matrix


@torch.no_grad()
def reduced(model, dtype):
    """A copy whose weights are the numbers that the engine has, in float64."""
    model = copy.deepcopy(model).double()
    for w in weights_of(model.decoder, whole=dtype == "int8"):
        if dtype == "bfloat16":
            w.copy_(w.bfloat16())
        else:
            scale = w.abs().amax(1, keepdim=True) / 127
            w.copy_((w / scale).round() * scale)
    if dtype == "int8":
        split_back(model.decoder)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("V", [70, FEW_TOKENS + 18])
def test_reduced_weights_decode_as_the_same_numbers_in_float32(V, dtype, kind):
    """An engine with reduced weights is the float32 engine of a model that has those weights."""
    model, src = make(kind, V=V, H=33), sources(30, 7)
    rounded = reduced(model, dtype).float()
    options = {"bos": BOS, "eos": EOS, "max_length": 10}
    model.prepare_inference(dtype)
    assert model.decoder.packed.dtype == dtype
    ours, want = model.generate(src, **options), rounded.generate(src, **options)
    same = [torch.equal(a, b) for a, b in zip(ours.tokens, want.tokens, strict=True)]
    assert sum(same) >= 29  # a tie may be decided otherwise
    rows = torch.tensor(same)
    torch.testing.assert_close(ours.log_probs[rows], want.log_probs[rows], rtol=1e-4, atol=1e-3)


def first_log_probs(model, source, state):
    """(B, V) of the first token: as many beams as there are tokens."""
    decoder = getattr(model, "decoder", model)
    V = decoder.output_dim
    found = s2s.generate(
        decoder, source, state, bos=BOS, eos=EOS, max_length=1, beam_size=V, n_best=V
    )
    order = found.tokens.squeeze(2).argsort(1)
    return found.log_probs.gather(1, order)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("H", [1, 18, 67])
def test_int8_loses_accuracy_by_its_weights_alone(kind, H):
    """What it multiplies them by is rounded to 14 bits, 64 times as finely as they are."""
    model, src = make(kind, V=70, H=H, size=1.0), sources(30, 7)
    (source, state), rounded = model.encode(src), reduced(model, "int8")
    exact, whole = (
        x.double().score(src[:, None].expand(-1, 70, -1).flatten(0, 1), trg).log_probs.view(30, 70)
        for x in (copy.deepcopy(model), rounded)
        for trg in [torch.tensor([[BOS, v] for v in range(70)]).repeat(30, 1)]
    )
    ours = first_log_probs(model.prepare_inference("int8"), source, state)
    assert (ours - whole).norm() < 0.05 * (whole - exact).norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_int8_and_a_row_that_is_not_finite(kind):
    """It comes out as NaN, and those beside it as if it were not there."""
    model, src = make(kind, V=70, H=33).prepare_inference("int8"), sources(9, 7)
    source, state = model.encode(src)
    options, others = {"bos": BOS, "eos": EOS, "max_length": 4}, torch.arange(9) != 4
    want = s2s.generate(model.decoder, source, state, **options)
    for value in (math.nan, math.inf, -math.inf):
        hidden = state.hidden.clone()
        hidden[:, 4, 3] = value
        found = s2s.generate(model.decoder, source, state._replace(hidden=hidden), **options)
        assert torch.equal(found.log_probs[others], want.log_probs[others])
        assert found.log_probs[4].isnan()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20, 1e38])
def test_int8_and_any_size_of_what_it_multiplies(size):
    """A tanh RNN of nothing but its state, fed to it in all sizes."""
    model = make(("rnn", False, False), V=70, H=33, layers=1, size=1.0)
    with torch.no_grad():
        model.decoder.embedding.weight.zero_()
    state = s2s.DecoderState(torch.randn(1, 5, 33) * size, None)
    exact = reduced(model, "int8")
    want, _, _ = exact.decoder.step(
        torch.full((5,), BOS),
        state._replace(hidden=state.hidden.double()),
        torch.zeros(5, 33).double(),
    )
    ours = first_log_probs(model.prepare_inference("int8"), torch.zeros(5, 33), state)
    torch.testing.assert_close(ours, want.log_softmax(1).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[4]], ids=str)
@pytest.mark.parametrize("H", [33, 1030])
def test_int8_rows_are_alike_alone_and_in_any_batch(kind, H):
    """Bit for bit: sums are exact, and added up alike where there are several."""
    model, src = make(kind, V=70, H=H, layers=1).prepare_inference("int8"), sources(40, 7)
    source, state = model.encode(src)
    options = {"bos": BOS, "eos": EOS, "max_length": 3, "min_length": 3}
    want = s2s.generate(model.decoder, source, state, **options)
    for rows in ([7], [3, 8], [5, 1, 9], range(3, 8), range(7, 21), range(1, 36)):
        some = torch.tensor(rows)
        one = stepwise.take_source(source, some), stepwise.take_state(state, some)
        found = s2s.generate(model.decoder, *one, **options)
        assert torch.equal(found.tokens, want.tokens[some])
        assert torch.equal(found.log_probs, want.log_probs[some])


@pytest.mark.parametrize("H", [1024, 1025, 2048, 3000])
@torch.no_grad()
def test_int8_sums_that_nearly_fill_32_bits(H):
    """All numbers and all weights are as large as the largest, and their products have one sign."""
    decoder = make(("rnn", False, False), V=70, H=H, layers=1).decoder
    signs = 1 - 2 * torch.randint(0, 2, (2 * H,), generator=torch.Generator().manual_seed(0))
    for p in decoder.parameters():
        p.zero_()
    decoder.rnn.bias_hh_l0.copy_(30 * signs[:H])  # the hidden state, after tanh
    logits = torch.randn(70)
    decoder.fc_out.weight.copy_(logits[:, None] * signs / (2 * H))
    decoder.prepare_inference("int8")
    for B in (1, 2, 5, 20):
        state = s2s.DecoderState(torch.zeros(1, B, H), None)
        found = first_log_probs(decoder, signs[H:].float().expand(B, H), state)
        want = logits.double().log_softmax(0).float().expand(B, 70)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PROJECT, ids=str)
@pytest.mark.parametrize("V", [70, FEW_TOKENS + 18])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_projected_values_are_another_order_of_sums(dtype, V, kind, monkeypatch):
    """In float32; with reduced weights too, but for int8's scales, which then are others. Those of
    the tokens' gates are not reduced where these are made beforehand: here of all."""
    monkeypatch.setattr(packing, "FEW_TOKENS", V)
    model, src = make(kind, V=V, H=33), sources(9, 7)
    source, state = model.encode(src)
    want = first_log_probs(model.prepare_inference(dtype), source, state)
    ours = first_log_probs(model.prepare_inference(dtype, project_values=True), source, state)
    nothing = dtype == "int8" and kind[2]  # neither gates nor int8's logits
    assert torch.equal(ours, want) == nothing
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=0.1 if dtype == "int8" else 1e-3)


def test_projecting_values_makes_the_gates_of_so_many_tokens(monkeypatch):
    V = FEW_TOKENS + 1
    decoder = make(V=V, H=5).decoder
    panels = pack_decoder(decoder, "float32", project_values=True).weights.tensors()[0]
    assert panels.shape == (V, 1, 4 * packing.UNIT)
    for many in (V * 20, V * 20 - 1):
        monkeypatch.setattr(packing, "MOST_GATES", many)
        first = pack_decoder(decoder, "float32", project_values=True).weights.tensors()[0]
        assert torch.equal(first, panels if many == V * 20 else decoder.embedding.weight)


def reduced_layers(decoder):
    """Weights of each layer, but for those of few tokens' embeddings, whose gates are float32."""
    layers = [layer[:2] for layer in decoder.layers.all_weights]
    if decoder.output_dim <= FEW_TOKENS:
        layers[0] = layers[0][0][:, decoder.embedding.embedding_dim :], layers[0][1]
    return layers


def weights_of(decoder, whole):
    """The matrices that are reduced. A scale belongs to a whole row of [input; hidden] of a cell
    other than GRU: with `whole` those are joined, for split_back to part again."""
    weights = [decoder.fc_out.weight]
    if decoder.attention is not None:
        weights.append(decoder.attention.Wa.weight)
    decoder.joined = []
    for w_input, w_hidden in reduced_layers(decoder):
        if whole and decoder.cell_type != "gru":
            decoder.joined.append(torch.cat([w_input, w_hidden], 1))
            weights.append(decoder.joined[-1])
        else:
            weights += [w_input, w_hidden]
    return weights


def split_back(decoder):
    for joined, (w_input, w_hidden) in zip(decoder.joined, reduced_layers(decoder), strict=False):
        w_input.copy_(joined[:, : w_input.shape[1]])
        w_hidden.copy_(joined[:, w_input.shape[1] :])


def laid(w):
    """A packed matrix where it is to lie."""
    if not isinstance(w, packing.Panels):
        return w
    place = torch.full(w.shape, math.nan, dtype=w.dtype)
    w.copy_to(place)
    return place


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("N", [1, 15, 64, 131])
@pytest.mark.parametrize("K", [0, 1, 6, 130])
def test_panels_are_packed_as_plain_pytorch_does(N, K, blocks):
    whole = torch.randn(blocks * N, K + 9)
    for w in (whole[:, 4 : 4 + K], whole[:, 4 : 4 + K].contiguous(), whole[:, :K].T.contiguous().T):
        panels = packing.Panels([w, whole[:, :2]], blocks, torch.float32)
        found, (P, _, width) = laid(panels), panels.shape
        assert torch.equal(found[:, :K], packing.pack_rows(w, blocks).view(P, K, width))
        assert torch.equal(found[:, K:], packing.pack_rows(whole[:, :2], blocks))


def test_panels_of_another_shape_are_refused():
    w, op = torch.randn(8, 5), torch.ops.seq2seq_fast.pack_panels
    for panels, weight, blocks, column in (
        (torch.empty(1, 5, 64), w, 4, 1),
        (torch.empty(1, 5, 64), w, 4, -1),
        (torch.empty(1, 5, 64), w, 3, 0),
        (torch.empty(1, 5, 48), w, 4, 0),
        (torch.empty(2, 5, 64), w, 4, 0),
        (torch.empty(1, 5, 64).double(), w, 4, 0),
        (torch.empty(1, 5, 64), w.double(), 4, 0),
        (torch.empty(1, 64, 5).mT, w, 4, 0),
        (torch.empty(1, 5, 64), w[0], 4, 0),
    ):
        with pytest.raises(RuntimeError, match="expected panels"):
            op(panels, weight, blocks, column)


def test_packed_panels_hold_the_matrix():
    w = torch.randn(4 * 19, 7)
    panels, scale = pack_matrix([w[:, :3], w[:, 3:]], 4, torch.float32)
    assert panels.shape == (2, 7, 64) and scale.numel() == 0
    data = laid(panels)
    for gate, unit in ((0, 0), (3, 18), (2, 16), (1, 15)):
        panel, lane = divmod(unit, 16)
        assert torch.equal(data[panel, :, gate * 16 + lane], w[gate * 19 + unit])
    assert (data[1].view(7, 4, 16)[:, :, 3:] == 0).all()
    data, scale = pack_matrix([w], 1, torch.int8)
    assert data.shape == (2, 2, 64, 4)
    whole = (data.float() - 128) * scale.view(2, 1, 64, 1)
    restored = whole.transpose(1, 2).reshape(128, 8)[:76]
    assert ((restored[:, :7] - w).abs() <= w.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert (restored[:, 7] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_weights_lie_side_by_side(dtype):
    decoder = make(KINDS[2]).decoder
    with torch.no_grad():
        apart = [laid(w) for w in packing._pack(decoder, packing.DTYPES[dtype], True, False)]
    together = pack_decoder(decoder, dtype).weights.tensors()
    assert len({w.untyped_storage().data_ptr() for w in together}) == 1
    end = 0
    for a, b in zip(apart, together, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and b.is_contiguous()
        if b.numel():
            assert b.data_ptr() % 64 == 0 and b.data_ptr() >= end
            end = b.data_ptr() + b.nbytes


def test_nothing_is_kept_of_weights_that_are_gone():
    """Neither their memory nor the packed ones; but how they were prepared."""
    model, src = make().prepare_inference("bfloat16", project_values=True), sources(3, 6)
    options = {"bos": BOS, "eos": EOS, "max_length": 6}
    before = model.generate(src, **options)
    kept = id(model.decoder.packed), id(model.encoder.packed)
    model.to("cpu").float()  # which changes nothing
    assert (id(model.decoder.packed), id(model.encoder.packed)) == kept
    old = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    model.double()
    for part in (model.decoder, model.encoder):
        assert part.packed.weights.memory.numel() == 0 and not part.packed.watch.holds()
    gc.collect()
    assert not any(ref() for ref in old)
    assert torch.equal(model.generate(src, **options).tokens, before.tokens)
    model.float()
    assert torch.equal(model.generate(src, **options).tokens, before.tokens)
    assert model.decoder.packed.weights.memory.numel() > 0
    assert model.decoder.packed.dtype == "bfloat16" and model.decoder.packed.projects_values
    assert model.prepare_inference(None) is model
    assert model.decoder.packed is None and model.encoder.packed is None
    assert torch.equal(model.generate(src, **options).tokens, before.tokens)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_carry_no_packed_weights(clone):
    model = make().prepare_inference("int8")
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(make()))
    twin = clone(model)
    assert twin.decoder.packed.weights.memory.numel() == 0 and twin.decoder.packed.dtype == "int8"
    src, options = sources(3, 6), {"bos": BOS, "eos": EOS, "max_length": 6}
    for prepared in (twin, model):  # the model's own are still there
        found = prepared.generate(src, **options)
        assert prepared.decoder.packed.weights.memory.numel() > 0
    assert torch.equal(found.tokens, twin.generate(src, **options).tokens)


@pytest.mark.parametrize("project_values", [False, True])
def test_prepared_weights_follow_the_parameters(project_values):
    model, src = make().prepare_inference(project_values=project_values), sources(5, 6)
    names = set(model.state_dict())
    options = {"bos": BOS, "eos": EOS, "max_length": 8}
    before = model.generate(src, **options)
    kept = model.decoder.packed
    model.generate(src, **options)
    assert model.decoder.packed is kept and set(model.state_dict()) == names
    with torch.no_grad():
        model.decoder.fc_out.weight.mul_(-1)
    after = model.generate(src, **options)
    assert model.decoder.packed is not kept
    assert model.decoder.packed[1:4] == ("float32", model.decoder.packed.watch, project_values)
    assert torch.equal(after.tokens, model.generate(src, backend="reference", **options).tokens)
    model.load_state_dict(make().state_dict())
    assert torch.equal(model.generate(src, **options).tokens, before.tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(src, **options).tokens, before.tokens)
    with torch.inference_mode():
        assert torch.equal(model.generate(src, **options).tokens, before.tokens)


@torch.no_grad()
def test_prepared_weights_follow_what_parameters_are_computed_from():
    model, src = make().prepare_inference(), sources(5, 6)
    options = {"bos": BOS, "eos": EOS, "max_length": 8}
    torch.nn.utils.parametrizations.weight_norm(model.decoder.fc_out)
    scale = model.eval().decoder.fc_out.parametrizations.weight.original0
    for factor in (1, -1, 0.5):
        scale.mul_(factor)
        for _ in range(2):
            want = model.generate(src, backend="reference", **options)
            found = model.generate(src, **options)
            assert torch.equal(found.tokens, want.tokens)
            torch.testing.assert_close(found.log_probs, want.log_probs, rtol=1e-4, atol=1e-4)
