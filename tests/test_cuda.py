"""The CUDA kernels without a GPU: run on the CPU by tests/cuda_on_cpu."""

import shutil

import cuda_on_cpu
import pytest
import test_additive_attention as plain
import torch

import seq2seq_fast as s2s
from seq2seq_fast import reference
from seq2seq_fast.ops import additive_attention as module

pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which(cuda_on_cpu.COMPILER) is None, reason="no host compiler here"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops():
    return cuda_on_cpu.load()


@pytest.fixture(autouse=True)
def on_cuda_kernels(ops, monkeypatch):
    """The public functions run on them, and new tensors are NaN until they are written."""
    monkeypatch.setattr(module, "_ops", ops)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


FAULTS = "none, no barrier, no wait, unwritten, order of blocks".split(", ")


@pytest.mark.parametrize("fault", range(5), ids=FAULTS)
def test_the_harness_shows_a_wrong_result(ops, fault):
    x = torch.arange(64.0)
    want = torch.cat((x.flip(0), torch.zeros(5)))
    results = [ops.broken(x, fault) for _ in range(4)]
    assert all(torch.equal(y, want) for y in results) == (fault == 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(5, "past the shared memory"), (6, "never come"), (7, "never come")],
    ids=["write past the end", "divergent barrier", "warp without all its lanes"],
)
def test_the_harness_refuses(ops, fault, message):
    with pytest.raises(RuntimeError, match=message):
        ops.broken(torch.arange(64.0), fault)
    assert ops.broken(torch.arange(64.0), 0)[0] == 63  # and goes on


# T up to 4 goes to the kernel for one query, the rest to tiles of each size, warps and split.
SHAPES = [
    *plain.SHAPES,
    (1, 3, 530, 70, 21),  # a split source
    (1, 70, 150, 40, 9),  # several tiles of queries and ranges of keys
    (2, 26, 28, 160, 4),  # warps that divide the features
]


@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 6.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, size):
    plain.test_parity(shape, dtype, size)
