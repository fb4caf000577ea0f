"""Decoding's CUDA kernels without a GPU: run on the CPU by tests/cuda_on_cpu."""

import contextlib
import copy
import os
import pickle
import shutil
import threading
from unittest import mock

import cuda_on_cpu
import pytest
import test_decoding as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq_fast import DecoderState
from seq2seq_fast.decoding import DecodingOptions, graphed, stepwise
from seq2seq_fast.ops.additive_attention import PreparedKeys

BOS, EOS = plain.BOS, plain.EOS
pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which(cuda_on_cpu.COMPILER) is None, reason="no host compiler here"),
]


class Again:
    """In place of a graph, which only a GPU has: the call itself."""

    captured = 0

    def __init__(self, call):
        Again.captured += 1
        self.replay = call


class Seen:
    """In place of what watches a GPU: as late as that one."""

    def __init__(self, over):
        self.over, self.seen, self.ended = over, {}, True

    def begin_run(self):
        assert self.ended
        self.seen.clear()
        self.ended = False

    def end_run(self):
        self.ended = True

    def hold(self, x):
        pass

    def note(self, block):
        self.seen[block] = int(self.over)

    def read(self, block):
        return self.seen.pop(block)


class Kept:
    """In place of tensors that other streams read."""

    def __init__(self, tensors):
        self.take = lambda: tensors


GRAPH, WATCH, MADE = graphed.Graph, graphed.Watch, graphed.Made  # which only a GPU has


@pytest.fixture(autouse=True, scope="module")
def on_cuda_kernels():
    """New tensors are NaN until they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed, "_ops", cuda_on_cpu.load())
        patch.setattr(graphed, "Graph", Again)
        patch.setattr(graphed, "Watch", Seen)
        patch.setattr(graphed, "Made", Kept)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["steps", "together"])
def loop(request):
    """How the kernels' steps follow each other: for tests of greedy decoding."""
    with mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP=request.param):
        yield request.param


@torch.no_grad()
def both(model, src, seed=None, **options):
    """What the kernels and what plain PyTorch make of it, with generators of one seed."""
    source, state = model.encode(src)
    if not isinstance(source, torch.Tensor):  # prepared for the kernels of the CPU
        source = source._replace(keys=PreparedKeys(source.keys.keys))
    found = []
    for decode in (graphed.generate, stepwise.generate):
        if seed is not None:
            options |= {"sample": True, "generator": torch.Generator().manual_seed(seed)}
        o = DecodingOptions(bos=BOS, eos=EOS, **options)
        found.append(decode(model.decoder, source, state, o))
    return found


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(plain.KINDS),
    options=plain.OPTIONS,
    coverage_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    P=st.sampled_from([0, 0, 2]),
    B=st.integers(1, 3),
    S=st.sampled_from([1, 7, 33]),
    H=st.sampled_from([1, 7, 20]),
    layers=st.integers(1, 3),
    V=st.sampled_from([5, 11, 600]),
    seed=st.integers(0, 100),
    loop=st.sampled_from(["steps", "together"]),
)
def test_the_kernels_decode_as_plain_pytorch_does(
    kind, options, coverage_penalty, P, B, S, H, layers, V, seed, loop
):
    model, src = plain.make(kind, V, H, layers, seed), plain.sources(B, S, seed)
    options = options | {
        "n_best": min(options["beam_size"], 1 + seed % 3),
        "coverage_penalty": coverage_penalty,
        "prefix": torch.randint(3, V, (B, P)) if P else None,
    }
    options = plain.suited(options, kind)
    with mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP=loop):
        plain.check_same(model, src, *both(model, src, **options))


