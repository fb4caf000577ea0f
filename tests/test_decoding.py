"""Decoding: the compiled engine against plain PyTorch, and both against definitions."""

import copy
import itertools
import math
import pickle
import threading
import warnings

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, PROJECT, V_SRC, check_same, make, rescored, sources
from hypothesis import given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s
from seq2seq_fast import decoding
from seq2seq_fast.decoding import native, packing, stepwise
from seq2seq_fast.decoding.packing import FEW_TOKENS, pack_decoder, pack_matrix

OPTIONS = st.fixed_dictionaries(
    {
        "max_length": st.integers(2, 9),
        "min_length": st.integers(0, 2),
        "beam_size": st.sampled_from([1, 1, 2, 3, 5]),
        "length_penalty": st.sampled_from([0.0, 0.6, 1.5]),
        "no_repeat_ngram": st.integers(0, 3),
        "max_length_ratio": st.sampled_from([None, 0.5, 1.3]),
        "pad_idx": st.sampled_from([None, 0]),
        "return_weights": st.booleans(),
    }
)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    options=OPTIONS,
    coverage_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    P=st.sampled_from([0, 0, 2]),
    B=st.integers(1, 5),
    S=st.integers(1, 19),
    H=st.sampled_from([1, 7, 16, 70]),
    layers=st.integers(1, 3),
    V=st.sampled_from([5, 11, 64, 130, FEW_TOKENS, FEW_TOKENS + 1, 1040]),
    seed=st.integers(0, 100),
    project_values=st.booleans(),
)
def test_the_engine_decodes_as_plain_pytorch_does(
    kind, options, coverage_penalty, P, B, S, H, layers, V, seed, project_values
):
    model, src = make(kind, V, H, layers, seed), sources(B, S, seed)
    if project_values and kind in PROJECT:
        model.prepare_inference(project_values=True)
    if not kind[1]:
        coverage_penalty, options = 0.0, options | {"return_weights": False}
    options = options | {
        "n_best": min(options["beam_size"], 1 + seed % 3),
        "coverage_penalty": coverage_penalty,
        "prefix": torch.randint(3, V, (B, P)) if P else None,
    }
    results = [
        model.generate(src, bos=BOS, eos=EOS, backend=backend, **options)
        for backend in ("native", "reference")
    ]
    check_same(model, src, *results)


def test_ten_thousand_rows_have_the_reference_s_tokens():
    """Differences must be ties: the two tokens' log-probabilities equal to float32's rounding."""
    model, differing, rows = make(V=40, H=32), 0, 0
    for seed in range(20):
        src = sources(500, 9, seed)
        ours, plain = (
            model.generate(src, bos=BOS, eos=EOS, max_length=12, backend=b)
            for b in ("native", "reference")
        )
        rows += len(src)
        n = min(ours.tokens.shape[1], plain.tokens.shape[1])
        for b in (ours.tokens[:, :n] != plain.tokens[:, :n]).any(1).nonzero().flatten().tolist():
            differing += 1
            t = int((ours.tokens[b, :n] != plain.tokens[b, :n]).nonzero()[0])
            pair = [torch.cat([torch.tensor([BOS]), r.tokens[b, : t + 1]]) for r in (ours, plain)]
            exact = copy.deepcopy(model).double()
            a, c = (exact.score(src[b, None], x[None]).log_probs.item() for x in pair)
            assert abs(a - c) < 1e-4, (b, t, a, c)
    assert rows == 10_000 and differing < 10


@pytest.mark.parametrize(
    ("kind", "project_values"),
    [(kind, False) for kind in KINDS] + [(kind, True) for kind in PROJECT],
    ids=str,
)
def test_a_row_is_decoded_alike_alone_and_in_any_batch(kind, project_values):
    """Bit for bit, from what an encoder made of it."""
    model, src = make(kind, V=70, H=40), sources(67, 7)
    model.prepare_inference(project_values=project_values)
    source, state = model.encode(src)
    for options in ({}, {"beam_size": 4, "n_best": 4, "length_penalty": 1.0}):
        options |= {"bos": BOS, "eos": EOS, "max_length": 12, "backend": "native"}
        together = s2s.generate(model.decoder, source, state, **options)
        for b in range(0, 67, 11):
            row = torch.tensor([b])
            alone = s2s.generate(
                model.decoder,
                stepwise.take_source(source, row),
                stepwise.take_state(state, row),
                **options,
            )
            assert torch.equal(alone.scores[0], together.scores[b])
            n = alone.tokens.shape[-1]
            assert torch.equal(alone.tokens[0], together.tokens[b, ..., :n])


