"""Results as JSON, Markdown and a chart. Ratios are baseline / library: above 1 is faster."""

import datetime
import json
import os
import platform
import re
import statistics
from pathlib import Path

BASELINES = {
    "eager": "eager",
    "compile": "compile",
    "compile, Linear": "compile, Linear(H, 1)",
}
FLOOR = "reading keys and values once"  # a sum over as many numbers, where each is used only once
DISTURBED = 0.05  # share of the machine's CPU time
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name; where that tells no model, as in many virtual machines, its numbers too."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    name = field("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or not field("cpu family"):
        return name
    return f"{name} (family {field('cpu family')}, model {field('model')})"


def machine() -> dict:
    import torch

    lowered = os.environ.get("ATEN_CPU_CAPABILITY")  # the instruction set that was asked for
    # A virtual machine may hide that of its processor, which its name does not tell.
    has = torch.backends.cpu.get_cpu_capability()
    narrow = f"{lowered} alone" if lowered else "AVX2" if has == "AVX2" else ""
    return {
        "cpu": cpu_model() + (f", {narrow}" if narrow else ""),
        "threads": torch.get_num_threads(),
        "cpu_capability": has,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def file_stem(machine: dict) -> str:
    """cpu-amd-epyc-7763-64-core-processor-2-threads"""
    name = re.sub(r"\((r|tm)\)|@.*", "", machine["cpu"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"cpu-{slug}-{machine['threads']}-threads"


def ratios(row: dict) -> dict[str, float]:
    """How many times as long as the library each of the others takes."""
    return {
        name: seconds / row["seconds"]["library"]
        for name, seconds in row["seconds"].items()
        if name != "library"
    }


def _disturbed(row: dict) -> str:
    """A star where other processes had the CPU for a noticeable part of the time."""
    return " *" if (row.get("taken_by_others") or 0) > DISTURBED else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _name(row: dict) -> str:
    return row["name"] + (" (keys prepared)" if row["prepared"] else "")


def _shape(row: dict) -> str:
    return " ".join(f"{axis} {n}" for axis, n in row["shape"].items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _attention(rows: list[dict]) -> str:
    unprepared = "library, keys not prepared"
    head = ["case", "shape", "scale", "what", "library", "G elements/s"]
    head += [f"against {label}" for label in (*BASELINES.values(), FLOOR)]
    lines = []
    for row in rows:
        ratio = ratios(row)
        time, rate = (
            _time(row["seconds"]["library"]) + _disturbed(row),
            row["elements_per_second"] / 1e9,
        )
        against = [_ratio(ratio.get(baseline)) for baseline in (*BASELINES, FLOOR)]
        line = [_name(row), _shape(row), row["scale"], row["mode"], time, f"{rate:.3g}", *against]
        lines.append(line)
        if unprepared in row["seconds"]:
            seconds = row["seconds"][unprepared]
            rate = rate * row["seconds"]["library"] / seconds
            against = [
                _ratio(r and r / ratio[unprepared])
                for r in (ratio.get(b) for b in (*BASELINES, FLOOR))
            ]
            lines.append(
                [f"{row['name']} (keys not prepared)", *line[1:4], _time(seconds), f"{rate:.3g}"]
                + against
            )
    return _table(head, lines)


def _models(rows: list[dict]) -> str:
    head = ["model", "shape", "what", "library", "a step", "against the tutorial's code"]
    head += ["against PyTorch, hoisted by hand"]
    lines = []
    for row in rows:
        seconds, ratio = row["seconds"]["library"], ratios(row)
        line = [row["name"], _shape(row), row["mode"], _time(seconds) + _disturbed(row)]
        line += [_time(seconds / row["shape"]["T"])]
        lines.append(line + [_ratio(ratio.get(name)) for name in ("tutorial", "hoisted")])
    return _table(head, lines)


def _decoding(rows: list[dict]) -> str:
    others = ["tutorial code", "ONNX Runtime", "reading the weights"]
    head = ["model", "shape", "what", "weights", "library, a step"]
    head += [f"against {other}" for other in others]
    lines = [
        [row["name"], _shape(row), row["mode"], row["dtype"]]
        + [_time(row["seconds"]["library"] / row["steps"]) + _disturbed(row)]
        + [_ratio(ratios(row).get(other)) for other in others]
        for row in rows
    ]
    return _table(head, lines)


def _drop_in(rows: list[dict]) -> str:
    head = ["module", "shape", "what", "library", "against plain PyTorch"]
    lines = []
    for row in rows:
        time = _time(row["seconds"]["library"]) + _disturbed(row)
        lines.append([row["name"], _shape(row), row["mode"], time, _ratio(ratios(row)["plain"])])
    return _table(head, lines)


def _located(rows: list[dict]) -> str:
    head = ["decoder", "shape", "what", "library", "a step", "against plain PyTorch"]
    lines = []
    for row in rows:
        seconds = row["seconds"]["library"]
        line = [row["name"], _shape(row), row["mode"], _time(seconds) + _disturbed(row)]
        lines.append(line + [_time(seconds / row["steps"]), _ratio(ratios(row)["plain"])])
    return _table(head, lines)


def _growth(rows: list[dict]) -> str:
    """Of rows whose contenders are the library over each number of steps."""
    (row,) = rows
    each = [t / n for t, n in zip(row["seconds"].values(), row["steps"], strict=True)]
    head = ["steps", *map(str, row["steps"])]
    times = ["a step" + _disturbed(row), *map(_time, each)]
    return _table(
        head, [times, [f"of {row['steps'][0]} steps'", *(f"{x / each[0]:.0%}" for x in each)]]
    )


def _memory(rows: list[dict]) -> str:
    head = ["case", "scale", "library", "eager"]
    lines = [
        [row["name"], row["scale"]]
        + [f"{row['peak_bytes'][name] / 1e6:.0f} MB" for name in ("library", "eager")]
        for row in rows
    ]
    return _table(head, lines)


def _accuracy(entries: list[dict]) -> str:
    head = ["case", "output", "library", "eager", "ratio, median", "ratio, largest", "of allowed"]
    lines = [
        [e["name"], e["output"], f"{e['library']:.2g}", f"{e['eager']:.2g}"]
        + [f"{e['ratio_median']:.2f}", f"{e['ratio_max']:.2f}", f"{e['allowed_median']:.0%}"]
        for e in entries
    ]
    return _table(head, lines)


def _introduction(results: dict) -> str:
    m = results["machine"]
    text = (
        f"{m['cpu']}, {m['threads']} threads, PyTorch {m['torch']}, float32, {m['date']}. Medians"
        " of interleaved rounds; a ratio is the other's time over the library's, above 1 is faster."
    )
    if any(_disturbed(row) for row in results["rows"]):
        text += f" * Other processes had more than {DISTURBED:.0%} of the CPU: not to be relied on."
    return text


def _rows(results: dict, kind: str) -> list[dict]:
    return [row for row in results["rows"] if row["kind"] == kind]


def _sections(results: dict) -> list[tuple]:
    """(title, table, entries) that the README and the results file share."""
    return [
        ("", _models, _rows(results, "model")),
        ("Decoding, the encoder left out:", _decoding, _rows(results, "decoding")),
        (
            "Decoders whose attention sees where it has attended before, and one that reads"
            " attentional vectors:",
            _located,
            _rows(results, "located"),
        ),
    ]


def _join(parts: list[str], sections: list[tuple]) -> str:
    for title, table, entries in sections:
        if entries:
            parts += [title] * bool(title) + [table(entries)]
    return "\n\n".join(parts)


# What the README shows of each kind: who counts as plain PyTorch, and who are the others.
_SHOWN = {
    "attention": (("eager",), ("compile", "compile, Linear")),
    "model": (("tutorial",), ("hoisted",)),
    "decoding": (("tutorial code",), ("ONNX Runtime",)),
    "located": (("plain",), ()),
}
_OTHERS = {
    "compile": "torch.compile",
    "compile, Linear": "torch.compile",
    "hoisted": "hoisted by hand",
}


def _against_the_best(ratio: dict[str, float], others: tuple[str, ...]) -> tuple[str, str]:
    """The ratio of the fastest of the others, and which that is."""
    there = {name: ratio[name] for name in others if name in ratio}
    if not there:
        return "–", ""
    best = min(there, key=lambda name: there[name])
    return _ratio(there[best]), _OTHERS.get(best, best)


def _case(row: dict) -> tuple[str, str]:
    """A row's case and what is done with it, for people."""
    sizes = {axis: n for axis, n in row["shape"].items() if axis in "BTSVHA"}
    shape = " ".join(f"{axis} {n}" for axis, n in sizes.items())
    what = {"attention": "attention, ", "decoding": f"{row.get('dtype')}, "}.get(row["kind"], "")
    return f"{row['name']} ({shape})", what + row["mode"]


def summary(results: dict) -> str:
    """For the README: a line for each case, without variants, and accuracy in a sentence."""
    lines = []
    for kind, (plain, others) in _SHOWN.items():
        for row in _rows(results, kind):
            if kind == "decoding" and ("," in row["mode"] or row["mode"] == "sampled"):
                continue  # variants
            seconds, ratio = row["seconds"]["library"], ratios(row)
            time = _time(seconds)
            if kind in ("decoding", "located"):
                time = _time(seconds / row["steps"]) + " a step"
            other = " ".join(_against_the_best(ratio, others)).strip()
            against = [_against_the_best(ratio, plain)[0], other]
            lines.append([*_case(row), time + _disturbed(row), *against])
    head = ["case", "what", "library", "plain PyTorch takes", "the best of the others takes"]
    text = f"{_introduction(results)}\n\n{_table(head, lines)}"
    if not results["accuracy"]:
        return text
    median = statistics.median(entry["ratio_median"] for entry in results["accuracy"])
    most = max(entry["allowed_median"] for entry in results["accuracy"])
    return (
        f"{text}\n\nLargest error against float64 over that of eager PyTorch, attention and its"
        f" gradients: {median:.2f} in the median. Of what the tests' accuracy rule allows:"
        f" {most:.0%} at most."
    )


def across(folder: Path) -> str:
    """Models and decoding on all machines that there are results of."""
    stems = sorted(path.stem for path in folder.glob("cpu-*.json"))
    found = [json.loads((folder / f"{stem}.json").read_text(encoding="utf-8")) for stem in stems]
    cases: dict[tuple[str, str], dict[int, str]] = {}
    for i, results in enumerate(found):
        for kind in ("model", "decoding", "located"):
            for row in _rows(results, kind):
                if row["mode"].startswith("`"):
                    continue  # parts of models
                ratio = ratios(row)
                against = [_against_the_best(ratio, names)[0] for names in _SHOWN[kind]]
                cases.setdefault(_case(row), {})[i] = " / ".join(x for x in against if x != "–")
    lines = [[*case, *(of.get(i, "–") for i in range(len(found)))] for case, of in cases.items()]
    machines = [
        f"{i}. {x['machine']['cpu']}, PyTorch {x['machine']['torch']},"
        f" {x['machine']['date']}: [tables]({stem}.md), [numbers]({stem}.json)"
        for i, (stem, x) in enumerate(zip(stems, found, strict=True), 1)
    ]
    return "\n".join(
        [
            "# Results",
            "",
            "What plain PyTorch takes over what the library takes, and behind the stroke what the",
            "best other way takes (hoisted by hand in training, ONNX Runtime in decoding). Two",
            "threads, float32 unless it says int8. Written by `make bench`; medians of interleaved",
            "rounds, which differ by a tenth from run to run, on a shared machine by more.",
            "",
            *machines,
            "",
            _table(["case", "what", *map(str, range(1, len(found) + 1))], lines),
        ]
    )


def markdown(results: dict) -> str:
    rows = results["rows"]
    sections = [
        ("", _attention, _rows(results, "attention")),
        *_sections(results),
        ("The encoder, and a step of the decoder alone:", _decoding, _rows(results, "part")),
        (
            "Modules of examples/drop_in.py beside themselves in plain PyTorch:",
            _drop_in,
            _rows(results, "drop_in"),
        ),
        (
            "The decoder of 100 tokens, forward and backward, as steps grow in number:",
            _growth,
            _rows(results, "growth"),
        ),
        (
            "Peak memory that one forward and backward add:",
            _memory,
            [r for r in rows if "peak_bytes" in r],
        ),
        (
            "Largest error against float64, medians of five draws; the tests allow 100%:",
            _accuracy,
            results["accuracy"],
        ),
    ]
    return _join([_introduction(results)], sections)


def replace_block(text: str, block: str) -> str:
    """text with what stands between the two markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} before one {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def chart(results: dict, path: Path) -> str:
    """Draws the ratios of the attention rows; returns a line that says what was done."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "No chart: matplotlib is not installed."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _rows(results, "attention")[::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    for i, (baseline, label) in enumerate(BASELINES.items()):
        places = [y + 0.25 * (1 - i) for y in range(len(rows))]
        values = [ratios(row).get(baseline, 1) for row in rows]
        bars = axes.barh(places, [x - 1 for x in values], left=1, height=0.25, label=label)
        labels = [_ratio(ratios(row).get(baseline)) for row in rows]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    labels = [f"{_name(row)}\n{row['mode']}{_disturbed(row)}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("time over the library's time: right of 1 the library is faster")
    axes.set_title(f"{results['machine']['cpu']}, {results['machine']['threads']} threads")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Wrote {path.name}"


def write(results: dict, folder: Path, readme: Path | None = None) -> list[str]:
    """Writes the files of this machine, and the README's block if asked; says what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(results["machine"])
    text = markdown(results)
    rows = [row | {"ratios": ratios(row)} for row in results["rows"]]
    as_json = json.dumps(results | {"rows": rows}, indent=1, ensure_ascii=False)
    (folder / f"{stem}.json").write_text(as_json + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(across(folder) + "\n", encoding="utf-8")
    said = [f"Wrote {stem}.json, {stem}.md, README.md", chart(results, folder / f"{stem}.png")]
    if readme:
        replaced = replace_block(readme.read_text(encoding="utf-8"), summary(results))
        readme.write_text(replaced, encoding="utf-8")
        said.append(f"Wrote {readme.name}")
    return said
