"""Whether weights are still what they were when they were packed."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class WeightWatch:
    """Of all tensors of some modules. One of nothing does not hold, nor do copies.

    Args:
        modules: the tables that they are in, with their names there; what is not there must stay
            away.

    Each call of `generate` asks, and at batch 1 it takes as long as a few steps of decoding do:
    this remembers where everything lay, rather than ask modules for their attributes.
    """

    __slots__ = ("_places", "_tensors")

    def __init__(self, modules: Iterable[tuple[dict[str, Any], str]] = ()):
        # What was in which place of which table; tensors, with address and version
        self._places: list[tuple[dict, str, Any]] = []
        self._tensors: list[tuple[Tensor, int, int | None]] = []
        for table, name in modules:
            self._add(table, name)

    def _add(self, table: dict, name: str) -> None:
        module: nn.Module | None = table.get(name)
        self._places.append((table, name, module))
        if module is None:
            return
        for kept in (module._parameters, module._buffers, module.__dict__):
            for key, x in kept.items():
                if isinstance(x, Tensor):
                    version = None if x.is_inference() else x._version
                    self._places.append((kept, key, x))
                    self._tensors.append((x, x.data_ptr(), version))
        for child in module._modules:
            self._add(module._modules, child)

    def holds(self) -> bool:
        """Whether no weight has been exchanged, nor changed in place by PyTorch. (A change through
        `.data` is not seen, another tensor as `.data` is.)"""
        for table, name, what in self._places:
            if table.get(name) is not what:
                return False
        for x, pointer, version in self._tensors:
            if x.data_ptr() != pointer or (version is not None and x._version != version):
                return False
        return bool(self._places)

    def __reduce__(self) -> tuple:
        return WeightWatch, ()
