"""What the library reads of PyTorch's modules, which it does not always call."""

from typing import Any

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


def plain_embedding(module: nn.Module) -> bool:
    """Whether all that a call of it does, backward too, is to pick rows of its weight."""
    return (
        type(module) is nn.Embedding
        and module.padding_idx is None
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


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
