"""The CUDA kernels without a GPU: run on the CPU by tests/cuda_on_cpu."""

import shutil

import cuda_on_cpu
import pytest
import test_additive_attention as plain
import test_machinery as machinery
import torch
from conftest import Target

import seq2seq_fast as s2s
from seq2seq_fast import reference
from seq2seq_fast.ops import additive_attention as module

pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which(cuda_on_cpu.COMPILER) is None, reason="no host compiler here"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON = Target("cpu", "native")


@pytest.fixture(scope="module")
def ops():
    return cuda_on_cpu.load()


@pytest.fixture(autouse=True)
def on_cuda_kernels(ops, monkeypatch):
    """The public functions run on them, and new tensors are NaN until they are written."""
    monkeypatch.setattr(module, "_ops", ops)  # prepare_keys
    cuda_on_cpu.become_native(ops, monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unless_a_race(op, *args):
    """What the op makes, or nothing where the harness watches for races and finds one."""
    try:
        return op(*args)
    except RuntimeError as error:
        if not cuda_on_cpu.WATCHES_RACES or "a race" not in str(error):
            raise
    return torch.empty(0)


FAULTS = "none, no barrier, no wait, unwritten, order of blocks".split(", ")


@pytest.mark.parametrize("fault", range(5), ids=FAULTS)
def test_the_harness_shows_a_wrong_result(ops, fault):
    x = torch.arange(64.0)
    want = torch.cat((x.flip(0), torch.zeros(5)))
    results = [unless_a_race(ops.broken, x, fault) for _ in range(4)]
    assert all(torch.equal(y, want) for y in results) == (fault == 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(5, "past the shared memory"), (6, "never come"), (7, "never come")],
    ids=["write past the end", "divergent barrier", "warp without all its lanes"],
)
def test_the_harness_refuses(ops, fault, message):
    with pytest.raises(RuntimeError, match=message):
        ops.broken(torch.arange(64.0), fault)
    assert ops.broken(torch.arange(64.0), 0)[0] == 63  # and goes on


@pytest.mark.parametrize("fault", [0, 1], ids=["none", "no meeting"])
def test_the_harness_shows_that_blocks_have_not_met(ops, fault):
    x = torch.arange(5.0)
    results = [unless_a_race(ops.broken_together, x, fault)[5:] for _ in range(4)]
    assert all(torch.equal(y, x.roll(-1)) for y in results) == (fault == 0)


def test_blocks_meet_where_their_count_begins_again(ops):
    x = torch.arange(5.0)
    for _ in range(4):
        assert torch.equal(ops.broken_together(x, 10)[5:], x.roll(-1))


def test_the_harness_refuses_blocks_that_wait_for_ever(ops):
    with pytest.raises(RuntimeError, match="blocks wait for others that never come"):
        ops.broken_together(torch.arange(5.0), 7)


@pytest.mark.skipif(not cuda_on_cpu.WATCHES_RACES, reason="not compiled to watch for races")
@pytest.mark.parametrize(
    ("op", "fault"),
    [("broken", 1), ("broken_together", 1), ("broken_gathered", 8), ("broken_gathered", 9)],
    ids=["no barrier", "no meeting", "a shuffle for a barrier of the warp", "no fence"],
)
def test_the_harness_finds_a_race_in_every_order(ops, op, fault):
    x = torch.arange(64.0 if op != "broken_together" else 5.0)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="a race: a (read|write) by .*thread"):
            getattr(ops, op)(x, fault)
        getattr(ops, op)(x, 0)  # and goes on


@pytest.mark.skipif(
    cuda_on_cpu.WATCHES_RACES or "g++" not in cuda_on_cpu.COMPILER,
    reason="needs g++; once is enough",
)
@pytest.mark.awaits("races")
def test_no_race_in_a_part_of_the_tests(beforehand):
    ran = beforehand("races")
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


def test_what_blocks_leave_for_the_last_one(ops):
    x = torch.arange(64.0)
    assert torch.equal(ops.broken_gathered(x, 0)[:64], 5 * x.view(32, 2).flip(1).flatten())


SIZES = [1e-4, 0.3, 1.0, 6.0, 50.0, 1e4]
CASES = [(torch.float32, size) for size in SIZES] + [(x, 1.0) for x in DTYPES[1:]]
# T up to 4 goes to the kernel for one query, the rest to tiles; these reach what small ones do not.
LARGER = [
    (2, 2, 400, 84, 21),  # a split source
    (1, 2, 330, 20, 400),  # values that backward multiplies in tiles
    (1, 56, 3, 20, 4),  # more warps than keys
    (1, 61, 70, 20, 9),  # several tiles of queries, several ranges of keys
    (2, 26, 28, 160, 4),  # warps that divide the features
]


@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
@pytest.mark.parametrize("shape", plain.SHAPES + LARGER, ids=str)
def test_parity(shape, dtype, size):
    plain.test_parity(shape, dtype, size, ON)