VECTORS = [None, (1, "tanh"), (9, "none"), (20, "tanh")]  # width and activation


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(plain.PROJECT),
    location=st.sampled_from([(), *plain.LOCATIONS]),
    vectors=st.sampled_from(VECTORS),
    options=plain.OPTIONS,
    coverage_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    B=st.integers(1, 3),
    S=st.sampled_from([1, 7, 33]),
    H=st.sampled_from([1, 7, 20]),
    layers=st.integers(1, 3),
    begun=st.booleans(),
    seed=st.integers(0, 100),
    loop=st.sampled_from(["steps", "together"]),
)
def test_locations_and_attentional_vectors(
    kind, location, vectors, options, coverage_penalty, B, S, H, layers, begun, seed, loop
):
    O, activation = vectors if vectors and kind[2] else (None, "tanh")  # noqa: E741
    model = plain.make(
        kind, 11, H, layers, seed, location=location, O=O, activation=activation
    )  # fmt: skip
    src, C = plain.sources(B, S, seed), len(location)
    source, state = model.encode(src)
    source = source._replace(keys=PreparedKeys(source.keys.keys))
    if begun:  # as a search that goes on would
        fed = torch.randn(B, model.decoder.fed_dim) if kind[2] else None
        place = torch.rand(B, C, S) * source.mask[:, None] if C else None
        state = state._replace(context=fed, location=place)
    options = options | {
        "n_best": min(options["beam_size"], 1 + seed % 3), "coverage_penalty": coverage_penalty,
    }  # fmt: skip
    o = DecodingOptions(bos=BOS, eos=EOS, **options)
    with torch.no_grad(), mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP=loop):
        found, want, again = (
            decode(model.decoder, source, state, o)
            for decode in (graphed.generate, stepwise.generate, graphed.generate)
        )
    if begun:
        torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found.log_probs, want.log_probs, rtol=1e-4, atol=1e-4)
    else:
        plain.check_same(model, src, found, want)
    assert torch.equal(again.tokens, found.tokens) and torch.equal(again.scores, found.scores)


def test_a_location_in_a_source_that_is_split():
    model = plain.make(plain.KINDS[1], 11, 20, location=plain.LOCATIONS[1], O=9)
    src = plain.sources(1, 2500)
    for options in ({}, {"beam_size": 3, "n_best": 2}):
        found, want = both(model, src, max_length=9, return_weights=True, **options)
        plain.check_same(model, src, found, want)


def test_filters_that_change_are_read_anew():
    model, src = plain.make(location=plain.LOCATIONS[0]), plain.sources(2, 7)
    for _ in range(3):
        found, want = both(model, src, max_length=9)
        plain.check_same(model, src, found, want)
        with torch.no_grad():
            model.decoder.attention.location_conv.weight.mul_(-3)


def exchanged_filters(decoder, n, width):
    attention = decoder.attention
    C, A = attention.location_conv.in_channels, attention.Wa.out_features
    attention.location_conv = torch.nn.Conv1d(C, n, width, padding=width // 2, bias=False)
    attention.location_dense = torch.nn.Linear(n, A, bias=False)


CHANGES = {
    "wider filters": lambda decoder: exchanged_filters(decoder, 3, 7),
    "fewer filters": lambda decoder: exchanged_filters(decoder, 1, 5),
    "many filters": lambda decoder: exchanged_filters(decoder, 600, 5),
    "another activation": lambda decoder: setattr(decoder, "attentional_activation", "none"),
    "another channel": lambda decoder: setattr(decoder.attention, "location", ("cumulative",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_decoder_between_calls_is_seen(change):
    model = plain.make(plain.KINDS[1], H=7, location=plain.LOCATIONS[0], O=9)
    src = plain.sources(2, 7)
    for _ in range(3):  # launched, captured, replayed
        found, want = both(model, src, max_length=9)
        plain.check_same(model, src, found, want)
    CHANGES[change](model.decoder)
    for _ in range(3):
        found, want = both(model, src, max_length=9)
        plain.check_same(model, src, found, want)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"beam_size": 3}], ids=str)
@pytest.mark.parametrize("kind", [plain.KINDS[0], plain.KINDS[5]], ids=str)
def test_each_row_may_have_its_own_bos(kind, options, loop):
    """In a graph whose rows had others too."""
    model = plain.make(kind, size=6.0)
    source, state = model.encode(plain.sources(4, 6))
    for bos in (BOS, torch.tensor([3, 1, 7, 0]), torch.tensor([4, 9, 9, 2]), torch.tensor([5] * 4)):
        o = DecodingOptions(bos=bos, eos=EOS, max_length=12, **options)
        found, want = (
            decode(model.decoder, source, state, o)
            for decode in (graphed.generate, stepwise.generate)
        )
        assert torch.equal(found.tokens, want.tokens)
        torch.testing.assert_close(found.scores, want.scores)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(plain.KINDS),
    options=plain.OPTIONS,
    P=st.sampled_from([0, 0, 2]),
    B=st.sampled_from([1, 2, 3, 40]),
    S=st.sampled_from([1, 7, 33]),
    H=st.sampled_from([1, 7, 20, 64]),
    layers=st.integers(1, 3),
    V=st.sampled_from([5, 11, 600]),
    seed=st.integers(0, 100),
)
def test_greedy_decoding_in_one_launch(kind, options, P, B, S, H, layers, V, seed):
    model, src = plain.make(kind, V, H, layers, seed), plain.sources(B, S, seed)
    options = options | {
        "beam_size": 1,
        "no_repeat_ngram": 0,
        "prefix": torch.randint(3, V, (B, P)) if P else None,
    }
    options = plain.suited(options, kind)
    launches = torch.ops.seq2seq_fast_cuda_on_cpu.launches_together
    with mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP="together"):
        before = launches()
        ours, theirs = both(model, src, **options)
        assert launches() == before + 1
    plain.check_same(model, src, ours, theirs)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(plain.KINDS),
    B=st.integers(1, 3),
    V=st.sampled_from([5, 11, 600, 1200]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 2000]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3, 1e-3]),
    options=st.sampled_from([{}, {"min_length": 4}, {"no_repeat_ngram": 1}, {"prefix": [3]}]),
    seed=st.integers(0, 100),
)
def test_the_kernels_draw_as_plain_pytorch_does(
    kind, B, V, temperature, top_k, top_p, options, seed
):
    model, src = plain.make(kind, V, 7, 1, seed), plain.sources(B, 5, seed)
    if "prefix" in options:
        options = {"prefix": torch.tensor(options["prefix"])}
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p} | options
    ours, theirs = both(model, src, seed, max_length=9, **options)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)


