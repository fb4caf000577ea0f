"""The attention decoder on a GPU: microseconds a step of the tutorial's model, teacher-forced.

Goals on an H200: 25 us a step forward, 80 forward and backward; 10 times eager, 4 times compiled.
"""

import statistics
from dataclasses import replace

import plain
import torch
from bench_seq2seq import LETTERS, build
from cases import BOTH, FORWARD
from timing import device_seconds, interleaved

import seq2seq_fast as s2s

ROW_S = 2.0  # of timing, beside compiling


def captured(call):
    """call's work in a CUDA graph: its launches cost the host nothing."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # what is made once is made outside
        call()
    stream.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def with_compiled_step(model):
    model.decoder = torch.compile(model.decoder, dynamic=False)
    return model


def calls(case, mode, device, capture=captured):
    """{name: call}: all steps and the readout; the encoder is a stand-in."""
    g = torch.Generator().manual_seed(1)
    src = torch.randint(case.V, (case.B, case.S), generator=g).to(device)
    trg = torch.randint(case.V, (case.B, case.T + 1), generator=g).to(device)
    grad = torch.randn(case.B, case.T + 1, case.V, generator=g).to(device)

    def call(model, backend=None):
        @torch.set_grad_enabled(mode == BOTH)
        def run():
            logits = model(src, trg, 1.0)
            if mode == BOTH:
                model.zero_grad()
                logits.backward(grad)

        def on_backend():
            with s2s.use_backend(backend):
                run()

        return run if backend is None else on_backend

    def made(kind):
        return build(kind, case).to(device)

    own = [x for x in s2s.backends()["attention_decoder"][device] if x != "reference"]
    found = {f"library, {x}": call(made(s2s.Seq2Seq), x) for x in own}
    if mode == FORWARD:
        found |= {f"{name}, captured": lambda call=x: capture(call) for name, x in found.items()}
    found["eager"] = call(made(plain.Seq2Seq))
    found["compile"] = call(with_compiled_step(made(plain.Seq2Seq)))
    return found


def measure(case=LETTERS, device="cuda", seconds=device_seconds, capture=captured):
    """{mode: {contender: seconds a step, or why there is none}}."""
    case = replace(case, ratio=1.0)
    results = {}
    for mode in (FORWARD, BOTH):
        torch._dynamo.reset()
        made, failed = {}, {}
        for name, call in calls(case, mode, device, capture).items():
            try:
                made[name] = call() if name.endswith("captured") else call
                made[name]()
            except Exception as error:  # the others can be measured still
                made.pop(name, None)
                failed[name] = type(error).__name__
        samples = interleaved(made, seconds, ROW_S)
        results[mode] = failed | {
            name: statistics.median(x) / case.T for name, x in samples.items()
        }
    return results