def relatives(shape=(2, 6, 37, 24, 10), dtype=torch.float32):
    """Tensors in a corner of larger ones of NaN, strided and misaligned; the same ones apart."""
    apart = plain.inputs(shape, dtype)
    within = []
    for x in apart:
        room = torch.full([2 * n + 3 for n in x.shape], float("nan"), dtype=dtype)
        view = room[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
        within.append(view.copy_(x))
    return apart, within


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_tensors(ops, dtype, T):
    apart, within = relatives((2, T, 37, 24, 10), dtype)
    # The first from a place that is not even aligned to four elements, else contiguous.
    shifted = torch.empty(apart[1].numel() + 1, dtype=dtype)[1:].view_as(apart[1])
    keys = [apart[1], within[1], shifted.copy_(apart[1])]
    w = torch.randn(2, T, 37).softmax(-1).to(dtype)
    gc, gw = torch.randn(2, T, 10).to(dtype), torch.ones(()).to(dtype).expand(2, T, 37)
    exact = reference.additive_attention(*(x.double() for x in apart), None, None, 0.5)
    eps = torch.finfo(dtype).eps
    results = []
    for (q, _, values, v), k in zip((apart, within, apart), keys, strict=True):
        outputs = ops.additive_attention(q, k, values, v, None, None, 0.5, None)
        for got, want in zip(outputs, exact, strict=True):
            torch.testing.assert_close(got.double(), want, atol=8 * eps, rtol=8 * eps)
        args = (gc, gw, q, k, values, v, w, 0.5, None)
        results.append(ops.additive_attention_backward(*args, *[True] * 5))
    for other in results[1:]:  # torch's product with values may sum up strided ones differently
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=8 * eps, rtol=8 * eps)


@pytest.mark.parametrize("shape", [(1, 1, 530, 64, 21), (2, 61, 70, 80, 9)], ids=str)
def test_the_same_bits_in_any_order_of_threads_and_blocks(ops, shape):
    q, k, values, v = plain.inputs(shape, torch.float32)
    mask = torch.rand(shape[:3]) < 0.7
    first = None
    for _ in range(3):
        context, weights = ops.additive_attention(q, k, values, v, mask, None, 1.0, None)
        args = (context, weights, q, k, values, v, weights, 1.0, None)
        outputs = (context, weights, *ops.additive_attention_backward(*args, *[True] * 5))
        first = first or outputs
        assert all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e30])
@pytest.mark.parametrize("where", ["query", "keys", "v", "grad"])
def test_what_is_not_finite_is_as_in_the_reference(ops, where, bad):
    for T in (1, 6):
        q, k, _, v = plain.inputs((2, T, 37, 24, 10), torch.float32)
        tensors = {"query": q, "keys": k, "v": v, "grad": torch.randn(2, T, 37)}
        tensors[where].view(-1)[5] = bad
        grad = tensors["grad"]
        got = (
            ops.additive_scores(q, k, v),
            *ops.additive_scores_backward(grad, q, k, v, *[True] * 3),
        )
        want = (
            reference.additive_scores(q, k, v),
            *reference.additive_scores_backward(grad, q, k, v),
        )
        finite = (x.nan_to_num(1, 1, -1) for x in (q, k, v, grad))
        for a, b, scale in zip(got, want, plain.terms(*finite), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a[b.isinf()], b[b.isinf()])
            good = b.isfinite()
            assert ((a - b).abs() <= 1e-5 * (b.abs() + scale))[good].all()


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("T", [1, 7])
def test_prepared_keys(size, T):
    q, k, values, v = plain.inputs((3, T, 41, 20, 6), torch.float32, size)
    k[:, 20:] *= 0.1 / size  # powers and powers minus one in one source
    exact = s2s.additive_attention(*(x.double() for x in (q, k, values, v)), backend="reference")
    for keys in (k, s2s.prepare_keys(k)):
        for got, want in zip(s2s.additive_attention(q, keys, values, v), exact, strict=True):
            torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=3e-6)


def test_what_other_kernels_are_tested_for():
    for T in (1, 6):
        plain.test_adversarial_pair_and_non_finite_values(T, ON)
        plain.test_scores_at_infinity_and_nan_in_score_bias(T, ON)
    for where in ("q", "k", "v", "grad"):
        for what in (torch.inf, -torch.inf, torch.nan):
            plain.test_gradients_with_non_finite_values(where, what, ON)
    plain.test_strided_inputs_and_empty_axes(ON)
    plain.test_rows_masked_everywhere_are_zero_and_have_no_gradient(ON)
    for dtype in DTYPES:
        plain.test_a_query_without_t_axis_is_a_row_of_many(dtype, ON)
    machinery.test_gradients_through_prepared_keys()
    for needed in range(5):
        machinery.test_each_gradient_alone_is_the_one_of_all(needed)


def test_no_place_of_a_part_attended_to(ops):
    q, k, values, v = plain.inputs((1, 1, 530, 64, 21), torch.float32)
    mask = torch.zeros(1, 1, 530, dtype=torch.bool)
    for attended in (0, 3):
        mask[..., 300 : 300 + attended] = True
        got = ops.additive_attention(q, k, values, v, mask, None, 1.0, None)
        want = reference.additive_attention(q, k, values, v, mask, None, 1.0)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_more_features_than_shared_memory_holds(ops):
    q, k, values, v = plain.inputs((1, 1, 3, 4200, 2), torch.float32)
    got = ops.additive_scores(q, k, v)
    torch.testing.assert_close(got, reference.additive_scores(q, k, v), rtol=1e-5, atol=1e-4)


def test_bad_input_of_the_ops(ops):
    q, k, values, v = plain.inputs((2, 3, 5, 4, 6), torch.float32)
    with pytest.raises(RuntimeError, match="float64 has no CUDA kernel"):
        ops.additive_scores(q.double(), k.double(), v.double())
    with pytest.raises(RuntimeError, match="one dtype"):
        ops.additive_scores(q, k.half(), v)
    with pytest.raises(RuntimeError, match="prepare_keys"):
        ops.additive_attention(q, k, values, v, None, None, 1.0, torch.zeros(2, 7))
