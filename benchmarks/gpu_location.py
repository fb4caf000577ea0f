"""Decoders whose attention sees its location, on a GPU: microseconds a step, all steps given or of
greedy decoding, beside a loop over PyTorch's cells."""

import torch
from bench_location import SYSTEMS  # noqa: F401, for gpu.py
from cases import BOTH
from gpu_decoder import captured, step_seconds
from timing import device_seconds

import seq2seq_fast as s2s

OTHERS = ("eager",)
GREEDY = "greedy"


def decoding(system, device):
    """{name: call}: all steps of greedy decoding, of so many rows."""
    theirs, ours = (model.eval().to(device) for model in system.models())
    values, mask = (x.to(device) for x in system.source())
    state = s2s.DecoderState(*(None if x is None else x.to(device) for x in system.start()[:2]))
    options = {"bos": 1, "eos": 2, "max_length": system.T, "min_length": system.T}

    @torch.inference_mode()
    def library():
        return s2s.generate(ours, ours.source(values, mask), state, **options)

    @torch.inference_mode()
    def eager():
        return theirs.greedy(values, mask, 1, system.T)

    return {f"library, {s2s.backends()['decode'][device][0]}": library, "eager": eager}


def calls(system, mode, device, capture=captured):
    """{name: call}: all steps and the readout."""
    if mode == GREEDY:
        return decoding(system, device)
    theirs, ours = (model.to(device) for model in system.models())
    values, mask = (x.to(device) for x in system.source())
    values.requires_grad_()
    state = s2s.DecoderState(*(None if x is None else x.to(device) for x in system.start()[:2]))
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(system.V, (system.B, system.T), generator=g).to(device)

    def call(model, logits_of):
        @torch.set_grad_enabled(mode == BOTH)
        def run():
            logits = logits_of()
            if mode == BOTH:
                model.zero_grad()
                logits.square().mean().backward()

        return run

    def library():
        out = ours.run(tokens, state, ours.source(values, mask))
        return ours.fc_out(out.features)

    backend = s2s.backends()["extended_decoder"][device][0]
    found = {f"library, {backend}": call(ours, library)}
    found |= {f"{name}, captured": lambda call=x: capture(call) for name, x in found.items()}
    return found | {"eager": call(theirs, lambda: theirs(tokens, values, mask))}


def measure(system, mode, device="cuda", seconds=device_seconds, capture=captured):
    """{contender: seconds a step, or why there is none}."""
    return step_seconds(calls(system, mode, device, capture), system.T, seconds)
