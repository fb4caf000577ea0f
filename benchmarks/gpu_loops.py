"""How the steps of a recurrence follow each other on a GPU: by launches, or together in one."""

import contextlib
import os

SWITCH, LOOPS = "SEQ2SEQ_FAST_GPU_LOOP", ("steps", "together")


@contextlib.contextmanager
def looping(how):
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = how
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
