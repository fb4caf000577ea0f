"""Decoding of a large vocabulary seeks the most probable tokens among rounded weights
(csrc/cpu/screen.h): they are those of all logits. So are log-probabilities, bit for bit, but for
those of MANY_SUMMED tokens: test_summing.py tests them."""

import copy
import math

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, check_same, make, sources, suited
from hypothesis import given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s
from seq2seq_fast.decoding import stepwise
from seq2seq_fast.decoding.packing import MANY_SUMMED, MANY_TOKENS, pack_decoder

V = MANY_TOKENS + 70
# What is sought with, of packed weights: six bits and scales of the hidden state's part
MATRIX, SCALES, OF_CONTEXT, SCALES_OF_CONTEXT, BOUNDS, *_, WEIGHTS = range(-15, 0)


@pytest.fixture(autouse=True)
def seeking():
    """Plain loops do not seek: there is nothing to test."""
    model, src = make(V=V), sources(2, 5)
    packed = pack_decoder(model.decoder, "float32")
    for part in (SCALES, SCALES_OF_CONTEXT):
        packed.weights.tensors()[part].zero_()
    packed.weights.tensors()[BOUNDS].zero_()
    model.decoder.packed = packed
    options = {"bos": BOS, "eos": EOS, "max_length": 5, "return_scores": False}
    want = model.generate(src, backend="reference", **options)
    if torch.equal(model.generate(src, **options).tokens, want.tokens):
        pytest.skip("the loops of this processor do not seek")


def decoded(decoder, source, state, dtype="float32", **options):
    """From all logits; from bytes, with scores and without."""
    options = {"bos": BOS, "eos": EOS, "max_length": 8, "backend": "native"} | options
    found = []
    for seek, scores in ((False, True), (True, True), (True, False)):
        decoder.packed = pack_decoder(decoder, dtype, seek)
        torch.manual_seed(0)  # where tokens are drawn
        found.append(s2s.generate(decoder, source, state, return_scores=scores, **options))
    decoder.packed = None
    return found


def test_attentional_vectors_are_sought_with():
    model, src = make(KINDS[1], V, O=9), sources(2, 5)
    options = {"bos": BOS, "eos": EOS, "max_length": 5, "return_scores": False}
    want = model.generate(src, backend="reference", **options)
    model.decoder.packed = packed = pack_decoder(model.decoder, "float32")
    assert torch.equal(model.generate(src, **options).tokens, want.tokens)
    for part in (SCALES, BOUNDS):
        packed.weights.tensors()[part].zero_()
    assert not torch.equal(model.generate(src, **options).tokens, want.tokens)


