"""The decoder's CUDA kernels without a GPU: run on the CPU by tests/cuda_on_cpu."""

import os
import shutil
import statistics

import cuda_on_cpu
import pytest
import test_attention_decoder as plain
import torch

import seq2seq_fast as s2s
from seq2seq_fast.ops.kernels import OPS

pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which(cuda_on_cpu.COMPILER) is None, reason="no host compiler here"),
]


@pytest.fixture(autouse=True, params=["steps", "together"])
def on_cuda_kernels(monkeypatch, request):
    """The public function runs on them, and new tensors are NaN until they are written."""
    cuda_on_cpu.become_native(cuda_on_cpu.load(), monkeypatch)
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", request.param)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_float32(options, seed):
    return plain.cast(plain.problem(**options, seed=seed), torch.float32)


def keeps_the_rule(options, draws=3):
    """As test_attention_decoder.py judges it, the median of some draws."""
    used = {}
    for seed in range(draws):
        args = plain.problem(**options, seed=seed)
        args32 = plain.cast(args, torch.float32)
        exact, tokens = plain.results(args, backend="reference")
        ours, our_tokens = plain.results(args32)
        theirs, _ = plain.results(args32, backend="reference")
        assert tokens is our_tokens is None or torch.equal(tokens, our_tokens)
        eps, T = torch.finfo(torch.float32).eps, args["inputs"].shape[1]
        for name, want in exact.items():
            error, allowed = ((x[name] - want).abs().max().item() for x in (ours, theirs))
            rounding = 4 * eps * T * max(want.abs().max().item(), 1)
            used.setdefault(name, []).append(error / (2 * allowed + rounding))
    medians = {name: statistics.median(ratios) for name, ratios in used.items()}
    assert max(medians.values()) <= 1, medians


OPTIONS = {
    "plain": {},
    "one layer, strided": dict(L=1, strided=True),
    "dropout, fed back": dict(L=3, dropout=True, feedback=[1, 3, 4]),
    "odd sizes": dict(B=2, T=3, S=37, H=33, A=70, D=9, E=3),
}


