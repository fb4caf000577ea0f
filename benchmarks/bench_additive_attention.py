"""Additive attention: time against plain PyTorch and torch.compile, accuracy, peak memory."""

import statistics
import sys

import memory
import report
import torch
from cases import BOTH, FIGURES, FORWARD, STEPS, WORKLOADS
from torch.nn import functional as F

import seq2seq_fast as s2s


def plain(query, keys, values, v):
    scores = (torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) * v).sum(-1)
    weights = scores.softmax(-1)
    return torch.bmm(weights, values), weights


def plain_linear(query, keys, values, v):
    """What nn.Linear(H, 1) computes, less its bias, which moves every score alike."""
    tanh = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))
    weights = F.linear(tanh, v.unsqueeze(0)).squeeze(-1).softmax(-1)
    return torch.bmm(weights, values), weights


def prepared_or_not(case, keys):
    return s2s.prepare_keys(keys) if case.prepared else keys


def contenders(case, mode):
    """{name: call} on the same inputs; the key projection is hoisted out of every one of them."""
    query, keys, values, v = leaves = case.inputs()
    if mode == BOTH:
        for x in leaves:
            x.requires_grad_()
    library_keys = prepared_or_not(case, keys)
    grad = torch.randn(case.B, case.T, case.D)

    def call(function, keys):
        if mode == FORWARD:
            return lambda: function(query, keys, values, v)
        return lambda: torch.autograd.grad(function(query, keys, values, v)[0], leaves, grad)

    calls = {"library": call(s2s.additive_attention, library_keys)}
    if case.prepared:
        calls["library, keys not prepared"] = call(s2s.additive_attention, keys)
    calls["eager"] = call(plain, keys)
    calls["compile"] = call(torch.compile(plain, dynamic=False), keys)
    calls["compile, Linear"] = call(torch.compile(plain_linear, dynamic=False), keys)
    if case.T == 1 and mode == FORWARD:  # bound by bytes: each number is used once
        calls[report.FLOOR] = torch.randn(keys.numel() + values.numel()).sum
    return calls


def named(cases, *names):
    return [case for case in cases if case.name.split()[0] in names]


_figures = [(case, mode) for case, mode in FIGURES]
QUICK = {
    "test_time": (
        ("case", "mode"),
        _figures
        + [(case, BOTH) for case in named(WORKLOADS, "R3") + named(STEPS, "R1", "R7", "R9")],
    ),
    "test_accuracy": (("case",), [(case,) for case in dict(FIGURES)]),
    "test_peak_memory": (("case",), [(case,) for case in named(WORKLOADS, "R3")]),
}
FULL = QUICK | {
    "test_time": (
        ("case", "mode"),
        _figures + [(case, mode) for case in WORKLOADS + STEPS for mode in (FORWARD, BOTH)],
    ),
    "test_peak_memory": (("case",), [(case,) for case in WORKLOADS]),
}


def shape(case):
    return {axis: getattr(case, axis) for axis in "BTSHD"}


def test_time(case, mode, compare):
    row = compare(
        contenders(case, mode),
        kind="attention",
        name=case.name,
        mode=mode,
        shape=shape(case),
        scale=case.scale,
        prepared=case.prepared,
    )
    row["elements_per_second"] = case.elements / row["seconds"]["library"]


def outputs(function, case, seed, dtype):
    """Context, weights and the gradients of query, keys, values and v, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in case.inputs(seed)]
    query, keys, values, v = leaves
    if function is s2s.additive_attention:
        keys = prepared_or_not(case, keys)
    results = function(query, keys, values, v)
    g = torch.Generator().manual_seed(1000 + seed)
    grads = [torch.randn(x.shape, generator=g).to(dtype) for x in results]
    gradients = torch.autograd.grad(results, leaves, grads)
    return [x.detach().double() for x in (*results, *gradients)]


NAMES = ("context", "weights", "grad query", "grad keys", "grad values", "grad v")


def test_accuracy(case, record_accuracy):
    """Largest error against float64 in five draws.

    Half a rounding of the largest value is the least that eager counts with: on tiny shapes it may
    be exact by luck. What the tests allow is twice eager's error and one rounding.
    """
    eps = torch.finfo(torch.float32).eps
    errors = {name: [] for name in NAMES}
    for seed in range(5):
        exact = outputs(plain, case, seed, torch.float64)
        ours = outputs(s2s.additive_attention, case, seed, torch.float32)
        eager = outputs(plain, case, seed, torch.float32)
        for name, o, p, e in zip(NAMES, ours, eager, exact, strict=True):
            rounding = eps * e.abs().max().item()
            errors[name].append(((o - e).abs().max().item(), (p - e).abs().max().item(), rounding))
    for name, draws in errors.items():
        ratios = [o / max(p, rounding / 2, 1e-30) for o, p, rounding in draws]
        record_accuracy(
            {
                "name": case.name,
                "shape": shape(case),
                "dtype": "float32",
                "output": name,
                "library": statistics.median(o for o, _, _ in draws),
                "eager": statistics.median(p for _, p, _ in draws),
                "ratio_median": statistics.median(ratios),
                "ratio_max": max(ratios),
                "allowed_median": statistics.median(
                    o / (2 * p + rounding + 1e-30) for o, p, rounding in draws
                ),
            }
        )


def print_peak(name, contender):
    """Runs in a process of its own: what one forward and backward add to the resident memory."""
    (case,) = (case for case in WORKLOADS if case.name == name)
    call = contenders(case, BOTH)[contender]
    warm = s2s.additive_attention if contender.startswith("library") else plain
    outputs(warm, case.__class__("warm-up", 1, 2, 3, 8, 8), 0, torch.float32)
    memory.print_added(call)


def test_peak_memory(case, rows):
    peaks = memory.peaks(__file__, case.name, {"library": "library", "eager": "eager"})
    for row in rows:
        if (row["name"], row["mode"]) == (case.name, BOTH):
            row["peak_bytes"] = peaks


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
