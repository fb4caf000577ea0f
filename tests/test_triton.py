"""The Triton kernels without a GPU: interpreted, compiled, and their instructions counted."""

import itertools

import pytest
import sass
import test_attention_decoder
import torch

import seq2seq_fast as s2s

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from seq2seq_fast.ops.kernels import OPS  # noqa: E402
from seq2seq_fast.triton import (  # noqa: E402
    INTERPRETED,
    LAUNCHERS,
    additive_scores,
    additive_scores_backward,
    cells,
    launch,
    one_query,
    one_query_backward,
    softmax,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where TRITON_INTERPRET=1")


@compiled
@pytest.mark.unsanitized
@pytest.mark.awaits("triton's interpreter")
def test_kernels_in_the_interpreter(beforehand):
    """The tests of the op on small shapes, and those below, in a process of their own: Triton
    decides at its import how kernels run."""
    ran = beforehand("triton's interpreter")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def tensors(B, T, S, H, D):
    g = torch.Generator().manual_seed(0)
    shapes = ((B, T, H), (B, S, H), (B, S, D), (H,))
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes]


@interpreted
@pytest.mark.parametrize(
    ("shape", "module"),
    [
        ((1, 2, 3, 130, 2), additive_scores),  # features of a score
        ((1, 70, 3, 4, 2), additive_scores_backward),  # queries of a gradient
        ((1, 1, 100, 70, 70), one_query),  # the source
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_work_is_split_where_multiprocessors_would_idle(shape, module, monkeypatch):
    x, found = tensors(*shape), []
    want = s2s.additive_attention(*x, backend="reference")
    want += torch.autograd.grad(want[0].square().sum() + want[1].square().sum(), x)

    def parts(*args):
        found.append(launch.parts(*args))
        return found[-1]

    monkeypatch.setattr(module, "parts", parts)
    monkeypatch.setattr(module, "multiprocessors", lambda _: 64)
    monkeypatch.setattr(one_query, "LEAST", 1000)
    got = s2s.additive_attention(*x, backend="triton")
    got += torch.autograd.grad(got[0].square().sum() + got[1].square().sum(), x)
    assert found and min(found) > 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
def test_a_source_split_keeps_what_masks_and_infinities_mean(monkeypatch):
    monkeypatch.setattr(one_query, "multiprocessors", lambda _: 64)
    monkeypatch.setattr(one_query, "LEAST", 100)
    q, k, values, v = tensors(5, 1, 100, 6, 3)
    bias, mask = torch.zeros(5, 1, 100), torch.ones(5, 100) > 0
    bias[0, :, :40] = bias[1] = bias[4, :, 60:] = -torch.inf
    bias[2, :, 7] = torch.nan
    mask[3] = False
    mask[4, :40] = False
    kw = dict(mask=mask, score_bias=bias)
    want = s2s.additive_attention(q, k, values, v, backend="reference", **kw)
    got = s2s.additive_attention(q, k, values, v, backend="triton", **kw)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@interpreted
def test_the_interpreter_is_taken_only_by_name():
    for name in ("additive_attention", "attention_decoder", "attention_decoder_backward"):
        usable = s2s.backends()[name]
        assert usable["cpu"][0] == "native" and "triton" in usable["cpu"]
        assert "triton" not in usable["cuda"]
    assert "triton" not in s2s.backends()["linear_cross_entropy"]["cpu"]
    q, k, values, v = tensors(1, 2, 3, 4, 5)
    with s2s.use_backend("triton"):
        got = s2s.additive_attention(q, k, values, v)
    named = s2s.additive_attention(q, k, values, v, backend="triton")
    native = s2s.additive_attention(q, k, values, v)
    assert torch.equal(got[0], named[0]) and not torch.equal(got[0], native[0])
    with pytest.raises(ValueError, match="'triton' was asked for"):
        s2s.additive_scores(*(x.to("meta") for x in (q, k, v)), backend="triton")


@compiled
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has GPUs")
def test_triton_is_absent_where_nothing_runs_it():
    q, k, values, v = tensors(1, 2, 3, 4, 5)
    assert "triton" not in s2s.backends()["additive_attention"]["cuda"]
    with pytest.raises(ValueError, match="'triton' was asked for, but has no additive_attention"):
        s2s.additive_attention(q, k, values, v, backend="triton")


@pytest.mark.parametrize(("n", "wanted"), [(1, 5), (4, 3), (7, 100), (10, 4), (6, 0)])
def test_parts_are_none_of_them_empty(n, wanted):
    count = launch.parts(n, wanted)
    each = triton.cdiv(n, count)
    assert 1 <= count <= max(1, wanted) and each * (count - 1) < n <= each * count


FLOAT32 = ("q_factors k_factors v_pairs q_maxima k_maxima maxima powers g dq dk dv logits tops "
           "totals contexts scores factors also").split()  # fmt: skip
INPUTS = "query keys values v x bias weights context grad grad_bias".split()
# Of the decoder's kernels, which know float32 alone.
FLOAT32 += cells.ADVANCE_ARGUMENTS[:10] + cells.RETREAT_ARGUMENTS[:12]
FLOAT32 += "carried grad_context grad_weights minus_one to_context to_scores".split()
FLOAT32 += ["to_query", "of_weights"]
# Kernel: what its arguments are where they are no numbers, and which numbers 16 divides.
KERNELS = {
    "prepare": (additive_scores.prepare_kernel, dict(IS_KEYS=True, PAIRS=additive_scores.PAIRS)),
    "forward": (
        additive_scores.forward_kernel,
        dict(MAXIMA=16, PAIRS=additive_scores.PAIRS, THREADS=additive_scores.THREADS),
    ),
    "exponentials": (additive_scores_backward.exponentials_kernel, dict(WIDTH=64)),
    **{
        f"backward {levels} {width}": (
            additive_scores_backward.backward_kernel,
            dict(LEVELS=levels, WIDTH=width),
        )
        for levels, width in additive_scores_backward.SHAPES
    },
    "softmax": (softmax.softmax_kernel, dict(HAS_MASK=True, HAS_BIAS=True, WIDTH=64)),
    "softmax_backward": (softmax.softmax_backward_kernel, dict(NEED_BIAS=True, WIDTH=64)),
    **{
        f"one_query {width}": (
            one_query.one_query_kernel,
            dict(HAS_MASK=True, HAS_BIAS=True, WIDTH=width, EVEN=True, SPLIT=width == 64)
            | dict(powers=None, also=None),
        )
        for width in (64, 128)
    },
    **{
        f"one_query_powers {width}": (
            one_query.one_query_kernel,
            dict(HAS_MASK=True, HAS_BIAS=False, WIDTH=width, EVEN=True, SPLIT=False),
        )
        for width in (64, 128)
    },
    **{
        f"one_query_backward {S} {H}": (
            one_query_backward.one_query_backward_kernel,
            one_query_backward.shape_of_program(S, H, H) | dict(EVEN=H % 64 == 0, STAGE="all"),
        )
        for S, H in itertools.product((32, 64), (48, 64, 112, 128))
    },
    # The first stage has no reciprocals to budget, and so another name.
    **{
        f"{name} {stage}": (
            one_query_backward.one_query_backward_kernel,
            one_query_backward.shape_of_program(64, 128, 128) | dict(EVEN=True, STAGE=stage),
        )
        for name, stage in (("one_query_backward", "slopes"), ("one_query_back", "values"))
    },
    **{
        f"advance {cell}": (cells.advance_kernel, dict(CELL=cell, HAS_INPUT=True, BLOCK=128))
        for cell in ("lstm", "gru", "rnn")
    },
    **{
        f"retreat {cell}": (cells.retreat_kernel, dict(CELL=cell, BLOCK=128))
        for cell in ("lstm", "gru", "rnn")
    },
    "combine": (one_query.combine_kernel, dict(HAS_MASK=True, SPLITS=4, WIDTH=64)),
}
UNIT_STRIDES = ("stride_h", "stride_qh", "stride_kh", "stride_vd", "stride_v", "stride_bs",
                "stride_ms", "stride_gs", "stride_ws")  # fmt: skip
DIVISIBLE = ("H", "D", "S", "stride_n", "stride_qt", "stride_ks", "stride_vs", "stride_b",
             "stride_qb", "stride_kb", "stride_vb")  # fmt: skip


def compile_for(capability, name, dtype):
    kernel, constants = KERNELS[name]
    constants, warps = dict(constants), constants.get("num_warps", 4)
    constants.pop("num_warps", None)
    special = [x.name for x in kernel.params if not x.do_not_specialize]
    constants = constants | {x: 1 for x in UNIT_STRIDES if x in special}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {x: "*fp32" for x in FLOAT32 if x in types}
    types |= {x: f"*{dtype}" for x in INPUTS if x in types}
    types |= {"out": "*fp32"} if "out" in types else {}
    types |= {"scale": "fp32"} if "scale" in types else {}
    types |= {"mask": "*u8"} if "mask" in types else {}
    aligned = [x for x in special if types[x].startswith("*") or x in DIVISIBLE]
    places = {(kernel.arg_names.index(x),): [["tt.divisibility", 16]] for x in aligned}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=places)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


# For sm_90, beside one that is much the same.
COMPILED_ELSEWHERE = (
    *("backward 3 16", "one_query 64", "one_query_powers 64"),
    *(
        x
        for x in KERNELS
        if x.startswith("one_query_backward") and x != "one_query_backward 64 128"
    ),
)


@compiled
@pytest.mark.unsanitized
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", [x for x in KERNELS if x not in COMPILED_ELSEWHERE])
def test_kernels_compile(name, capability):
    assert compile_for(capability, name, "fp32")[:4] == b"\x7fELF"


# What budgets.py calls a kernel, and elements of a thread in one pass as the source has it.
BUDGETED = {
    "forward": ("forward", 2 * additive_scores.ROWS * additive_scores.COLUMNS * 2),
    "backward": ("backward", additive_scores_backward.ROWS * additive_scores_backward.COLUMNS),
    "one_query": ("forward, one query", 2),
    "one_query_powers": ("forward, one query, prepared", 2),
    "one_query_backward": ("backward, one query", 2),
}


@compiled
@pytest.mark.unsanitized
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((x, "fp32") for x in KERNELS if x.split()[0] in BUDGETED),
        # The other kernels have numbers of the inputs' dtype nowhere in their main loops.
        *((x, "bf16") for x in KERNELS if x.split()[0] == "one_query"),
    ],
)
def test_instruction_budgets(name, dtype, within_budget):
    kernel, per_iteration = BUDGETED[name.split()[0]]
    within_budget(
        kernel,
        "triton",
        f"{name}, {dtype}",
        compile_for(90, name, dtype),
        per_reciprocal=2,
        per_iteration=per_iteration,
    )


