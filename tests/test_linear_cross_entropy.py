"""Cross entropy without the logits: parity with the plain form, memory, machinery, bad input."""

import math
import random
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import seq2seq_fast as s2s
from seq2seq_fast import reference
from seq2seq_fast.ops.linear_cross_entropy import loss_of_steps

IGNORED = 3


def problem(N=11, K=7, V=13, bias=True, weight=False, strided=False, scale=1.0, seed=0):
    """Tensor arguments in float64, {name: tensor}, gradients asked of the first three."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        step = 2 if strided else 1
        x = torch.randn(*shape[:-1], step * shape[-1], generator=g, dtype=torch.float64) * size
        return x[..., ::step].requires_grad_()

    args = {"input": draw(N, K, size=scale), "linear_weight": draw(V, K)}
    args["linear_bias"] = draw(V) if bias else None
    args["weight"] = torch.rand(V, generator=g, dtype=torch.float64) if weight else None
    args["target"] = torch.randint(V, (N,), generator=g)
    return args


def cast(args, dtype):
    """The floating-point arguments in a dtype, as leaves."""
    return {
        k: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for k, x in args.items()
    }


def plain(input, linear_weight, target, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def results(loss, args, **options):
    """{name: tensor}: the loss and every gradient."""
    found = {"loss": loss(**args, **options)}
    leaves = {k: x for k, x in args.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found |= dict(zip(leaves, torch.autograd.grad(3 * found["loss"], leaves.values()), strict=True))
    return {k: x.detach() for k, x in found.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "N": st.integers(1, 40),
            "K": st.integers(1, 20),
            "V": st.integers(1, 70),
            "bias": st.booleans(),
            "weight": st.booleans(),
            "strided": st.booleans(),
            "scale": st.sampled_from([1.0, 30.0]),
            "seed": st.integers(0, 2**31),
        }
    ),
    st.fixed_dictionaries(
        {
            "reduction": st.sampled_from(["mean", "sum"]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
            "ignore_index": st.sampled_from([-100, IGNORED]),
        }
    ),
)
def test_loss_and_gradients_keep_the_accuracy_rule(drawn, options):
    """Errors against float64, ours at most twice plain PyTorch's in float32 plus rounding, of which
    there is one unit of the largest logit: what a gradient is moved by, all of it, if that is the
    one logit that counts."""
    used: dict[str, list[float]] = {}
    eps = torch.finfo(torch.float32).eps
    for seed in range(3):
        args = problem(**drawn | {"seed": drawn["seed"] + seed})
        if args["target"].eq(options["ignore_index"]).all():
            args["target"][0] = options["ignore_index"] = drawn["V"] - 1
            options["ignore_index"] = -100
        exact = results(plain, args, **options)
        logits = args["input"] @ args["linear_weight"].T
        units = 4 + logits.abs().max().item()
        torch.testing.assert_close(results(s2s.linear_cross_entropy, args, **options), exact)
        args = cast(args, torch.float32)
        ours = results(s2s.linear_cross_entropy, args, **options)
        theirs = results(plain, args, **options)
        assert ours.keys() == theirs.keys() == exact.keys()
        for name, want in exact.items():
            error, allowed = ((x[name] - want).abs().max().item() for x in (ours, theirs))
            rounding = units * eps * max(want.abs().max().item(), 1e-3)
            used.setdefault(name, []).append(error / (2 * allowed + rounding))
    medians = {name: statistics.median(ratios) for name, ratios in used.items()}
    assert max(medians.values()) <= 1, medians


def test_many_chunks_are_one():
    """Rows that fill several chunks of a large vocabulary, with rows to leave out among them."""
    args = cast(problem(N=301, K=5, V=30_011), torch.float32)
    args["target"][::7] = IGNORED
    found = results(s2s.linear_cross_entropy, args, ignore_index=IGNORED, label_smoothing=0.1)
    want = results(plain, args, ignore_index=IGNORED, label_smoothing=0.1)
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)
    assert (found["input"][::7] == 0).all()


@pytest.mark.parametrize("mean", [True, False])
def test_the_fallback_is_the_plain_form(mean, monkeypatch):
    """What runs where there is no kernel, such as on a GPU, in chunks of two rows."""
    monkeypatch.setattr(reference, "_CHUNK", 26)
    args = problem(weight=True)
    options = {"label_smoothing": 0.2, "ignore_index": IGNORED}
    want = results(plain, args, reduction="mean" if mean else "sum", **options)
    x, w, b, of_class, target = (None if x is None else x.detach() for x in args.values())
    found = reference.linear_cross_entropy(
        x[None], w, b, target[None], of_class, None, [], 0.2, IGNORED, mean, True, True, True
    )
    torch.testing.assert_close(found[0], want["loss"])
    for a, name in zip(found[1:], ("input", "linear_weight", "linear_bias"), strict=True):
        torch.testing.assert_close(3 * a.view_as(want[name]), want[name])
    nothing = reference.linear_cross_entropy(
        x[None], w, b, target[None], of_class, None, [], 0.2, IGNORED, mean, False, False, False
    )
    torch.testing.assert_close(nothing[0], want["loss"])
    assert all(g.numel() == 0 for g in nothing[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("N", [0, 4])
def test_no_target_at_all(N, reduction):
    """The mean of nothing is NaN and its gradients are not; the sum is zero."""
    args = cast(problem(N=N), torch.float32)
    args["target"].fill_(-100)
    found = results(s2s.linear_cross_entropy, args, reduction=reduction)
    want = results(plain, args, reduction=reduction)
    torch.testing.assert_close(found["loss"], want["loss"], equal_nan=True)
    assert all((x == 0).all() for name, x in found.items() if name != "loss")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_mean_over_no_weight_at_all_is_nan(smoothing):
    args = cast(problem(weight=True), torch.float32)
    args["weight"][:4] = 0
    args["target"] %= 4
    options = {"label_smoothing": smoothing, "ignore_index": IGNORED}
    assert results(plain, args, **options)["loss"].isnan()
    assert results(s2s.linear_cross_entropy, args, **options)["loss"].isnan()
    x, w, b, of_class, target = (None if x is None else x.detach() for x in args.values())
    fallback = reference.linear_cross_entropy(
        x[None], w, b, target[None], of_class, None, [], smoothing, IGNORED, True, *3 * [False]
    )
    assert fallback[0].isnan()


def test_logits_that_are_not_finite_are_seen():
    for bad in (float("nan"), float("inf")):
        args = cast(problem(), torch.float32)
        with torch.no_grad():
            args["linear_bias"][5] = bad
        assert results(s2s.linear_cross_entropy, args)["loss"].isnan()
        assert results(plain, args)["loss"].isnan()
    with torch.no_grad():
        args["linear_bias"][5] = -float("inf")
    args["target"] = args["target"].where(args["target"] != 5, 6)
    found, want = results(s2s.linear_cross_entropy, args), results(plain, args)
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


def test_gradcheck_and_each_gradient_alone():
    args = problem(N=5, weight=True)
    leaves = [x for x in args.values() if x is not None and x.requires_grad]
    options = {"label_smoothing": 0.1}
    assert torch.autograd.gradcheck(
        lambda *_: s2s.linear_cross_entropy(**args, **options), leaves, fast_mode=True
    )
    every = results(s2s.linear_cross_entropy, args, **options)
    for name in ("input", "linear_weight", "linear_bias"):
        alone = {
            k: x.detach() if isinstance(x, torch.Tensor) and k != name else x
            for k, x in args.items()
        }
        found = results(s2s.linear_cross_entropy, alone, **options)
        assert found.keys() == {"loss", name}
        torch.testing.assert_close(found[name], every[name], rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(s2s.linear_cross_entropy(**args, **options), every["loss"])


def test_a_second_backward_is_the_first_and_a_double_one_raises():
    args = problem()
    leaf = args["input"]
    loss = s2s.linear_cross_entropy(**args)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        grad.sum().backward()
    loss = s2s.linear_cross_entropy(**args, backend="reference")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    args = cast(problem(), dtype)
    found = results(s2s.linear_cross_entropy, args)
    want = results(s2s.linear_cross_entropy, cast(args, torch.float32))
    assert found["loss"].dtype == dtype
    for name, x in found.items():
        torch.testing.assert_close(x.float(), want[name], rtol=0.02, atol=0.01)


def test_autocast_leaves_it_in_float32():
    args = cast(problem(), torch.float32)
    want = results(s2s.linear_cross_entropy, args)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(s2s.linear_cross_entropy, args)
        mixed = s2s.linear_cross_entropy(**args | {"input": args["input"].bfloat16()})
    for name, x in found.items():
        assert torch.equal(x, want[name])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, want["loss"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False,) * 3], ids=str)
def test_opcheck(needs):
    args = cast(problem(weight=True), torch.float32)
    x, w, b, of_class, target = (x.detach() for x in args.values())
    torch.library.opcheck(
        torch.ops.seq2seq_fast.linear_cross_entropy,
        (x[None], w, b, target[None], of_class, None, [], 0.1, IGNORED, True, *needs),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    args = cast(problem(), torch.float32)
    compiled = torch.compile(s2s.linear_cross_entropy, fullgraph=True, backend=backend)
    found, want = (results(f, args) for f in (compiled, s2s.linear_cross_entropy))
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


def test_logits_that_were_made_are_taken():
    args = problem(N=12, V=9)
    target = args.pop("target").view(3, 4)
    args["input"] = args["input"].detach().view(3, 4, 7).requires_grad_()
    logits = F.linear(*list(args.values())[:3]).detach()
    logits[:, [0, 2]] = torch.nan  # nobody looks at these
    want = results(loss_of_steps, args | {"target": target})
    found = results(loss_of_steps, args | {"target": target, "logits": logits}, steps=[1, 3])
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


def model():
    torch.manual_seed(0)
    encoder, decoder = s2s.Encoder(11, 6, 8, 2, 0.3), s2s.Decoder(13, 6, 8, 2, 0.3)
    return s2s.Seq2Seq(encoder, decoder, pad_idx=0).double()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("T", [1, 2, 6])
def test_a_models_loss_is_the_criterion_of_its_logits(T, ratio, backend):
    m = model()
    src, trg = torch.randint(1, 11, (3, 7)), torch.randint(13, (3, T), dtype=torch.int32)
    src[1, 4:] = 0
    options = {"ignore_index": IGNORED, "label_smoothing": 0.1, "weight": torch.rand(13).double()}
    found = []
    with s2s.use_backend(backend):
        for fused in (True, False):
            random.seed(1)
            torch.manual_seed(1)
            if fused:
                loss = m.loss(src, trg, ratio, **options)
            else:
                logits = m(src, trg, ratio)[:, 1:].flatten(0, 1)
                loss = F.cross_entropy(logits, trg[:, 1:].flatten().long(), **options)
            grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
            found.append([loss, *(g if g is not None else torch.zeros(()) for g in grads)])
    assert found[0][0].isnan() == (T == 1)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), equal_nan=True)


MEMORY = """
import torch, seq2seq_fast as s2s
N, K, V = 2048, 16, 16384
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
def run(N):
    x, w = torch.randn(N, K, requires_grad=True), torch.randn(V, K, requires_grad=True)
    s2s.linear_cross_entropy(x, w, torch.zeros(N, dtype=torch.int64)).backward()