def check_alike(all_logits, sought, alone, exact=True):
    for found in (sought, alone):
        assert torch.equal(all_logits.tokens, found.tokens)
        assert torch.equal(all_logits.lengths, found.lengths)
        assert torch.equal(all_logits.finished, found.finished)
    for name in ("log_probs", "scores"):
        ours, want = getattr(sought, name), getattr(all_logits, name)
        if exact:
            assert torch.equal(ours.nan_to_num(7), want.nan_to_num(7))
        else:
            torch.testing.assert_close(ours, want, rtol=2e-6, atol=2e-6)
        assert getattr(alone, name) is None
    if all_logits.weights is not None:
        assert torch.equal(all_logits.weights, sought.weights)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    options=st.fixed_dictionaries(
        {
            "max_length": st.integers(2, 30),
            "min_length": st.integers(0, 2),
            "length_penalty": st.sampled_from([0.0, 0.6]),
            "no_repeat_ngram": st.integers(0, 2),
            "max_length_ratio": st.sampled_from([None, 0.5, 1.3]),
        }
    ),
    coverage_penalty=st.sampled_from([0.0, 0.4]),
    P=st.sampled_from([0, 0, 2]),
    B=st.sampled_from([1, 2, 3, 4, 5, 9]),
    H=st.sampled_from([1, 7, 33, 64]),
    V=st.sampled_from([MANY_TOKENS, V, 4096 + 5]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    temperature=st.sampled_from([None, None, 1e-3, 0.7, 1.0, 30.0]),  # None: greedy decoding
    top_k=st.sampled_from([0, 1, 2, 17, 60, 100]),
    top_p=st.sampled_from([1.0, 0.9]),
    width=st.sampled_from([None, None, 1, 9, 70]),  # of attentional vectors
    seed=st.integers(0, 100),
)
def test_the_results_are_those_of_all_logits(
    kind, options, coverage_penalty, P, B, H, V, size, dtype, temperature, top_k, top_p, width, seed
):
    model = make(kind, V, H, seed=seed, size=size, O=width if kind[1] and kind[2] else None)
    src = sources(B, 9, seed)
    options = options | {
        "coverage_penalty": coverage_penalty,
        "prefix": torch.randint(3, V, (B, P)) if P else None,
        "return_weights": True,
    }
    options = suited(options, kind)
    if temperature is not None:
        options |= {"sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    source, state = model.encode(src)
    found = decoded(model.decoder, source, state, dtype, **options)
    check_alike(*found, exact=V < MANY_SUMMED)
    if dtype == "float32" and size < 8:  # and its hypotheses do not hang on the last bits
        torch.manual_seed(0)
        plain = model.generate(src, bos=BOS, eos=EOS, backend="reference", **options)
        check_same(model, src, found[1], plain)


def crowd(name, w, bias):
    """Weights (V, K) among which the largest logit is hard to tell by bytes."""
    g = torch.Generator().manual_seed(0)
    if name == "alike":
        w.copy_(w[:1].expand_as(w).clone())
        bias.zero_()
    elif name == "twins":  # of which the first one wins
        w[500:] = w[: len(w) - 500].clone()
        bias[500:] = bias[: len(bias) - 500].clone()
    elif name == "neighbours":  # in the last bit
        w.copy_(w[:1].expand_as(w).clone())
        w.mul_(1 + torch.randint(-1, 2, w.shape, generator=g) * 2.0**-23)
    elif name == "outliers":  # beside which all else rounds to zero
        w[:, 0] = 1000 * (1 + torch.rand(len(w), generator=g) * 1e-3)
    elif name == "lengths":
        w.mul_(10 ** torch.linspace(-8, 3, len(w))[torch.randperm(len(w), generator=g), None])
    elif name == "large":
        w.mul_(1e25)
    elif name == "tiny":
        w.mul_(1e-36)
        bias.zero_()
    elif name == "zero":
        w.zero_()
        bias.zero_()
    elif name == "biases":
        bias.copy_(1e6 + torch.rand(len(w), generator=g))
    elif name == "barred":
        bias[torch.randperm(len(w), generator=g)[: len(w) // 2]] = -math.inf
    elif name == "none":
        bias.fill_(-math.inf)
    elif name == "infinite":
        w[7, 1] = math.inf
    else:
        bias[7] = math.nan


CROWDS = ["alike", "twins", "neighbours", "outliers", "lengths", "large", "tiny", "zero", "biases",
          "barred", "none", "infinite", "nan"]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B", [1, 3, 20])
@pytest.mark.parametrize("name", CROWDS)
@torch.no_grad()
def test_crowded_logits(name, B, dtype):
    model, src = make(V=V, H=40, seed=3, size=1.0), sources(B, 7)
    fc_out = model.decoder.fc_out
    crowd(name, fc_out.weight, fc_out.bias)
    source, state = model.encode(src)
    draws = {"sample": True}, {"sample": True, "top_k": 5}, {"sample": True, "top_k": 60}
    for options in ({}, {"no_repeat_ngram": 1}, {"min_length": 8}, *draws):
        check_alike(*decoded(model.decoder, source, state, dtype, **options))


def of_zeros(H, D, attention):
    """A decoder whose parameters are zero, hidden states too; its weights of the context, and its
    readout's bias."""
    sizes = {"attention": attention, "encoder_dim": D}
    decoder = s2s.Decoder(V, 6, H, 1, 0.0, cell_type="rnn", **sizes).eval()
    for p in decoder.parameters():
        p.zero_()
    return decoder, decoder.fc_out.weight[:, H:], decoder.fc_out.bias


@pytest.mark.parametrize("part", ["hidden", "context"])
@pytest.mark.parametrize("rounded", ["weights", "rows"])
@torch.no_grad()
def test_the_bound_is_needed_and_enough(rounded, part):
    """Token 5 is the one by little, and token 9 by as much as rounding can hide: with nine tenths
    of the bound it comes out."""
    D, of_hidden = 64, part == "hidden"
    H, step = (D if of_hidden else 8), 1 / (31 if of_hidden and rounded == "weights" else 127)
    (decoder, w, bias), x = of_zeros(H, D, attention=False), torch.ones(D)
    context = torch.zeros(1, D) if of_hidden else x[None]
    w = decoder.fc_out.weight[:, :H] if of_hidden else w
    if rounded == "weights":  # to nothing, and to one step
        w[[5, 9], 0], x[0] = 1, 0  # of all steps that there are
        w[5, 1:], w[9, 1 : int(0.95 * D)] = 0.49 * step, 0.51 * step
    else:
        x[1:] = 0.49 * step
        w[5, 1:], w[9, 1:] = 1, -1
        bias[9] = 1.9 * 0.49 * step * (D - 1)
    if of_hidden:  # by tanh of the layer's bias
        decoder.rnn.bias_hh_l0.copy_(torch.atanh(x / 2))
        bias.div_(2)
    state = s2s.DecoderState(torch.zeros(1, 1, H), None)
    options = {"bos": BOS, "eos": EOS, "max_length": 1, "return_scores": False}
    for share, token in ((1.0, 5), (0.9, 9)):
        decoder.packed = pack_decoder(decoder, "float32")
        decoder.packed.weights.tensors()[BOUNDS].mul_(share)
        assert s2s.generate(decoder, context, state, **options).tokens.tolist() == [[token]]


@pytest.mark.parametrize("rounded", ["products", "weights", "values", "attention"])
@torch.no_grad()
def test_what_rounding_hides_of_projected_values(rounded):
    """As above, where values meet the context's bytes, as those of few and short sources do from
    the second or third step on: token 5 is the one, and the bytes alone speak for token 9."""
    H, D, S, step = 8, 64, 12, 1 / 127
    (decoder, w, bias), values = of_zeros(H, D, attention=True), torch.zeros(1, S, D)
    attention = decoder.attention  # equal to all
    if rounded == "products":
        w[5, 0], w[5, 1], w[9, 0], w[9, 2] = 1, step, 1, step  # their own bytes are exact
        values[0, 0, 0], values[0, 1:, 1], values[0, 1 : S - 1, 2] = 1, 0.49, 0.51
    elif rounded == "weights":
        w[[5, 9], 0], values[..., 1:] = 1, 1
        w[5, 1:], w[9, 1 : int(0.95 * D)] = 0.49 * step, 0.51 * step
    elif rounded == "values":
        values[..., 0], values[..., 1:] = 1, 0.49 * step
        w[5, 1:], w[9, 1:] = 1, -1
        bias[9] = 1.9 * 0.49 * step * (D - 1)
    else:  # of the others: 0.49 steps of the first one's 127
        values[..., -1], values[0, 0, -1], values[0, 1:, 1] = -20, 20, 1
        attention.Ua.weight[0, -1] = 1
        attention.Va.weight[0, 0] = -0.5 * math.log(0.49 * step)  # times tanh(20) - tanh(-20)
        w[5, 1], w[9, 1] = 1, -1
        bias[9] = 1.9 * 0.49 * step * (S - 1) / (1 + 0.49 * step * (S - 1))
    source, state = decoder.source(values), s2s.DecoderState(torch.zeros(1, 1, H), None)
    found = decoded(decoder, source, state, min_length=8)
    check_alike(*found)
    assert found[2].tokens.tolist() == [8 * [5]]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 1e38])
@torch.no_grad()
def test_a_row_that_is_not_finite(value):
    """Its step makes all logits: the rows beside it are decoded as without it."""
    model = make(("rnn", False, False), V=V, H=40, layers=1)
    source, state = model.encode(sources(5, 7))
    want = decoded(model.decoder, source, state)[1]
    source = source.clone()
    source[2] = value  # the context, which the readout sees
    found = decoded(model.decoder, source, state)
    check_alike(*found)
    others = torch.arange(5) != 2
    assert torch.equal(found[1].tokens[others], want.tokens[others])
    assert torch.equal(found[1].log_probs[others], want.log_probs[others])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 1e38])