@pytest.mark.parametrize(("cell_type", "after"), plain.ORDERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_every_gradient_keep_the_accuracy_rule(cell_type, after, options):
    keeps_the_rule(dict(cell_type=cell_type, after=after) | options)


# What few blocks with little memory divide in other ways.
LARGER = {
    "teams": dict(B=37, T=2, S=3, H=24, A=6),
    "more rows than at once, weights read again": dict(L=1, B=40, T=2, S=3, H=200, A=9, D=8),
    "one row": dict(B=1, H=48, A=40),
    "wide columns": dict(B=2, T=2, L=3, H=160, D=7, E=1),
}


@pytest.mark.parametrize("cell_type", plain.MODULES)
@pytest.mark.parametrize("options", LARGER.values(), ids=LARGER)
def test_larger_sizes_keep_the_accuracy_rule(cell_type, options):
    keeps_the_rule(dict(cell_type=cell_type) | options)


# Parts of the source, for blocks that would be idle or for what shared memory holds of it.
SPLIT = {
    "blocks": dict(B=2, T=3, S=410, A=80, H=8),
    "fewer blocks than parts": dict(B=8, T=2, S=4200, A=5),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_a_split_source(options, after):
    ops = torch.ops.seq2seq_fast_cuda_on_cpu
    together = os.environ["SEQ2SEQ_FAST_GPU_LOOP"] == "together"
    args = in_float32(dict(feedback=[1], after=after) | options, 0)
    before = ops.launches_together()
    found = s2s.attention_decoder(**args)
    assert ops.launches_together() == before + 2 * together
    want = s2s.attention_decoder(**args, backend="reference")
    for name in ("outputs", "contexts", "weights"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-4, atol=1e-5)


# Backward, blocks share rows in ranges of the source and slices of the features.
SHARED = dict(T=2, S=413, A=700, D=64, L=1, H=8, E=3)  # elements beyond kLeastLaunched


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_shared_rows_keep_the_accuracy_rule(B, after):
    keeps_the_rule(dict(B=B, after=after) | SHARED, draws=9)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("cell_type", "after"), plain.ORDERS)
def test_a_first_state_without_a_gradient(cell_type, after, attention):
    plain.test_a_first_state_of_zeros_with_and_without_a_gradient(cell_type, after, attention)


@pytest.mark.parametrize("size", [1e-3, 0.3, 6.0, 40.0, 1e4])
@pytest.mark.parametrize("after", [False, True])
def test_queries_and_keys_of_every_magnitude(size, after, **options):
    """All paths of attention backward. Score gradients cancel: rounding is of the terms' size."""
    args = plain.problem(after=after, **dict(S=37, A=20) | options)
    with torch.no_grad():
        args["keys"].mul_(size)
        args["query"][1].mul_(size)
        args["v"].mul_(0.2)
    exact, _ = plain.results(args, backend="reference")
    args = plain.cast(args, torch.float32)
    (ours, _), (theirs, _) = plain.results(args), plain.results(args, backend="reference")
    for name, want in exact.items():
        error, allowed = ((x[name] - want).abs().max().item() for x in (ours, theirs))
        rounding = 20 * torch.finfo(torch.float32).eps * max(want.abs().max().item(), 1)
        assert error <= 2 * allowed + rounding, name


def test_small_keys_beside_large_ones():
    """Powers minus one beside powers, in one row."""
    args = plain.problem(S=50, A=20)
    with torch.no_grad():
        args["keys"][:, 16:32] *= 0.01
    exact, _ = plain.results(args, backend="reference")
    ours, _ = plain.results(plain.cast(args, torch.float32))
    for name, want in exact.items():
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [1e22, 1e28, 1e34])
def test_gradients_beyond_what_powers_may_be_left_out_of(size):
    args = plain.problem(T=1, L=1, S=37, A=20)
    with torch.no_grad():
        args["keys"].mul_(0.1).add_(9)
        args["query"][0].mul_(0.1)
        args["query"][1].mul_(0.1).sub_(9)
    exact, ours = (dict(args), plain.cast(args, torch.float32))
    found = []
    for x in (exact, ours):
        out = s2s.attention_decoder(**x, backend="reference" if x is exact else None)
        scores = (out.contexts * size).sum()
        found.append(torch.autograd.grad(scores, x["query"][1])[0])
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-3, atol=1e-5 * size)


@pytest.mark.parametrize("size", [1e-3, 6.0, 1e4])
def test_queries_and_keys_of_every_magnitude_where_rows_are_shared(size):
    test_queries_and_keys_of_every_magnitude(size, False, **SHARED)