def test_equal_logits_are_cut_alike():
    model, src = plain.make(V=600), plain.sources(3, 5)
    with torch.no_grad():
        model.decoder.fc_out.weight.zero_()
        model.decoder.fc_out.bias.zero_()
        model.decoder.fc_out.bias[[7, 9, 550]] = 3
    for options in ({"top_k": 2}, {"top_p": 0.05}, {"top_k": 3, "top_p": 0.6}, {"top_p": 0.5}):
        for seed in range(5):
            ours, theirs = both(model, src, seed, max_length=8, **options)
            assert torch.equal(ours.tokens, theirs.tokens), options
            if options.get("top_p") == 0.05:  # two of the three reach it
                assert ((ours.tokens == 7) | (ours.tokens == 9) | (ours.tokens == EOS)).all()


def test_draws_of_logits_that_are_not_finite():
    src = plain.sources(3, 5)
    for value, token in ((-torch.inf, 5), (torch.nan, 5), (torch.inf, 6), (1e30, 6)):
        model = plain.make()
        with torch.no_grad():
            model.decoder.fc_out.bias[token] = value
        for options in ({}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.5}):
            ours, theirs = both(model, src, 0, max_length=6, **options)
            assert torch.equal(ours.tokens, theirs.tokens), (value, options)


def test_each_call_draws_anew_in_a_replayed_graph():
    model, src, g = plain.make(V=600), plain.sources(3, 9), torch.Generator().manual_seed(0)
    captured = Again.captured
    options = {"max_length": 20, "sample": True, "temperature": 2.0}
    found = [both(model, src, generator=g, **options)[0].tokens for _ in range(4)]
    assert Again.captured == captured + 1
    assert not any(torch.equal(found[0], x) for x in found[1:])
    both(model, src, generator=g, **options | {"temperature": 0.5})
    assert len(model.decoder.loops.kept) == 2


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("kind", [plain.KINDS[0], plain.KINDS[3]], ids=str)
def test_greedy_decoding_of_a_split_source(kind, return_weights, loop):
    model, src = plain.make(kind, H=64), plain.sources(2, 530)
    launches = torch.ops.seq2seq_fast_cuda_on_cpu.launches_together
    before = launches()
    options = {"max_length": 4, "min_length": 3, "return_weights": return_weights}
    ours, theirs = both(model, src, **options)
    assert launches() == before + (loop == "together")
    plain.check_same(model, src, ours, theirs)


