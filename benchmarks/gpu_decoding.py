"""Greedy decoding on a GPU: microseconds a step of T tokens of each source, encoding left out."""

import statistics
from dataclasses import dataclass

import plain
import torch
from bench_decoding import BOS, EOS, tutorial
from gpu_loops import LOOPS, looping
from timing import device_seconds, interleaved

import seq2seq_fast as s2s

ROW_S = 1.0  # of timing, beside compiling
DTYPES = (torch.bfloat16, torch.float32)  # the goals are of the first
RATIOS = {"eager": 10, "compile, reduce-overhead": 3}  # of their times over the library's


@dataclass(frozen=True)
class Model:
    name: str
    V: int
    S: int
    T: int
    H: int
    emb: int
    layers: int
    goals: dict[int, int]  # us a step, at most, by batch size, on an H200 in bfloat16


MODELS = (
    Model("tutorial model", 10_000, 30, 30, 256, 100, 2, {1: 12, 8: 12, 64: 12}),
    Model("R3 GNMT v2", 32_320, 50, 50, 1024, 1024, 4, {1: 70}),
)


def calls(model, B, device, dtype):
    """{name: call}; the tutorial's decoder has the same weights and numbers."""
    torch.manual_seed(0)
    sizes = (model.V, model.emb, model.H, model.layers, 0.0)
    decoder = s2s.Decoder(*sizes).eval().to(device, dtype)
    twin = plain.Decoder(*sizes).eval().to(device, dtype)
    twin.load_state_dict(decoder.state_dict())
    values = torch.randn(B, model.S, model.H, device=device, dtype=dtype)
    hidden, cell = torch.randn(2, model.layers, B, model.H, device=device, dtype=dtype)
    with torch.no_grad():
        source = decoder.source(values)
    state = s2s.DecoderState(hidden, cell)
    options = {"bos": BOS, "eos": EOS, "max_length": model.T, "min_length": model.T}

    def library(how):
        def call():
            with looping(how):
                return s2s.generate(decoder, source, state, **options)

        return call

    return {f"library, {how}": library(how) for how in LOOPS} | {
        "eager": tutorial(twin, values, hidden, cell, model.T),
        "compile, reduce-overhead": replayed(twin, values, hidden, cell, model.T),
    }


def replayed(decoder, values, hidden, cell, T):
    """The tutorial's loop around a step that torch.compile has put into a CUDA graph."""
    step = torch.compile(decoder, dynamic=False, mode="reduce-overhead")

    @torch.inference_mode()
    def call():
        h, c, token = hidden, cell, torch.full((len(values),), BOS, device=values.device)
        for _ in range(T):
            torch.compiler.cudagraph_mark_step_begin()
            logits, h, c = step(token, h, c, values)
            token, h, c = logits.argmax(-1), h.clone(), c.clone()  # the next replay writes there

    return call


def measure(model, B, dtype, device="cuda", seconds=device_seconds):
    """{contender: seconds a step, or why there is none}."""
    torch._dynamo.reset()
    made, failed = {}, {}
    for name, call in calls(model, B, device, dtype).items():
        try:
            call()
        except Exception as error:  # the others can be measured still
            failed[name] = type(error).__name__
        else:
            made[name] = call
    samples = interleaved(made, seconds, ROW_S)
    return failed | {name: statistics.median(x) / model.T for name, x in samples.items()}
