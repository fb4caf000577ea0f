"""Parity with float64 by the accuracy rule: at most twice the plain form's error, plus rounding."""

import pytest
import torch

import seq2seq_fast as s2s
from seq2seq_fast import reference

SHAPES = [
    (1, 1, 3, 8, 5),
    (2, 5, 7, 13, 3),
    (3, 1, 1, 1, 1),
    (2, 17, 33, 64, 31),
    (1, 9, 70, 257, 20),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(shape, dtype, size=1.0, seed=0):
    B, T, S, H, D = shape
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(s, generator=g, dtype=torch.float64) * size for s in ((B, T, H), (B, S, H))]
    draw += [torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, S, D), (H,))]
    return [x.to(dtype) for x in draw]


def run(fn, tensors, dtype, mask, bias, **kw):
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    b = bias.to(dtype).detach().requires_grad_()
    context, weights = fn(*leaves, mask=mask, score_bias=b, scale=0.7, **kw)
    g = torch.Generator().manual_seed(7)
    gc = torch.randn(context.shape, generator=g, dtype=torch.float64).to(tensors[0].dtype)
    gw = torch.randn(weights.shape, generator=g, dtype=torch.float64).to(tensors[0].dtype)
    grads = torch.autograd.grad([context, weights], [*leaves, b], [gc.to(dtype), gw.to(dtype)])
    return [context, weights, *grads]


def errors(outputs, exact):
    return [(o.double() - e).abs().max().item() for o, e in zip(outputs, exact, strict=True)]


@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 6.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, size):
    """The rule must hold in the median of five draws, and within a factor of five in each.

    A softmax that is all but decided makes the largest error of one draw a matter of luck.
    """
    B, T, S, H, D = shape
    names = ("context", "weights", "query", "keys", "values", "v", "bias")
    ratios = {name: [] for name in names}
    eps = torch.finfo(dtype).eps
    for seed in range(5):
        tensors = inputs(shape, dtype, size, seed)
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(B, T, S, generator=g) < 0.7
        bias = torch.randn(B, 1, S, generator=g).to(dtype)
        args = (s2s.additive_attention, tensors)
        exact = run(*args, torch.float64, mask, bias, backend="reference")
        plain = run(*args, dtype, mask, bias, backend="reference")
        ours = run(*args, dtype, mask, bias)
        for name, o, p, e in zip(
            names, *(errors(x, exact) for x in (ours, plain)), exact, strict=True
        ):
            top = e.abs().max().item()
            if dtype == torch.float64:  # nothing wider to compare with
                assert o <= 1e-11 * top + 1e-13, name
            ratios[name].append(o / (2 * p + eps * top + 1e-30))
    for name, ratio in ratios.items():
        if dtype != torch.float64:
            assert sorted(ratio)[2] <= 1 and max(ratio) <= 5, (name, ratio)


def test_the_extension_was_built():
    assert s2s.backends()["additive_scores"]["cpu"][0] == "native"