@pytest.mark.parametrize("told", [True, False])
def test_blocks_that_do_not_fit_together_leave_it_to_launches(told):
    model, src = plain.make(), plain.sources(3, 9)
    ops = torch.ops.seq2seq_fast_cuda_on_cpu
    with mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP="together"):
        ops.limit_launches_together(0, told)
        try:
            before = ops.launches_together()
            ours, theirs = both(model, src, max_length=9)
            assert ops.launches_together() == before
        finally:
            ops.limit_launches_together(2**62, True)
    plain.check_same(model, src, ours, theirs)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_later_calls_replay_a_graph_on_their_own_numbers(beam_size):
    """Of one shape up to the rounding of the source's length; what is longer has another graph."""
    model, captured = plain.make(), Again.captured
    options = {"max_length": 20, "beam_size": beam_size, "return_weights": True}
    for i, S in enumerate((9, 9, 30, 4, 33)):
        src = plain.sources(3, S, seed=i)
        plain.check_same(model, src, *both(model, src, **options))
    assert Again.captured == captured + 1 and len(model.decoder.loops.kept) == 2


def test_a_capture_that_fails_leaves_it_to_launches(monkeypatch):
    captured = []

    class Failing:
        def __init__(self, call):
            captured.append(call)
            raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(graphed, "Graph", Failing)
    model = plain.make()
    for seed in range(4):
        src = plain.sources(3, 9, seed)
        told = pytest.warns(UserWarning, match="without a CUDA graph: no memory for a graph")
        with told if seed == 1 else contextlib.nullcontext():
            plain.check_same(model, src, *both(model, src, max_length=20))
    assert len(captured) == 1


@pytest.mark.parametrize("invalidated", [True, False])
def test_what_made_a_capture_fail_is_what_is_raised(invalidated, monkeypatch):
    asked = []

    class Captured:
        def capture_begin(self, **_):
            asked.append("begin")

        def capture_end(self):
            asked.append("end")
            if invalidated:
                raise RuntimeError("operation failed due to a previous error during capture")

    def call():
        raise RuntimeError("the first error")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: asked.append("handle"))
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="the first error"):
        GRAPH(call)
    assert asked == ["handle", "begin", "end"]


def test_a_change_of_weights_is_seen(loop):
    model, src = plain.make(), plain.sources(3, 9)
    for _ in range(3):
        plain.check_same(model, src, *both(model, src, max_length=9))
        with torch.no_grad():
            model.decoder.fc_out.bias.copy_(torch.randn(11))
            model.decoder.lstm.weight_hh_l0.mul_(-1)


def test_a_replaced_readout_of_another_width_is_refused(loop):
    model, src = plain.make(), plain.sources(3, 9)
    readout = model.decoder.fc_out
    model.decoder.fc_out = torch.nn.Linear(readout.in_features, readout.out_features + 8)
    source, state = model.encode(src)
    options = DecodingOptions(bos=BOS, eos=EOS, max_length=9)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"decoder\.fc_out\.weight: .*expected"):
            graphed.generate(model.decoder, source, state, options)
    model.decoder.fc_out = readout
    plain.check_same(model, src, *both(model, src, max_length=9))


def test_who_comes_after_a_run_that_was_broken_off_waits_for_it(monkeypatch):
    model, src = plain.make(), plain.sources(3, 9)
    both(model, src, max_length=9)

    def broken_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graphed.Loop, "_results", broken_off)
        with pytest.raises(KeyboardInterrupt):
            both(model, src, max_length=9)
    (kept,) = model.decoder.loops.kept.values()
    assert kept.watch.ended and not kept.lock.locked()
    plain.check_same(model, src, *both(model, src, max_length=9))


