"""Processes that a test waits for, begun before the first test.

They take minutes on one core, most of which is idle meanwhile: so they have the lowest priority,
and who marks a test with `@pytest.mark.awaits(name)` finds it at the end of the run.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).parent
AT_ONCE = 2
BEGUN = "S2S_TESTS_BEGUN_BEFOREHAND"  # in the environment of these processes, which begin no others


def _pytest(names: list[str], *arguments: str) -> list[str]:
    files = [str(TESTS / f"test_{name}.py") for name in names]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *files]


# Of `make races`, which takes minutes, what takes a second or two each.
RACES = "harness or prepared_keys or strided or plain-lstm or sizes-gru or without_attention"
RACES += " or logits or first_of_equal or no_token or together-blocks"
INTERPRETED = "not float64 and not bad_input and (not parity or float32 or (bfloat16 and 1.0))"

COMMANDS = {
    "races": (
        _pytest(["cuda", "cuda_decoder", "cuda_decoding"], "-k", RACES),
        {"CUDA_ON_CPU_RACES": "1"},
    ),
    "triton's interpreter": (
        _pytest(
            ["additive_attention", "triton", "triton_decoder"], "--on", "cpu:triton",
            "-m", "not large", "-k", INTERPRETED, "-W", "ignore::RuntimeWarning",
        ),
        {"TRITON_INTERPRET": "1"},
    ),
    "nvcc": ([sys.executable, "setup.py", "-q", "build_cuda"], {}),
}  # fmt: skip


class Beforehand:
    """Runs some of COMMANDS, AT_ONCE of them at a time."""

    def __init__(self, names: list[str]):
        self._places = threading.Semaphore(AT_ONCE)
        self._running: set[subprocess.Popen] = set()
        self._ended: dict[str, subprocess.CompletedProcess | OSError] = {}
        self._lock, self._stopped = threading.Lock(), False
        self._threads = {
            name: threading.Thread(target=self._run, args=(name,), daemon=True) for name in names
        }
        for thread in self._threads.values():
            thread.start()

    def _run(self, name: str) -> None:
        command, environment = COMMANDS[name]
        with self._places:
            with self._lock:
                if self._stopped:
                    return
                try:
                    process = subprocess.Popen(
                        ["nice", "-n", "19", *command],
                        cwd=TESTS.parent,
                        env=os.environ | environment | {BEGUN: "1"},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                        # A group, so that it can be stopped with all its children. Not a session:
                        # Linux would give that its share of the cores whatever its priority.
                        preexec_fn=os.setpgrp,
                    )
                except OSError as error:
                    self._ended[name] = error
                    return
                self._running.add(process)
            out, err = process.communicate()
            with self._lock:
                self._running.remove(process)
        self._ended[name] = subprocess.CompletedProcess(command, process.returncode, out, err)

    def result(self, name: str) -> subprocess.CompletedProcess:
        """Of one that has ended, which this waits for."""
        self._threads[name].join()
        ended = self._ended[name]
        if isinstance(ended, OSError):
            raise ended
        return ended

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                    os.killpg(process.pid, signal.SIGKILL)
