"""Tokens are drawn alike by every engine, from the distribution that the options state."""

import math

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, check_same, make, sources, suited
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dropout import philox as philox_of_one

from seq2seq_fast.decoding import sampling

BACKENDS = ["native", "reference"]
DRAWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.3, 2.5]),
        "top_k": st.sampled_from([0, 0, 1, 3, 40, 1000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.999]),
        "max_length": st.integers(2, 9),
        "min_length": st.integers(0, 2),
        "no_repeat_ngram": st.integers(0, 2),
        "max_length_ratio": st.sampled_from([None, 0.5, 1.3]),
    }
)


def drawn(model, src, seed=0, **options):
    options = {"bos": BOS, "eos": EOS, "max_length": 8, "sample": True} | options
    return model.generate(src, generator=torch.Generator().manual_seed(seed), **options)


def with_logits(logits):
    """A model of which all next tokens have these logits."""
    model = make(("rnn", False, False), V=len(logits), H=3, layers=1)
    with torch.no_grad():
        model.decoder.fc_out.weight.zero_()
        model.decoder.fc_out.bias.copy_(torch.as_tensor(logits))
    return model


def first_tokens(logits, n=1, **options):
    return drawn(with_logits(logits), sources(1, 3).expand(n, -1), max_length=1, **options).tokens


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    options=DRAWS,
    P=st.sampled_from([0, 0, 2]),
    B=st.integers(1, 5),
    S=st.integers(1, 9),
    H=st.sampled_from([1, 7, 16]),
    V=st.sampled_from([5, 64, 300, 1024 + 7]),
    dtype=st.sampled_from([None, "float32", "projected"]),
    seed=st.integers(0, 100),
)
def test_every_engine_draws_the_same(kind, options, P, B, S, H, V, dtype, seed):
    model, src = make(kind, V, H, 2, seed), sources(B, S, seed)
    if dtype is not None:
        model.prepare_inference(project_values=dtype == "projected" and kind[1])
    prefix = torch.randint(3, V, (B, P)) if P else None
    options = suited(options, kind) | {"prefix": prefix}
    check_same(model, src, *(drawn(model, src, seed, backend=b, **options) for b in BACKENDS))


def test_the_noise_is_gumbels_of_philoxs_numbers():
    seed, V = -5, 700
    rows = torch.tensor([0, 3])
    g = sampling.gumbel(torch.tensor([seed]), rows, 4, V)
    for i, row in enumerate(rows.tolist()):
        for v in range(0, V, 7):
            block, j, lane = v // 256, v % 256 // 64, v % 64
            number = philox_of_one(64 * block + lane, seed % 2**64, row, 4)[j]
            want = -math.log(-math.log1p(-(number + 0.5) / 2**32))
            assert g[i, v].item() == pytest.approx(want, rel=1e-12, abs=1e-12)
    many = sampling.gumbel(torch.tensor([1]), torch.arange(50), 0, 4000)
    assert many.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert many.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_have_the_stated_distribution(backend):
    n, log_p = 20_000, torch.tensor([0.1, 0.5, 0.05, 0.05, 0.3]).log()

    def frequencies(**options):
        return first_tokens(log_p, n, backend=backend, **options)[:, 0].bincount(minlength=5) / n

    def close(got, want):
        want = torch.as_tensor(want)
        assert ((got - want).abs() < 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()

    close(frequencies(), log_p.exp())
    close(frequencies(temperature=2.0), (log_p / 2).softmax(0))
    close(frequencies(top_k=2), [0, 5 / 8, 0, 0, 3 / 8])
    close(frequencies(top_k=4), log_p.exp())  # of equals both
    close(frequencies(top_p=0.85), [1 / 9, 5 / 9, 0, 0, 1 / 3])
    close(frequencies(top_p=0.92), [0.1 / 0.95, 0.5 / 0.95, 0.05 / 0.95, 0, 0.3 / 0.95])
    close(frequencies(top_p=0.6, top_k=2), [0, 1, 0, 0, 0])  # of the two it has 5/8
    close(frequencies(top_p=0.7, top_k=2), [0, 5 / 8, 0, 0, 3 / 8])
    close(frequencies(top_p=0.5, temperature=3.0), [0, 1 / (1 + 0.6 ** (1 / 3)), 0, 0, 0.45754])
    for only in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"temperature": 5e-324}):
        assert frequencies(**only)[1] == 1
    close(frequencies(temperature=1e300), [0.2] * 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 100, 299, 300, 301])
