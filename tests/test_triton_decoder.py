"""The decoder's Triton kernels in Triton's interpreter; test_triton.py compiles them."""

import pytest
import test_attention_decoder as plain
import test_cuda_decoder as cuda
import torch

import seq2seq_fast as s2s

pytest.importorskip("triton")

from seq2seq_fast.triton import INTERPRETED, launch, one_query, one_query_backward  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1")
SMALL = dict(B=2, T=3, S=5)


@pytest.fixture(autouse=True)
def on_triton():
    """And new tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    with s2s.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def in_float32(**options):
    return plain.cast(plain.problem(**SMALL | options), torch.float32)


OPTIONS = {
    "lstm": dict(L=1, strided=True),
    "lstm, query after": dict(after=True, dropout=True),
    "gru": dict(cell_type="gru", dropout=True, L=3),
    "gru, query after, fed back": dict(cell_type="gru", after=True, feedback=[1, 2]),
    "rnn, fed back": dict(cell_type="rnn", dropout=True, feedback=[2]),
    "rnn, query after, odd sizes": dict(cell_type="rnn", after=True, S=37, H=33, A=150, D=9, E=3),
    "several blocks": dict(B=5, T=2, H=64, A=64, D=70),
    "one step, one row, width one": dict(B=1, T=1, L=1, S=1, H=1, A=1, D=1, E=1),
    "lstm, no attention": dict(attention=False, dropout=True, feedback=[1]),
    "gru, no attention": dict(cell_type="gru", attention=False, L=1),
    "rnn, no attention": dict(cell_type="rnn", attention=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_every_gradient_keep_the_accuracy_rule(options):
    cuda.keeps_the_rule(SMALL | options)


@pytest.mark.parametrize(
    ("size", "after"), [(1e-3, True), (0.3, False), (6.0, True), (40.0, False), (1e4, True)]
)
def test_queries_and_keys_of_every_magnitude(size, after):
    cuda.test_queries_and_keys_of_every_magnitude(size, after, T=2, A=50)


INFINITE, BAD = (torch.inf, -torch.inf), (torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize(
    ("where", "bad", "like"),
    [(where, bad, "reference") for where in ("inputs", "hidden") for bad in INFINITE]
    + [(where, bad, "native") for where in ("keys", "values", "v") for bad in BAD],
)
def test_what_is_not_finite(where, bad, like):
    """As in the reference; but of a gradient's NaN, keys that have no weight get theirs, as they do
    from the compiled kernels."""
    args = in_float32(T=2, L=1)
    with torch.no_grad():
        args[where].view(-1)[-1] = bad
    (ours, _), (want, _) = plain.results(args), plain.results(args, backend=like)
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@pytest.mark.parametrize("cell_type", plain.MODULES)
def test_a_first_state_without_a_gradient(cell_type):
    plain.test_a_first_state_of_zeros_with_and_without_a_gradient(cell_type, False, True)


def test_a_source_masked_everywhere_gives_contexts_of_zero_and_no_gradient():
    plain.test_a_source_masked_everywhere_gives_contexts_of_zero_and_no_gradient()


@pytest.mark.parametrize("after", [False, True])
def test_a_source_split_among_programs(after, monkeypatch):
    found = []
    monkeypatch.setattr(one_query, "parts", lambda *x: found.append(launch.parts(*x)) or found[-1])
    monkeypatch.setattr(one_query, "multiprocessors", lambda _: 64)
    monkeypatch.setattr(one_query, "LEAST", 100)
    args = in_float32(after=after, S=70, T=2, L=1)
    (ours, _), (want, _) = plain.results(args), plain.results(args, backend="reference")
    assert found == [3]
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [1e-3, 0.3, 40.0])
def test_rows_shared_among_programs_backward(size, monkeypatch):
    found = []
    module = one_query_backward
    monkeypatch.setattr(module, "parts", lambda *x: found.append(launch.parts(*x)) or found[-1])
    monkeypatch.setattr(module, "multiprocessors", lambda _: 12)
    monkeypatch.setattr(module, "LEAST", 100)
    monkeypatch.setattr(module, "LEAST_SHARED", 100)
    cuda.test_queries_and_keys_of_every_magnitude(size, False, T=2, S=300, A=150)
    assert found[:2] == [3, 2]


@pytest.mark.parametrize("cell_type", plain.MODULES)
def test_gates_made_anew_and_steps_without_gradients_change_nothing(cell_type):
    args = in_float32(cell_type=cell_type, after=True)
    want, _ = plain.results(args)
    again, _ = plain.results(args, recompute=True)
    with torch.no_grad():
        out = s2s.attention_decoder(**args)._asdict()
    for name, x in want.items():
        torch.testing.assert_close(again[name], x, rtol=1e-5, atol=1e-5, msg=name)
        assert name not in out or torch.equal(out[name], x)


@pytest.mark.parametrize("attention", [True, False])
def test_no_step_and_no_row(attention):
    plain.test_no_step_and_one_step(0, attention)
    args = in_float32(attention=attention)
    rows = {k: args[k][:0] for k in ("inputs", "context", "keys", "values", "mask") if k in args}
    rows |= {k: args[k][:, :0] for k in ("hidden", "cell")}
    assert s2s.attention_decoder(**args | rows).outputs.shape == (0, 3, 7)


def test_double_precision_is_the_references():
    args = plain.problem(**SMALL)
    (ours, _), (want, _) = plain.results(args), plain.results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=1e-9, msg=name)


def test_the_sequence_is_its_steps():
    plain.test_the_sequence_is_its_steps("lstm", True, True)


@pytest.mark.parametrize("options", [{}, {"after": True, "dropout": True}, {"attention": False}])
def test_opcheck(options):
    plain.test_opcheck("gru" if options else "lstm", options | SMALL)


def test_compile_fullgraph():
    plain.test_compile_fullgraph("aot_eager")
