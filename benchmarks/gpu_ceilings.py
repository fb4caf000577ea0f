"""What a GPU can do at most: bandwidth, special functions, launches, barriers.

The kernels are Triton's; grid and cluster barriers need CUDA C++ (gpu_ceilings.cu) and nvcc.
"""

import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from timing import device_seconds

FUNCTIONS = {"MUFU.TANH": "tanh.approx.f32", "MUFU.RCP": "rcp.approx.ftz.f32",
             "MUFU.EX2": "ex2.approx.ftz.f32"}  # fmt: skip
CHAINS = tl.constexpr(8)  # independent ones in a thread, so that latency does not count
FFMA_STEPS = range(0, 9)  # multiply-adds beside each special function


@triton.jit
def functions_kernel(out, iterations, CODE: tl.constexpr, FFMA: tl.constexpr):
    """Grid (any,): each thread evaluates 8 special functions an iteration, and FFMA beside each."""
    i = tl.arange(0, 128)
    x = i[:, None] * 0.001 + tl.arange(0, CHAINS)[None, :] * 0.1 + 0.5
    y = x
    for _ in range(iterations):
        x = tl.inline_asm_elementwise(
            CODE + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        for _ in tl.static_range(FFMA):
            y = tl.fma(y, 0.999, 0.5)
    total = tl.sum(x + y, axis=1)
    tl.store(out + tl.program_id(0) * 128 + i, total)


@triton.jit
def clock_kernel(out, iterations):
    """Cycles and nanoseconds that each program needed, so the clock rate under load."""
    cycles = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    start = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    out += tl.program_id(0) * 130
    x = tl.arange(0, 128) * 0.001
    for _ in range(iterations):
        x = tl.fma(x, 0.999, 0.5)
    tl.store(out + 2 + tl.arange(0, 128), x.to(tl.int64))
    tl.debug_barrier()
    end = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    last = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    tl.store(out, last - cycles)
    tl.store(out + 1, end - start)


@triton.jit
def tanh_kernel(x, out, n):
    i = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    y = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [tl.load(x + i, mask=i < n, other=0.0)],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    tl.store(out + i, y, mask=i < n)


@triton.jit
def empty_kernel(out):
    tl.store(out, 0.0)


def median_seconds(call, loops=10, rounds=7):
    device_seconds(call, loops)
    return statistics.median(device_seconds(call, loops) for _ in range(rounds))


def copy_bandwidth():
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5)


def clock_hz(iterations=2_000_000):
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * 130, dtype=torch.int64, device="cuda")
    clock_kernel[(programs,)](out, iterations)
    cycles, nanoseconds = out[:2].tolist()
    return cycles / nanoseconds * 1e9


def special_functions(clock, multiprocessors):
    """{name: results a clock and multiprocessor, alone and with FFMA beside each}."""
    programs, iterations = multiprocessors * 16, 2000
    out = torch.empty(programs * 128, device="cuda")
    rates = {}
    for name, code in FUNCTIONS.items():
        rates[name] = {}
        for n in FFMA_STEPS:
            seconds = median_seconds(
                lambda n=n, code=code: functions_kernel[(programs,)](
                    out, iterations, CODE=code, FFMA=n
                ), 3, 5,
            )  # fmt: skip
            results = programs * 128 * CHAINS.value * iterations
            rates[name][str(n)] = results / seconds / clock / multiprocessors
    return rates


def tanh_error():
    """Largest relative error of tanh.approx, at 2^24 places from 2^-20 to 10, and where it is."""
    x = torch.logspace(-20, 3.32, 2**24, base=2.0, dtype=torch.float64, device="cuda").float()
    y = torch.empty_like(x)
    tanh_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel())
    exact = x.double().tanh()
    error = ((y.double() - exact) / exact).abs()
    at = error.argmax()
    return {"relative": error[at].item(), "at": x[at].item()}


def launches():
    """Seconds that a kernel takes at least: launched in a row, and in a CUDA graph of 100."""
    out = torch.empty(1, device="cuda")

    def launch():
        empty_kernel[(1,)](out)

    def hundred():
        for _ in range(100):
            launch()

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hundred()
    return {
        "launch": median_seconds(hundred) / 100,
        "in a graph": median_seconds(graph.replay) / 100,
    }


def compile_barriers(folder, arch):
    """The program of gpu_ceilings.cu, for an arch such as sm_90a."""
    source, program = Path(__file__).with_suffix(".cu"), Path(folder) / "barriers"
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-o", program, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def barriers():
    """Seconds of a grid.sync and of a cluster barrier by its number of blocks; why not, if not."""
    if shutil.which("nvcc") is None:
        return {"skipped": "no nvcc here"}
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = compile_barriers(folder, f"sm_{major}{minor}")
        ran = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    return json.loads(ran.stdout)


def ceilings():
    """(name, function) in the order of their worth; each takes what was found before."""
    return {
        "clock_hz": lambda found: clock_hz(),
        "copy_bytes_per_second": lambda found: copy_bandwidth(),
        "special_functions": lambda found: special_functions(
            found["clock_hz"], torch.cuda.get_device_properties(0).multi_processor_count
        ),
        "tanh_approx_error": lambda found: tanh_error(),
        "kernel_seconds": lambda found: launches(),
        "barrier_seconds": lambda found: barriers(),
    }
