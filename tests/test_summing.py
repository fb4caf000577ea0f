"""Log-probabilities of many tokens are made of sixteen bits (Readout::normaliser in
csrc/cpu/readout.cpp), but for tokens that are a large part of their sum."""

import copy

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, check_same, make, rescored, sources, suited
from hypothesis import given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s
from seq2seq_fast.decoding import stepwise
from seq2seq_fast.decoding.packing import MANY_SUMMED, MOST_OF_SIXTEEN, pack_decoder

V = MANY_SUMMED + 70
# Of packed weights: sixteen bits, their scales, how far off they may be, what was taken from them
MATRIX, SCALES, _, _, BOUNDS, MEAN, DIRECTIONS, WEIGHTS = range(-8, 0)
OPTIONS = {"bos": BOS, "eos": EOS}


@pytest.fixture(autouse=True)
def summing():
    """Some processors' loops have no use for sixteen bits: there is nothing to test."""
    model = make(V=V)
    source, state = model.encode(sources(5, 5))
    model.decoder.packed = packed = pack_decoder(model.decoder, "float32")
    options = OPTIONS | {"max_length": 2, "backend": "native"}
    want = s2s.generate(model.decoder, source, state, **options)
    for part in (SCALES, BOUNDS):
        packed.weights.tensors()[part].zero_()
    if torch.equal(s2s.generate(model.decoder, source, state, **options).scores, want.scores):
        pytest.skip("the loops of this processor make log-probabilities of floats")


def decoded(decoder, source, state, dtype="float32", **options):
    decoder.packed = pack_decoder(decoder, dtype)
    torch.manual_seed(0)  # where tokens are drawn
    found = s2s.generate(decoder, source, state, **(OPTIONS | {"backend": "native"} | options))
    decoder.packed = None
    return found


def check_accurate(model, src, each=False, **options):
    """By the rule of all of them: next to plain PyTorch's errors against float64, at most or of
    each source. No token is more than certain."""
    source, state = model.encode(src)
    ours = decoded(model.decoder, source, state, **options)
    plain = model.generate(src, backend="reference", **OPTIONS, **options)
    errors = []
    for found in (ours, plain):
        errors.append((found.log_probs.double() - rescored(model, src, found)).abs())
    rounding = torch.finfo(torch.float32).eps * plain.log_probs.abs()
    if not each:
        *errors, rounding = (x.max() for x in (*errors, rounding))
    assert (errors[0] <= 2 * errors[1] + rounding + 1e-12).all(), errors
    assert (ours.log_probs <= 0).all()


def topics(fc_out, rank=12, spread=6.0):
    """Weights as training makes them: few directions that many tokens share, tokens of all
    frequencies, logits of some size."""
    g = torch.Generator().manual_seed(1)
    N, K = fc_out.weight.shape
    w = torch.randn(N, rank, generator=g) @ torch.randn(rank, K, generator=g) / rank**0.5
    fc_out.weight.copy_(spread * (w + 0.3 * torch.randn(N, K, generator=g)) / K**0.5)
    fc_out.bias.copy_(-torch.arange(1.0, N + 1).log()[torch.randperm(N, generator=g)])