run(1)  # the libraries' own memory
before = peak()
run(N)
print((peak() - before) * 1024 / 4)
"""


@pytest.mark.unsanitized
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc")
def test_memory_stays_far_below_the_logits():
    command = [sys.executable, "-c", MEMORY]
    numbers = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert numbers < 2048 * 16384 / 4


def test_no_features_make_equal_logits():
    inputs = torch.zeros(4, 0), torch.zeros(7, 0), torch.tensor([0, 3, 6, 6])
    for backend in ("native", "reference"):
        loss = s2s.linear_cross_entropy(*inputs, backend=backend)
        assert loss == pytest.approx(math.log(7))


def test_meta_tensors_have_a_loss_too():
    x, w = (torch.empty(n, 3, device="meta", requires_grad=True) for n in (4, 7))
    loss = s2s.linear_cross_entropy(x, w, torch.empty(4, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.is_meta and x.grad.shape == x.shape and w.grad.shape == w.shape


X, IDS = torch.zeros, torch.zeros(2, dtype=torch.int64)


def call(input=X(2, 3), linear_weight=X(5, 3), target=IDS, **options):  # noqa: B008
    return lambda: s2s.linear_cross_entropy(input, linear_weight, target, **options)


BAD = {
    "input": (call(input=[1]), TypeError, "input: got list"),
    "input ids": (call(input=IDS[:, None]), TypeError, "input: got torch.int64"),
    "weight": (call(linear_weight=X(5, 4)), ValueError, r"linear_weight: got shape \(5, 4\)"),
    "weight empty": (call(linear_weight=X(0, 3)), ValueError, "linear_weight: got V = 0"),
    "weight dtype": (call(linear_weight=X(5, 3).double()), TypeError, "linear_weight: got torch.f"),
    "weight device": (call(linear_weight=X(5, 3, device="meta")), ValueError, "linear_weight: is"),
    "bias": (call(linear_bias=X(4)), ValueError, r"linear_bias: got shape \(4,\)"),
    "classes": (call(weight=X(4)), ValueError, r"weight: got shape \(4,\)"),
    "target": (call(target=[1]), TypeError, "target: got list"),
    "target dtype": (call(target=IDS.float()), TypeError, "target: got torch.float32"),
    "target shape": (call(target=IDS[:1]), ValueError, r"target: got shape \(1,\), expected \(2,"),
    "target high": (call(target=IDS + 5), ValueError, "target: got class 5, expected 0 to 4"),
    "target low": (call(target=IDS - 1), ValueError, "target: got class -1, expected 0 to 4, or -"),
    "target sparse": (call(target=IDS.to_sparse()), TypeError, "target: got a Tensor that is"),
    "ignored": (call(ignore_index=1.5), TypeError, "ignore_index: got float"),
    "ignored none": (call(ignore_index=None), TypeError, "ignore_index: got NoneType"),
    "ignored bool": (call(ignore_index=True), TypeError, "ignore_index: got bool"),
    "ignored Tensor": (call(ignore_index=IDS), TypeError, "ignore_index: got Tensor"),
    "ignored far": (call(ignore_index=2**63), ValueError, "ignore_index: got 9223372036854775808"),
    "reduction": (call(reduction="none"), ValueError, "reduction: got 'none'"),
    "smoothing": (call(label_smoothing=1.5), ValueError, "label_smoothing: got 1.5"),
    "smoothing type": (call(label_smoothing="x"), TypeError, "label_smoothing: got str"),
    "backend": (call(backend="fast"), ValueError, "backend: got 'fast'"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
