"""`make gpu` as far as it goes without a GPU: its plan, its rows on the CPU, its report, its
kernels compiled."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sass
import torch
from cases import BOTH, FORWARD, WORKLOADS, Case

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_decoder  # noqa: E402
import gpu_decoding  # noqa: E402
import gpu_location  # noqa: E402
import gpu_report  # noqa: E402
import timing  # noqa: E402

MACHINE = {
    "gpu": "NVIDIA H200 NVL",
    "multiprocessors": 100,
    "torch": "2.11",
    "triton": "3.6",
    "cuda": "13.0",
    "date": "2000-01-01",
}
TINY = Case("R0 tiny", 2, 3, 4, 8, 5)
SMALL = replace(gpu_decoder.LETTERS, B=2, S=3, T=4, V=9, H=8, emb=5)


def broken(*_, **__):
    raise MemoryError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_without_a_gpu_it_says_so_in_one_line(arguments):
    with pytest.raises(SystemExit, match=r"^gpu: no GPU here that torch can use \([^\n]*\)$"):
        gpu.main(arguments)


def test_the_plan_has_every_row_and_the_most_telling_first():
    jobs = gpu.plan()
    assert {job.case.name.split()[0] for job in jobs[:4]} == {"R3", "R5"}
    for case in WORKLOADS:
        of_case = [job for job in jobs if job.case.name == case.name]
        if case.name.startswith("R"):
            others = {(job.mode, name) for job in of_case for name in job.others}
            assert others == {(m, x) for m in (FORWARD, BOTH) for x in ("eager", *gpu.COMPILED)}
            assert all(job.case.B == case.scale_of for job in of_case)
    assert any(job.case.name.startswith("R7") and job.case.T == 1 for job in jobs)
    assert len({job.name for job in jobs}) == len(jobs)


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_a_row_measured_on_the_cpu(mode, monkeypatch):
    monkeypatch.setitem(gpu.COMPILED, "compile", (broken, "default"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu, "ROW_S", 0.01)
    job = gpu.Job(TINY, mode, torch.float32, ("eager", "compile"))
    row = gpu.measure(job, "cpu", timing.host_seconds, peak=lambda call: 7)
    assert row["seconds"].keys() == {"library, native", "eager"} == row["peak_bytes"].keys()
    assert all(1e-7 < x < 1 for x in row["seconds"].values())
    assert row["failed"] == {"compile": "MemoryError"}
    assert row["elements"] == 2 * 3 * 4 * 8 and row["dtype"] == "float32" and row["mode"] == mode
    json.dumps(row)


@pytest.fixture
def decoder(monkeypatch, tmp_path):
    """decoder(seconds left, capture): what is found of it on the CPU, and the report."""

    def run(left=9, capture=broken):
        results = gpu_report.Results(tmp_path, MACHINE)
        gpu.decoder(
            gpu.Deadline(left, lambda: 0), results, SMALL, "cpu",
            seconds=timing.host_seconds, capture=capture,
        )  # fmt: skip
        found = {x.removeprefix("decoder, "): y for x, y in results.data.items()}
        return found, gpu_report.markdown(results.data)

    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(gpu_decoder, "ROW_S", 0.01)
    return run


def test_the_decoder_measured_on_the_cpu(decoder):
    found, text = decoder(capture=lambda call: call)
    own = [f"library, native, {how}" for how in ("steps", "together")]
    captured = [f"{name}, captured" for name in own]
    for mode, goal in ((FORWARD, 25), (BOTH, 80)):
        times = {f"{name}, us a step" for name in (*own, *captured, "eager", "compile")}
        ratios = {f"{x} over {name}" for x in ("eager", "compile") for name in own + captured}
        assert found[mode].keys() == times | ratios | {"goal"}
        assert all(1 < found[mode][name] < 1e6 for name in times)
        assert f"| decoder, {mode}, goal, us a step | {goal} |" in text
        assert f"| decoder, {mode}, goal, eager over library | 10 |" in text
        assert f"| decoder, {mode}, eager over library, native, together |" in text
    assert found["largest error"].keys() == {*own, "eager"}
    assert all(0 < x < 1e-6 for x in found["largest error"].values())


def test_what_fails_of_the_decoder_leaves_the_rest(decoder, monkeypatch):
    found, _ = decoder()
    assert found[FORWARD]["library, native, steps, captured"] == "MemoryError"
    assert "library, native, steps, us a step" in found[FORWARD]
    measure = gpu_decoder.measure

    def forward_alone(mode, *args, **options):
        return (measure if mode == FORWARD else broken)(mode, *args, **options)

    monkeypatch.setattr(gpu_decoder, "measure", forward_alone)
    found, _ = decoder()
    assert "library, native, steps, us a step" in found[FORWARD]
    assert found[BOTH] == {"skipped": "MemoryError: "}


def test_no_decoder_when_time_is_up(decoder):
    found, _ = decoder(left=0)
    assert [found[x] for x in ("largest error", FORWARD, BOTH)] == 3 * [{"skipped": "time was up"}]


def test_decoding_measured_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda module, **_: broken)
    monkeypatch.setattr(gpu_decoding, "ROW_S", 0.01)
    (model, gnmt), results = gpu_decoding.MODELS, gpu_report.Results(tmp_path, MACHINE)
    small = replace(model, V=9, S=3, T=4, H=8, emb=5, goals={1: 12, 3: 13})
    options = {"models": [small], "device": "cpu", "seconds": timing.host_seconds}
    gpu.decoding(gpu.Deadline(9, lambda: 0), results, **options)
    own = ["library, steps", "library, together"]
    times = {f"{name}, us a step" for name in (*own, "eager")}
    ratios = {f"eager over {name}" for name in own}
    for dtype in ("bfloat16", "float32"):
        for B, goal in small.goals.items():
            found = results.data[f"decoding, tutorial model, B {B}, {dtype}"]
            assert found.keys() == times | ratios | {"compile, reduce-overhead", "goal"}
            assert all(1 < found[name] < 1e6 for name in times)
            assert found["goal"]["us a step"] == goal
            assert found["goal"]["eager over library"] == 10
    assert gnmt.goals == {1: 70} and model.goals == {1: 12, 8: 12, 64: 12}
    gpu.decoding(gpu.Deadline(-1, lambda: 0), results, **options)
    assert results.data["decoding, tutorial model, B 1, float32"] == {"skipped": "time was up"}


def test_decoders_that_see_their_location_measured_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_decoder, "ROW_S", 0.01)
    results = gpu_report.Results(tmp_path, MACHINE)
    small = [replace(x, B=2, T=3, S=5, H=8, E=4, A=6, D=7, V=9) for x in gpu_location.SYSTEMS]
    options = {"device": "cpu", "seconds": timing.host_seconds, "capture": lambda call: call}
    gpu.located(gpu.Deadline(9, lambda: 0), results, small, **options)
    for system in small:
        for mode in (FORWARD, BOTH):
            found = results.data[f"decoder that sees its location, {system.name}, {mode}"]
            own = ["library, native", "library, native, captured"]
            assert found.keys() == {
                *(f"{name}, us a step" for name in (*own, "eager")),
                *(f"eager over {name}" for name in own),
            }
            assert all(found[f"{name}, us a step"] > 1 for name in own)
        found = results.data[f"decoder that sees its location, {system.name}, greedy"]
        assert found["library, native, us a step"] > 1 and found["eager over library, native"] > 0
    gpu.located(gpu.Deadline(-1, lambda: 0), results, small[:1], **options)
    name = f"decoder that sees its location, {small[0].name}, {FORWARD}"
    assert results.data[name] == {"skipped": "time was up"}


def row_of(job, own=1e-3, **others):
    return {
        "name": job.case.name,
        "mode": job.mode,
        "shape": {"B": 2},
        "scale": "as published",
        "dtype": "float32",
        "elements": 3 * 10**9,
        "seconds": {"library, triton": own, **others},
        "peak_bytes": {"library, triton": 10**6, "eager": 2 * 10**7},
        "failed": {},
    }


def test_rows_stop_when_time_is_up_and_what_is_left_is_named(tmp_path):
    now = [0.0]
    jobs = [gpu.Job(TINY, FORWARD, torch.float32, (x,)) for x in ("eager", "compile", "other")]

    def run(job):
        now[0] += 30
        return row_of(job, eager=5e-3)

    results = gpu_report.Results(tmp_path, MACHINE)
    deadline = gpu.Deadline(50, lambda: now[0])
    gpu.rows(jobs, deadline, results, run)
    saved = json.loads((tmp_path / "nvidia-h200-nvl.json").read_text())
    assert len(saved["rows"]) == 2 and saved["not_measured"] == [jobs[2].name]
    assert f"Not measured: {jobs[2].name}." in (tmp_path / "nvidia-h200-nvl.md").read_text()


def test_what_was_measured_survives_an_interruption(tmp_path):
    done = []

    def run(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return row_of(job)

    results = gpu_report.Results(tmp_path, MACHINE)
    with pytest.raises(KeyboardInterrupt):
        gpu.rows(gpu.plan(), gpu.Deadline(100, lambda: 0), results, run)
    saved = json.loads((tmp_path / "nvidia-h200-nvl.json").read_text())
    assert [row["name"] for row in saved["rows"]] == [job.case.name for job in done]
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".json", ".md"]


def test_report():
    job = gpu.Job(TINY, FORWARD, torch.float32, ())
    data = {
        "machine": MACHINE,
        "tests": "passed: 3 passed in 1.0 s",
        "clock_hz": 2e9,
        "special_functions": {"MUFU.RCP": {"0": 15.5}},
        "barrier_seconds": {"skipped": "no nvcc here"},
        "rows": [
            row_of(job, eager=20e-3) | {"failed": {"compile": "OutOfMemoryError"}},
            row_of(job, own=2e-3, **{"compile, max-autotune": 8e-3}),
        ],
    }
    text = gpu_report.markdown(data)
    (line,) = (x for x in text.splitlines() if x.startswith("| R0 tiny"))
    cells = [x.strip() for x in line.strip("|").split("|")]
    # 3e9 elements in 1 ms are 3e12 a second, so 15 a clock on each of 100 multiprocessors at 2 GHz.
    assert cells[4:9] == ["triton", "1.00 ms", "3e+03", "15.00", "94%"]
    assert cells[9:14] == ["20.00×", "–", "–", "4.00×", "–"]
    assert cells[14:] == ["1 MB", "20 MB"]
    assert "| special_functions, MUFU.RCP, 0 | 15.5 |" in text
    assert "| barrier_seconds, skipped | no nvcc here |" in text
    assert "Could not run: R0 tiny, forward, float32: compile (OutOfMemoryError)." in text


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        ("print('so it is')", 60, "passed: so it is"),
        ("print('no'); raise SystemExit(3)", 60, "failed: no"),
        ("import time; time.sleep(60)", 1, "not finished in 1 s"),
    ],
)
def test_what_is_said_of_a_command(code, seconds, said, capsys):
    assert gpu.ran([sys.executable, "-c", code], seconds) == said
    assert ("no" in capsys.readouterr().out) == said.startswith("failed")


@pytest.mark.unsanitized
def test_the_device_suite_can_be_collected():
    compute_sanitizer = gpu.sanitizer("memcheck", ["native", "triton"])
    command = compute_sanitizer[compute_sanitizer.index(sys.executable) :]
    said = gpu.ran([*command, "--collect-only"], 60)
    assert said.startswith("passed: ") and "no tests" not in said


WITHOUT_HYPOTHESIS = """
import sys, pytest
sys.modules["hypothesis"] = None
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.unsanitized
def test_the_device_suite_needs_no_more_than_pytest(monkeypatch):
    """A machine with a GPU may have nothing else, and no network."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    python, _, _, *arguments = gpu.suite(["native"], ["--collect-only"])
    said = gpu.ran([python, "-c", WITHOUT_HYPOTHESIS, *arguments], 60)
    assert said.startswith("passed: ") and "tests collected" in said and "error" not in said


def test_what_the_sanitizers_are_given(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu, "ran", lambda command, seconds: " ".join(map(str, command)))
    found = gpu.sanitized(["native", "triton", "reference"], 9)
    assert "--tool memcheck" in found["memcheck"] and "--tool racecheck" in found["racecheck"]
    assert "cuda:triton" in found["memcheck"] and "cuda:reference" not in found["memcheck"]
    assert "cuda:native" in found["racecheck"] and "cuda:triton" not in found["racecheck"]
    assert gpu.sanitized(["triton", "reference"], 9)["racecheck"].startswith("skipped")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert set(gpu.sanitized(["native"], 9).values()) == {"skipped: no compute-sanitizer here"}


def test_an_extension_without_cuda_kernels_or_older_than_its_source_is_built_anew(
    monkeypatch, tmp_path
):
    extension, source = tmp_path / "_C.so", tmp_path / "csrc" / "cuda" / "x.cu"
    source.parent.mkdir(parents=True)
    for path, age in ((extension, 5), (source, 9)):
        path.touch()
        os.utime(path, (age, age))
    monkeypatch.setattr(gpu.s2s.library, "CUDA_ARCHITECTURES", (80, 90))
    assert not gpu.extension_is_ready(extension, tmp_path / "csrc")
    os.utime(source, (2, 2))
    os.utime(source.parent, (9, 9))
    assert gpu.extension_is_ready(extension, tmp_path / "csrc")
    monkeypatch.setattr(gpu.s2s.library, "CUDA_ARCHITECTURES", ())
    assert not gpu.extension_is_ready(extension, tmp_path / "csrc")


@pytest.mark.unsanitized
class TestCeilings:
    @pytest.fixture
    def ceilings(self):
        pytest.importorskip("triton")
        import gpu_ceilings

        if gpu_ceilings.triton.knobs.runtime.interpret:
            pytest.skip("nothing is compiled where TRITON_INTERPRET=1")
        return gpu_ceilings

    def cubin(self, kernel, **constants):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        types |= {name: "*fp32" for name in ("x", "out") if name in types}
        if kernel.arg_names == ["out", "iterations"]:
            types["out"] = "*i64"
        source = ASTSource(kernel, signature=types, constexprs=constants)
        return compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    @pytest.mark.parametrize("name", ["MUFU.TANH", "MUFU.RCP", "MUFU.EX2"])
    def test_special_functions_are_what_is_timed(self, name, ceilings):
        code = ceilings.FUNCTIONS[name]
        loops = sass.kernel(self.cubin(ceilings.functions_kernel, CODE=code, FFMA=3)).loops
        (loop,) = (x for x in loops if x.count("MUFU"))
        assert loop.count(name) == loop.count("MUFU") and loop.count("MUFU") % 8 == 0
        assert loop.count("FFMA") == 3 * loop.count("MUFU")
        assert loop.slots < 1.25 * (loop.count("FFMA") + loop.count("MUFU"))

    def test_the_other_kernels_compile(self, ceilings):
        for kernel in (ceilings.clock_kernel, ceilings.tanh_kernel, ceilings.empty_kernel):
            assert self.cubin(kernel)[:4] == b"\x7fELF"

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
    def test_the_barriers_compile(self, ceilings, tmp_path):
        assert ceilings.compile_barriers(tmp_path, "sm_90").stat().st_size > 0
