"""Linear layers by the library's product."""

import pytest
import torch
from torch import nn

import seq2seq_fast as s2s
from seq2seq_fast.ops import linear as module
from seq2seq_fast.ops.linear import linear


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(7, 5)


def counted(monkeypatch):
    calls = []
    product = module.product
    monkeypatch.setattr(module, "product", lambda *a: calls.append(a) or product(*a))
    return calls


@pytest.mark.parametrize("shape", [(3, 7), (2, 4, 7), (2, 0, 7)], ids=str)
def test_outputs_and_gradients_are_the_layers(layer, shape, monkeypatch):
    calls = counted(monkeypatch)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 5)
    leaves = [x, *layer.parameters()]
    ours, theirs = (
        [y, *torch.autograd.grad(y, leaves, grad)] for y in (linear(layer, x), layer(x))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 3
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), layer(x))
    assert len(calls) == 4


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(layer, which, monkeypatch):
    calls = counted(monkeypatch)
    x = torch.randn(3, 7, requires_grad=which == "x")
    for name, p in layer.named_parameters():
        p.requires_grad_(name == which)
    leaf = {"x": x, "weight": layer.weight, "bias": layer.bias}[which]
    linear(layer, x).sum().backward()
    assert leaf.grad is not None and len(calls) == 1 + (which != "bias")


def test_layers_that_are_more_than_a_product_are_called(layer, monkeypatch):
    calls, x, seen = counted(monkeypatch), torch.randn(3, 7), []

    class Other(nn.Linear):
        pass

    linear(Other(7, 5), x)
    layer.register_forward_hook(lambda *_: seen.append(1))
    linear(layer, x)
    assert seen == [1]
    plain = nn.Linear(7, 5)
    linear(plain.double(), x.double())
    with s2s.use_backend("reference"):
        linear(plain.float(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(plain, x).dtype == torch.bfloat16
    assert calls == []


def test_it_is_compiled_whole(layer):
    x = torch.randn(3, 7, requires_grad=True)
    compiled = torch.compile(lambda x: linear(layer, x).sin().sum(), fullgraph=True)
    grads = [torch.autograd.grad(f(x), x)[0] for f in (compiled, lambda x: layer(x).sin().sum())]
    torch.testing.assert_close(*grads)
