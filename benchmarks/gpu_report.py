"""The results of a GPU as JSON and Markdown, written anew after everything that is measured."""

import json
import os
import re

from report import _ratio, _shape, _table, _time

WALL = 16  # special functions a clock and multiprocessor, and so tanh where each takes one
OTHERS = {
    "eager": "eager",
    "compile": "compile",
    "compile, Linear": "compile, Linear(H, 1)",
    "compile, max-autotune": "max-autotune",
    "compile, Linear, max-autotune": "max-autotune, Linear(H, 1)",
}


class Results:
    def __init__(self, folder, machine):
        self.folder = folder
        self.stem = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
        self.data = {"machine": machine, "rows": []}
        self.write()

    def put(self, name, value):
        self.data[name] = value
        self.write()

    def append(self, name, value):
        self.data[name].append(value)
        self.write()

    def write(self):
        """Replaced as a whole, so that an interruption leaves the last complete state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        as_json = json.dumps(self.data, indent=1, ensure_ascii=False)
        for suffix, text in (("json", as_json), ("md", markdown(self.data))):
            part = self.folder / f"{self.stem}.{suffix}.part"
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, self.folder / f"{self.stem}.{suffix}")


def merged(rows):
    """One row for each case, mode and dtype: a later job adds what is compared with.

    Ratios are of times from one job, so the library's own of each job are kept for them.
    """
    found = {}
    for row in rows:
        key = row["name"], row["mode"], row["dtype"], row["scale"]
        into = found.setdefault(key, row | {"ratios": {}, "seconds": {}, "peak_bytes": {}})
        for own in (x for x in row["seconds"] if x.startswith("library")):
            ratios = into["ratios"].setdefault(own, {})
            for other, seconds in row["seconds"].items():
                if other in OTHERS:
                    ratios[other] = seconds / row["seconds"][own]
        for name in ("seconds", "peak_bytes"):
            into[name] = row[name] | into[name]
    return list(found.values())


def _rows(data):
    clock, processors = data.get("clock_hz"), data["machine"]["multiprocessors"]
    head = ["case", "shape", "what", "dtype", "backend", "time", "G elements/s",
            "elements/clock/SM", "of the wall", *(f"against {x}" for x in OTHERS.values()),
            "peak memory", "eager's"]  # fmt: skip
    lines = []
    for row in merged(data["rows"]):
        for own, ratios in row["ratios"].items():
            rate = row["elements"] / row["seconds"][own]
            per_clock = rate / clock / processors if isinstance(clock, float) else None
            peaks = (row["peak_bytes"].get(name) for name in (own, "eager"))
            lines.append(
                [row["name"], _shape(row), row["mode"], row["dtype"], own.split(", ")[1]]
                + [_time(row["seconds"][own]), f"{rate / 1e9:.3g}"]
                + ["–" if per_clock is None else f"{per_clock:.2f}"]
                + ["–" if per_clock is None else f"{per_clock / WALL:.0%}"]
                + [_ratio(ratios.get(x)) for x in OTHERS]
                + ["–" if x is None else f"{x / 1e6:.0f} MB" for x in peaks]
            )
    return _table(head, lines)


def _flat(value, path=""):
    if not isinstance(value, dict):
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        return [[path, shown]]
    return [line for name, x in value.items() for line in _flat(x, f"{path}, {name}".strip(", "))]


def markdown(data):
    m = data["machine"]
    versions = f"PyTorch {m['torch']}, Triton {m['triton']}, CUDA {m['cuda']}"
    parts = [f"{m['gpu']}, {m['multiprocessors']} multiprocessors, {versions}, {m['date']}."]
    known = {k: v for k, v in data.items() if k not in ("machine", "rows", "not_measured")}
    if known:
        parts.append(_table(["what", "found"], _flat(known)))
    if data["rows"]:
        note = f"The wall is {WALL} special functions a clock and multiprocessor (SM); a ratio is"
        parts += [note + " the other's time over the library's.", _rows(data)]
    failed = [
        f"{row['name']}, {row['mode']}, {row['dtype']}: {name} ({why})"
        for row in data["rows"]
        for name, why in row["failed"].items()
    ]
    for title, names in (("Could not run", failed), ("Not measured", data.get("not_measured"))):
        if names:
            parts.append(f"{title}: " + "; ".join(names) + ".")
    return "\n\n".join(parts)
