"""Decoding: the compiled engine against plain PyTorch, and both against definitions."""

import copy
import itertools
import math
import os
import signal
import threading
import time
import warnings

import pytest
import torch
from decoding_models import (
    BOS,
    EOS,
    KINDS,
    LOCATIONS,
    PROJECT,
    V_SRC,
    check_same,
    make,
    rescored,
    sources,
    suited,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s
from seq2seq_fast import decoding
from seq2seq_fast.decoding import native, stepwise
from seq2seq_fast.decoding.packing import FEW_TOKENS, pack_decoder

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
    location=st.sampled_from([(), (), *LOCATIONS]),
)
def test_the_engine_decodes_as_plain_pytorch_does(
    kind, options, coverage_penalty, P, B, S, H, layers, V, seed, project_values, location
):
    location = location if kind[1] else ()
    model, src = make(kind, V, H, layers, seed, location=location), sources(B, S, seed)
    if project_values and kind in PROJECT:
        model.prepare_inference(project_values=True)
    options = options | {
        "n_best": min(options["beam_size"], 1 + seed % 3),
        "coverage_penalty": coverage_penalty,
        "prefix": torch.randint(3, V, (B, P)) if P else None,
    }
    options = suited(options, kind)
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
    ("kind", "project_values", "location"),
    [(kind, False, ()) for kind in KINDS]
    + [(kind, True, ()) for kind in PROJECT]
    + [(kind, False, where) for kind in PROJECT[:2] for where in LOCATIONS],
    ids=str,
)
@torch.no_grad()
def test_a_row_is_decoded_alike_alone_and_in_any_batch(kind, project_values, location):
    """Bit for bit, and encoded too, by a prepared encoder."""
    model, src = make(kind, V=70, H=40, location=location), sources(67, 70 if location else 7)
    model.prepare_inference(project_values=project_values)
    source, state = model.encode(src)
    for options in ({}, {"beam_size": 4, "n_best": 4, "length_penalty": 1.0}):
        options |= {"bos": BOS, "eos": EOS, "max_length": 12, "backend": "native"}
        together = s2s.generate(model.decoder, source, state, **options)
        for b in range(0, 67, 11):
            alone = s2s.generate(model.decoder, *model.encode(src[b, None]), **options)
            assert torch.equal(alone.scores[0], together.scores[b])
            n = alone.tokens.shape[-1]
            assert torch.equal(alone.tokens[0], together.tokens[b, ..., :n])


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[5]], ids=str)
def test_each_row_may_have_its_own_bos(kind, prepared):
    """Of its language, say: as it has alone."""
    model, src, bos = make(kind, size=6.0), sources(5, 6), torch.tensor([1, 3, 7, 10, 0])
    if prepared:
        model.prepare_inference()
    for options in ({}, {"beam_size": 3, "n_best": 2}, {"prefix": torch.tensor([4, 5])}):
        options |= {"eos": EOS, "max_length": 6}
        for backend in ("native", "reference"):
            found = model.generate(src, bos=bos.int(), backend=backend, **options)
            for b, of_row in enumerate(bos.tolist()):
                alone = model.generate(src[b, None], bos=of_row, backend=backend, **options)
                n = alone.tokens.shape[-1]
                assert torch.equal(found.tokens[b, ..., :n], alone.tokens[0])
                torch.testing.assert_close(found.scores[b], alone.scores[0])
    drawn = [
        model.generate(
            src, bos=bos, eos=EOS, max_length=6, sample=True, backend=b,
            generator=torch.Generator().manual_seed(0),
        )
        for b in ("native", "reference")
    ]  # fmt: skip
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)


@pytest.mark.parametrize("D", [16, 300, 512])
@pytest.mark.parametrize("S", [1, 4, 30])
@torch.no_grad()
def test_keys_and_bridges_are_alike_too(D, S):
    torch.manual_seed(0)
    options = {"bidirectional": True, "bridge_dim": 300}
    encoder = s2s.Encoder(V_SRC, 5, D // 2, 1, 0.0, **options).eval().prepare_inference()
    decoder, src = s2s.Decoder(5, 4, 300, 1, 0.0, encoder_dim=D), sources(40, S)
    together, alone = encoder(src), [encoder(row[None]) for row in src]
    for i, dim in enumerate((0, 1, 1)):
        assert torch.equal(together[i], torch.cat([x[i] for x in alone], dim))
    keys = torch.cat([decoder.source(values[None]).keys.keys for values in together[0]])
    assert torch.equal(decoder.source(together[0]).keys.keys, keys)


@pytest.mark.parametrize("location", [(), LOCATIONS[1]], ids=str)
def test_threads_do_not_change_the_result(location):
    model, src = make(V=700, H=64, location=location), sources(9, 140 if location else 7)
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


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("V", [6, 2000])
def test_so_it_is_where_eos_is_impossible(V, prepared):
    """Of probability zero, as log P then says."""
    model, src = make(V=V), sources(3, 4)
    with torch.no_grad():
        model.decoder.fc_out.bias.fill_(-math.inf)
        model.decoder.fc_out.bias[[0, 5]] = 0.0
    if prepared:
        model.prepare_inference()
    for sample in (False, True):
        for backend in ("native", "reference"):
            found = model.generate(
                src, bos=BOS, eos=EOS, max_length=9, no_repeat_ngram=1, sample=sample,
                backend=backend,
            )  # fmt: skip
            assert (found.lengths == 3).all() and found.finished.all()
            assert (found.tokens.sort(-1).values == torch.tensor([0, 2, 5])).all()
            assert (found.log_probs == -math.inf).all()


def test_a_length_penalty_may_be_of_any_size():
    model, src = make(), sources(3, 5)
    for alpha in (200.0, 1e308):
        ours, plain = (
            model.generate(
                src, bos=BOS, eos=EOS, max_length=500, beam_size=2, length_penalty=alpha, backend=b
            )
            for b in ("native", "reference")
        )
        assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.scores, plain.scores)


