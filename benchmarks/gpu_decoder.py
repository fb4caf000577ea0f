"""The attention decoder on a GPU: microseconds a step of the tutorial's model, teacher-forced."""

import statistics

import cuda_graphs
import plain
import torch
from bench_seq2seq import LETTERS, build
from cases import BOTH, FORWARD
from gpu_loops import LOOPS, looping
from timing import device_seconds, interleaved

import seq2seq_fast as s2s

ROW_S = 2.0  # of timing, beside compiling
GOALS = {FORWARD: 25, BOTH: 80}  # us a step, at most, on an H200
RATIOS = {"eager": 10, "compile": 4}  # of their times over the library's, at least


def captured(call):
    """call's work in a CUDA graph: its launches cost the host nothing."""
    graph, _ = cuda_graphs.capture(call)
    return graph.replay


def with_compiled_step(model):
    model.decoder = torch.compile(model.decoder, dynamic=False)
    return model


def contenders(device):
    """{name: (backend, how its steps follow each other)}"""
    found = {}
    for backend in s2s.backends()["attention_decoder"][device]:
        if backend == "native":
            found |= {f"library, native, {how}": (backend, how) for how in LOOPS}
        elif backend != "reference":
            found[f"library, {backend}"] = backend, LOOPS[0]
    return found


def inputs(case, device):
    """Token ids of source and target, and the gradient of the logits."""
    g = torch.Generator().manual_seed(1)
    src = torch.randint(case.V, (case.B, case.S), generator=g)
    trg = torch.randint(case.V, (case.B, case.T + 1), generator=g)
    grad = torch.randn(case.B, case.T + 1, case.V, generator=g)
    return [x.to(device) for x in (src, trg, grad)]


def calls(case, mode, device, capture=captured):
    """{name: call}: all steps and the readout; the encoder is a stand-in."""
    src, trg, grad = inputs(case, device)

    def call(model, backend=None, how=LOOPS[0]):
        @torch.set_grad_enabled(mode == BOTH)
        def run():
            logits = model(src, trg, 1.0)
            if mode == BOTH:
                model.zero_grad()
                logits.backward(grad)

        def on_backend():
            with s2s.use_backend(backend), looping(how):
                run()

        return run if backend is None else on_backend

    def made(kind):
        return build(kind, case).to(device)

    found = {name: call(made(s2s.Seq2Seq), *x) for name, x in contenders(device).items()}
    found |= {f"{name}, captured": lambda call=x: capture(call) for name, x in found.items()}
    found["eager"] = call(made(plain.Seq2Seq))
    found["compile"] = call(with_compiled_step(made(plain.Seq2Seq)))
    return found


def step_seconds(calls, T, seconds):
    """{contender: seconds a step, or why there is none}; those that are captured are made first."""
    made, failed = {}, {}
    for name, call in calls.items():
        try:
            made[name] = call() if name.endswith("captured") else call
            made[name]()
        except Exception as error:  # the others can be measured still
            made.pop(name, None)
            failed[name] = type(error).__name__
    samples = interleaved(made, seconds, ROW_S)
    return failed | {name: statistics.median(x) / T for name, x in samples.items()}


def measure(mode, case=LETTERS, device="cuda", seconds=device_seconds, capture=captured):
    """{contender: seconds a step, or why there is none}."""
    torch._dynamo.reset()
    return step_seconds(calls(case, mode, device, capture), case.T, seconds)


@torch.no_grad()
def errors(case=LETTERS, device="cuda"):
    """{contender: largest error of its logits against the tutorial's code in float64}."""
    src, trg, _ = inputs(case, device)
    model = build(plain.Seq2Seq, case).to(device)
    found = {"eager": model(src, trg, 1.0)}
    library = build(s2s.Seq2Seq, case).to(device)
    for name, (backend, how) in contenders(device).items():
        with s2s.use_backend(backend), looping(how):
            found[name] = library(src, trg, 1.0)
    exact = model.double()(src, trg, 1.0)
    return {name: (x - exact).abs().max().item() for name, x in found.items()}
