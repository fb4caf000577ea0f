"""What surrounds the arithmetic: memory, threads, compile, export, opcheck, autocast."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import seq2seq_fast as s2s
from seq2seq_fast import _C, library
from seq2seq_fast.ops.kernels import fake

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc")


def inputs(B=2, T=5, S=19, H=12, D=6, dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    shapes = [(B, T, H), (B, S, H), (B, S, D), (H,)]
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


MEMORY = """
import sys, torch, seq2seq_fast as s2s
B, T, S, H = 4, 256, 256, 256
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
def inputs(n):
    return [torch.randn(s, requires_grad=True) for s in ((n, T, H), (n, S, H), (n, S, H), (H,))]
def run(q, k, values, v):
    context, weights = s2s.additive_attention(q, k, values, v, backend=sys.argv[1])
    torch.autograd.grad([context, weights], [q, k, values, v], [context, weights])
run(*(x[:1] if x.dim() == 3 else x for x in inputs(1)))  # the libraries' own memory
arguments, before = inputs(B), 0
before = peak()
run(*arguments)
print((peak() - before) * 1024 / 4)
"""


@needs_proc
@pytest.mark.unsanitized
def test_no_tensor_of_size_btsh_is_ever_made():
    """Peak of forward and backward beyond the inputs, in float32 numbers, in a fresh process."""
    B, T, S, H = 4, 256, 256, 256

    def peak(backend):
        command = [sys.executable, "-c", MEMORY, backend]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    outputs = B * T * (H + S) + B * (T + 2 * S) * H  # context, weights and the gradients
    buffers = 3 * B * T * S + 6 * B * (T + S) * H
    assert peak("native") <= outputs + buffers < B * T * S * H / 10
    assert peak("reference") > B * T * S * H  # so the measurement would have seen one


ACCURACY = "test_additive_attention and not opcheck or keep_the_accuracy_rule or plain_pytorch"
ACCURACY += " or int8 or reduced or alike or philox"
BYTES = "int8 or needed_and_enough or rows_batches or nearly_fill or test_summing and accuracy"


@pytest.mark.unsanitized
@pytest.mark.parametrize(
    ("capability", "selected"),
    [
        ("default", ACCURACY),
        ("avx2", f"{ACCURACY} or {BYTES}"),
        ("avx2_vnni", BYTES),  # all that differs where VNNI is there, or is not
        ("avx512", BYTES),
    ],
    ids=["default", "avx2", "avx2_vnni", "avx512"],
)
def test_every_instruction_set_keeps_the_accuracy_rule(capability, selected):
    """The loops are compiled once for each; the suite itself runs in the best one."""
    if capability == _C.cpu_capability:
        pytest.skip("which the suite itself runs in")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", "import torch, seq2seq_fast._C as c; print(c.cpu_capability)"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if ran.stdout.strip() != capability:
        assert capability != "default"
        pytest.skip(f"not on this processor, which has {ran.stdout.strip()}")
    names = [f"test_{x}.py" for x in ("additive_attention", "attention_decoder", "location")]
    names += [f"test_{x}.py" for x in ("decoding", "product", "dropout", "seeking", "summing")]
    tests = [str(Path(__file__).with_name(name)) for name in names]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
        "-Wignore:ignoring invalid value for ATEN_CPU_CAPABILITY",  # PyTorch knows no avx2_vnni
        "-k",
        selected,
        *tests,
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


THREADS = """
import random, sys, torch, seq2seq_fast as s2s
torch.set_num_threads(int(sys.argv[1]))
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for B, T, S, H, D in ((1, 1, 400, 64, 300), (1, 60, 90, 128, 70), (6, 33, 50, 40, 20)):
        torch.manual_seed(0)
        shapes = ((B, T, H), (B, S, H), (B, S, D), (H,))
        x = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
        out = s2s.additive_attention(*x)
        out += torch.autograd.grad(out, x, out)
        for y in out:
            print(hash(y.detach().double().numpy().tobytes()))
for cell_type in ("lstm", "gru"):
    torch.manual_seed(0)
    options = {"cell_type": cell_type, "query_after": cell_type == "gru"}
    encoder = s2s.Encoder(50, 20, 72, 2, 0.0, cell_type=cell_type)
    model = s2s.Seq2Seq(encoder, s2s.Decoder(50, 20, 72, 2, 0.0, **options))
    random.seed(0)
    model(*torch.randint(50, (2, 33, 9))).sum().backward()
    for p in model.decoder.parameters():
        print(hash(p.grad.numpy().tobytes()))
