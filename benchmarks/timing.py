"""Timing of several calls against each other, with the clock of the host or of a GPU."""

import time

SAMPLE_S = 2e-3  # calls are timed in groups at least this long, well above the clock's overhead
ROUNDS = (5, 40)
# Threads of a library that waits by spinning hold the cores a while after its last call, those of
# ONNX Runtime up to 40 ms, and would be counted against the next contender: decoding at B 1 by a
# factor of 2.
PAUSE_S = 0.05
BUDGET_S = 2.0  # per row, without warm-up; ROUNDS[0] rounds are run in any case


def host_seconds(call, loops):
    """Per call, for what is done when the call returns."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def device_seconds(call, loops):
    """Per call, from one event on the current CUDA stream to another."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / loops


def interleaved(contenders, seconds=host_seconds, budget_s=BUDGET_S):
    """Seconds per call, {name: one sample per round}; every round times every contender once.

    Who begins moves on by one each round, so that noise and clock changes hit all alike.
    """
    loops = {}
    for name, call in contenders.items():
        seconds(call, 2)  # compiles, allocates
        loops[name] = max(1, round(SAMPLE_S / seconds(call, 3)))
    names, samples = list(contenders), {name: [] for name in contenders}
    end = time.perf_counter() + budget_s
    for i in range(ROUNDS[1]):
        if i >= ROUNDS[0] and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_S)
            if loops[name] > 1:
                contenders[name]()  # wakes threads and caches
            samples[name].append(seconds(contenders[name], loops[name]))
    return samples
