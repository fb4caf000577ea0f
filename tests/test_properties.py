"""Random shapes, strides, masks, dtypes and magnitudes, against float64 by the accuracy rule."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_additive_attention import terms  # noqa: E402

import seq2seq_fast as s2s  # noqa: E402

SIZES = st.integers(1, 40)
MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 3.0, 12.0, 60.0, 1e4, 1e30])


def strided(shape, generator, how):
    """Numbers of a shape whose memory is in order, transposed, spread out, or expanded."""
    if how == "transposed":
        return torch.randn(shape[::-1], generator=generator).permute(*range(len(shape))[::-1])
    if how == "spread":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    if how == "expanded":
        return torch.randn(1, *shape[1:], generator=generator).expand(shape)
    return torch.randn(shape, generator=generator)


LAYOUTS = st.sampled_from(["plain", "transposed", "spread", "expanded"])


@st.composite
def problems(draw):
    B, T, S, H, D = (draw(SIZES) for _ in range(5))
    B = min(B, 5)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = strided((B, T, H), g, draw(LAYOUTS)) * draw(MAGNITUDES)
    k = strided((B, S, H), g, draw(LAYOUTS)) * draw(MAGNITUDES)
    if draw(st.booleans()):  # large values that all but cancel: tanh of the small difference
        k = k - (q.mean(1, keepdim=True) if T > 1 else q)
    values = strided((B, S, D), g, draw(LAYOUTS))
    v = torch.randn(H, generator=g) * draw(st.sampled_from([1.0, 0.01, 1e3]))
    v[torch.rand(H, generator=g) < 0.2] = 0
    mask = None
    if draw(st.booleans()):
        mask = torch.rand((B, T, S) if draw(st.booleans()) else (B, S), generator=g) < 0.6
    bias = torch.randn(S, generator=g) if draw(st.booleans()) else None
    return q, k, values, v, mask, bias, draw(st.sampled_from([1.0, 0.3, -2.0]))


def scores_and_gradients(q, k, v, grad, backend=None):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = s2s.additive_scores(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_scores_and_their_gradients_are_right_to_rounding(on, problem):
    """Every element, to 3e-6 of the sum of its terms' largest sizes (tanh and 1 - tanh² <= 1)."""
    q, k, _, v, *_ = problem
    q, k, v, grad = on.put(q, k, v, torch.randn(q.shape[0], q.shape[1], k.shape[1]))
    ours = scores_and_gradients(q, k, v, grad, on.backend)
    # The sum q + k of the plain form is rounded to float32: what tanh sees is that sum.
    exact = scores_and_gradients(q.double(), k.double(), v.double(), grad.double(), "reference")
    plain = scores_and_gradients(q, k, v, grad, "reference")
    for o, e, p, scale in zip(ours, exact, plain, terms(q, k, v, grad), strict=True):
        error, allowed = (o.double() - e).abs(), 2 * (p.double() - e).abs().max()
        assert (error <= allowed + 3e-6 * scale + 1e-30).all()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_attention_is_a_distribution_and_its_context_an_average(on, problem):
    *tensors, scale = problem
    q, k, values, v, mask, bias = (x if x is None else x.to(on.device) for x in tensors)
    kw = dict(mask=mask, score_bias=bias, scale=scale, backend=on.backend)
    context, weights = s2s.additive_attention(q, k, values, v, **kw)
    assert context.isfinite().all() and (weights >= 0).all()
    full = torch.ones_like(weights, dtype=torch.bool)
    if mask is not None:
        full = (mask if mask.dim() == 3 else mask.unsqueeze(1)).expand_as(weights)
    assert (weights[~full] == 0).all()
    want = full.any(-1).float()
    torch.testing.assert_close(weights.sum(-1), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(context, weights @ values, rtol=1e-5, atol=1e-5)
    # The weights are the softmax of the op's own scores.
    scores = s2s.additive_scores(q, k, v, backend=on.backend).double() * scale
    if bias is not None:
        scores = scores + bias
    expected = scores.masked_fill(~full, -torch.inf).softmax(-1).nan_to_num(0)
    room = 1e-6 * (1 + scores.abs().amax().item())
    assert (weights.double() - expected).abs().max() <= room


@settings(max_examples=60, deadline=None)
@given(problems())
def test_prepared_keys_and_one_query_at_a_time_change_nothing(on, problem):
    *tensors, scale = problem
    q, k, values, v, mask, bias = (x if x is None else x.to(on.device) for x in tensors)
    kw = dict(score_bias=bias, scale=scale, backend=on.backend)
    whole = s2s.additive_attention(q, k, values, v, mask=mask, **kw)
    prepared = s2s.prepare_keys(k)
    for a, b in zip(
        whole, s2s.additive_attention(q, prepared, values, v, mask=mask, **kw), strict=True
    ):
        assert torch.equal(a, b)
    t = q.shape[1] // 2
    row = mask[:, t] if mask is not None and mask.dim() == 3 else mask
    context, weights = s2s.additive_attention(q[:, t], prepared, values, v, mask=row, **kw)
    torch.testing.assert_close(context, whole[0][:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, whole[1][:, t], rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    problems(), st.sampled_from(["q", "k", "v", "grad"]), st.sampled_from(["inf", "-inf", "nan"])
)
def test_non_finite_values_give_what_the_reference_gives(on, problem, where, what):
    q, k, _, v, *_ = problem
    grad = torch.randn(q.shape[0], q.shape[1], k.shape[1])
    tensors = on.put(q, k, v, grad)
    q, k, v, grad = (x.clone(memory_format=torch.contiguous_format) for x in tensors)
    {"q": q, "k": k, "v": v, "grad": grad}[where].view(-1)[0] = float(what)
    ours, want = (scores_and_gradients(q, k, v, grad, b) for b in (on.backend, "reference"))
    finite = [x.nan_to_num(1, 1, -1).abs() for x in (q, k, v, grad)]
    for a, b, scale in zip(ours, want, terms(*finite), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[b.isinf()], b[b.isinf()])
        good = b.isfinite()
        assert ((a - b).abs() <= 1e-5 * (b.abs() + scale))[good].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 4, 5, 0)])
def test_empty_batches_queries_and_values(shape, dtype, on):
    B, T, S, H, D = shape
    sizes = [(B, T, H), (B, S, H), (B, S, D), (H,)]
    inputs = [torch.randn(s).to(on.device, dtype).requires_grad_() for s in sizes]
    context, weights = s2s.additive_attention(*inputs, backend=on.backend)
    assert context.shape == (B, T, D) and weights.shape == (B, T, S)
    (context.sum() + weights.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    assert inputs[3].grad.isfinite().all()