"""


def test_the_same_bits_with_any_number_of_threads():
    def bits(threads):
        return subprocess.run(
            [sys.executable, "-c", THREADS, str(threads)],
            check=True,
            capture_output=True,
            text=True,
            # MKL's products around the decoder's loop sum up as threads are, unless told not to.
            env={**os.environ, "PYTHONHASHSEED": "0", "MKL_CBWR": "AVX2,STRICT"},
        ).stdout

    one = bits(1)
    assert one and one == bits(2) == bits(2) == bits(3)


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone_is_the_one_of_all(needed):
    q, k, values, v = inputs()
    bias = torch.randn(2, 1, 19, requires_grad=True)
    leaves = [q, k, values, v, bias]
    all_of_them = torch.autograd.grad(
        sum(x.square().sum() for x in s2s.additive_attention(*leaves[:4], score_bias=bias)), leaves
    )
    only = [x.detach().requires_grad_(i == needed) for i, x in enumerate(leaves)]
    out = s2s.additive_attention(*only[:4], score_bias=only[4])
    sum(x.square().sum() for x in out).backward()
    assert [x.grad is not None for x in only] == [i == needed for i in range(5)]
    torch.testing.assert_close(only[needed].grad, all_of_them[needed], rtol=0, atol=0)


def test_gradients_through_prepared_keys():
    q, k, values, v = inputs()
    results = []
    for keys in (k, s2s.prepare_keys(k)):
        out = s2s.additive_attention(q, keys, values, v)
        results.append(torch.autograd.grad(out, [q, k, values, v], out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.unsanitized
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, dynamic):
    def attend(q, k, values, v, mask, bias):
        context, weights = s2s.additive_attention(
            q.tanh(), k, values, v, mask=mask, score_bias=bias, scale=0.5
        )
        prepared = s2s.prepare_keys(k)
        one, _ = s2s.additive_attention(q[:, 0], prepared, values, v)
        scores = s2s.additive_scores(q, k, v)
        return context.sum() + (weights * scores).sum() + one.sin().sum()

    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    for sizes in ((2, 5, 19), (3, 4, 23)) if dynamic else ((2, 5, 19),):
        x = inputs(*sizes)
        mask = torch.rand(sizes) < 0.7
        bias = torch.randn(sizes, requires_grad=True)
        leaves = [*x, bias]
        results = []
        for f in (attend, compiled):
            loss = f(*x, mask, bias)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Attend(torch.nn.Module):
    def forward(self, q, k, values, v, mask):
        context, weights = s2s.additive_attention(q, k, values, v, mask=mask)
        return context, weights, s2s.additive_attention(q, s2s.prepare_keys(k), values, v)[0]


def test_export():
    x = inputs(grad=False)
    mask = torch.rand(2, 19) < 0.7
    T, S = torch.export.Dim("T", min=2), torch.export.Dim("S", min=2)
    shapes = ({1: T}, {1: S}, {1: S}, None, {1: S})
    program = torch.export.export(Attend(), (*x, mask), dynamic_shapes=shapes)
    longer = inputs(2, 7, 31, grad=False)
    mask = torch.rand(2, 31) < 0.7
    for a, b in zip(program.module()(*longer, mask), Attend()(*longer, mask), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    q, k, values, v = inputs(dtype=dtype)
    ops, check = torch.ops.seq2seq_fast, torch.library.opcheck
    # Autograd lives in the public functions, so what opcheck asks of it has no place here.
    kinds = ("test_schema", "test_faketensor")
    gc, gw = torch.randn(2, 5, 6).to(dtype), torch.randn(2, 5, 19).to(dtype)
    mask, bias = torch.rand(2, 1, 19) < 0.7, torch.randn(2, 5, 19).to(dtype)
    powers = None if dtype == torch.float64 else s2s.prepare_keys(k).powers
    check(ops.additive_scores, (q, k, v), test_utils=kinds)
    check(ops.additive_scores_backward, (gw, q, k, v, True, False, True), test_utils=kinds)
    check(ops.additive_attention, (q, k, values, v, mask, bias, 0.5, powers), test_utils=kinds)
    one = (q[:, 2], k, values, v, mask, bias[:, :1], 0.5, powers)
    check(ops.additive_attention, one, test_utils=kinds)
    args = (gc, gw, q, k, values, v, gw.softmax(-1), 0.5, powers)
    for needs in ((True,) * 5, (False,) * 5, (True, False, True, False, True)):
        check(ops.additive_attention_backward, (*args, *needs), test_utils=kinds)
    if dtype != torch.float64:
        check(ops.prepare_keys, (k,), test_utils=kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_every_argument_to_its_dtype(dtype):
    q, k, values, v = inputs()
    prepared = s2s.prepare_keys(k)
    with torch.autocast("cpu", dtype):
        mixed = s2s.additive_attention(q.to(dtype), k.to(dtype), values, v)
        context, weights = s2s.additive_attention(q, prepared, values, v)
        scores = s2s.additive_scores(q, k, v)
        double = s2s.additive_scores(q.double(), k.double(), v.double())
    assert context.dtype == weights.dtype == scores.dtype == mixed[0].dtype == dtype
    assert double.dtype == torch.float64
    context.sum().backward()
    assert q.grad.dtype == k.grad.dtype == torch.float32
    want = s2s.additive_attention(*(x.to(dtype) for x in (q, k, values, v)))
    assert torch.equal(weights, want[1]) and torch.equal(mixed[1], want[1])


def test_backends_and_their_names():
    for op in ("additive_scores", "additive_attention", "attention_decoder"):
        assert s2s.backends()[op]["cpu"] == ("native", "reference")
    q, k, values, v = inputs(grad=False)
    with s2s.use_backend("reference"):
        inside = s2s.additive_attention(q, k, values, v)
        named = s2s.additive_attention(q, k, values, v, backend="native")
        assert s2s.prepare_keys(k).powers is None
    assert "decode" in s2s.backends() and "weights_memory" not in s2s.backends()
    with pytest.raises(KeyError, match="no_such_op"):
        fake("no_such_op")
    plain = s2s.additive_attention(q, k, values, v, backend="reference")
    assert torch.equal(inside[0], plain[0])
    assert torch.equal(named[0], s2s.additive_attention(q, k, values, v)[0])
    with pytest.raises(ValueError, match="backend"), s2s.use_backend("cuda"):
        pass
    meta = [x.to("meta") for x in (q, k, values, v)]
    with pytest.raises(ValueError, match="no additive_attention kernel for meta"):
        s2s.additive_attention(*meta, backend="native")


@pytest.fixture
def built_for_cuda(monkeypatch):
    """As if the extension had CUDA kernels: choose() on what stands for a tensor on a GPU."""
    built = ("native", "triton", "reference")
    monkeypatch.setattr(library, "CUDA_ARCHITECTURES", (80, 90))
    monkeypatch.setitem(library._USABLE, ("additive_scores", "cuda"), built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    library._asked_of_gpus.cache_clear()
    yield lambda dtype, backend=None: library.choose(
        "additive_scores", SimpleNamespace(device=torch.device("cuda"), dtype=dtype), backend
    )
    library._asked_of_gpus.cache_clear()


def test_a_gpu_older_than_the_extension_is_left_to_other_backends(built_for_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 5))[i])
    with pytest.warns(UserWarning, match=r"capability 8.0 and later, a GPU here has 7.5"):
        assert built_for_cuda(torch.float32) == "triton"
    with pytest.raises(ValueError, match="no additive_scores kernel for cuda"):
        built_for_cuda(torch.float32, "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert s2s.backends()["additive_scores"]["cuda"] == ("triton", "reference")


def test_float64_on_a_gpu_is_the_references(built_for_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (10, 0))
    assert built_for_cuda(torch.float32) == built_for_cuda(torch.bfloat16) == "native"
    assert built_for_cuda(torch.float64) == built_for_cuda(torch.float64, "native") == "reference"


@pytest.mark.parametrize(
    ("powers", "got"),
    [
        ("x", "str"),
        (torch.zeros(2, 320).double(), r"torch.float64 of shape \(2, 320\)"),
        (torch.zeros(2, 7), r"torch.float32 of shape \(2, 7\)"),
        (torch.zeros(320, 2).T, r"torch.float32 of shape \(2, 320\)"),
        (torch.zeros(2, 320, device="meta"), "torch.float32 .* on meta"),
    ],
    ids=str,
)
def test_powers_of_another_form_are_refused(powers, got):
    q, k, values, v = inputs(grad=False)
    assert s2s.prepare_keys(k).powers.shape == (2, 320)
    with pytest.raises(ValueError, match=rf"keys.powers: got {got}.*, expected .*\(2, 320\)"):
        s2s.additive_attention(q, s2s.PreparedKeys(k, powers), values, v)


@pytest.mark.parametrize("scale", [None, "x", True, torch.tensor(2.0)])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(TypeError, match="scale: got"):
        s2s.additive_attention(*inputs(grad=False), scale=scale)