def clusters(fc_out):
    """Half of the tokens one way and half the other, all alike but for little: the probable ones
    have weights in common that are not the mean."""
    g = torch.Generator().manual_seed(1)
    N, K = fc_out.weight.shape
    w = torch.randn(K, generator=g).expand(N, K).clone()
    w[N // 2 :] *= -1
    fc_out.weight.copy_(2 * w + 0.02 * torch.randn(N, K, generator=g))
    fc_out.bias.zero_()


@pytest.mark.parametrize("V", [V, 16384])
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("weights", [0.3, 4.0, 30.0, topics, clusters, "alike", "outliers"])
@torch.no_grad()
def test_accuracy(weights, beam_size, V):
    model = make(V=V, H=96, size=weights if isinstance(weights, float) else 1.0)
    fc_out = model.decoder.fc_out
    if callable(weights):
        weights(fc_out)
    elif weights == "alike":  # what rounding takes from them is the same for all tokens
        fc_out.weight.copy_(fc_out.weight[:1].expand_as(fc_out.weight).clone())
    elif weights == "outliers":  # far from what the others have in common
        fc_out.weight[7], fc_out.bias[7] = 1e4 * fc_out.weight[7].sign(), -1e8
    check_accurate(model, sources(40, 9), max_length=6, min_length=2, beam_size=beam_size)


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("logit", [10.0, 15.0, 30.0, 60.0])
@torch.no_grad()
def test_certain_tokens(logit, beam_size):
    """Their part of the sum has the bits that they are chosen by: nothing is left of what rounding
    takes from logits."""
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        decoder, context, state = of_bias(0.9 * torch.rand(200) - 0.45)
        w, h = decoder.fc_out.weight[:, :200], torch.tanh(decoder.rnn.bias_hh_l0)
        w.copy_(0.1 * torch.randn(w.shape))
        w[7] = logit * h / (h @ h)
        options = {"max_length": 1, "beam_size": beam_size}
        found = decoded(decoder, context, state, **options)
        plain = s2s.generate(decoder, context, state, backend="reference", **OPTIONS, **options)
        want = (w.double() @ h.double()).log_softmax(0)[7]
        errors.append([(x.log_probs.double() - want).abs().max() for x in (found, plain)])
        assert (found.log_probs <= 0).all()
    ours, plain = torch.tensor(errors).amax(0)
    assert ours <= 2 * plain + 1e-12


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e7, 1e12, 1e20, 1e30])
@torch.no_grad()
def test_large_logits(size, beam_size):
    """Near logits that may be far off are no near ones."""
    torch.manual_seed(0)
    decoder, context, state = of_bias(0.9 * torch.rand(64) - 0.45)
    decoder.fc_out.weight.copy_(size * torch.randn(decoder.fc_out.weight.shape))
    options = {"max_length": 3, "beam_size": beam_size}
    found = decoded(decoder, context, state, **options)
    plain = s2s.generate(decoder, context, state, backend="reference", **OPTIONS, **options)
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.log_probs, plain.log_probs, rtol=1e-6, atol=2e-6)


@torch.no_grad()
def test_a_barred_token_that_is_most_of_the_sum():
    model = make(V=V, H=40)
    model.decoder.fc_out.bias[EOS] += 12
    check_accurate(model, sources(9, 7), max_length=5, min_length=4)
    check_accurate(model, sources(9, 7), max_length=5, min_length=4, beam_size=3)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    options=st.fixed_dictionaries(
        {
            "max_length": st.integers(2, 12),
            "min_length": st.integers(0, 2),
            "length_penalty": st.sampled_from([0.0, 0.6]),
            "no_repeat_ngram": st.integers(0, 2),
            "max_length_ratio": st.sampled_from([None, 1.3]),
            "coverage_penalty": st.sampled_from([0.0, 0.4]),
        }
    ),
    beam=st.sampled_from([(1, 1), (2, 1), (2, 2), (5, 3)]),
    P=st.sampled_from([0, 0, 2]),
    B=st.sampled_from([1, 2, 5, 9]),
    H=st.sampled_from([1, 7, 33, 64]),
    V=st.sampled_from([MANY_SUMMED, V, 8192 + 5]),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    project_values=st.booleans(),
    width=st.sampled_from([None, None, 1, 9, 70]),  # of attentional vectors
    seed=st.integers(0, 100),
)
def test_results(kind, options, beam, P, B, H, V, size, dtype, project_values, width, seed):
    model = make(kind, V, H, seed=seed, size=size, O=width if kind[1] and kind[2] else None)
    src = sources(B, 9, seed)
    options |= {
        "prefix": torch.randint(3, V, (B, P)) if P else None,
        "return_weights": True,
        "beam_size": beam[0],
        "n_best": beam[1],
    }
    options = suited(options, kind)
    if dtype == "bfloat16":  # what it rounds is not the question
        for p in model.decoder.parameters():
            p.data = p.data.bfloat16().float()
    project_values &= kind[1] and model.decoder.attentional_dim is None
    model.prepare_inference(dtype, project_values=project_values)
    ours = model.generate(src, backend="native", **OPTIONS, **options)
    plain = model.generate(src, backend="reference", **OPTIONS, **options)
    check_same(model, src, ours, plain)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_batches_and_threads(threads, beam_size):
    """A source has the same bits alone, where few rows' scores come late, and beside others that
    end earlier."""
    model, src = make(V=V, H=50), sources(13, 9)
    source, state = model.encode(src)
    options = {"max_length": 40, "max_length_ratio": 3.0, "beam_size": beam_size}
    want = decoded(model.decoder, source, state, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = decoded(model.decoder, source, state, **options)
        assert torch.equal(together.log_probs, want.log_probs)
        for b in range(0, 13, 4):
            row = torch.tensor([b])
            one = stepwise.take_source(source, row), stepwise.take_state(state, row)
            alone = decoded(model.decoder, *one, **options)
            n = alone.tokens.shape[-1]
            assert torch.equal(alone.log_probs[0], want.log_probs[b])
            assert torch.equal(alone.tokens[0], want.tokens[b, ..., :n])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e38])