def test_threads_do_not_change_the_result():
    model, src = make(V=700, H=64), sources(9, 7)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(model.generate(src, bos=BOS, eos=EOS, max_length=12, beam_size=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].tokens, other.tokens)
        assert torch.equal(found[0].scores, other.scores)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_wide_beam_finds_the_best_of_all_sequences(backend):
    """With as many beams as tokens nothing of two steps is lost."""
    model, src = make(V=6), sources(3, 5)
    found = model.generate(
        src, bos=BOS, eos=EOS, max_length=2, beam_size=6, n_best=3, backend=backend
    )
    others = [v for v in range(6) if v != EOS]
    sequences = [(EOS, EOS), *((v, EOS) for v in others)]
    for b in range(3):
        trg = torch.tensor([(BOS, *s) for s in sequences])
        log_p = model.score(src[b, None].expand(len(trg), -1), trg, eos=EOS).log_probs
        best = log_p.topk(3)
        expected = [list(sequences[i]) for i in best.indices]
        assert found.tokens[b].tolist() == expected
        torch.testing.assert_close(found.log_probs[b], best.values.detach())
        assert found.finished[b].all()


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_the_early_stop_changes_nothing(alpha, monkeypatch):
    model, src = make(V=9, size=2.0), sources(8, 6)
    with torch.no_grad():
        model.decoder.fc_out.bias[EOS] += 3
    options = {"bos": BOS, "eos": EOS, "max_length": 25, "beam_size": 3, "n_best": 2}
    options["length_penalty"] = alpha
    stopped = [model.generate(src, backend=b, **options) for b in ("native", "reference")]
    steps = []
    step = s2s.Decoder.step
    monkeypatch.setattr(
        s2s.Decoder, "step", lambda self, *a: steps.append(len(a[0])) or step(self, *a)
    )
    model.generate(src, backend="reference", **options)
    with_stop = sum(steps)
    steps.clear()
    monkeypatch.setattr(stepwise.Ended, "complete", lambda *_: False)
    full = model.generate(src, backend="reference", **options)
    assert with_stop < sum(steps)  # it does stop early
    for found in stopped:
        assert torch.equal(found.tokens, full.tokens)
        torch.testing.assert_close(found.scores, full.scores)


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_scores_follow_the_formulas(backend, beam_size):
    model, src = make(), sources(6, 8)
    alpha, beta = 0.8, 0.3
    found = model.generate(
        src, bos=BOS, eos=EOS, max_length=9, beam_size=beam_size, n_best=beam_size,
        length_penalty=alpha, coverage_penalty=beta, return_weights=True, backend=backend,
    )  # fmt: skip
    shape = found.lengths.shape
    if beam_size > 1:  # the best come first, and all that ended before what did not
        order = found.scores - 1e6 * (~found.finished).float()
        assert (order.diff(dim=-1) <= 0).all()
    log_probs = rescored(model, src, found)
    torch.testing.assert_close(found.log_probs, log_probs.float(), rtol=1e-5, atol=1e-5)
    attended = src != 0
    for i in itertools.product(*map(range, shape)):
        n = int(found.lengths[i])
        w = found.weights[i]
        torch.testing.assert_close(w[:n].sum(-1), torch.ones(n))
        assert (w[n:] == 0).all() and (w[:, ~attended[i[0]]] == 0).all()
        covered = w.sum(0)[attended[i[0]]].clamp(max=1)
        score = float(log_probs[i]) / ((5 + n) / 6) ** alpha
        score += beta * sum(math.log(c) for c in covered.tolist())
        assert float(found.scores[i]) == pytest.approx(score, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rules_are_kept(backend, beam_size):
    model, src = make(V=7), sources(20, 8)
    prefix = torch.tensor([3, 4, 3])
    found = model.generate(
        src, bos=BOS, eos=EOS, max_length=12, max_length_ratio=1.5, min_length=5, pad_idx=0,
        no_repeat_ngram=2, beam_size=beam_size, n_best=beam_size, prefix=prefix, backend=backend,
    )  # fmt: skip
    lengths = (src != 0).sum(1)
    limits = (lengths * 1.5).floor().long().clamp(3, 12)
    found = [x if beam_size > 1 else x.unsqueeze(1) for x in found[:5]]
    tokens, n, _, _, finished = found
    assert tokens.shape[2] == n.max() and (n <= limits[:, None]).all()
    for b, i in itertools.product(range(20), range(beam_size)):
        length = int(n[b, i])
        if length == 0:
            continue
        row = tokens[b, i].tolist()
        assert row[:3] == [3, 4, 3] and set(row[length:]) <= {0}
        assert (row[length - 1] == EOS) == bool(finished[b, i]) and EOS not in row[: length - 1]
        grams = list(itertools.pairwise(row[:length]))
        assert len(set(grams)) == len(grams)
        if finished[b, i]:
            assert length >= 5
        else:
            assert length == limits[b]


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_where_no_token_is_left_eos_is_taken(backend, beam_size):
    """Each token once: after all of them nothing but eos, whatever min_length says."""
    model, src = make(V=4), sources(3, 4)
    found = model.generate(
        src, bos=BOS, eos=EOS, max_length=9, min_length=9, no_repeat_ngram=1, beam_size=beam_size,
        backend=backend,
    )  # fmt: skip
    assert (found.lengths == 4).all() and found.finished.all()
    assert (found.tokens.sort(-1).values == torch.tensor([0, 1, 2, 3])).all()


def test_special_sources():
    """All padding: no context at all. No rows: empty results."""
    model = make()
    src = torch.zeros(2, 5, dtype=torch.int64)
    ours, plain = (
        model.generate(src, bos=BOS, eos=EOS, max_length=5, return_weights=True, backend=b)
        for b in ("native", "reference")
    )
    assert torch.equal(ours.tokens, plain.tokens) and (ours.weights == 0).all()
    for beam_size, shape in ((1, (0, 0)), (3, (0, 1, 0))):
        for sample in (False, beam_size == 1):
            found = model.generate(
                src[:0], bos=BOS, eos=EOS, max_length=5, beam_size=beam_size, sample=sample,
                return_weights=True,
            )  # fmt: skip
            assert found.tokens.shape == shape and found.tokens.dtype == torch.int64
            assert found.scores.shape == found.lengths.shape == found.finished.shape == shape[:-1]
            assert found.weights.shape == (*shape, 5)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_logits_that_are_not_finite(beam_size):
    """-inf is never chosen while there is another token; NaN ends in what plain PyTorch ends in."""
    src = sources(3, 5)
    for value, token in ((-math.inf, 5), (math.nan, 5), (1e30, 6)):
        model = make()
        with torch.no_grad():
            model.decoder.fc_out.bias[token] = value
        ours, plain = (
            model.generate(src, bos=BOS, eos=EOS, max_length=6, beam_size=beam_size, backend=b)
            for b in ("native", "reference")
        )
        assert torch.equal(ours.tokens, plain.tokens)
        torch.testing.assert_close(ours.scores, plain.scores, equal_nan=True)
        assert value != -math.inf or (ours.tokens != token).all()


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("max_length", [2, 5])
@pytest.mark.parametrize("bias", [-math.inf, math.nan])
def test_a_prefix_of_probability_zero(bias, max_length, beam_size):
    """Beams have no such hypothesis, however far it may go; greedy decoding goes on."""
    model, src, prefix = make(), sources(2, 5), torch.tensor([[5, 3], [4, 3]])
    with torch.no_grad():
        model.decoder.fc_out.bias[5] = bias
    ours, plain = (
        model.generate(
            src, bos=BOS, eos=EOS, max_length=max_length, min_length=2, beam_size=beam_size,
            prefix=prefix, backend=b,
        )
        for b in ("native", "reference")
    )  # fmt: skip
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.lengths, plain.lengths)
    torch.testing.assert_close(ours.scores, plain.scores, equal_nan=True)
    lengths = ours.lengths.flatten()
    assert lengths[0] == 0 if beam_size > 1 else lengths[0] >= 2
    assert lengths[1] >= 2 or math.isnan(bias)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_score_is_the_forward_pass_log_softmax(kind):
    model, src = make(kind), sources(4, 6)
    trg = torch.randint(3, 11, (4, 7))
    trg[1, 3] = trg[2, 0] = EOS  # the first token is only fed
    logits = model(src, trg, 1.0)[:, 1:]
    want = logits.log_softmax(-1).gather(2, trg[:, 1:, None]).squeeze(2)
    scored = model.score(src, trg)
    torch.testing.assert_close(scored.token_log_probs, want)
    torch.testing.assert_close(scored.log_probs, want.sum(1))
    want[1, 3:] = 0
    until = model.score(src, trg, eos=EOS)
    torch.testing.assert_close(until.token_log_probs, want)
    if kind[1]:
        assert (until.weights[1, 3:] == 0).all() and scored.weights.shape == (4, 6, 6)
    else:
        assert scored.weights is None
    grad = torch.autograd.grad(until.log_probs.sum(), model.decoder.fc_out.weight)[0]
    assert grad.abs().sum() > 0


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
    V = model.decoder.output_dim
    found = s2s.generate(
        model.decoder, source, state, bos=BOS, eos=EOS, max_length=1, beam_size=V, n_best=V
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


def test_packed_panels_hold_the_matrix():
    w = torch.randn(4 * 19, 7)
    data, scale = pack_matrix(w, 4, torch.float32)
    assert data.shape == (2, 7, 64) and scale.numel() == 0
    for gate, unit in ((0, 0), (3, 18), (2, 16), (1, 15)):
        panel, lane = divmod(unit, 16)
        assert torch.equal(data[panel, :, gate * 16 + lane], w[gate * 19 + unit])
    assert (data[1].view(7, 4, 16)[:, :, 3:] == 0).all()
    data, scale = pack_matrix(w, 1, torch.int8)
    assert data.shape == (2, 2, 64, 4)
    whole = (data.float() - 128) * scale.view(2, 1, 64, 1)
    restored = whole.transpose(1, 2).reshape(128, 8)[:76]
    assert ((restored[:, :7] - w).abs() <= w.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert (restored[:, 7] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_weights_lie_side_by_side(dtype):
    decoder = make(KINDS[2]).decoder
    with torch.no_grad():
        apart = packing._pack(decoder, packing.DTYPES[dtype], True, False)
    together = pack_decoder(decoder, dtype).weights.tensors()
    assert len({w.untyped_storage().data_ptr() for w in together}) == 1
    end = 0
    for a, b in zip(apart, together, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and b.is_contiguous()
        if b.numel():
            assert b.data_ptr() % 64 == 0 and b.data_ptr() >= end
            end = b.data_ptr() + b.nbytes


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


def test_many_threads_at_once():
    model = make(V=300, H=48).prepare_inference()
    inputs = [sources(1 + i % 3, 5 + i % 4, i) for i in range(8)]
    options = {"bos": BOS, "eos": EOS, "max_length": 20, "beam_size": 3}
    want = [model.generate(src, **options) for src in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            found = model.generate(inputs[i], **options)
            if not (
                torch.equal(found.tokens, want[i].tokens)
                and torch.equal(found.scores, want[i].scores)
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_python_goes_on_meanwhile():
    """The engine runs without the GIL: another thread's Python counts on."""
    model, src = make(V=2000, H=128, size=1.0), sources(64, 9)
    source, state = model.encode(src)
    packed = pack_decoder(model.decoder, "float32")
    asked = decoding.DecodingOptions(bos=BOS, eos=EOS, max_length=60, min_length=60)
    running, counted = threading.Event(), []

    def decode():
        running.set()
        with torch.no_grad():
            native.generate(model.decoder, packed, source, state, asked)

    thread = threading.Thread(target=decode)
    thread.start()
    running.wait()
    while thread.is_alive():
        counted.append(1)
    thread.join()
    assert len(counted) > 1000


def test_training_mode_warns_once_and_decodes_without_dropout(monkeypatch):
    monkeypatch.setattr(decoding, "_warned", False)
    torch.manual_seed(0)
    parts = [cls(V_SRC, 6, 8, 2, 0.5) for cls in (s2s.Encoder, s2s.Decoder)]
    model, src = s2s.Seq2Seq(*parts), sources(3, 5)
    options = {"bos": BOS, "eos": EOS, "max_length": 8}
    with pytest.warns(UserWarning, match="training mode"):
        first = model.generate(src, **options)
    assert model.training and model.decoder.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model.generate(src, **options)
        plain = model.eval().generate(src, backend="reference", **options)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.tokens, plain.tokens)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_models_of_16_bits_are_decoded_in_float32(dtype, kind):
    model, src = make(kind, V=1100).to(dtype), sources(4, 6)
    source, state = model.encode(src)
    wide = copy.deepcopy(model).float()

    def widen(x):
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda y: y.float() if y.is_floating_point() else y, x
        )

    for prepared in (None, "float32", "bfloat16", "int8"):
        if prepared is not None:
            model.prepare_inference(prepared)
            wide.prepare_inference(prepared)
        for options in ({"return_weights": kind[1]}, {"beam_size": 3}, {"return_scores": False}):
            options |= {"bos": BOS, "eos": EOS, "max_length": 9}
            found = s2s.generate(model.decoder, source, state, **options)
            want = s2s.generate(wide.decoder, widen(source), widen(state), **options)
            assert torch.equal(found.tokens, want.tokens)
            if found.scores is not None:
                assert torch.equal(found.scores, want.scores)
            if found.weights is not None:
                assert found.weights.dtype == dtype
                assert torch.equal(found.weights, want.weights.to(dtype))
    hidden, cell, context = state
    logits = model.decoder(src[:, 0] % 11, hidden, cell, source, context=context)[0]
    assert logits.dtype == dtype  # a step alone is as it was
    with torch.no_grad():
        model.decoder.fc_out.bias[EOS] += 100
    assert (model.generate(src, bos=BOS, eos=EOS, max_length=9).lengths == 1).all()


def test_float64_is_decoded_step_by_step():
    model, src = make().double(), sources(3, 5)
    options = {"bos": BOS, "eos": EOS, "max_length": 8}
    found = model.generate(src, **options)
    assert torch.equal(found.tokens, make().generate(src, **options).tokens)
    with pytest.raises(ValueError, match=r"backend: 'native'.*float64"):
        model.generate(src, backend="native", **options)


@pytest.mark.unsanitized
def test_out_of_memory_leaves_the_model_usable():
    V = 1 << 20  # as many beams: logits of four terabytes
    parts = s2s.Encoder(V_SRC, 2, 2, 1, 0.0), s2s.Decoder(V, 2, 2, 1, 0.0)
    model, src = s2s.Seq2Seq(*parts).eval().prepare_inference(), sources(1, 3)
    options = {"bos": BOS, "eos": EOS, "max_length": 2}
    before = model.generate(src, **options)
    with pytest.raises(MemoryError):
        model.generate(src, beam_size=V, backend="native", **options)
    assert torch.equal(model.generate(src, **options).tokens, before.tokens)


GOOD = {"bos": BOS, "eos": EOS, "max_length": 6}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bos": 11}, ValueError, "bos: got 11, expected 0 to 10"),
        ({"eos": -1}, ValueError, "eos: got -1, expected 0 to 10"),
        ({"eos": 2.0}, TypeError, "eos: got float, expected a whole number"),
        ({"pad_idx": 11}, ValueError, "pad_idx: got 11"),
        ({"max_length": 0}, ValueError, "max_length: got 0, expected at least 1"),
        ({"min_length": 7}, ValueError, "min_length: got 7, expected 0 to 6"),
        ({"beam_size": 12}, ValueError, "beam_size: got 12, expected 1 to 11"),
        ({"beam_size": 2, "n_best": 3}, ValueError, "n_best: got 3, expected 1 to 2"),
        ({"length_penalty": math.inf}, ValueError, "length_penalty: got inf, expected a finite"),
        ({"coverage_penalty": math.nan}, ValueError, "coverage_penalty: got nan"),
        ({"length_penalty": -1.0}, ValueError, "length_penalty: got -1.0"),
        ({"max_length_ratio": 0.0}, ValueError, "max_length_ratio: got 0.0"),
        ({"no_repeat_ngram": -1}, ValueError, "no_repeat_ngram: got -1"),
        ({"sample": True, "temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"sample": True, "top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"sample": True, "beam_size": 2}, ValueError, "beam_size: got 2, expected 1 with sample"),
        ({"top_k": 3}, ValueError, "top_k: got 3, expected it only with sample"),
        ({"prefix": torch.ones(7, dtype=torch.int64)}, ValueError, "prefix: got 7 tokens"),
        (
            {"prefix": torch.ones(2, 2, dtype=torch.int64)},
            ValueError,
            r"prefix: got shape \(2, 2\)",
        ),
        ({"prefix": torch.tensor([11])}, ValueError, "prefix: got token id 11"),
        ({"prefix": torch.tensor([3, EOS])}, ValueError, "prefix: got eos"),
        ({"prefix": [3]}, TypeError, "prefix: got list"),
        ({"prefix": torch.tensor([3]).to_sparse()}, TypeError, "prefix: got .*sparse_coo"),
        (
            {"prefix": torch.empty(3, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "prefix: is on meta",
        ),
        ({"max_length": 2**63}, ValueError, "max_length: got 9223372036854775808, expected 1 to"),
        ({"no_repeat_ngram": 2**63}, ValueError, "no_repeat_ngram: got .*, expected 0 to"),
        ({"length_penalty": "x"}, TypeError, "length_penalty: got str, expected a number"),
        ({"length_penalty": None}, TypeError, "length_penalty: got NoneType"),
        ({"length_penalty": 10**400}, ValueError, "length_penalty: got 1329 bits"),
        ({"coverage_penalty": torch.ones(2)}, TypeError, "coverage_penalty: got Tensor"),
        ({"max_length_ratio": "x"}, TypeError, "max_length_ratio: got str"),
        ({"sample": True, "temperature": None}, TypeError, "temperature: got NoneType"),
        ({"sample": True, "top_p": "x"}, TypeError, "top_p: got str"),
        ({"top_p": torch.ones(2)}, TypeError, "top_p: got Tensor"),
        ({"sample": True, "generator": 3}, TypeError, "generator: got int"),
        ({"sample": "yes"}, TypeError, "sample: got str, expected True or False"),
        ({"return_weights": "yes"}, TypeError, "return_weights: got str"),
        ({"return_scores": 0}, TypeError, "return_scores: got int"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' .* no decode kernel"),
        ({"backend": "other"}, ValueError, "backend: got 'other'"),
        ({"beams": 3}, TypeError, "beams"),
    ],
    ids=lambda x: None if isinstance(x, type) else str(x),
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make().generate(sources(3, 5), **GOOD | options)


def test_options_that_are_not_known_or_not_given_are_named():
    model, src = make(), sources(3, 5)
    for options in ({}, {"prefix": torch.tensor([3])}):
        with pytest.raises(TypeError, match="beams: got an option that is not known"):
            model.generate(src, **GOOD, **options, beams=3)
        with pytest.raises(TypeError, match="eos: got nothing, expected a whole number"):
            model.generate(src, bos=BOS, max_length=3, **options)


def test_equal_options_of_other_types_are_refused_all_the_same():
    """Options that were found good once are not checked again; True == 1.0 == 1."""
    model, src = make(), sources(3, 5)
    options = GOOD | {"max_length": 1}
    for _ in range(2):
        assert model.generate(src, **options).tokens.shape == (3, 1)
        for other in (True, 1.0):
            with pytest.raises(TypeError, match=f"max_length: got {type(other).__name__}"):
                model.generate(src, **options | {"max_length": other})
    with pytest.raises(ValueError, match="eos: got 10"):  # of another vocabulary
        model.generate(src, **options | {"eos": 10})
        make(V=7).generate(src, **options | {"eos": 10})
    with pytest.raises(TypeError, match="vocabulary: got an option that is not known"):
        model.generate(src, **options, vocabulary=11)


def test_a_length_beyond_all_numbers_is_the_greatest():
    model, src = make(), sources(3, 5)
    options = GOOD | {"min_length": 6}
    for ratio in (1e19, 1e300):
        for backend in (None, "reference"):
            found = model.generate(src, max_length_ratio=ratio, backend=backend, **options)
            assert found.lengths.tolist() == [6, 6, 6]
    most = decoding.DecodingOptions(BOS, EOS, 2**63 - 1, max_length_ratio=1e300)
    assert most.limits(torch.tensor([3])) >= 2**62


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]])
def test_another_default_device_changes_nothing(kind):
    src, options = sources(3, 5), GOOD | {"max_length_ratio": 1.5}
    want = make(kind).generate(src, **options)
    model = make(kind)
    with torch.device("meta"):
        for backend in (None, "reference"):
            for prepared in (False, True):
                if prepared:
                    model.prepare_inference()
                found = model.generate(src, backend=backend, **options)
                assert torch.equal(found.tokens, want.tokens)
                assert model.generate(src, **options | {"beam_size": 2}).tokens.is_cpu


WIDE = s2s.Decoder(11, 2, 1, 1, 0.0, encoder_dim=140_000)
STATE = s2s.DecoderState(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
CALLS = {
    "decoder": (lambda: ask(make()), TypeError, "decoder: got Seq2Seq, expected a Decoder"),
    "no decoder": (lambda: ask(None), TypeError, "decoder: got NoneType"),
    "state": (lambda: ask(state=tuple(STATE)), TypeError, "state: got tuple, expected a Decoder"),
    "no state": (lambda: ask(state=None), TypeError, "state: got NoneType"),
    "no hidden": (
        lambda: ask(state=STATE._replace(hidden=None)),
        TypeError,
        "hidden: got NoneType, expected a Tensor",
    ),
    "hidden rank": (
        lambda: ask(state=STATE._replace(hidden=torch.zeros(4))),
        ValueError,
        r"hidden: got shape \(4,\), expected \(n_layers, B, H\)",
    ),
    "keys' type": (lambda: ask(keys=lambda k: k.keys), TypeError, "encoder_outputs.keys: got Ten"),
    "no keys": (
        lambda: ask(keys=lambda k: k._replace(keys=None)),
        TypeError,
        "encoder_outputs.keys: got NoneType",
    ),
    "keys' dtype": (
        lambda: ask(keys=lambda k: k._replace(keys=k.keys.long())),
        TypeError,
        "encoder_outputs.keys: got torch.int64",
    ),
    "keys' device": (
        lambda: ask(keys=lambda k: k._replace(keys=k.keys.to("meta"))),
        ValueError,
        "encoder_outputs.keys: is on meta",
    ),
    "powers": (
        lambda: ask(keys=lambda k: k._replace(powers=torch.zeros(3, 4))),
        ValueError,
        r"keys.powers: got torch.float32 of shape \(3, 4\)",
    ),
    "no v": (lambda: ask(v=None), TypeError, "encoder_outputs.v: got NoneType"),
    "v's dtype": (
        lambda: ask(v=torch.zeros(4).double()),
        TypeError,
        "encoder_outputs.v: got torch.float64",
    ),
    "int8 too wide": (
        lambda: decoding.prepare_inference(WIDE, "int8"),
        ValueError,
        "dtype: got 'int8' of weights for 14000[0-9] inputs, expected at most 131072",
    ),
    "dtype": (lambda: make().prepare_inference(["a"]), ValueError, r"dtype: got \['a'\]"),
    "project_values": (
        lambda: make().prepare_inference(project_values="x"),
        TypeError,
        "project_values: got str",
    ),
}
CALLS |= {
    f"eos {eos!r}": (lambda eos=eos: ask(eos=eos), error, message)
    for eos, error, message in [
        (11, ValueError, "eos: got 11, expected 0 to 10"),
        (-5, ValueError, "eos: got -5"),
        (2.5, TypeError, "eos: got float"),
        (True, TypeError, "eos: got bool"),
        ("a", TypeError, "eos: got str"),
        (torch.tensor(2), TypeError, "eos: got Tensor"),
    ]
}


def ask(decoder=0, state=STATE, keys=None, eos=None, **changes):
    """Calls `generate`, or `score` where an eos is given, on a source with changes."""
    small = make(H=4, layers=1).decoder
    decoder = small if decoder == 0 else decoder
    source = small.source(torch.zeros(3, 5, 4))
    source = source._replace(**changes, keys=keys(source.keys) if keys else source.keys)
    if eos is None:
        return s2s.generate(decoder, source, state, **GOOD)
    return s2s.score(decoder, source, state, torch.ones(3, 4, dtype=torch.int64), eos=eos)


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_calls_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_bad_input_is_refused():
    model, src = make(), sources(3, 5)
    bare = make(KINDS[5])
    for option in ({"return_weights": True}, {"coverage_penalty": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: .*without attention"):
            bare.generate(src, **GOOD, **option)
    source, state = model.encode(src)
    with pytest.raises(ValueError, match="hidden: got shape"):
        s2s.generate(model.decoder, source, state._replace(hidden=state.hidden[:, :2]), **GOOD)
    with pytest.raises(TypeError, match="cell: got NoneType"):
        s2s.generate(model.decoder, source, state._replace(cell=None), **GOOD)
    of_others = [
        s2s.Decoder(11, 6, 13, 2, 0.0, **widths).source(torch.zeros(3, 5, D))
        for D, widths in ((40, {"encoder_dim": 40}), (13, {"attention_dim": 40}))
    ]
    for prepared in (False, True):  # which reads weights without another check
        twin = make().prepare_inference() if prepared else make()
        for other in of_others:
            with pytest.raises(ValueError, match="encoder_outputs: got "):
                s2s.generate(twin.decoder, other, state, **GOOD)
            with pytest.raises(ValueError, match="encoder_outputs: got "), torch.no_grad():
                twin.decoder(torch.zeros(3, dtype=torch.int64), *state[:2], other)
    with pytest.raises(ValueError, match="trg: got shape"):
        model.score(src, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="trg: got torch.float32"):
        model.score(src, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="trg: is on meta, expected cpu"):
        model.score(src, torch.zeros(3, 4, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="trg: got token id 11"):
        model.score(src, torch.full((3, 4), 11))
    with pytest.raises(ValueError, match="dtype: got 'int4'"):
        model.prepare_inference("int4")
    with pytest.raises(ValueError, match="decoder: is torch.float64"):
        make().double().prepare_inference()
    with pytest.raises(ValueError, match="project_values: got True, .* without attention"):
        make(KINDS[5]).prepare_inference(project_values=True)
    assert model.decoder.packed is None


WRONG = {
    "hidden of float64": lambda s, t: (s, t._replace(hidden=t.hidden.double())),
    "hidden of int64": lambda s, t: (s, t._replace(hidden=t.hidden.long())),
    "hidden of 4 dimensions": lambda s, t: (s, t._replace(hidden=t.hidden.unsqueeze(3))),
    "hidden of 2 dimensions": lambda s, t: (s, t._replace(hidden=t.hidden[0])),
    "hidden, sparse": lambda s, t: (s, t._replace(hidden=t.hidden.to_sparse())),
    "hidden on meta": lambda s, t: (s, t._replace(hidden=t.hidden.to("meta"))),
    "hidden of other layers": lambda s, t: (s, t._replace(hidden=t.hidden[:1])),
    "hidden, wider": lambda s, t: (s, t._replace(hidden=torch.zeros(2, 3, 14))),
    "cell of other rows": lambda s, t: (s, t._replace(cell=t.cell.transpose(0, 1).contiguous())),
    "cell, none": lambda s, t: (s, t._replace(cell=None)),
    "context": lambda s, t: (s, t._replace(context=torch.zeros(3, 13))),
    "another state": lambda s, t: (s, tuple(t)),
    "another source": lambda s, t: (tuple(s), t),
    "values of other rows": lambda s, t: (s._replace(values=s.values[:2]), t),
    "values, fewer": lambda s, t: (s._replace(values=s.values[:, :4]), t),
    "values, wider": lambda s, t: (s._replace(values=torch.zeros(3, 5, 14)), t),
    "values of bfloat16": lambda s, t: (s._replace(values=s.values.bfloat16()), t),
    "v, longer": lambda s, t: (s._replace(v=torch.zeros(14)), t),
    "v of 2 dimensions": lambda s, t: (s._replace(v=s.v[None]), t),
    "keys of bfloat16": lambda s, t: (
        s._replace(keys=s.keys._replace(keys=s.keys.keys.bfloat16())),
        t,
    ),
    "powers of others": lambda s, t: (
        s._replace(keys=s.keys._replace(powers=s.keys.powers[:, :-16])),
        t,
    ),
    "mask of bytes": lambda s, t: (s._replace(mask=torch.ones(3, 5, dtype=torch.uint8)), t),
    "mask of other places": lambda s, t: (s._replace(mask=torch.ones(3, 4).bool()), t),
    "mask of 3 dimensions": lambda s, t: (s._replace(mask=torch.ones(3, 5, 1).bool()), t),
}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", WRONG)
def test_prepared_weights_ask_the_same_questions(name, dtype):
    """Those that are asked by the engine itself too: the errors are alike."""
    errors = []
    for prepare in (False, True):
        model = make()
        if prepare:
            model.prepare_inference(dtype)
        source, state = WRONG[name](*model.encode(sources(3, 5)))
        for options in (GOOD, GOOD | {"sample": True}):  # on the short way, and the long one
            with pytest.raises((TypeError, ValueError)) as raised:
                s2s.generate(model.decoder, source, state, **options)
            errors.append((raised.type, str(raised.value)))
    assert len(set(errors)) == 1


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"return_scores": False}])
def test_prepared_weights_take_the_short_way(monkeypatch, options):
    """Without the questions that the engine asks, to the same result."""
    model = make().prepare_inference()
    source, state = model.encode(sources(3, 5))

    def generate():
        return s2s.generate(model.decoder, source, state, **GOOD, **options)

    short = generate()
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "_rows", None)  # the long way's first question
        generate()
    monkeypatch.setattr(decoding, "_at_once", lambda *_: None)
    for name, x in generate()._asdict().items():
        assert x is None if getattr(short, name) is None else torch.equal(x, getattr(short, name))


def test_prepared_weights_draw_what_others_do():
    """No random number is lost on the way."""
    model, src = make(), sources(3, 5)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(model.generate(src, sample=True, **GOOD).tokens)
        model.prepare_inference()
    assert torch.equal(*found)
