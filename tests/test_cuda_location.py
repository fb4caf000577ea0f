"""The CUDA kernels of location-sensitive attention, dropped states and attentional vectors, without
a GPU: run on the CPU by tests/cuda_on_cpu."""

import shutil

import cuda_on_cpu
import pytest
import torch
from decoder_problems import ORDERS, accuracy, cast, problem, results

import seq2seq_fast as s2s

pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which(cuda_on_cpu.COMPILER) is None, reason="no host compiler here"),
]
BOTH = ("previous", "cumulative")


@pytest.fixture(autouse=True)
def on_cuda_kernels(monkeypatch):
    """The public function runs on them, and new tensors are NaN until they are written."""
    cuda_on_cpu.become_native(cuda_on_cpu.load(), monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


OPTIONS = {
    "both": dict(channels=BOTH, K=5),
    "previous, one layer, strided": dict(channels=BOTH[:1], L=1, strided=True, start=False),
    "coverage": dict(channels=BOTH[1:], N=1, K=1, S=20),
    "fed back, detached": dict(channels=BOTH, dropout=True, feedback=[1, 3, 4], detach=True),
    "blocks of places and of features": dict(channels=BOTH, B=2, T=3, S=37, A=150, N=9, K=31, D=9),
    "states dropped": dict(channels=BOTH, L=3, dropout=True, states_dropped=True),
    "states dropped, no location": dict(states_dropped=True, feedback=[2]),
    "states dropped, no attention": dict(states_dropped=True, attention=False, dropout=True),
    "contexts dropped": dict(contexts_dropped=True, feedback=[2]),
    "contexts dropped, located": dict(contexts_dropped=True, channels=BOTH, L=1),
    "rows shared by blocks": dict(channels=BOTH, B=1, T=2, S=413, D=64, L=1),
    "wider than the source": dict(channels=BOTH, B=2, T=3, S=5, N=2, K=41),
}


@pytest.mark.parametrize(("cell_type", "after"), ORDERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_every_gradient_keep_the_accuracy_rule(cell_type, after, options):
    if not options.get("attention", True):
        after = False
    used = accuracy(dict(cell_type=cell_type, after=after, seed=0) | options)
    assert used is not None and max(used.values()) <= 1, used


VECTORS = {
    "tanh": dict(joined="tanh"),
    "none, fed back, dropout": dict(
        joined="none", dropout=True, feedback=[1, 3, 4], vectors_dropped=True
    ),
    "one layer, strided": dict(joined="tanh", L=1, strided=True, start=False, vectors_dropped=True),
    "with a location": dict(joined="tanh", channels=BOTH, states_dropped=True),
    "dropped as it is read": dict(joined="tanh", contexts_dropped=True),
    "of dropped features": dict(joined="tanh", features_dropped=True, feedback=[2]),
    "wide": dict(joined="tanh", B=2, T=3, O=150, H=33, D=9, feedback=[2]),
    "one step": dict(joined="tanh", T=1),
}


@pytest.mark.parametrize("mode", ["steps", "together"])
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("options", VECTORS.values(), ids=VECTORS)
def test_attentional_vectors_keep_the_accuracy_rule(cell_type, options, mode, monkeypatch):
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", mode)
    used = accuracy(dict(cell_type=cell_type, after=True, seed=0) | options)
    assert used is not None and max(used.values()) <= 1, used


def test_no_attentional_vector_after_no_step():
    args = cast(problem(T=0, after=True, joined="tanh"), torch.float32)
    (found, _), (want, _) = results(args), results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


@pytest.mark.parametrize("mode", ["steps", "together"])
def test_a_split_source_and_one_that_is_masked_in_part(mode, monkeypatch):
    """Of which blocks of places have nothing to do; no loop in one launch is asked for it."""
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", mode)
    args = cast(problem(B=2, T=3, S=410, A=80, H=8, channels=BOTH, N=2, K=5), torch.float32)
    args["mask"] = torch.arange(410) < torch.tensor([[410], [100]])
    (found, _), (want, _) = results(args), results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_the_same_bits_in_any_order_of_threads_and_blocks():
    args = cast(problem(S=40, channels=BOTH, N=4, K=5, feedback=[2]), torch.float32)
    (first, tokens), (again, tokens_again) = results(args), results(args)
    assert torch.equal(tokens, tokens_again)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("T", [0, 1])
def test_no_step_and_one_step(T):
    args = cast(problem(T=T, channels=BOTH), torch.float32)
    (found, _), (want, _) = results(args), results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["keys", "values", "v"])
def test_what_is_not_finite_is_as_on_the_cpu(where, bad, monkeypatch):
    args = cast(problem(channels=BOTH), torch.float32)
    with torch.no_grad():
        args[where].view(-1)[-1] = bad
    ours, _ = results(args)
    cuda_on_cpu.become_native(torch.ops.seq2seq_fast, monkeypatch)
    want, _ = results(args)
    for name, x in want.items():
        torch.testing.assert_close(
            ours[name], x, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_more_filters_than_a_block_has_memory_for_are_refused():
    """Backward needs more than forward does."""
    args = cast(problem(channels=BOTH, N=3000, K=1), torch.float32)
    out = s2s.attention_decoder(**args)
    with pytest.raises(RuntimeError, match="3000 filters of width 1 take .* shared memory"):
        out.outputs.sum().backward()
    args = cast(problem(channels=BOTH, N=4000, K=1), torch.float32)
    with pytest.raises(RuntimeError, match="4000 filters of width 1 take .* shared memory"):
        s2s.attention_decoder(**args)