@torch.no_grad()
def test_a_row_that_is_not_finite(value, beam_size):
    """All of its logits are made, and the rows beside it are decoded as without it."""
    model = make(("rnn", False, False), V=V, H=40, layers=1)
    source, state = model.encode(sources(8, 7))
    options = {"max_length": 6, "beam_size": beam_size}
    for bad in ([2], [0, 3, 4, 7], [1, 2, 3, 4, 5, 6, 7]):
        others = torch.tensor([b for b in range(8) if b not in bad])
        of_others = s2s.DecoderState(state.hidden[:, others], None)
        want = decoded(model.decoder, source[others], of_others, **options)
        broken = source.clone()
        broken[bad] = value  # the context, which the readout sees
        found = decoded(model.decoder, broken, state, **options)
        n = want.tokens.shape[-1]
        assert torch.equal(found.tokens[others][..., :n], want.tokens)
        assert torch.equal(found.log_probs[others], want.log_probs)
        if beam_size == 1:
            plain = model.decoder, broken, state
            plain = s2s.generate(*plain, backend="reference", **OPTIONS, **options)
            torch.testing.assert_close(
                found.log_probs, plain.log_probs, rtol=1e-5, atol=1e-5, equal_nan=True
            )


def of_bias(hidden, V=V, D=3):
    """A decoder without attention whose hidden state is tanh of its bias, at every step."""
    decoder = s2s.Decoder(
        V, 4, len(hidden), 1, 0.0, cell_type="rnn", attention=False, encoder_dim=D
    )
    for p in decoder.eval().parameters():
        p.zero_()
    decoder.rnn.bias_hh_l0.copy_(torch.atanh(hidden))
    return decoder, torch.zeros(6, D), s2s.DecoderState(torch.zeros(1, 6, len(hidden)), None)


@torch.no_grad()
def test_rows_none_of_which_is_finite():
    model = make(("rnn", False, False), V=V, H=40, layers=1)
    source, state = model.encode(sources(8, 7))
    for beam_size in (1, 2):
        found = decoded(model.decoder, source * torch.nan, state, max_length=3, beam_size=beam_size)
        assert not found.log_probs.isfinite().any()


