"""Timing of several calls against each other, with the clock of the host or of a GPU."""

import time

SAMPLE_S = 2e-3  # calls are timed in groups at least this long, well above the clock's overhead
ROUNDS = (5, 40)
# Before each sample: threads of a library that waits by spinning hold the cores a while after its
# last call, and would be counted against the next contender.
PAUSE_S = 0.01
WARM_S = 5e-3  # of calls after it, which wake threads and fill caches
LONG_S = 0.05  # a call that wakes and fills by itself
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


def warm_up(call):
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        call()


def interleaved(contenders, seconds=host_seconds, budget_s=BUDGET_S, pause_s=PAUSE_S):
    """Seconds per call, {name: one sample per round}; every round times every contender once.

    Who begins moves on by one each round, so that noise and clock changes hit all alike.
    """
    once = {}
    for name, call in contenders.items():
        seconds(call, 2)  # compiles, allocates
        once[name] = seconds(call, 3)
    loops = {name: max(1, round(SAMPLE_S / each)) for name, each in once.items()}
    names, samples = list(contenders), {name: [] for name in contenders}
    end = time.perf_counter() + budget_s
    for i in range(ROUNDS[1]):
        if i >= ROUNDS[0] and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause_s)
            if once[name] < LONG_S:
                warm_up(contenders[name])
            samples[name].append(seconds(contenders[name], loops[name]))
    return samples