def test_adversarial_pair_and_non_finite_values():
    q, k, v = torch.full((1, 1, 5), 60.0), torch.full((1, 3, 5), -59.5), torch.ones(5)
    got = s2s.additive_scores(q, k, v)
    torch.testing.assert_close(got, torch.full((1, 1, 3), 5 * 0.46211715726))
    for bad in (float("inf"), float("-inf"), float("nan"), 1e30):
        q[0, 0, 2] = bad
        want = s2s.additive_scores(q, k, v, backend="reference")
        torch.testing.assert_close(s2s.additive_scores(q, k, v), want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_t_axis_is_a_row_of_many(dtype):
    q, k, values, v = inputs((3, 4, 21, 11, 6), dtype)
    mask, bias = torch.rand(3, 21) < 0.7, torch.randn(3, 21).to(dtype)
    for backend in ("native", "reference"):
        kw = dict(mask=mask, backend=backend)
        whole = s2s.additive_attention(q, k, values, v, score_bias=bias.unsqueeze(1), **kw)
        scores = s2s.additive_scores(q, k, v, backend=backend)
        for grad in (False, True):
            one = q[:, 2].detach().requires_grad_(grad)
            got = s2s.additive_attention(one, k, values, v, score_bias=bias, **kw)
            assert got[0].shape == (3, 6) and got[1].shape == (3, 21)
            near = dict(atol=2 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
            for a, b in zip(got, whole, strict=True):
                torch.testing.assert_close(a, b[:, 2], **near)
            row = s2s.additive_scores(one, k, v, backend=backend)
            torch.testing.assert_close(row, scores[:, 2], atol=near["atol"] * 20, rtol=0)


def test_strided_inputs_and_empty_axes():
    q = torch.randn(7, 2, 13).transpose(0, 1)
    k, v = torch.randn(2, 13, 9).transpose(1, 2), torch.randn(26)[::2]
    want = s2s.additive_scores(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(s2s.additive_scores(q, k, v).double(), want, atol=1e-5, rtol=0)
    assert s2s.additive_scores(q[:, :0], k, v).shape == (2, 0, 9)
    assert s2s.additive_scores(q[:0], k[:0], v).shape == (0, 7, 9)


def test_opcheck_compile_and_bits():
    q, k, values, v = (x.requires_grad_() for x in inputs((2, 5, 19, 12, 6), torch.float32))
    ops = torch.ops.seq2seq_fast
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.additive_scores, (q, k, v), test_utils=tests)
    g = torch.randn(2, 5, 19)
    torch.library.opcheck(
        ops.additive_scores_backward, (g, q, k, v, True, False, True), test_utils=tests
    )
    args = (q, k, values, v, None, None, 1.0, None)
    torch.library.opcheck(ops.additive_attention, args, test_utils=tests)

    compiled = torch.compile(s2s.additive_attention, fullgraph=True, backend="aot_eager")
    for call in (s2s.additive_attention, compiled):
        first, again = (
            torch.autograd.grad(call(q, k, values, v)[0].sum(), [q, k, values, v]) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_masked_everywhere_are_zero_and_have_no_gradient():
    q, k, values, v = (x.requires_grad_() for x in inputs((2, 3, 4, 5, 6), torch.float32))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = False
    context, weights = s2s.additive_attention(q, k, values, v, mask=mask)
    assert (context[1, 2] == 0).all() and (weights[1, 2] == 0).all()
    (context.sum() + (weights**2).sum()).backward()
    assert (q.grad[1, 2] == 0).all() and all(x.grad.isfinite().all() for x in (q, k, values, v))


def test_reference_passes_gradcheck():
    tensors = [x.requires_grad_() for x in inputs((2, 2, 3, 4, 3), torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *a: s2s.additive_attention(*a, backend="reference"), tensors
    )
    q, k, _, v = tensors
    g = torch.randn(2, 2, 3, dtype=torch.float64)
    ours = reference.additive_scores_backward(g, q, k, v)
    auto = torch.autograd.grad(reference.additive_scores(q, k, v), [q, k, v], g)
    for a, b in zip(ours, auto, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        (dict(keys=torch.randn(2, 4, 6)), ValueError, "keys"),
        (dict(keys=torch.randn(2, 0, 5)), ValueError, "S = 0"),
        (dict(v=torch.randn(4)), ValueError, "v:"),
        (dict(values=torch.randn(2, 3, 6)), ValueError, "values"),
        (dict(query=torch.ones(2, 3, 5, dtype=torch.long)), TypeError, "query"),
        (dict(v=torch.randn(5).double()), TypeError, "v:"),
        (dict(mask=torch.ones(2, 4)), TypeError, "mask"),
        (dict(mask=torch.ones(2, 5, dtype=torch.bool)), ValueError, "mask"),
        (dict(score_bias=torch.ones(3, 4)[:2]), ValueError, "score_bias"),
        (dict(backend="nope"), ValueError, "backend"),
    ],
)
def test_bad_input_names_the_argument(change, error, name):
    args = dict(
        query=torch.randn(2, 3, 5),
        keys=torch.randn(2, 4, 5),
        values=torch.randn(2, 4, 6),
        v=torch.randn(5),
    )
    with pytest.raises(error, match=name):
        s2s.additive_attention(**{**args, **change})


def test_double_backward_raises():
    q, k, values, v = (x.requires_grad_() for x in inputs((1, 2, 3, 4, 3), torch.float32))
    for out in (s2s.additive_scores(q, k, v), s2s.additive_attention(q, k, values, v)[0]):
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()
