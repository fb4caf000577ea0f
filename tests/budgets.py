"""What the kernels may cost, in instructions of their main loop on sm_90. See sass.py.

A score element is one tanh(query + key). A Hopper multiprocessor issues 128 lane-instructions a
clock and evaluates 16 special functions (MUFU): 4 slots make at most 32 elements a clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sass


@dataclass(frozen=True)
class Budget:
    slots: float  # issue slots per element, loads included
    mufu: float | None  # special functions per element; None where bytes bind before they do


BUDGETS = {
    "forward": Budget(4.4, 0.5),
    "forward, one query": Budget(10, None),
    "forward, one query, prepared": Budget(7, 0.5),
    "backward": Budget(11, 0.5),
    "backward, one query": Budget(9, 0.5),
    "forward, C++": Budget(4.2, 0.5),
    "forward, one query, C++": Budget(8, None),
    "backward, C++": Budget(10, 0.5),
    "backward, one query, C++": Budget(10.5, None),
}


@dataclass(frozen=True)
class Measured:
    kernel: str  # a key of BUDGETS
    backend: str
    variant: str  # dtype and block sizes, say
    slots: float
    mufu: float
    registers: int
    spills: int

    @property
    def within(self) -> bool:
        budget = BUDGETS[self.kernel]
        dear = budget.mufu is not None and self.mufu > budget.mufu
        return self.slots <= budget.slots and not dear and self.spills == 0


def measure(
    kernel: str,
    backend: str,
    variant: str,
    cubin: bytes,
    *,
    per_reciprocal: int,
    per_iteration: int = 1,
    name: str = "",
    among: Callable[[sass.Loop], bool] = lambda loop: True,
) -> Measured:
    """Counts the main loop of the kernel `name` in an sm_90 cubin; arguments as in sass.py."""
    code = sass.kernel(cubin, name)
    loop = code.main_loop(per_reciprocal, among)
    n = sass.elements(loop, per_reciprocal, per_iteration)
    return Measured(
        kernel,
        backend,
        variant,
        loop.slots / n,
        loop.count("MUFU") / n,
        code.registers,
        code.spills,
    )


def table(rows: list[Measured]) -> str:
    form = "{:28} {:8} {:34} {:>8} {:>8} {:>8} {:>8} {:>10} {:>7}"
    head = ("kernel", "backend", "variant", "slots", "at most", "MUFU", "at most", "registers")
    lines = [form.format(*head, "spills")]
    for r in sorted(rows, key=lambda r: (list(BUDGETS).index(r.kernel), r.backend)):
        budget = BUDGETS[r.kernel]
        most = "–" if budget.mufu is None else f"{budget.mufu:.2f}"
        lines.append(
            form.format(
                r.kernel,
                r.backend,
                r.variant,
                f"{r.slots:.2f}",
                f"{budget.slots:.2f}",
                f"{r.mufu:.3f}",
                most,
                r.registers,
                r.spills,
            )
        )
    return "\n".join(lines)