def test_copies_begin_anew():
    model, src = plain.make(), plain.sources(2, 5)
    both(model, src, max_length=9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model.decoder.loops.kept and not other.decoder.loops.kept
        plain.check_same(other, src, *both(other, src, max_length=9))


def test_no_more_than_a_few_shapes_are_kept():
    model = plain.make(layers=1)
    for B in range(1, graphed.MOST_LOOPS + 3):
        both(model, plain.sources(B, 4), max_length=2)
    assert len(model.decoder.loops.kept) == graphed.MOST_LOOPS


def test_a_loop_in_use_is_not_shared():
    model, src = plain.make(), plain.sources(2, 5)
    both(model, src, max_length=9)
    (loop,) = model.decoder.loops.kept.values()
    with loop.lock:
        runs = loop.runs
        results = []
        thread = threading.Thread(
            target=lambda: results.extend(both(model, src, max_length=9)), daemon=True
        )
        thread.start()
        thread.join(60)
        assert loop.runs == runs
    plain.check_same(model, src, *results)


def test_it_stops_a_block_after_all_searches_are_over(monkeypatch):
    model, src = plain.make(), plain.sources(3, 5)
    with torch.no_grad():
        model.decoder.fc_out.bias[EOS] += 100
    steps, decode_steps = [], graphed._ops.decode_steps

    class Counting:
        prepare_keys, decode_results = graphed._ops.prepare_keys, graphed._ops.decode_results

        def decode_steps(self, *args):
            steps.append(args[-1])
            decode_steps(*args)

    monkeypatch.setattr(graphed, "_ops", Counting())
    ours, theirs = both(model, src, max_length=80)
    assert (ours.lengths == 1).all() and sum(steps) == 2 * graphed.BLOCK
    plain.check_same(model, src, ours, theirs)


def test_limits_are_copied_from_the_host_where_they_are_relative_alone(monkeypatch):
    model, src, made = plain.make(), plain.sources(3, 5), mock.Mock(wraps=stepwise.row_limits)
    monkeypatch.setattr(stepwise, "row_limits", made)
    for ratio, calls in ((None, 1), (1.3, 2), (None, 1)):  # one is of plain PyTorch
        made.reset_mock()
        plain.check_same(model, src, *both(model, src, max_length=9, max_length_ratio=ratio))
        assert made.call_count == calls


def test_states_that_begin_anywhere_in_memory(loop):
    """Not on a boundary of four numbers, which widths would allow."""
    model = plain.make(("lstm", True, True), H=8).eval()
    model.decoder.embedding = torch.nn.Embedding(11, 8)
    model.decoder.lstm = torch.nn.LSTM(16, 8, 2, batch_first=True)
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        n = torch.Size(shape).numel()
        return torch.randn(n + 1, generator=g)[1:].view(shape)

    source = model.decoder.source(torch.randn(3, 5, 8, generator=g))
    source = source._replace(keys=PreparedKeys(source.keys.keys.detach()))
    state = DecoderState(draw(2, 3, 8), draw(2, 3, 8), draw(3, 8))
    o = DecodingOptions(bos=BOS, eos=EOS, max_length=6)
    with torch.no_grad():
        ours, theirs = (
            f(model.decoder, source, state, o) for f in (graphed.generate, stepwise.generate)
        )
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("beam_size", [1, 2])
def test_where_no_token_is_left_eos_is_taken(beam_size):
    model, src = plain.make(V=4), plain.sources(3, 4)
    options = {"max_length": 9, "min_length": 9, "no_repeat_ngram": 1, "beam_size": beam_size}
    found, _ = both(model, src, **options)
    assert (found.lengths == 4).all() and found.finished.all()
    assert (found.tokens.sort(-1).values == torch.tensor([0, 1, 2, 3])).all()


@pytest.mark.parametrize("beam_size", [1, 3])
def test_logits_that_are_not_finite(beam_size, loop):
    src = plain.sources(3, 5)
    for value, token in ((-torch.inf, 5), (torch.nan, 5), (1e30, 6)):
        model = plain.make()
        with torch.no_grad():
            model.decoder.fc_out.bias[token] = value
        ours, theirs = both(model, src, max_length=6, beam_size=beam_size)
        native = model.generate(
            src, bos=BOS, eos=EOS, max_length=6, beam_size=beam_size, backend="native"
        )
        assert torch.equal(ours.tokens, native.tokens), value
        torch.testing.assert_close(ours.scores, native.scores, equal_nan=True)


def test_the_first_of_equal_tokens_and_rows(loop):
    model, src = plain.make(V=600), plain.sources(2, 5)
    with torch.no_grad():
        model.decoder.fc_out.weight.zero_()
        model.decoder.fc_out.bias.zero_()
        model.decoder.fc_out.bias[[7, 9, 550]] = 3
    ours, theirs = both(model, src, max_length=4, beam_size=3, n_best=3)
    assert torch.equal(ours.tokens, theirs.tokens)
    ours, theirs = both(model, src, max_length=4)
    assert (ours.tokens == 7).all() and torch.equal(ours.tokens, theirs.tokens)


def test_a_source_that_is_all_padding(loop):
    model = plain.make()
    src = torch.zeros(2, 5, dtype=torch.int64)
    ours, theirs = both(model, src, max_length=5, return_weights=True)
    assert torch.equal(ours.tokens, theirs.tokens) and (ours.weights == 0).all()


def both_of_16_bits(model, src, **options):
    """What the kernels make of a model in 16 bits, and plain PyTorch of its numbers in float32."""
    source, state = model.encode(src)
    source = source._replace(keys=PreparedKeys(source.keys.keys))
    o = DecodingOptions(bos=BOS, eos=EOS, **options)
    ours = graphed.generate(model.decoder, source, state, o)
    source, state = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda y: y.float() if y.is_floating_point() else y, (source, state)
    )
    with torch.no_grad():
        return ours, stepwise.generate(model.float().decoder, source, state, o)


