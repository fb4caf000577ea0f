"""The counter of instructions itself, on kernels whose machine code is known."""

import shutil
import subprocess

import budgets
import pytest
import sass

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def _reciprocals(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for i in range(0, n):
        a = tl.load(x + i * N + at)
        total += tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(out + at, total)


def compiled(N):
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "N": "constexpr"}
    source = ASTSource(_reciprocals, signature=signature, constexprs={"N": N})
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 1}).asm["cubin"]


def test_a_loop_is_found_and_counted():
    kernel = sass.kernel(compiled(64), "_reciprocals")
    assert kernel.spills == 0 and 8 <= kernel.registers <= 64
    loop = kernel.main_loop(per_reciprocal=1)
    n = sass.elements(loop, 1, per_iteration=2)  # 64 numbers over 32 lanes
    assert loop.count("MUFU") == loop.count("FADD") == n
    assert n <= loop.count("LDG") * 2 and loop.slots >= 2.5 * n
    with pytest.raises(ValueError, match="multiple of 7"):
        sass.elements(loop, 1, per_iteration=7)


def test_a_budget_that_is_exceeded_is_seen():
    measured = budgets.measure("forward", "triton", "", compiled(64), per_reciprocal=1)
    assert measured.mufu == 1 and not measured.within
    assert "4.40" in budgets.table([measured])


CUDA = """
extern "C" __global__ void spilling(const float* x, float* out, int n) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i];
  for (int i = 0; i < n; ++i) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x[i]));
    kept[i & 63] += r;
  }
  for (int i = 0; i < 64; ++i) out[i] = kept[i];
}
extern "C" __global__ void other(float* out) { *out = 1; }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_cubins_from_nvcc_and_local_memory(tmp_path):
    source, cubin = tmp_path / "x.cu", tmp_path / "x.cubin"
    source.write_text(CUDA)
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", "-o", cubin, source], check=True)
    kernel = sass.kernel(cubin.read_bytes(), "spilling")
    assert kernel.spills > 0
    assert kernel.main_loop(1).count("MUFU.RCP") >= 1
    with pytest.raises(ValueError, match="2 kernels"):
        sass.kernel(cubin.read_bytes())
    with pytest.raises(ValueError, match="no loop"):
        sass.kernel(cubin.read_bytes(), "other").main_loop(1)
