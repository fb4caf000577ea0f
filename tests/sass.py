"""What a compiled kernel executes, read from the machine code of its cubin. No GPU is needed.

The disassembler is the one that ships inside the triton package; cubins from nvcc do as well.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;")
_JUMP = re.compile(r"BRA\S*\s+(?:!?U?P\w+,\s*)*0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop; its instructions counted by name, such as "MUFU.RCP"."""

    names: Counter

    @property
    def slots(self) -> int:
        return self.names.total()

    def count(self, name: str) -> int:
        """How many instructions bear the name or begin with it: "MUFU" counts "MUFU.RCP" too."""
        return sum(n for x, n in self.names.items() if x == name or x.startswith(name + "."))


@dataclass(frozen=True)
class Kernel:
    loops: list[Loop]
    registers: int
    spills: int  # instructions that read or write local memory

    def main_loop(
        self, per_reciprocal: int, among: Callable[[Loop], bool] = lambda loop: True
    ) -> Loop:
        """The innermost loop, among some, that spends the fewest slots per element.

        What is slower beside it is a path for unusual input. Loops without a reciprocal are none
        over elements.
        """
        candidates = [loop for loop in self.loops if loop.count("MUFU.RCP") and among(loop)]
        if not candidates:
            raise ValueError("no loop with a MUFU.RCP in it")
        return min(candidates, key=lambda loop: loop.slots / elements(loop, per_reciprocal))


def elements(loop: Loop, per_reciprocal: int, per_iteration: int = 1) -> int:
    """Elements of one pass through a loop, of which `per_reciprocal` share one reciprocal.

    Counted from the code, since the compiler unrolls loops as it likes; `per_iteration`, what the
    source says of one pass, must divide it.
    """
    n = per_reciprocal * loop.count("MUFU.RCP")
    if n == 0 or n % per_iteration:
        raise ValueError(f"{n} elements a pass, expected a multiple of {per_iteration}")
    return n


def kernel(cubin: bytes, name: str = "") -> Kernel:
    """The only kernel of a cubin whose (mangled) name contains `name`."""
    listing, usage = (_cuobjdump(cubin, option) for option in ("-sass", "-res-usage"))
    found = [x for x in re.split(r"Function : (?=\S)", listing)[1:] if name in x.split("\n")[0]]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels with {name!r} in their names, expected one")
    code = [(int(at, 16), text) for at, text in _LINE.findall(found[0])]
    names = [text.split()[0] for _, text in code]
    registers = re.search(rf"Function {re.escape(found[0].split()[0])}:\s+REG:(\d+)", usage)
    return Kernel(
        loops=_innermost(code),
        registers=int(registers[1]),
        spills=sum(x.split(".")[0] in ("LDL", "STL") for x in names),
    )


def _innermost(code: list[tuple[int, str]]) -> list[Loop]:
    jumps = ((at, _JUMP.match(text)) for at, text in code)
    spans = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [Loop(Counter(text.split()[0] for at, text in code if a <= at <= b)) for a, b in inner]


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True)
    return ran.stdout
