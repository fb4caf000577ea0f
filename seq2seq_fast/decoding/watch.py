"""Whether weights are still what they were when they were packed."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def _count_up(optimizer: Optimizer, *_: Any) -> None:
    """After a step of a fused optimizer, which changes weights but not their versions (up to
    PyTorch 2.13)."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            changed = [p for p in group["params"] if p.grad is not None]
            torch.autograd.graph.increment_version(changed)


@functools.cache
def _see_fused_optimizers() -> None:
    """Once, and not before there are weights to watch: all optimizers of the process are asked."""
    register_optimizer_step_post_hook(_count_up)


class WeightWatch:
    """Of all tensors of some modules, and of a forward that one of them may get for its own. One of
    nothing does not hold, nor do copies, nor does one of tensors that were made in inference mode.

    Args:
        modules: the tables that they are in, with their names there; what is not there must stay
            away.
        places: the same of modules that must stay the same, whatever their tensors.

    Each call of `generate` asks, and at batch 1 it takes as long as a few steps of decoding do:
    this remembers where everything lay, rather than ask modules for their attributes.
    """

    __slots__ = ("_places", "_tensors")

    def __init__(
        self,
        modules: Iterable[tuple[dict[str, Any], str]] = (),
        places: Iterable[tuple[dict[str, Any], str]] = (),
    ):
        # What was in which place of which table; tensors, with address and version
        self._places = [(table, name, table.get(name)) for table, name in places]
        # The alias keeps the memory, so that no other tensor's can come to lie there.
        self._tensors: list[tuple[Tensor, Tensor, int, int]] = []
        for table, name in modules:
            self._add(table, name)
        if self._tensors:
            _see_fused_optimizers()

    def _add(self, table: dict, name: str) -> None:
        module: nn.Module | None = table.get(name)
        self._places.append((table, name, module))
        if module is None:
            return
        self._places.append((vars(module), "forward", vars(module).get("forward")))
        for kept in (module._parameters, module._buffers, module.__dict__):
            for key, x in kept.items():
                if isinstance(x, Tensor):
                    self._places.append((kept, key, x))
                    if x.is_inference():  # which has no version, and may be changed unseen
                        self._places.append(({}, key, x))
                    else:
                        self._tensors.append((x, x.detach(), x.data_ptr(), x._version))
        for child in module._modules:
            self._add(module._modules, child)

    def holds(self) -> bool:
        """Whether no weight has been exchanged, nor changed in place by PyTorch. (A change through
        `.data` is not seen, another tensor as `.data` is.)"""
        for table, name, what in self._places:
            if table.get(name) is not what:
                return False
        for x, _, pointer, version in self._tensors:
            if x.data_ptr() != pointer or x._version != version:
                return False
        return bool(self._places)

    def __reduce__(self) -> tuple:
        return WeightWatch, ()