def test_a_prepared_source_must_be_of_the_decoder_s_dtype():
    """Prepared weights or not."""
    model = make()
    source, state = model.encode(sources(3, 5))
    model.decoder.bfloat16().prepare_inference()
    with pytest.raises(TypeError, match="got torch.float32, expected torch.bfloat16"):
        s2s.generate(model.decoder, source, state, bos=BOS, eos=EOS, max_length=3)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores_are_summed_in_float32_at_least(dtype):
    model, src = make(size=1.0).to(dtype), sources(4, 6)
    trg = torch.randint(3, 11, (4, 300))
    found = model.score(src, trg)
    log_p = model(src, trg, 1.0)[:, 1:].double().log_softmax(-1)
    want = log_p.gather(2, trg[:, 1:, None]).squeeze(2).sum(1)
    assert found.log_probs.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.log_probs.double(), want, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("handler", [None, "ValueError"])
def test_a_signal_ends_a_long_call(prepared, handler):
    """Ctrl-C does, and so does what a handler raises: even what the engine may raise itself."""
    model, src = make(), sources(1, 9)
    if prepared:
        model.prepare_inference()
    source, state = model.encode(src)
    steps = 30_000_000  # take minutes

    def stop(*_):
        raise ValueError("enough") from KeyError("why")

    # Not the handler at hand: run in the background, a suite inherits that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, stop if handler else signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    try:
        with pytest.raises(ValueError if handler else KeyboardInterrupt) as raised:
            timer.start()
            s2s.generate(
                model.decoder, source, state, bos=BOS, eos=EOS, max_length=steps, min_length=steps
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10
    if handler is not None:
        assert str(raised.value) == "enough" and isinstance(raised.value.__cause__, KeyError)
    options = {"bos": BOS, "eos": EOS, "max_length": 3}
    found = s2s.generate(model.decoder, source, state, **options)
    plain = s2s.generate(model.decoder, source, state, backend="reference", **options)
    assert torch.equal(found.tokens, plain.tokens)


def test_a_signal_is_the_main_thread_s_alone():
    """Whatever the engine refuses other threads meanwhile."""
    model, src = make(), sources(1, 9)
    source, state = model.encode(src)
    bad = state._replace(hidden=state.hidden[:1])
    packed = pack_decoder(model.decoder, "float32")
    asked = decoding.DecodingOptions(bos=BOS, eos=EOS, max_length=30_000_000, min_length=30_000_000)
    over, seen = threading.Event(), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def others():
        while not over.is_set():
            try:
                native.generate(model.decoder, packed, source, bad, asked)
            except RuntimeError:
                pass
            except BaseException as error:
                seen.append(error)

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(native.Interrupted) as raised:
                native.generate(model.decoder, packed, source, state, asked)
            assert isinstance(raised.value.__cause__, KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        for thread in threads:
            thread.join()
    assert not seen


def test_training_mode_warns_once_and_decodes_without_dropout(monkeypatch):
    monkeypatch.setattr(decoding, "_warned", False)
    torch.manual_seed(0)
    parts = [cls(V_SRC, 6, 8, 2, 0.5) for cls in (s2s.Encoder, s2s.Decoder)]
    model, src = s2s.Seq2Seq(*parts), sources(3, 5)
    options = {"bos": BOS, "eos": EOS, "max_length": 8}
    with pytest.warns(UserWarning, match="training mode") as warned:
        first = model.generate(src, **options)
    assert warned[0].filename == __file__
    monkeypatch.setattr(decoding, "_warned", False)
    with pytest.warns(UserWarning, match="training mode") as warned:
        s2s.generate(model.decoder, *model.encode(src), **options)
    assert warned[0].filename == __file__
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
    hidden, cell, context, _ = state
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
