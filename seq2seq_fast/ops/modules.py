"""What the library reads of PyTorch's modules, which it does not always call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALLED = frozenset(("forward", "encode", "source", "steps", "precompute"))  # with rows
_MAKE_WEIGHTS = (BasePruningMethod, SpectralNorm, WeightNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to know of calls of a module, which then must be called."""
    return any(getattr(module, name) for name in _HOOKS)


def knows_no_rows(module: nn.Module) -> bool:
    """Whether a module does to each row of a batch the same, and tells nobody: it is PyTorch's or
    the library's, with nothing hung to it."""
    ours = type(module).__module__.startswith(("torch.nn.", "seq2seq_fast."))
    return ours and _CALLED.isdisjoint(vars(module)) and not has_hooks(module)


def reads_alone(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module does what its kind's does with its weights, and nothing beside."""
    own = vars(module)  # spelled out: a short call of `generate` asks twice
    if type(module).forward is not kind.forward or "forward" in own:
        return False
    if own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if own.get("max_norm") is not None:
        return False
    before = own["_forward_pre_hooks"]
    return not before or all(isinstance(hook, _MAKE_WEIGHTS) for hook in before.values())


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call does what neither PyTorch nor the library has written."""
    of = getattr(type(module).forward, "__module__", "")
    return "forward" in vars(module) or not of.startswith(("torch.nn.modules.", "seq2seq_fast."))


def check_is_read(name: str, module: object) -> None:
    """Raises ValueError of a module that is read, and has a forward of its own. (Hooks it may have:
    they do not fire.)"""
    if isinstance(module, nn.Module) and has_own_forward(module):
        raise ValueError(
            f"{name}: got {type(module).__name__}, whose forward is its own, expected a module that"
            " is read and not called"
        )


def table_of(embedding: nn.Module) -> Tensor | None:
    """The weight of which a call of an embedding picks rows, with its gradients, if that is all it
    does; None if not."""
    if not isinstance(embedding, nn.Embedding) or not reads_alone(embedding, nn.Embedding):
        return None
    if embedding.scale_grad_by_freq or embedding.sparse:
        return None
    make_weights(embedding)
    weight: Tensor = embedding.weight
    if embedding.padding_idx is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    padding = torch.arange(len(weight), device=weight.device) == embedding.padding_idx
    return torch.where(padding[:, None], weight.detach(), weight)  # a row without a gradient


def make_weights(*modules: nn.Module | None) -> None:
    """Does what a call begins with where a module's weights are made of others: by `prune`,
    `weight_norm` and `spectral_norm` of torch.nn.utils, which hang themselves in front of it."""
    for module in modules:
        if module is None or not module._forward_pre_hooks:
            continue
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _MAKE_WEIGHTS):
                hook(module, None)


def bias_of(layer: Any) -> Tensor:
    """(N,), zeros where what has a weight (N, K) has no bias."""
    if layer.bias is None:
        zeros: Tensor = layer.weight.new_zeros(layer.weight.shape[0])
        return zeros
    bias: Tensor = layer.bias
    return bias


def dropout_rate(name: str, module: nn.Module) -> float:
    """The probability by which a dropout module drops now."""
    if type(module) is nn.Identity:
        return 0.0
    if not isinstance(module, nn.Dropout):
        raise ValueError(f"{name}: got {type(module).__name__}, expected nn.Dropout or nn.Identity")
    return module.p if module.training else 0.0


def rate_between_layers(layers: nn.RNNBase) -> float:
    """The same of what a recurrent module does between its layers."""
    return layers.dropout if layers.training and layers.num_layers > 1 else 0.0
