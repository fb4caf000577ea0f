"""A step of a decoder that was prepared for inference, against the step of one that was not."""

import pytest
import torch
from decoding_models import KINDS, make, sources
from test_packed_encoder import numbers

from seq2seq_fast.decoding import native
from seq2seq_fast.library import use_backend


@pytest.fixture
def packed_steps(monkeypatch):
    """How many steps have read packed weights."""
    calls, step = [], native.step
    monkeypatch.setattr(native, "step", lambda *args: calls.append(1) or step(*args))
    return calls


def steps(model, src, n=4):
    """Logits, state and weights of some steps, one after the other."""
    source, state = model.encode(src)
    found, g = [], torch.Generator().manual_seed(0)
    for _ in range(n):
        tokens = torch.randint(model.decoder.output_dim, (len(src),), generator=g)
        logits, state, weights = model.decoder.step(tokens, state, source)
        found += numbers([logits, *state, weights])
    return found


@pytest.mark.parametrize("V", [11, 600])
@pytest.mark.parametrize("H", [1, 20, 67])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_it_is_the_same_step(kind, H, V, packed_steps):
    model, src = make(kind, V=V, H=H), sources(5, 7)
    with use_backend("reference"):
        exact = steps(make(kind, V=V, H=H).double(), src)
        plain = steps(model, src)
    found = steps(model.prepare_inference(), src)
    assert len(packed_steps) == 4 and len(found) == len(exact)
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        size = want.abs().max()
        allowed = 2 * (theirs - want).abs().max() + 4 * torch.finfo(torch.float32).eps * size
        assert (ours - want).abs().max() <= allowed


def test_where_it_is_not_wanted(packed_steps):
    """Gradients, dropout, other weights, dtypes and backends; batches of nothing."""
    model, src = make().prepare_inference(), sources(3, 5)
    decoder, tokens = model.decoder, torch.tensor([3, 4, 5])
    source, state = model.encode(src)
    logits, *_ = decoder(tokens, state.hidden, state.cell, source)
    logits.sum().backward()
    assert decoder.fc_out.weight.grad.abs().sum() > 0 and not packed_steps
    with torch.no_grad():
        args = (tokens, state.hidden, state.cell, source)
        prepared, *_ = decoder(*args)
        assert len(packed_steps) == 1
        torch.testing.assert_close(prepared, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(decoder(tokens.int(), *args[1:])[0], prepared)
        assert len(packed_steps) == 2
        with use_backend("reference"):
            decoder(*args)
        decoder.train()
        decoder(*args)
        decoder.eval()
        empty, state_of_none = model.encode(src[:0])
        none, *_ = decoder(tokens[:0], state_of_none.hidden, state_of_none.cell, empty)
        assert none.shape == (0, 11)
        for other in ({"dtype": "int8"}, {"project_values": True}):
            model.prepare_inference(**other)
            torch.testing.assert_close(decoder(*args)[0], logits, rtol=1e-5, atol=1e-5)
        model.prepare_inference()
        decoder.fc_out.weight.mul_(2)
        assert not torch.equal(decoder(*args)[0], prepared)
        assert len(packed_steps) == 2
        with pytest.raises(ValueError, match="input: got token id 11"):
            decoder(torch.tensor([3, 4, 11]), *args[1:])
