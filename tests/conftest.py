import os

import budgets
import pytest

# A graph that torch.compile kept from an earlier state of these kernels must not be tested.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

MEASURED = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[MEASURED] = []


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
