"""All that a machine with a GPU is asked: the tests on the device, what it can do at most, and the
workloads beside plain PyTorch. Writes benchmarks/results/<gpu name>.json and .md as it goes.

make gpu VENV= [GPU_MINUTES=3]
"""

import argparse
import datetime
import importlib.util
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_decoder  # noqa: E402
import gpu_decoding  # noqa: E402
import gpu_location  # noqa: E402
import gpu_report  # noqa: E402
import torch  # noqa: E402
from bench_additive_attention import plain, plain_linear  # noqa: E402
from cases import BOTH, FORWARD, WORKLOADS, Case  # noqa: E402
from timing import device_seconds, interleaved  # noqa: E402

import seq2seq_fast as s2s  # noqa: E402

MINUTES = 6.0  # a job that has begun is finished
TESTS, SANITIZER = 0.4, 0.1  # of the time, at most; each tool of the latter
ROW_S = 1.0  # of timing, beside compiling
SANITIZED = "test_rows_masked or test_strided or test_adversarial"
COMPILED = {
    "compile": (plain, "default"),
    "compile, Linear": (plain_linear, "default"),
    "compile, max-autotune": (plain, "max-autotune"),
    "compile, Linear, max-autotune": (plain_linear, "max-autotune"),
}
QUICK = ("eager", "compile", "compile, Linear")


class Deadline:
    def __init__(self, seconds, now=time.monotonic):
        self.seconds, self.now, self.start = seconds, now, now()

    def left(self):
        return self.seconds - (self.now() - self.start)


@dataclass(frozen=True)
class Job:
    case: Case
    mode: str
    dtype: torch.dtype
    others: tuple[str, ...]  # what is measured beside the library's backends

    @property
    def name(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.name}, {self.mode}, {dtype}, against {'; '.join(self.others)}"


def published(case):
    return replace(case, B=case.scale_of or case.B)


def plan():
    """All jobs, the most telling first: time may end anywhere."""
    rows = [published(case) for case in WORKLOADS if case.name.startswith("R")]
    rows.sort(key=lambda case: not case.name.startswith(("R3 ", "R5 ")))
    steps = [case.step() for case in rows if case.recurrent]
    every, tuned = tuple(QUICK), tuple(x for x in COMPILED if "max-autotune" in x)
    return [
        *(Job(case, mode, torch.float32, every) for case in rows for mode in (FORWARD, BOTH)),
        *(Job(case, FORWARD, torch.float32, every) for case in steps),
        *(Job(case, mode, torch.bfloat16, every) for case in rows[:2] for mode in (FORWARD, BOTH)),
        *(Job(case, mode, torch.float32, tuned) for case in rows for mode in (FORWARD, BOTH)),
    ]


def calls(job, device):
    """{name: call} on the same inputs; the key projection is hoisted out of every one of them."""
    leaves = [x.to(device) for x in job.case.inputs(dtype=job.dtype)]
    query, keys, values, v = leaves
    if job.mode == BOTH:
        for x in leaves:
            x.requires_grad_()
    grad = torch.randn(job.case.B, job.case.T, job.case.D, device=device, dtype=job.dtype)

    def call(function, **kw):
        if job.mode == FORWARD:
            return lambda: function(query, keys, values, v, **kw)
        return lambda: torch.autograd.grad(function(query, keys, values, v, **kw)[0], leaves, grad)

    own = [x for x in s2s.backends()["additive_attention"][device] if x != "reference"]
    made = {f"library, {x}": call(s2s.additive_attention, backend=x) for x in own}
    for name in job.others:
        if name == "eager":
            made[name] = call(plain)
        else:
            function, mode = COMPILED[name]
            mode = None if mode == "default" else mode
            made[name] = call(torch.compile(function, dynamic=False, mode=mode))
    return made