def test_what_is_left_of_many(top_k, backend):
    """Whatever stretches the largest are sought by."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    found = first_tokens(logits, 30_000, backend=backend, top_k=top_k, temperature=50.0)
    kept = logits.topk(min(top_k, 300)).indices
    assert torch.equal(found.unique(), kept.sort().values)


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["flat", "ties", "wide", "barred", "one far below", "equal"])
def test_what_share_of_many_is_left(kind, top_p):
    """Whatever stretches their range is cut into: what is drawn is what the definition draws."""
    logits = torch.randn(1201, generator=torch.Generator().manual_seed(0))
    match kind:
        case "flat":
            logits *= 1e-3
        case "ties":
            logits = logits.mul(4).round() / 4
        case "wide":
            logits *= 60
        case "barred":
            logits[::3] = -math.inf
        case "one far below":
            logits = logits * 1e-2
            logits[7] = -87
        case "equal":
            logits = torch.zeros(1201)
    native, plain = (first_tokens(logits, 4000, backend=b, top_p=top_p) for b in BACKENDS)
    assert torch.equal(native, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_share_of_nearly_all_leaves_all(backend):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for top_p in (1 - 2**-53, 1 - 2**-40):
        found = first_tokens(logits, 20_000, backend=backend, top_p=top_p, temperature=50.0)
        assert len(found.unique()) == 300


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.1}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("barred", [-math.inf, 0.0])
def test_logits_that_are_not_finite(barred, backend, options):
    """One that is +inf or NaN is the token, the first one; one of -inf is none."""
    for bad in (math.inf, math.nan):
        logits = [barred, 1.0, 2.0, bad, -math.inf, bad]
        assert (first_tokens(logits, 50, backend=backend, **options) == 3).all()
    logits = [-math.inf, 1.0, -math.inf, 0.5, -math.inf, -math.inf]
    assert set(first_tokens(logits, 50, backend=backend, **options).flatten().tolist()) <= {1, 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_that_is_barred_does_not_decide_on_the_others(bad, backend):
    """Infinite or no number, it comes first, once: then the rest is drawn of."""
    model, src = with_logits([0.0] * 7 + [bad]), sources(1, 3).expand(40, -1)
    found = drawn(model, src, backend=backend, no_repeat_ngram=1, max_length=3, min_length=3)
    assert (found.tokens[:, 0] == 7).all() and len(found.tokens[:, 1].unique()) > 2


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_and_tiny_temperatures(backend, options):
    for size in (1e10, 1e17, 3e38):
        for temperature in (1.0, 1e-30):
            for sign in (1, -1):
                logits = torch.tensor([-0.5, -0.25, -1.0, -0.75]).mul(sign).mul(size)
                found = first_tokens(
                    logits, 50, backend=backend, temperature=temperature, **options
                )
                assert (found == logits.argmax()).all() or (size > 1e30 and temperature < 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_nothing_left_ends(backend):
    found = drawn(
        with_logits([0.0] * 4), sources(6, 3), backend=backend, no_repeat_ngram=1, max_length=9
    )
    assert found.finished.all() and (found.lengths <= 5).all()
    for tokens, n in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
        assert len(set(tokens[:n])) == n and tokens[n - 1] == EOS


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    options=DRAWS,
    n=st.sampled_from([1, 2, 5]),
    P=st.sampled_from([0, 1, 2]),
    B=st.integers(1, 3),
    each_bos=st.booleans(),
    V=st.sampled_from([20, 1024 + 7]),
    dtype=st.sampled_from([None, "float32", "projected"]),
    seed=st.integers(0, 100),
)
def test_draws_of_a_source_are_those_of_many_like_it(
    kind, options, n, P, B, each_bos, V, dtype, seed
):
    model, src = make(kind, V, 12, 2, seed), sources(B, 6, seed)
    if dtype is not None:
        model.prepare_inference(project_values=dtype == "projected" and kind[1])
    options = suited(options | {"return_weights": True}, kind)
    prefix = torch.randint(3, V, (B, P)) if P else None
    bos = torch.randint(3, V, (B,)) if each_bos else BOS
    many = options | {
        "prefix": None if prefix is None else prefix.repeat_interleave(n, 0),
        "bos": bos.repeat_interleave(n) if each_bos else bos,
    }
    want = drawn(model, src.repeat_interleave(n, 0), seed, **many)
    options |= {"prefix": prefix, "bos": bos, "n_samples": n}
    for backend in BACKENDS:
        found = drawn(model, src, seed, backend=backend, **options)
        assert found.tokens.shape[:-1] == ((B,) if n == 1 else (B, n))
        flat = [x if x is None or n == 1 else x.flatten(0, 1) for x in found]
        exactly = {"rtol": 0, "atol": 0} if backend == "native" and dtype is not None else {}
        for a, b in zip(flat, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **exactly or {"rtol": 1e-4, "atol": 1e-4})


def test_no_source_has_no_draws():
    model, src = make(), sources(2, 5)[:0]
    found = drawn(model, src, n_samples=3, return_weights=True)
    assert found.tokens.shape == (0, 3, 0) and found.weights.shape[:3] == (0, 3, 0)
    assert found.scores.shape == found.lengths.shape == (0, 3)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_rows_and_threads_change_no_draw(options):
    model, src = make(V=1100, H=40).prepare_inference(), sources(9, 6)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(drawn(model, src, backend="native", **options))
    finally:
        torch.set_num_threads(threads)
    found.append(drawn(model, src[:2], backend="native", **options))
    for other in found[1:]:
        n = other.tokens.shape[1]
        assert torch.equal(other.tokens, found[0].tokens[: len(other.tokens), :n])
        assert torch.equal(other.scores, found[0].scores[: len(other.scores)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generators_state_decides_the_draws(backend):
    model, src = make(), sources(9, 5)

    def draw(seed):
        return drawn(model, src, seed, backend=backend).tokens

    assert torch.equal(draw(1), draw(1))
    assert draw(1).shape != draw(2).shape or not torch.equal(draw(1), draw(2))
    options = {"bos": BOS, "eos": EOS, "max_length": 8, "sample": True, "backend": backend}
    found = []
    for _ in range(2):  # and without one torch's own
        torch.manual_seed(3)
        found += [model.generate(src, **options).tokens, model.generate(src, **options).tokens]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert found[0].shape != found[1].shape or not torch.equal(found[0], found[1])


def test_reduced_weights_are_drawn_from():
    """Near the distribution of float32: what int8 and bfloat16 change is little."""
    model, src = make(V=30, H=16), sources(1, 4).expand(4000, -1)
    shares = []
    for dtype in ("float32", "bfloat16", "int8"):
        tokens = drawn(model.prepare_inference(dtype), src, max_length=1, backend="native").tokens
        shares.append(tokens[:, 0].bincount(minlength=30) / 4000)
    for other in shares[1:]:
        assert (other - shares[0]).abs().max() < 0.03
