"""The benchmark report on made-up figures, and the cases that it and the tests share."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import FIGURES, ODD, STEPS, WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_seq2seq  # noqa: E402
import report  # noqa: E402

ATTENTION = {
    "kind": "attention",
    "name": "step",
    "mode": "forward",
    "shape": {"B": 4, "T": 1, "S": 5, "H": 8, "D": 8},
    "scale": "B 4 of 16",
    "prepared": True,
    "dtype": "float32",
    "rounds": 5,
    "seconds": {
        "library": 2e-3,
        "library, keys not prepared": 4e-3,
        "eager": 1e-2,
        "compile": 6e-3,
        report.FLOOR: 1e-3,
    },
    "elements_per_second": 8e4,
    "peak_bytes": {"library": 1_000_000, "eager": 20_000_000},
}
MODEL = ATTENTION | {
    "kind": "model",
    "name": "small model",
    "scale": "as stated",
    "seconds": {"library": 1.0, "tutorial": 3.0},
}
del MODEL["peak_bytes"], MODEL["elements_per_second"]
GROWTH = {
    "kind": "growth",
    "name": "small model",
    "steps": (10, 20),
    "seconds": {"library": 0.1, "T 20": 0.22},
}
DECODING = MODEL | {
    "kind": "decoding",
    "mode": "greedy",
    "steps": 10,
    "seconds": {"library": 0.5, "tutorial code": 5.0, "ONNX Runtime": 2.0},
}
VARIANT = DECODING | {"mode": "greedy, tokens alone"}
PART = DECODING | {"kind": "part", "mode": "one step", "steps": 1}
DROP_IN = MODEL | {"kind": "drop_in", "name": "a head", "seconds": {"library": 1e-3, "plain": 4e-3}}
RESULTS = {
    "machine": {
        "cpu": "AMD EPYC(tm) 7-Core @ 2.00GHz",
        "threads": 2,
        "cpu_capability": "AVX2",
        "torch": "2.0",
        "python": "3.10",
        "date": "2000-01-01",
    },
    "rows": [ATTENTION, MODEL, DECODING, VARIANT, PART, DROP_IN, GROWTH],
    "accuracy": [
        {"name": "step", "output": "context", "library": 1e-7, "eager": 2e-7}
        | {"ratio_median": 0.5, "ratio_max": 0.75, "allowed_median": 0.25}
    ],
}


def line_of(text, *words):
    (line,) = (x for x in text.splitlines() if all(word in x for word in words))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios():
    ratios = report.ratios(ATTENTION)
    expected = {"library, keys not prepared": 2, "eager": 5, "compile": 3, report.FLOOR: 0.5}
    assert ratios == pytest.approx(expected)


def test_markdown_shows_ratios_scale_and_what_did_not_run():
    text = report.markdown(RESULTS)
    prepared = line_of(text, "step (keys prepared)")
    assert prepared[2:5] == ["B 4 of 16", "forward", "2.00 ms"]
    assert prepared[-4:] == ["5.00×", "3.00×", "–", "0.50×"]
    assert line_of(text, "step (keys not prepared)")[-4:] == ["2.50×", "1.50×", "–", "0.25×"]
    assert line_of(text, "small model", "3.00×")[-3:] == ["1000.00 ms", "3.00×", "–"]
    assert line_of(text, "| greedy |")[3:5] == ["float32", "50.00 ms"]
    assert line_of(text, "tokens alone")[-3:] == ["10.00×", "4.00×", "–"]
    assert line_of(text, "a head")[2:] == ["forward", "1.00 ms", "4.00×"]
    assert line_of(text, "one step")[3:5] == ["float32", "500.00 ms"]
    assert line_of(text, "step", "20 MB") == ["step", "B 4 of 16", "1 MB", "20 MB"]
    assert line_of(text, "a step", "10.00 ms") == ["a step", "10.00 ms", "11.00 ms"]
    assert line_of(text, "of 10 steps'") == ["of 10 steps'", "100%", "110%"]
    assert line_of(text, "context")[-3:] == ["0.50", "0.75", "25%"]


def test_disturbed_rows_are_marked():
    assert "*" not in report.markdown(RESULTS)
    results = RESULTS | {"rows": [ATTENTION | {"taken_by_others": 0.5}, MODEL]}
    text = report.markdown(results)
    assert line_of(text, "step (keys prepared)")[4] == "2.00 ms *"
    assert "more than 5%" in text


def test_block_replacement_is_idempotent_and_keeps_the_rest():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.replace_block(text, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.replace_block(once, "new") == once
    for bad in ("", report.BEGIN, report.END + report.BEGIN, text + text):
        with pytest.raises(ValueError, match="expected one"):
            report.replace_block(bad, "new")


def test_machines_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "chart", lambda results, path: path.name)
    report.write(RESULTS, tmp_path)
    other = RESULTS["machine"] | {"cpu": "Xeon 7"}
    report.write(RESULTS | {"machine": other, "rows": [MODEL, DROP_IN]}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "1. AMD EPYC" in text and "2. Xeon 7" in text and "a head" not in text
    assert line_of(text, "small model", "| forward |")[-2:] == ["3.00×", "3.00×"]
    assert line_of(text, "tokens alone")[-2:] == ["10.00× / 4.00×", "–"]


def test_written_files(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "chart", lambda results, path: path.name)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}{report.END}")
    said = report.write(RESULTS, tmp_path / "results", readme)
    stem = "cpu-amd-epyc-7-core-2-threads"
    assert said == [f"Wrote {stem}.json, {stem}.md, README.md", f"{stem}.png", "Wrote README.md"]
    data = json.loads((tmp_path / "results" / f"{stem}.json").read_text())
    assert data.keys() == {"machine", "rows", "accuracy"}
    assert data["machine"].keys() >= {"cpu", "threads", "torch", "date"}
    assert data["rows"][0].keys() >= {"name", "mode", "shape", "scale", "dtype", "seconds"}
    assert data["rows"][0]["ratios"]["eager"] == pytest.approx(5)
    assert "small model" in (tmp_path / "results" / f"{stem}.md").read_text()
    assert line_of(readme.read_text(), "attention, forward") == [
        *(
            "step (B 4 T 1 S 5 H 8)",
            "attention, forward",
            "2.00 ms",
            "5.00×",
            "3.00× torch.compile",
        ),
    ]
    assert line_of(readme.read_text(), "greedy")[1:] == [
        *("float32, greedy", "50.00 ms a step", "10.00×", "4.00× ONNX Runtime"),
    ]
    assert line_of(readme.read_text(), "small model", "1000.00 ms")[3:] == ["3.00×", "–"]
    assert "one step" not in readme.read_text()  # parts are the results file's
    assert "0.50 in the median" in readme.read_text() and "25% at most" in readme.read_text()


def test_peak_memory_goes_to_the_row_that_it_was_measured_for(monkeypatch):
    case = bench_seq2seq.LETTERS  # whose shape other rows have too
    row = MODEL | {"name": case.name, "shape": case.shape(), "mode": case.what}
    others = [row | {"kind": "growth"}, row | {"mode": bench_seq2seq.STEP}, MODEL]
    peaks = {"library": 1_000_000, "eager": 20_000_000}
    monkeypatch.setattr(bench_seq2seq.memory, "peaks", lambda *_: peaks)
    rows = [row, *others]
    bench_seq2seq.test_peak_memory(case, rows)
    assert ["peak_bytes" in r for r in rows] == [True, False, False, False]


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    assert report.chart(RESULTS, tmp_path / "ratios.png") == "Wrote ratios.png"
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_machine_has_no_path():
    assert not any("/" in str(x) for x in report.machine().values())


@pytest.mark.parametrize(
    "case", [*ODD, *WORKLOADS, *STEPS, *dict(FIGURES)], ids=lambda case: case.name
)
def test_cases_make_inputs_of_the_stated_shapes(case):
    B, T, S, H, D = case.B, case.T, case.S, case.H, case.D
    assert case.plain_bytes == 4 * B * T * S * H <= 200e6
    tensors = case.inputs(seed=1, dtype=torch.bfloat16)
    assert [tuple(x.shape) for x in tensors] == [(B, T, H), (B, S, H), (B, S, D), (H,)]
    assert all(x.dtype == torch.bfloat16 for x in tensors)
    again = case.inputs(seed=1, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))


def test_a_processor_that_does_not_say_its_model_is_told_by_its_numbers(tmp_path):
    path = tmp_path / "cpuinfo"
    text = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {}\n"
    for name, want in (
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor"),
    ):
        path.write_text(text.format(name))
        assert report.cpu_model(path) == want
    assert report.cpu_model(tmp_path / "none")


def test_the_instruction_set_is_part_of_the_machines_name_where_it_is_not_all(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    names, stems = [], set()
    for has, asked in (("AVX512", None), ("AVX2", None), ("AVX2", "avx2")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda has=has: has)
        if asked:
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
        names.append(report.machine()["cpu"])
        stems.add(report.file_stem(report.machine()))
    best = names[0]
    assert names == [best, best + ", AVX2", best + ", avx2 alone"] and len(stems) == 3
