"""The training and evaluation loops of the tutorial's form."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Protocol

import torch
from torch import Tensor, nn

from .nn import Seq2Seq
from .ops.checks import instance, number, tensor
from .ops.modules import has_hooks


class Batch(Protocol):
    """What an iterator gives: token ids, batch first."""

    src: Tensor  # (B, S)
    trg: Tensor  # (B, T)


def _batches(iterator: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    empty = True
    for i, batch in enumerate(iterator):
        if not (hasattr(batch, "src") and hasattr(batch, "trg")):
            raise TypeError(
                f"iterator: batch {i} is a {type(batch).__name__}, expected one with .src and .trg"
            )
        empty = False
        yield batch.src, batch.trg
    if empty:
        raise ValueError("iterator: got no batch, expected at least one")


def _only_the_loss_is_seen(model: nn.Module, criterion: nn.CrossEntropyLoss) -> bool:
    """Whether nobody would miss logits that are not made: no hook, no forward of a subclass."""
    return (
        type(model).forward is Seq2Seq.forward
        and type(criterion) is nn.CrossEntropyLoss
        and criterion.reduction != "none"
        and not (has_hooks(model) or has_hooks(criterion))
    )


def _loss(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    src: Tensor,
    trg: Tensor,
    ratio: float,
) -> Tensor:
    if (
        isinstance(model, Seq2Seq)
        and isinstance(criterion, nn.CrossEntropyLoss)
        and _only_the_loss_is_seen(model, criterion)
    ):
        return model.loss(
            src,
            trg,
            ratio,
            weight=criterion.weight,
            ignore_index=criterion.ignore_index,
            reduction=criterion.reduction,
            label_smoothing=criterion.label_smoothing,
        )
    logits = model(src, trg, ratio)[:, 1:]  # t = 0 is the start token, which nothing predicts
    return criterion(logits.flatten(0, 1), trg[:, 1:].flatten())


def _checked(model: object, iterator: object, criterion: object) -> None:
    instance("model", model, nn.Module)
    if not (hasattr(iterator, "__iter__") or hasattr(iterator, "__getitem__")):
        raise TypeError(f"iterator: got {type(iterator).__name__}, expected batches")
    if not callable(criterion):
        raise TypeError(f"criterion: got {type(criterion).__name__}, expected a function")


def _finite(loss: Tensor, i: int) -> float:
    tensor("loss", loss)
    if loss.numel() != 1:
        raise ValueError(f"loss: got shape {tuple(loss.shape)} in batch {i}, expected one number")
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"loss: got {value} in batch {i}, expected a finite number")
    return value


def _clip(model: nn.Module, most: float) -> None:
    """`nn.utils.clip_grad_norm_`, but that on the CPU no gradient is multiplied by one."""
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.is_cpu and most / (norm + 1e-6) >= 1:  # its factor, but for being 1 at most
        return
    nn.utils.clip_grads_with_norm_(parameters, most, norm)


class _Progress:
    """Counts batches; on request one line on standard error, rewritten a few times a second."""

    def __init__(self, iterator: object, name: str, shown: bool):
        self.total = len(iterator) if isinstance(iterator, Sized) else None
        self.name, self.shown = name, shown
        self.start = self.last = time.perf_counter()
        self.batches = self.sequences = 0
        self.loss = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._show(time.perf_counter())
            print(file=sys.stderr)

    def add(self, sequences: int, loss: float) -> None:
        self.batches, self.sequences = self.batches + 1, self.sequences + sequences
        self.loss += loss
        now = time.perf_counter()
        if self.shown and now - self.last > 0.2:
            self.last = now
            self._show(now)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.batches, 1)

    def _show(self, now: float) -> None:
        bar, of = "", ""
        if self.total:
            filled = 24 * self.batches // self.total
            bar, of = f" [{'#' * filled}{'.' * (24 - filled)}]", f"/{self.total}"
        rate = self.sequences / max(now - self.start, 1e-9)
        line = f"{self.batches}{of} batches, {rate:.0f} words/s, loss {self.mean_loss:.3f}"
        print(f"\r{self.name}{bar} {line:<60}", end="", file=sys.stderr, flush=True)


def train(
    model: nn.Module,
    iterator: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    clip: float,
    *,
    teacher_forcing_ratio: float = 0.5,
    progress: bool = False,
) -> float:
    """One epoch of optimisation; the model is left in training mode.

    Args:
        model: model(src, trg, teacher_forcing_ratio) -> logits (B, T, V), as `Seq2Seq`, of which
            `loss` is taken where criterion is an `nn.CrossEntropyLoss`.
        iterator: anything that gives batches with .src (B, S) and .trg (B, T) token ids.
        optimizer: over model's parameters.
        criterion: loss of logits (N, V) and targets (N,), N = B (T - 1), the start token left out.
        clip: largest norm of all gradients together, above 0; math.inf for any.
        teacher_forcing_ratio: of steps that are fed trg's token, 0 to 1; see `Seq2Seq.forward`.
        progress: a line on standard error with batches, sequences ("words") a second and loss.

    Returns:
        The mean loss over batches.

    Raises:
        FloatingPointError: a loss is infinite or NaN; the step it belongs to is not taken.
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    _checked(model, iterator, criterion)
    if not (hasattr(optimizer, "zero_grad") and hasattr(optimizer, "step")):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected an Optimizer")
    number("clip", clip)
    if not clip > 0:
        raise ValueError(f"clip: got {clip}, expected a number above 0")
    model.train()
    with _Progress(iterator, "train", progress) as bar:
        for i, (src, trg) in enumerate(_batches(iterator)):
            optimizer.zero_grad()
            loss = _loss(model, criterion, src, trg, teacher_forcing_ratio)
            value = _finite(loss, i)
            loss.backward()
            _clip(model, clip)
            optimizer.step()
            bar.add(src.shape[0], value)
    return bar.mean_loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    iterator: Iterable[Batch],
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    progress: bool = False,
) -> float:
    """Mean loss over batches without teacher forcing; the model is left in evaluation mode.

    Arguments and errors as in `train`.
    """
    _checked(model, iterator, criterion)
    model.eval()
    with _Progress(iterator, "valid", progress) as bar:
        for i, (src, trg) in enumerate(_batches(iterator)):
            loss = _loss(model, criterion, src, trg, 0.0)
            bar.add(src.shape[0], _finite(loss, i))
    return bar.mean_loss