@torch.no_grad()
def test_values_that_are_not_finite(value):
    """Nor are their products, or not all of them."""
    model = make(("rnn", True, False), V=V, H=40, layers=1)
    source, state = model.encode(sources(2, 7))
    want = decoded(model.decoder, source, state)[1]
    for at in (slice(None), slice(3, 4)):
        values = source.values.clone()
        values[1, 2, at] = value
        found = decoded(model.decoder, source._replace(values=values), state)
        check_alike(*found)
        assert torch.equal(found[1].tokens[0], want.tokens[0])
        assert torch.equal(found[1].log_probs[0], want.log_probs[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_batches_and_threads(threads):
    """A source is decoded alike, alone and beside others that end earlier."""
    model, src = make(V=V, H=64), sources(13, 9)
    source, state = model.encode(src)
    options = {"max_length": 40, "max_length_ratio": 3.0}
    want = decoded(model.decoder, source, state, **options)[0]
    assert want.lengths.unique().numel() > 4
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = decoded(model.decoder, source, state, **options)
        check_alike(want, *together[1:])
        for b in range(0, 13, 4):
            row = torch.tensor([b])
            one = stepwise.take_source(source, row), stepwise.take_state(state, row)
            alone = decoded(model.decoder, *one, **options)
            check_alike(*alone)
            assert torch.equal(alone[1].log_probs[0], want.log_probs[b])
            n = int(want.lengths[b])
            assert torch.equal(alone[2].tokens[0], want.tokens[b, :n])
    finally:
        torch.set_num_threads(before)


def test_what_is_packed():
    """The seeking copies are there but for int8, and only of many tokens, all finite."""
    decoder = make(V=V).decoder
    matrix, scales, *of_context, bounds = pack_decoder(decoder, "float32").weights.tensors()[
        MATRIX : BOUNDS + 1
    ]
    weights = pack_decoder(decoder, "float32").weights.tensors()[WEIGHTS]
    P, H = -(-V // 64), decoder.layers.hidden_size
    assert bounds.shape == (5, P) and torch.equal(weights, decoder.fc_out.weight)
    assert matrix.dtype == of_context[0].dtype == torch.uint8
    # Blocks of sixteen columns: the fourth one's two bits above the six of each of the others
    above = (matrix.int() >> 6) * torch.tensor([1, 4, 16]).view(3, 1)
    blocks = torch.cat([matrix.int() & 63, above.sum(2, keepdim=True)], 2)
    six_bits = blocks.unflatten(3, (16, 4)).flatten(2, 3) - 32
    bytes_ = of_context[0].int() - 128
    parts = (
        (six_bits, scales, weights[:, :H], bounds[0]),
        (bytes_, of_context[1], weights[:, H:], bounds[2]),
    )
    for packed, scale, part, most in parts:
        assert len(packed) == P
        whole = packed.double() * scale.double().view(-1, 1, 64, 1)
        restored = whole.transpose(1, 2).reshape(-1, part.shape[1] + -part.shape[1] % 4)
        rounded = (restored[:V, : part.shape[1]] - part).norm(dim=1)
        assert (rounded <= most.repeat_interleave(64)[:V]).all()
        assert (rounded.max() > 0.5 * most.max()).all()  # and it is not far from what it bounds
    of_half = pack_decoder(decoder, "bfloat16").weights.tensors()[MATRIX:]
    assert of_half[-1].dtype == torch.bfloat16 and torch.equal(of_half[-1], weights.bfloat16())
    infinite = copy.deepcopy(decoder)
    with torch.no_grad():
        infinite.fc_out.weight[3, 3] = math.inf
    for other, form in (
        (decoder, ("int8",)),
        (decoder, ("float32", False)),
        (make(V=MANY_TOKENS - 1).decoder, ("float32",)),
        (infinite, ("float32",)),
    ):
        assert all(w.numel() == 0 for w in pack_decoder(other, *form).weights.tensors()[MATRIX:])


@pytest.mark.parametrize("backend", ["native", "reference", None])
def test_without_scores(backend):
    model, src = make(), sources(4, 5)
    options = {"bos": BOS, "eos": EOS, "max_length": 6, "backend": backend}
    found = model.generate(src, return_scores=False, **options)
    assert found.log_probs is None and found.scores is None
    assert torch.equal(found.tokens, model.generate(src, **options).tokens)
    assert model.generate(src[:0], return_scores=False, **options).scores is None
    drawn = model.generate(src, sample=True, return_scores=False, **options)
    assert drawn.scores is None and drawn.tokens.shape[0] == 4
    with pytest.raises(ValueError, match="return_scores: got False, expected True of beam search"):
        model.generate(src, beam_size=2, return_scores=False, **options)


@torch.no_grad()
def test_numbers_whose_bounds_overflow():
    """Biases next to the most negative number there is, as masks are made of."""
    least = torch.finfo(torch.float32).min
    decoder = s2s.Decoder(V, 4, 8, 1, 0.0, attention=False).eval()
    decoder.fc_out.bias.fill_(least)
    decoder.fc_out.bias[EOS] = 0
    decoder.fc_out.bias[700] = torch.nextafter(torch.tensor(least), torch.tensor(0.0))
    state = s2s.DecoderState(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    for options in ({}, {"sample": True, "top_k": 1}):
        found = decoded(decoder, torch.zeros(1, 8), state, max_length=4, min_length=3, **options)
        check_alike(*found)
        assert found[0].tokens.tolist() == [[700, 700, EOS]]


@torch.no_grad()
def test_rows_of_zeros_where_subnormal_numbers_are_flushed():
    torch.set_flush_denormal(True)
    try:
        for seed in range(8):
            model, src = make(V=V, H=64, seed=seed), sources(4, 6, seed)
            model.decoder.fc_out.weight[torch.arange(0, V, 64)] = 0
            check_alike(*decoded(model.decoder, *model.encode(src), max_length=20))
    finally:
        torch.set_flush_denormal(False)