@pytest.mark.parametrize("H", [64, 130])
@torch.no_grad()
def test_sums_that_nearly_fill_32_bits(H):
    """Weights that lie along the hidden state: no product is longer (Cauchy-Schwarz). All numbers
    are as large as the largest, or one is and the others are small."""
    g = torch.Generator().manual_seed(0)
    for small in (1.0, 0.3):
        x = torch.full((H,), small) * (1 - 2 * torch.randint(0, 2, (H,), generator=g))
        x[::64] = x[::64].sign()
        x *= 0.99
        decoder, context, state = of_bias(x)
        w = decoder.fc_out.weight
        w[:, :H] = 0.02 * x
        w[7] *= 1.05
        w[8] *= -1
        found = decoded(decoder, context, state, max_length=1)
        assert found.tokens.tolist() == 6 * [[7]]
        hidden = torch.tanh(decoder.rnn.bias_hh_l0).double()
        want = (w[:, :H].double() @ hidden).log_softmax(0)[7]
        torch.testing.assert_close(found.log_probs.double(), want.expand(6), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_rounding_hides():
    """Of tokens that differ by less than a step of their bits, the bounds leave all: the one that
    floats tell is found, and is not without them."""
    H = 70
    decoder, context, state = of_bias(torch.full((H,), 0.5))
    w = decoder.fc_out.weight
    w[::2, 0], w[1::2, 0] = -1, 1  # whose steps are large, and whose mean is nothing
    step = 1 / MOST_OF_SIXTEEN
    w[5, 1 : H // 2], w[9, 1:H] = 0.51 * step, 0.49 * step  # to one step, and to nothing
    options = {"max_length": 3, "min_length": 3}
    for beam_size in (1, 2):
        found = decoded(decoder, context, state, beam_size=beam_size, **options)
        tokens = found.tokens if beam_size == 1 else found.tokens[:, 0]
        assert tokens.tolist() == 6 * [3 * [9]]
    decoder.packed = pack_decoder(decoder, "float32")
    decoder.packed.weights.tensors()[BOUNDS].zero_()
    assert s2s.generate(decoder, context, state, **OPTIONS, **options).tokens.tolist() != 6 * [
        3 * [9]
    ]


@torch.no_grad()
def test_what_is_packed():
    """Sixteen bits of all weights, but of int8 and of fewer tokens."""
    decoder = make(V=V, H=45).decoder
    topics(decoder.fc_out)
    packed = pack_decoder(decoder, "float32").weights.tensors()
    parts = MATRIX, SCALES, BOUNDS, MEAN, DIRECTIONS, WEIGHTS
    whole, scales, bounds, mean, directions, weights = (packed[i] for i in parts)
    P, K = -(-V // 64), weights.shape[1]
    even = K + K % 2
    assert whole.dtype == torch.int16 and whole.shape == (P, (even + 16) // 2, 64, 2)
    rows = whole.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).double()[:V]
    exact = rows * scales.double()[:V, None]
    rounded = (exact[:, :K] + mean[:K].double() - weights).norm(dim=1)
    assert (rounded <= bounds[0].repeat_interleave(64)[:V]).all()
    assert rounded.max() > 0.5 * bounds[0].max()  # and it is not far from what it bounds
    blocks = torch.nn.functional.pad(rows[:, :even], (0, -even % 64)).unflatten(1, (-1, 64))
    for part in (blocks, rows[:, None, even:]):
        assert part.norm(dim=2).max() ** 2 < 2**31 and part.abs().max() < 2**15
    # Sixteen directions, times 16, and the weights' part of them, as much too small
    d = directions[:K].double() / 16
    torch.testing.assert_close(d.T @ d, torch.eye(16).double(), atol=1e-5, rtol=0)
    rest = weights.double() - mean[:K]
    torch.testing.assert_close(16 * exact[:, even:], rest @ d, atol=4e-3, rtol=1e-3)
    assert (rest @ d).norm() > 0.9 * rest.norm()  # there are twelve of them, and noise
    torch.testing.assert_close(mean[:K], weights.mean(0), atol=0.02, rtol=0)
    for other, dtype in ((decoder, "int8"), (make(V=MANY_SUMMED - 1).decoder, "float32")):
        tensors = pack_decoder(other, dtype).weights.tensors()
        assert all(tensors[i].numel() == 0 for i in parts[:-1])


def test_drawn_tokens_have_their_scores():
    model, src = make(V=V, H=40), sources(9, 7)
    source, state = model.encode(src)
    for cut in ({}, {"top_k": 7}, {"top_p": 0.8}):
        found = decoded(model.decoder, source, state, max_length=5, sample=True, **cut)
        exact = rescored(model, src, found)
        torch.testing.assert_close(found.log_probs.double(), exact, rtol=1e-6, atol=2e-6)


def test_many_threads_at_once():
    """Prepared models share their weights and nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    model, src = make(V=V, H=40).prepare_inference(), sources(9, 7)
    options = OPTIONS | {"max_length": 8}
    want = [model.generate(src, beam_size=k, **options).log_probs for k in (1, 2)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(model.generate, src, beam_size=1 + i % 2, **options) for i in range(12)]
        for i, job in enumerate(jobs):
            assert torch.equal(job.result().log_probs, want[i % 2])


def test_copies_are_packed_anew():
    model = make(V=V).prepare_inference()
    twin = copy.deepcopy(model)
    options = OPTIONS | {"max_length": 3}
    src = sources(6, 5)
    assert torch.equal(twin.generate(src, **options).scores, model.generate(src, **options).scores)