@compiled
@pytest.mark.unsanitized
@pytest.mark.parametrize("name", [x for x in KERNELS if x.split()[0] in ("advance", "retreat")])
def test_cells_keep_all_in_registers(name):
    code = sass.kernel(compile_for(90, name, "fp32"))
    assert code.spills == 0 and code.registers <= 40


class Elsewhere:
    """A driver for a GPU that is not there, and whose number no other has."""

    def get_current_device(self):
        return -1

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """(kernel, as it was compiled) for each launch of the decoder's, of which none is run."""
    found, run = [], triton.JITFunction.run

    def compile_only(self, *args, warmup, **kw):
        found.append((self.fn.__name__, run(self, *args, warmup=True, **kw)))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    for name in ("attention_decoder", "attention_decoder_backward"):
        monkeypatch.setitem(OPS, (name, "native"), LAUNCHERS[name])
    monkeypatch.setattr(triton.runtime.driver, "_active", Elsewhere())
    return found


@compiled
@pytest.mark.unsanitized
@pytest.mark.parametrize("after", [False, True])
def test_the_decoder_compiles_nothing_after_its_first_steps(after, launches):
    """Whatever the alignment of a step's tensors; and a step launches a cell for each layer, and
    attention, beside products."""
    compiled, counts = [], []
    for T in (2, 7):
        args = test_attention_decoder.problem(L=3, T=T, after=after, dropout=True, H=7, A=5, D=3)
        test_attention_decoder.results(test_attention_decoder.cast(args, torch.float32))
        compiled.append({(name, kernel.hash) for name, kernel in launches})
        counts.append(len(launches))
        launches.clear()
    assert compiled[0] == compiled[1] and len(compiled[0]) == 7
    assert counts == [2 * 2 * 4, 7 * 2 * 4]
