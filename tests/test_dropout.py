"""Factors of dropout."""

import pytest
import torch

from seq2seq_fast.ops.dropout import dropout_factors


def of(seed, size, p):
    return torch.ops.seq2seq_fast.dropout_factors(torch.tensor([seed]), size, p)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_the_share_and_the_mean(p):
    torch.manual_seed(0)
    factors = dropout_factors((300, 1000), p, torch.zeros(1))
    kept = torch.tensor(1 / (1 - p) if p < 1 else 0.0).item()
    assert set(factors.unique().tolist()) <= {0.0, kept}
    share = (factors == 0).float().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / factors.numel()) ** 0.5 + 1e-9


def philox(counter, key, third=0, fourth=0):
    x = [counter & 0xFFFFFFFF, counter >> 32, third, fourth]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        low = 0xFFFFFFFF
        x = [(b >> 32) ^ x[1] ^ k[0], b & low, (a >> 32) ^ x[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return x


def test_the_numbers_are_philox():
    """Random123's known answer, and which of the numbers are below p, block by block."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed in (0, 12345678901234567, -3):
        found = of(seed, [700], 0.3)
        for i in range(700):
            block, j, lane = i // 256, i % 256 // 64, i % 64
            number = philox(64 * block + lane, seed % 2**64)[j]
            assert (found[i] == 0) == (number < round(0.3 * 2**32))


def test_a_seed_of_torchs_generator_and_any_number_of_threads():
    def draw(threads=2, dtype=torch.float32):
        torch.manual_seed(7)
        torch.set_num_threads(threads)
        first = dropout_factors((70, 999), 0.5, torch.zeros(1, dtype=dtype))
        return first, dropout_factors((70, 999), 0.5, torch.zeros(1, dtype=dtype))

    threads = torch.get_num_threads()
    try:
        (a, b), (c, d), (e, f) = draw(), draw(1), draw(3, torch.float64)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)
    assert torch.equal(a.double(), e) and f.dtype == torch.float64


def test_opcheck_and_what_is_refused():
    seed = torch.tensor([3])
    torch.library.opcheck(torch.ops.seq2seq_fast.dropout_factors, (seed, [3, 0, 5], 0.5))
    torch.library.opcheck(torch.ops.seq2seq_fast.dropout_factors, (seed, [3, 5], 0.5))
    for bad in ((torch.tensor([1, 2]), [3], 0.5), (seed.int(), [3], 0.5), (seed, [3], 1.5)):
        with pytest.raises(RuntimeError, match="expected a seed"):
            torch.ops.seq2seq_fast.dropout_factors(*bad)
