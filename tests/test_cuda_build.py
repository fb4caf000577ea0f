"""The CUDA kernels as nvcc compiles them, which needs no GPU: warnings, registers, budgets."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass
import setuptools
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.awaits("nvcc"), pytest.mark.unsanitized]


def cuobjdump(*arguments, cwd=None) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump ships inside triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [tool, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def objects(beforehand) -> list[Path]:
    ran = beforehand("nvcc")
    if "no nvcc found" in ran.stderr:
        pytest.skip("no nvcc here")
    assert ran.returncode == 0, ran.stderr
    folder = ROOT / ran.stdout.split()[-1]
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def cubins(objects, tmp_path_factory) -> dict[str, bytes]:
    """Of sm_90, by the name of their source."""
    found = {}
    for path in objects:
        folder = tmp_path_factory.mktemp(path.stem)
        cuobjdump("-xelf", "sm_90", path.resolve(), cwd=folder)
        (cubin,) = folder.glob("*.cubin")
        found[path.stem] = cubin.read_bytes()
    return found


def test_nothing_is_warned_of_or_spilled(objects):
    assert {path.stem for path in objects} == {
        path.stem for path in (ROOT / "seq2seq_fast/csrc/cuda").glob("*.cu")
    }
    for path in objects:
        text = path.with_suffix(".txt").read_text()
        assert "warning" not in text, text
        # Device::launch allows a kernel all of a block's shared memory.
        assert not re.search(r"[1-9]\d* bytes smem", text), text
        frames = re.findall(".*bytes stack frame.*", text)
        assert frames
        for frame in frames:
            assert re.findall(r"\d+", frame) == ["0", "0", "0"], text


# Some of each major number, with those of CUDA 12 and 13 for Jetsons, and one that is to come.
CAPABILITIES = (80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121, 130)


def test_every_architecture_and_ptx_are_in(objects):
    for path in objects:
        assert re.findall(r"sm_(\d+)\.cubin", cuobjdump("-lelf", path)) == "80 90 100 120".split()
        (oldest,) = map(int, re.findall(r"sm_(\d+)\.ptx", cuobjdump("-lptx", path)))
        assert all(oldest <= capability for capability in CAPABILITIES)


@pytest.mark.parametrize("cuda", [None, "13.0", "13.2", "12.8", "14.0"])
def test_an_nvcc_of_a_later_major_release_than_that_of_pytorch_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    check = runpy.run_path(str(ROOT / "setup.py"))["check_release"]
    says = "Cuda compilation tools, release 13.0, V13.0.88"
    if cuda is None or int(cuda.split(".")[0]) >= 13:
        check(says, cuda)
        return
    major = cuda.split(".")[0]
    with pytest.raises(RuntimeError, match=rf"nvcc is of CUDA 13\.0.*{cuda}.*CUDA_HOME.*{major},"):
        check(says, cuda)


BUILD = """
import runpy, sys, torch
torch.version.cuda = "12.8"
sys.argv = ["setup.py", "-q", "build_ext", "-b", sys.argv[1], "-t", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_the_extension_is_not_built_with_one(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "SEQ2SEQ_FAST_CUDA": "1"}
    command = [sys.executable, "-c", BUILD, tmp_path / "build"]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "nvcc is of CUDA 13.0, this PyTorch of CUDA 12.8: set CUDA_HOME" in ran.stderr


LOAD = """
import sys, torch, seq2seq_fast.library
has = torch._C._dispatch_has_kernel_for_dispatch_key
torch.ops.load_library(sys.argv[1])
print(sum(has(f"seq2seq_fast::{name}", "CUDA") for name in seq2seq_fast.library.SCHEMAS))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_they_load_where_pytorch_has_no_cuda(objects, tmp_path):
    """With every symbol resolved at once, as Python loads an extension."""
    library = tmp_path / "cuda.so"
    torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, "-shared", "-o", library, *objects, *torch_libraries]
    subprocess.run(command, check=True)
    command = [sys.executable, "-c", LOAD, library]
    environment = os.environ | {"LD_BIND_NOW": "1"}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "12", ran.stderr  # ops


LAST_ERROR = """
#include <cuda_runtime.h>
static cudaError_t last = cudaErrorLaunchFailure;
static cudaError_t ask_and_clear() {  // as the runtime's, which is the same for ever without a GPU
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
#define cudaGetLastError ask_and_clear
#include "launch.h"
extern "C" __attribute__((visibility("default"))) int left_behind() {
  try {
    seq2seq_fast::check_cuda(last);
  } catch (const std::exception&) {
    return last;
  }
  return -1;
}
"""


def test_a_failed_launch_leaves_no_error_to_the_next_one(objects, tmp_path):
    source, library = tmp_path / "x.cu", tmp_path / "x.so"
    source.write_text(LAST_ERROR)
    paths = [f"-isystem={path}" for path in include_paths()]
    paths += [f"-I{ROOT / 'seq2seq_fast/csrc/cuda'}", *(f"-L{path}" for path in library_paths())]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-shared", *paths]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", source, "-ltorch", "-ltorch_cpu"]
    subprocess.run([*command, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).left_behind() == 0


# The tiles for few queries or a short source, 4x4 and 2x2, save padding and pay more for loads.
TILES = {"4x16": "ILi4ELi16E", "7x7": "ILi7ELi7E", "4x8": "ILi4ELi8E", "4x7": "ILi4ELi7E"}


@pytest.mark.parametrize("tile", TILES)
def test_budget_of_forward(cubins, within_budget, tile):
    name = "additive_scores" + TILES[tile]
    variant = f"{tile} a thread"
    cubin = cubins["additive_scores"]
    within_budget("forward, C++", "native", variant, cubin, per_reciprocal=2, name=name)


def test_budget_of_backward(cubins, within_budget):
    cubin, name = cubins["additive_scores"], "additive_scores_backward"
    within_budget("backward, C++", "native", "8x2 a thread", cubin, per_reciprocal=2, name=name)


KEYS = {"float32": "IfE", "float16": "I6__half", "bfloat16": "I13__nv_bfloat16"}


@pytest.mark.parametrize("dtype", KEYS)
def test_budget_of_one_query(cubins, within_budget, dtype):
    common = dict(per_reciprocal=2, name="one_query" + KEYS[dtype])
    kernel = "forward, one query, C++"

    def raw(loop):  # the loop that makes its own powers, one for each element
        return loop.count("MUFU.EX2") == 2 * loop.count("MUFU.RCP")

    cubin = cubins["one_query"]
    within_budget(kernel, "native", f"prepared keys ({dtype})", cubin, **common)
    within_budget(kernel, "native", f"{dtype} keys", cubin, among=raw, **common)


def test_budget_of_one_query_backward(cubins, within_budget):
    cubin, name = cubins["attention_decoder_backward"], "one_query_backward"
    kernel = "backward, one query, C++"
    within_budget(kernel, "native", "2 features a thread", cubin, per_reciprocal=2, name=name)


@pytest.mark.parametrize("dtype", KEYS)
def test_one_query_has_four_rows_of_values_on_their_way(cubins, dtype):
    loads = "LDG.E.128" if dtype == "float32" else "LDG.E.64"
    loops = sass.kernel(cubins["one_query"], "one_query" + KEYS[dtype]).loops
    loops = [loop for loop in loops if not loop.count("MUFU")]
    assert any(loop.count(loads) == 4 and loop.count("FFMA") == 16 for loop in loops)


LOOPS = {
    "decode_greedy": "decode_greedy",
    "decoder_loop": "decoder_loop",
    "decoder_backward_loop": "attention_decoder_backward",
}


@pytest.mark.parametrize("kernel", LOOPS)
def test_no_copy_of_a_products_rows_waits_for_the_one_before(cubins, kernel):
    """Zeros are stored beside them, which tells them from weights that are kept."""
    loops = sass.kernel(cubins[LOOPS[kernel]], kernel).loops
    copies = [loop for loop in loops if loop.count("LDGSTS") and loop.count("STS")]
    assert copies
    for loop in copies:
        assert not any(map(loop.count, ("LDG", "LDGDEPBAR", "DEPBAR", "BAR")))


@pytest.mark.parametrize("cell", range(3), ids=["lstm", "gru", "rnn"])
@pytest.mark.parametrize("kernel", ["advance_cell", "retreat_cell"])
def test_cells_leave_room_for_as_many_threads_as_there_can_be(cubins, kernel, cell):
    """Of 64 K registers, for 2048 threads of a multiprocessor: what waits for memory needs them."""
    assert sass.kernel(cubins["cells"], f"{kernel}ILNS_4CellE{cell}").registers <= 40


@pytest.mark.parametrize(
    "kernel",
    ["rankILb1ELb0E", "rankILb1ELb1E", "rankILb0ELb0E", "join_rows", "follow", "trace"],
)
def test_the_search_fits_a_multiprocessor(cubins, kernel):
    """Two blocks of 512 threads that rank a row each, of 64 K registers."""
    code = sass.kernel(cubins["decode_steps"], kernel)
    assert code.registers <= 64 and code.spills == 0


@pytest.mark.parametrize("kernel", ["place_keys", "place_slopes", "place_back", "place_sums"])
def test_places_fit_a_multiprocessor(cubins, kernel):
    """Four blocks of 128 threads at least, of 64 K registers."""
    code = sass.kernel(cubins["location"], kernel)
    assert code.registers <= 128 and code.spills == 0


@pytest.mark.parametrize("kernel", ["place_keys", "place_slopes"])
def test_places_have_eight_rows_of_the_projection_on_their_way(cubins, kernel):
    loops = sass.kernel(cubins["location"], kernel).loops
    assert any(loop.count("FFMA") == 8 * 16 and loop.count("LDG") == 8 for loop in loops)
