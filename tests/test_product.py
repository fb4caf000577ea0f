"""The product of two matrices that other ops are made of."""

import pytest
import torch

from seq2seq_fast.ops.kernels import product, products

SIZES = [
    (1, 1, 1),
    (5, 3, 7),
    (13, 130, 65),
    (14, 257, 16),
    (100, 128, 33),
    (200, 300, 129),
    (1700, 20, 50),
    (3, 400, 700),
    (15, 500, 41),
    (20, 1030, 70),
    (1100, 40, 400),
]
LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.T.contiguous().T,
    "neither": lambda x: torch.empty(2 * x.shape[0], 3 * x.shape[1])[::2, ::3].copy_(x),
    "a part": lambda x: torch.empty(x.shape[0], x.shape[1] + 3)[:, 1:-2].copy_(x),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("blas", [False, None], ids=["own loops", "the faster"])
def test_products_keep_the_accuracy_rule(blas, a_layout, b_layout, size):
    torch.manual_seed(0)
    M, K, N = size
    a, b = LAYOUTS[a_layout](torch.randn(M, K)), LAYOUTS[b_layout](torch.randn(K, N))
    exact = a.double() @ b.double()
    ours = torch.ops.seq2seq_fast.product(a, b, blas=blas)
    assert ours.shape == (M, N) and ours.is_contiguous()
    error, theirs = ((x - exact).abs().max().item() for x in (ours, a @ b))
    rounding = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= 2 * theirs + rounding


@pytest.mark.parametrize("blas", [None, True, False])
def test_nothing_to_multiply(blas):
    def of(*sizes):
        a, b = (torch.ones(n) for n in sizes)
        return torch.ops.seq2seq_fast.product(a, b, blas=blas)

    assert torch.equal(of((2, 0), (0, 3)), torch.zeros(2, 3))
    assert of((0, 4), (4, 3)).shape == (0, 3) and of((2, 4), (4, 0)).shape == (2, 0)


@pytest.mark.parametrize("M", [6, 7, 8, 13, 14, 20])  # rows are copied six or eight at a time
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_number_stays_in_its_row_and_column(layout, M):
    b = torch.randn(30, 40)
    b[7, 11] = torch.inf
    for row in range(M):
        a = torch.randn(M, 30)
        a[row, 5] = torch.nan
        found = torch.ops.seq2seq_fast.product(LAYOUTS[layout](a), b, blas=False)
        finite = torch.ones(M, 40, dtype=torch.bool)
        finite[row], finite[:, 11] = False, False
        assert torch.equal(found.isfinite(), finite)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_with_any_number_of_threads(layout):
    a, b = LAYOUTS[layout](torch.randn(1100, 600)), torch.randn(600, 400)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            found.append(torch.ops.seq2seq_fast.product(a, b, blas=False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_faster_one_is_a_product(dtype):
    a, b = torch.randn(9, 20).to(dtype), torch.randn(20, 5).to(dtype)
    torch.testing.assert_close(product(a, b), a @ b)
    torch.library.opcheck(torch.ops.seq2seq_fast.product, (a, b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_products_are_the_product_of_each(layout):
    a = LAYOUTS[layout](torch.randn(530, 620))
    b = [
        LAYOUTS[name](torch.randn(620, n)) for name, n in zip(LAYOUTS, (100, 1, 64, 0), strict=True)
    ]
    found = products(a, b)
    assert len(found) == len(b) and products(a, []) == []
    *same, sums = products(a, b, sums=True)
    assert all(torch.equal(x, y) for x, y in zip(same, found, strict=True))
    torch.testing.assert_close(sums, a.sum(1), rtol=0, atol=1e-4)
    assert torch.equal(products(a, [], sums=True)[0], a.sum(1))
    for x, y in zip(found, b, strict=True):
        assert torch.equal(x, product(a, y)) and x.is_contiguous()
    torch.library.opcheck(torch.ops.seq2seq_fast.products, (a, b, True, []))
    none = products(a[:, :0], [x[:0] for x in b])
    assert all(torch.equal(x, torch.zeros_like(y)) for x, y in zip(none, found, strict=True))


def test_shapes_that_disagree_are_refused():
    for a, b in (((2, 3), (2, 3)), ((2,), (2, 3))):
        with pytest.raises(RuntimeError, match="expected a"):
            torch.ops.seq2seq_fast.product(torch.ones(a), torch.ones(b))
        with pytest.raises(RuntimeError, match="each of b"):
            products(torch.ones(a), [torch.ones(b)])
