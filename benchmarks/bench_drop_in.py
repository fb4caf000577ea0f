"""The modules of examples/drop_in.py beside themselves in plain PyTorch, forward and backward."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import BOTH, FORWARD
from torch import Tensor, nn

from seq2seq_fast import use_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import drop_in  # noqa: E402


@dataclass(frozen=True)
class Use:
    """A module in use: `run` makes results of it and of inputs of these shapes."""

    name: str
    make: Callable[[], nn.Module]
    shape: dict[str, int]
    inputs: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]


def all_positions(module: nn.Module, query: Tensor, keys: Tensor) -> Tensor:
    return module(query, keys)[0]


def frames(module: nn.Module, queries: Tensor, memory: Tensor) -> Tensor:
    """Steps of Tacotron 2's attention, without the recurrent layers between them."""
    keys = module.memory_layer.linear_layer(memory)
    before = covered = memory.new_zeros(memory.shape[:2])
    contexts = []
    for query in queries:
        both = torch.stack([before, covered], 1)
        context, before = module(query, memory, keys, both, None)
        covered = covered + before
        contexts.append(context)
    return torch.stack(contexts)


def speech(module: nn.Module, memory: Tensor, frames: Tensor) -> Tensor:
    return module(memory, frames, torch.full((16,), 128))[0]


def characters(module: nn.Module, features: Tensor) -> Tensor:
    text = torch.arange(64 * 26).view(64, 26) % 38
    return module(features, text, True, 25)


def read(module: nn.Module, features: Tensor) -> Tensor:
    text = torch.zeros(64, 1, dtype=torch.int64)
    return module(features, text, False, 25)


def head() -> nn.Module:
    return drop_in.TextRecognitionHead(256, 256, 38)


USES = [
    Use(
        "GNMTAttention", lambda: drop_in.GNMTAttention(1024, 1024, 1024, True),
        {"B": 16, "T": 50, "S": 50, "H": 1024}, ((50, 16, 1024), (50, 16, 1024)), all_positions,
    ),
    Use(
        "TacotronAttention", lambda: drop_in.TacotronAttention(1024, 512, 128, 32, 31),
        {"B": 16, "T": 30, "S": 150, "H": 128}, ((30, 16, 1024), (16, 150, 512)), frames,
    ),
    Use(
        "TacotronDecoder", drop_in.TacotronDecoder,
        {"B": 16, "T": 60, "S": 128, "H": 128}, ((16, 128, 512), (16, 80, 60)), speech,
    ),
    Use(
        "TextRecognitionHead, given its text", head,
        {"B": 64, "T": 26, "S": 26, "H": 256}, ((64, 26, 256),), characters,
    ),
    Use(
        "TextRecognitionHead, reading", head,
        {"B": 64, "T": 26, "S": 26, "H": 256}, ((64, 26, 256),), read,
    ),
]  # fmt: skip
QUICK = FULL = {"test_drop_in": (("use", "mode"), [(u, m) for u in USES for m in (FORWARD, BOTH)])}


def test_drop_in(use, mode, compare):
    torch.manual_seed(0)
    module = use.make()
    inputs = [torch.randn(shape, requires_grad=True) for shape in use.inputs]

    def call():
        with torch.set_grad_enabled(mode == BOTH):
            found = use.run(module, *inputs)
        if mode == BOTH:
            found.sum().backward()
            module.zero_grad()

    def plain():
        with use_backend("reference"):
            call()

    compare(
        {"library": call, "plain": plain},
        kind="drop_in",
        name=use.name,
        mode=mode,
        shape=use.shape,
    )