@pytest.mark.parametrize(("B", "beam_size"), [(3, 1), (3, 2), (7, 1), (40, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_are_decoded_in_float32(dtype, B, beam_size, loop):
    model, src = plain.make(H=40, V=70).to(dtype), plain.sources(B, 9)
    options = {"max_length": 9, "beam_size": beam_size, "return_weights": True}
    ours, want = both_of_16_bits(model, src, **options)
    assert ours.weights.dtype == dtype and ours.scores.dtype == torch.float32
    assert torch.equal(ours.tokens, want.tokens)
    torch.testing.assert_close(ours.scores, want.scores, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.weights.float(), want.weights, rtol=1e-2, atol=1e-2)


@pytest.fixture
def multiprocessors():
    """Sets how many the kernels find; 16 before and after."""
    of = torch.ops.seq2seq_fast_cuda_on_cpu.set_multiprocessors
    yield of
    of(16)


@pytest.mark.parametrize(
    ("B", "H", "n"),
    # Rows that end within a turn of the tensor cores, that warps share out, and of two lengths.
    [
        (5, 40, 1),
        (8, 64, 3),
        (9, 40, 1),
        (16, 64, 2),
        (21, 40, 1),
        (18, 64, 1),
        (14, 160, 8),
        (16, 160, 1),
    ],
)
def test_products_of_bfloat16_weights(B, H, n, monkeypatch, multiprocessors):
    multiprocessors(n)
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", "together")
    model, src = plain.make(H=H, V=70).bfloat16(), plain.sources(B, 5)
    ours, want = both_of_16_bits(model, src, max_length=3, min_length=3)
    assert torch.equal(ours.tokens, want.tokens)
    torch.testing.assert_close(ours.log_probs, want.log_probs, rtol=1e-6, atol=4e-6)


def test_what_a_gpu_is_asked_for(monkeypatch):
    """Launches at first, then a graph, and no wait but for the block before the last one."""
    asked = []

    class Fake:
        """Stands for streams, events and graphs; a replay is the call that was captured."""

        def __init__(self):
            self.call = None

        def __getattr__(self, name):
            return lambda *_, **options: asked.append(f"{name} {options}" if options else name)

    class Graph(GRAPH):
        def __init__(self, call):
            super().__init__(lambda: asked.append("captured"))
            self.call = call

        def replay(self):
            super().replay()
            self.call()

    for name in ("CUDAGraph", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Fake)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: asked.append("handle"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: asked.append("record_stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **kw: zeros(*a, **kw))
    monkeypatch.setattr(graphed, "Graph", Graph)
    monkeypatch.setattr(graphed, "Watch", WATCH)
    monkeypatch.setattr(graphed, "Made", MADE)
    model, found = plain.make(), []
    for seed in range(3):
        src = plain.sources(3, 9, seed)
        plain.check_same(model, src, *both(model, src, max_length=20, min_length=20))
        found.append(asked[:])
        asked.clear()
    notes = ["record", "record synchronize", "record synchronize"]
    launched, captured, replayed = (" ".join(x) for x in found)
    # Weights, and a loop's buffers, may have been made on another stream.
    reads = " ".join(["wait_event", *["record_stream"] * 9])
    assert launched == " ".join(["record", reads, "record wait_event", *notes, "record"])
    capture = "handle wait_stream capture_begin {'capture_error_mode': 'thread_local'} captured"
    replays = " ".join(f"replay {x}" for x in notes)
    assert captured == f"{reads} wait_event {capture} capture_end wait_stream {replays} record"
    assert replayed == f"{reads} wait_event {replays} record"

    both(model, src, max_length=20, min_length=20, return_weights=True)
    assert " ".join(asked[-4:]) == "record synchronize record_stream record"  # reads them last

    with mock.patch.dict(os.environ, SEQ2SEQ_FAST_GPU_LOOP="together"):
        asked.clear()
        both(model, src, max_length=20)
        assert " ".join(asked) == f"record {reads}"  # float32's rows are filled up, for one launch
        asked.clear()
        both(model, src, max_length=20)
        assert " ".join(asked) == reads
