import os
from typing import NamedTuple

import budgets
import pytest
import torch
from beforehand import BEGUN, Beforehand

# A graph that torch.compile kept from an earlier state of these kernels must not be tested.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        """Rounded once, as on a GPU; some releases of the interpreter round twice."""
        data = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(data.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma

MEASURED = pytest.StashKey[list]()
BEFOREHAND = pytest.StashKey[Beforehand]()


class Target(NamedTuple):
    """What a test with the argument `on` runs on."""

    device: str
    backend: str

    @property
    def draws(self) -> int:
        """How often a test draws its numbers: Triton's interpreter takes its time."""
        return 3 if (self.device, self.backend) == ("cpu", "triton") else 5

    def put(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.to(self.device) for x in tensors]


def pytest_addoption(parser):
    parser.addoption(
        "--on",
        action="append",
        default=[],
        metavar="DEVICE:BACKEND",
        help="where the tests of kernels run, such as cuda:triton; cpu:native unless told",
    )


def pytest_configure(config):
    config.stash[MEASURED] = []


def pytest_generate_tests(metafunc):
    if "on" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("on") or ["cpu:native"]
        metafunc.parametrize("on", [Target(*x.split(":")) for x in wanted], ids=wanted)


def _awaited(item) -> list[str]:
    return [mark.args[0] for mark in item.iter_markers("awaits")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: bool(_awaited(item)))  # stable: these come last


def pytest_collection_finish(session):
    if BEGUN not in os.environ and not session.config.option.collectonly:
        names = dict.fromkeys(name for item in session.items for name in _awaited(item))
        session.config.stash[BEFOREHAND] = Beforehand([*names])


def pytest_unconfigure(config):
    if BEFOREHAND in config.stash:
        config.stash[BEFOREHAND].stop()


@pytest.fixture(scope="session")
def beforehand(request):
    """beforehand(name) waits for what a test with `@pytest.mark.awaits(name)` needs: see
    beforehand.py."""
    if BEGUN in os.environ:
        pytest.skip("once is enough")
    return request.config.stash[BEFOREHAND].result


@pytest.fixture
def within_budget(request):
    """within_budget(...), with the arguments of budgets.measure, fails where a kernel costs more.

    What it measured is printed beside the budgets at the end of the run.
    """

    def check(*args, **kw):
        measured = budgets.measure(*args, **kw)
        request.config.stash[MEASURED].append(measured)
        assert measured.within, "\n" + budgets.table([measured])

    return check


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[MEASURED]
    if rows:
        terminalreporter.section("issue slots and special functions per score element, sm_90")
        terminalreporter.write_line(budgets.table(rows))