def device_peak(call):
    """Bytes that a call takes beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(job, device="cuda", seconds=device_seconds, peak=device_peak):
    """A row of the results. What cannot be run is left out of it, and said to be."""
    torch._dynamo.reset()
    made, failed, peaks = {}, {}, {}
    for name, call in calls(job, device).items():
        try:
            call()
            peaks[name] = peak(call)
        except Exception as error:  # no memory, no compiler: the others can be measured still
            failed[name] = type(error).__name__
        else:
            made[name] = call
    samples = interleaved(made, seconds, ROW_S)
    return {
        "name": job.case.name,
        "mode": job.mode,
        "shape": {axis: getattr(job.case, axis) for axis in "BTSHD"},
        "scale": job.case.scale,
        "dtype": str(job.dtype).removeprefix("torch."),
        "elements": job.case.elements,
        "seconds": {name: statistics.median(x) for name, x in samples.items()},
        "peak_bytes": peaks,
        "failed": failed,
    }


def rows(jobs, deadline, results, run):
    """Measures jobs in their order until time is up; the names of the others are kept."""
    for i, job in enumerate(jobs):
        if deadline.left() <= 0:
            results.put("not_measured", [job.name for job in jobs[i:]])
            return
        results.append("rows", run(job))
    results.put("not_measured", [])


def step_times(found, goal, others):
    """What a step takes each contender and the library's ratios to the others, with the goals, if
    there are any."""
    times = {name: x for name, x in found.items() if isinstance(x, float)}
    ratios = {
        f"{other} over {own}": times[other] / times[own]
        for own in times
        for other in others
        if own.startswith("library") and other in times
    }
    shown = {f"{name}, us a step": 1e6 * x for name, x in times.items()}
    failed = {name: x for name, x in found.items() if name not in times}
    if goal is None:
        return shown | ratios | failed
    goals = {f"{other} over library": x for other, x in others.items()}
    return shown | ratios | failed | {"goal": {"us a step": goal, **goals}}


def put_all(deadline, results, jobs):
    """What each job finds, or why it finds nothing."""
    for name, job in jobs.items():
        try:
            found = job() if deadline.left() > 0 else {"skipped": "time was up"}
        except Exception as error:  # the others can be measured still
            found = {"skipped": f"{type(error).__name__}: {error}"}
        results.put(name, found)


def decoder(deadline, results, case=gpu_decoder.LETTERS, device="cuda", **options):
    jobs = {"decoder, largest error": lambda: gpu_decoder.errors(case, device)}
    for mode, goal in gpu_decoder.GOALS.items():
        jobs[f"decoder, {mode}"] = lambda mode=mode, goal=goal: step_times(
            gpu_decoder.measure(mode, case, device, **options), goal, gpu_decoder.RATIOS
        )
    put_all(deadline, results, jobs)


def decoding(deadline, results, models=gpu_decoding.MODELS, device="cuda", **options):
    jobs = {}
    for dtype in gpu_decoding.DTYPES:
        for model in models:
            for B, goal in model.goals.items():
                name = f"decoding, {model.name}, B {B}, {str(dtype).removeprefix('torch.')}"
                jobs[name] = lambda at=(model, B, dtype), goal=goal: step_times(
                    gpu_decoding.measure(*at, device, **options), goal, gpu_decoding.RATIOS
                )
    put_all(deadline, results, jobs)


def located(deadline, results, systems=gpu_location.SYSTEMS, device="cuda", **options):
    jobs = {}
    for system in systems:
        for mode in (FORWARD, BOTH, gpu_location.GREEDY):
            jobs[f"decoder that sees its location, {system.name}, {mode}"] = (
                lambda at=(system, mode): step_times(
                    gpu_location.measure(*at, device, **options), None, gpu_location.OTHERS
                )
            )
    put_all(deadline, results, jobs)


def machine():
    device = torch.cuda.get_device_properties(0)
    try:
        import triton
    except ImportError:
        version = None
    else:
        version = triton.__version__
    return {
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "backends": list(s2s.backends()["additive_attention"]["cuda"]),
    }


def ran(command, seconds):
    """ "passed", or the end of what a command that failed said, or that time was up."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=max(seconds, 1), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stdout, flush=True)
        return f"failed: {lines[-1] if lines else done.returncode}"
    return f"passed: {lines[-1]}"


def suite(backends, options=()):
    on = [x for backend in backends for x in ("--on", f"cuda:{backend}")]
    python = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    python += ["-W", "default"]  # what a driver or another release warns of is no failure
    files = [f"tests/test_{x}.py" for x in ("gpu", "additive_attention", "properties")]
    return [*python, *files, *on, *options]


def sanitizer(tool, backends):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    return [*command, *suite(backends, ["-k", SANITIZED])]


def sanitized(backends, seconds):
    """{tool: what it found}; only the compiled kernels have shared memory to race for."""
    own = [x for x in backends if x != "reference"]
    tools = {"memcheck": own, "racecheck": [x for x in own if x == "native"]}
    if not shutil.which("compute-sanitizer"):
        return dict.fromkeys(tools, "skipped: no compute-sanitizer here")
    return {
        tool: ran(sanitizer(tool, kernels), seconds) if kernels else "skipped: no kernels for it"
        for tool, kernels in tools.items()
    }


def extension_is_ready(extension, sources):
    """Whether it has CUDA kernels, wherever it was built, and is not older than its source."""
    newest = max(x.stat().st_mtime for x in sources.rglob("*") if x.is_file())
    return bool(s2s.library.CUDA_ARCHITECTURES) and extension.stat().st_mtime >= newest


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--check", action="store_true", help="only whether there is a GPU")
    parser.add_argument("--built", action="store_true", help="only whether a build can be spared")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu: no GPU here that torch can use (torch.cuda.is_available() is False)")
    if options.check:
        return 0
    if options.built:
        found = importlib.util.find_spec("seq2seq_fast._C")
        sources = ROOT / "seq2seq_fast" / "csrc"
        return int(found is None or not extension_is_ready(Path(found.origin), sources))
    deadline = Deadline(60 * options.minutes)
    results = gpu_report.Results(options.results, machine())
    backends = results.data["machine"]["backends"]

    results.put("tests", ran(suite(backends), TESTS * deadline.seconds))
    for tool, found in sanitized(backends, SANITIZER * deadline.seconds).items():
        results.put(tool, found)
    if "triton" in backends:
        import gpu_ceilings

        ceilings = gpu_ceilings.ceilings().items()
        jobs = {name: lambda f=function: f(results.data) for name, function in ceilings}
        put_all(Deadline(float("inf")), results, jobs)
    decoder(deadline, results)
    decoding(deadline, results)
    located(deadline, results)
    rows(plan(), deadline, results, measure)
    print(gpu_report.markdown(results.data))
    return int(not results.data["tests"].startswith("passed"))


if __name__ == "__main__":
    sys.exit(main())
