"""Peak memory of a call, each measured in a process of its own. Linux only."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resident_bytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def print_added(call):
    """What a call adds. VmHWM, as ru_maxrss would begin at the size of the parent process."""
    before = resident_bytes("VmRSS")
    call()
    print(resident_bytes("VmHWM") - before)


def peaks(file, name, contenders):
    """{label: bytes} that `python file name contender` prints, of contenders {label: contender}."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))}
    found = {}
    for label, contender in contenders.items():
        command = [sys.executable, file, name, contender]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found[label] = int(done.stdout)
    return found