@pytest.mark.parametrize("options", [{}, SHARED], ids=["rows", "shared rows"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["keys", "values", "v"])
def test_what_is_not_finite_is_as_on_the_cpu(where, bad, options, monkeypatch):
    args = in_float32(options, 0)
    with torch.no_grad():
        args[where].view(-1)[-1] = bad
    ours, _ = plain.results(args)
    cuda_on_cpu.become_native(torch.ops.seq2seq_fast, monkeypatch)
    want, _ = plain.results(args)
    for name, x in want.items():
        torch.testing.assert_close(
            ours[name], x, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["inputs", "hidden"])
def test_an_infinite_state_is_as_in_the_reference(where, bad):
    args = in_float32({}, 0)
    with torch.no_grad():
        args[where].view(-1)[-1] = bad
    (ours, _), (want, _) = plain.results(args), plain.results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("cell_type", plain.MODULES)
@pytest.mark.parametrize("feedback", [(), [1, 2]], ids=["forced", "fed back"])
def test_without_attention(cell_type, feedback):
    keeps_the_rule(dict(cell_type=cell_type, attention=False, dropout=True, feedback=feedback))


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("attention", [True, False])
def test_no_step_and_one_step(T, attention):
    plain.test_no_step_and_one_step(T, attention)


def test_no_row():
    out = s2s.attention_decoder(**in_float32(dict(B=1), 0))
    args = in_float32(dict(B=1, attention=False), 0)
    none = {k: args[k][:0] for k in ("inputs", "context")}
    none |= {k: args[k][:, :0] for k in ("hidden", "cell")}
    assert s2s.attention_decoder(**args | none).outputs.shape == (0, *out.outputs.shape[1:])


def test_a_source_masked_everywhere_and_a_context_before_the_first_step():
    plain.test_a_source_masked_everywhere_gives_contexts_of_zero_and_no_gradient()


def test_the_argmax_of_equals_and_of_what_is_no_number():
    args = in_float32(dict(feedback=[1, 2, 3, 4], V=300), 0)
    for bad in (0.0, torch.nan, torch.inf):
        bias = torch.zeros(300)
        bias[[7, 270]] = bad
        feedback = args["feedback"]._replace(weight=torch.zeros(300, 10), bias=bias)
        for backend in (None, "reference"):
            out = s2s.attention_decoder(**args | {"feedback": feedback}, backend=backend)
            assert (out.tokens == (0 if bad == 0 else 7)).all()


@pytest.mark.parametrize(("cell_type", "after"), plain.ORDERS)
def test_the_same_bits_in_any_order_of_threads_and_blocks(cell_type, after):
    args = in_float32(
        dict(cell_type=cell_type, after=after, dropout=True, feedback=[2], H=40, V=300), 0
    )
    (first, tokens), (again, tokens_again) = plain.results(args), plain.results(args)
    assert torch.equal(tokens, tokens_again)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("more", [0, 1])
def test_a_source_that_a_block_has_too_little_memory_for_is_refused_backward(more, monkeypatch):
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", "steps")
    S = (227 << 8) - 1024 - 2 + more  # of the harness's floats, beside scratch and a context of 2
    out = s2s.attention_decoder(**in_float32(dict(B=1, T=1, S=S, A=1, D=2, H=2, L=1), 0))
    if not more:
        out.outputs.sum().backward()
        return
    with pytest.raises(RuntimeError, match=rf"over S = {S} positions of width 2 .* shared memory"):
        out.outputs.sum().backward()


def test_float64_is_refused():
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    args = (x, x, x, [x[0]] * 3, [], None, None, x[0], None, "lstm", False, [], [], None, [])
    with pytest.raises(RuntimeError, match="expected float32"):
        OPS["attention_decoder", "native"](*args)


def test_rows_that_leave_are_refused():
    x, L = torch.zeros(1, 1, 1), [torch.zeros(4, 1)] * 2 + [torch.zeros(4)]
    args = (x, x, x, L, [], None, None, x[0], None, "lstm", False, [], [], None, [1])
    with pytest.raises(RuntimeError, match="expected no batch_sizes"):
        OPS["attention_decoder", "native"](*args)


def test_one_launch_for_all_steps_between_those_fed_back_and_one_backward(monkeypatch):
    ops = torch.ops.seq2seq_fast_cuda_on_cpu
    for mode, want in (("steps", (0, 0)), ("together", (3, 1))):
        monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", mode)
        counts = [ops.launches_together()]
        out = s2s.attention_decoder(**in_float32(dict(T=6, feedback=[2, 5]), 0))
        counts.append(ops.launches_together())
        out.outputs.sum().backward()
        counts.append(ops.launches_together())
        assert (counts[1] - counts[0], counts[2] - counts[1]) == want


@pytest.fixture
def limit():
    """So many launches of blocks that run at the same time have room, which is told or is not."""
    limit = torch.ops.seq2seq_fast_cuda_on_cpu.limit_launches_together
    yield limit
    limit(2**62, True)


@pytest.mark.parametrize(("left", "told"), [(0, True), (0, False), (1, False)])
@pytest.mark.parametrize(("cell_type", "after"), plain.ORDERS)
def test_blocks_that_do_not_fit_together_leave_it_to_launches(cell_type, after, left, told, limit):
    ops = torch.ops.seq2seq_fast_cuda_on_cpu
    args = in_float32(
        dict(cell_type=cell_type, after=after, T=6, feedback=[2, 5], L=3, dropout=True), 0
    )
    want, tokens = plain.results(args, backend="reference")
    limit(left, told)
    before = ops.launches_together()
    found, tokens_found = plain.results(args)
    assert ops.launches_together() - before <= left
    assert torch.equal(tokens, tokens_found)
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)
