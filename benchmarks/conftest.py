"""Options, the interleaved timer and the report at the end.

python -m pytest -q benchmarks [--full] [--readme]
"""

import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the cases are shared with the tests

import report  # noqa: E402
from timing import PAUSE_S, SAMPLE_S, interleaved  # noqa: E402

RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all workloads, not the quick set")
    parser.addoption("--readme", action="store_true", help="put the table into README.md")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[RESULTS] = {"rows": [], "accuracy": []}


def pytest_generate_tests(metafunc):
    """A bench file's QUICK and FULL lists hold the argument lists of its tests, by test name."""
    sets = metafunc.module.FULL if metafunc.config.getoption("full") else metafunc.module.QUICK
    if metafunc.function.__name__ in sets:
        names, values = sets[metafunc.function.__name__]
        ids = ["-".join(getattr(x, "name", str(x)) for x in row) for row in values]
        metafunc.parametrize(names, values, ids=[i.replace(" ", "_") for i in ids])


def cpu_seconds():
    """CPU time so far of (all processes and what the host withheld, this one); Linux only."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in ticks)
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def taken_by_others(before, after, wall):
    """Share of the machine's CPU time that this process did not use and others did."""
    if before is None or after is None:
        return None
    busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / (wall * os.cpu_count()))


def runnable(contenders):
    """Without the contenders that torch.compile cannot build here (no compiler, say)."""
    kept = {}
    for name, call in contenders.items():
        try:
            call()
        except Exception as error:
            if not name.startswith("compile"):
                raise
            warnings.warn(f"{name} left out: {type(error).__name__}", stacklevel=2)
        else:
            kept[name] = call
    return kept


@pytest.fixture
def rows(request):
    """What `compare` has recorded so far."""
    return request.config.stash[RESULTS]["rows"]


@pytest.fixture
def compare(benchmark, rows):
    """compare(contenders, **what) times them in one run and adds a row to the results.

    The first contender is the library; pytest-benchmark keeps its times for --benchmark-compare,
    while all ratios come from the interleaved rounds.
    """
    torch._dynamo.reset()

    def run(contenders, *, pause_s=PAUSE_S, **what):
        contenders = runnable(contenders)
        before, start = cpu_seconds(), time.perf_counter()
        samples = interleaved(contenders, pause_s=pause_s)
        others = taken_by_others(before, cpu_seconds(), time.perf_counter() - start)
        medians = {name: statistics.median(x) for name, x in samples.items()}
        quartiles = {name: statistics.quantiles(x, n=4)[::2] for name, x in samples.items()}
        row = (
            {"dtype": "float32"}
            | what
            | {
                "rounds": len(samples["library"]),
                "seconds": medians,
                "quartiles": quartiles,
                "taken_by_others": others,
            }
        )
        rows.append(row)
        benchmark.extra_info["ratios"] = report.ratios(row)
        loops = max(1, round(SAMPLE_S / medians["library"]))
        benchmark.pedantic(contenders["library"], rounds=3, iterations=loops)
        return row

    return run


@pytest.fixture
def record_accuracy(request):
    return request.config.stash[RESULTS]["accuracy"].append


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    results = {"machine": report.machine()} | config.stash[RESULTS]
    if not results["rows"] and not results["accuracy"]:
        return
    say = terminalreporter.write_line
    say("\n" + report.markdown(results) + "\n")
    narrowed = config.option.keyword or any(a.endswith(".py") or "::" in a for a in config.args)
    if exitstatus or narrowed:
        say("Not all rows ran: no files written.")
        return
    readme = ROOT / "README.md" if config.getoption("readme") else None
    for line in report.write(results, Path(__file__).parent / "results", readme):
        say(line)
