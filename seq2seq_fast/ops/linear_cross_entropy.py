"""Cross entropy of a linear layer's logits, without all of them at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import asked_for, choose
from . import checks
from .autograd import autocast_off, autocast_on, needs_grad, once, wanted

_op = torch.ops.seq2seq_fast.linear_cross_entropy


@torch.library.register_fake("seq2seq_fast::linear_cross_entropy")
def _(input, linear_weight, linear_bias, target, weight, logits, steps, smoothing, ignored, mean,
      need_input, need_weight, need_bias):  # fmt: skip
    return (
        input.new_empty(()),
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(linear_weight.shape if need_weight else 0),
        input.new_empty(linear_weight.shape[0] if need_bias else 0),
    )


class _Loss(torch.autograd.Function):
    """The gradients are made along with the loss, chunk by chunk; backward scales them."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, *others):
        loss, *grads = _op(input, linear_weight, linear_bias, *others, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(input, linear_weight, linear_bias, *grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        *inputs, d_input, d_weight, d_bias = ctx.saved_tensors
        with torch.no_grad():
            found = [d_input * grad, d_weight * grad, d_bias * grad]
        found = wanted(found, ctx.needs_input_grad[:3])
        known = [x for x in (grad, *inputs) if x is not None]
        return *once(found, known), *[None] * 7


def loss_of_logits(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The loss of logits (B, T, V), of which the same is asked as by `linear_cross_entropy`: of a
    readout that is called, and of the reference."""
    V = logits.shape[-1]
    checks.loss(logits, V, target, weight, reduction, label_smoothing, autocast_on(logits))
    checks.classes(target, V, ignore_index)
    return F.cross_entropy(
        logits.flatten(0, 1),
        target.flatten(),
        weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def loss_of_steps(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    steps: Sequence[int] = (),
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`linear_cross_entropy` of input (B, T, K) and target (B, T); logits (B, T, V) has [:, t]
    already for each t of `steps`, without gradients of its own."""
    autocast = autocast_on(input)
    checks.linear_cross_entropy(
        input, linear_weight, linear_bias, target, weight, reduction, label_smoothing, autocast
    )
    checks.classes(target, linear_weight.shape[0], ignore_index)
    dtype = input.dtype
    if dtype == torch.float64:
        within = dtype
    elif input.is_cpu:
        within = torch.float32
    else:
        within = torch.get_autocast_dtype(input.device.type) if autocast else dtype

    def cast(x):
        return None if x is None else x.to(within)

    choose("linear_cross_entropy", input, backend)  # an error where it is not there
    with autocast_off(input):
        args = (cast(input), cast(linear_weight), cast(linear_bias))
        if asked_for(backend) == "reference":
            of_loss = cast(weight), reduction, ignore_index, label_smoothing
            loss = loss_of_logits(F.linear(*args), target, *of_loss)
        else:
            options = (list(steps), label_smoothing, ignore_index, reduction == "mean")
            others = (target, cast(weight), cast(logits), *options)
            if needs_grad(*args):
                loss = _Loss.apply(*args, *others)
            else:
                loss, *_ = _op(*args, *others, False, False, False)
    return loss.to(torch.float32 if autocast and dtype != torch.float64 else dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), never with all the logits.

    The arguments are those of `torch.nn.functional.linear_cross_entropy`, but for reduction="none"
    and targets that are probabilities, of which there are none here. Logits are made for some
    rows at a time, and with them the gradients, where any is asked for: of a large vocabulary the
    logits neither take memory nor pass through it. Rows whose target is ignored cost nothing.

    Args:
        input: (..., K), floating point.
        linear_weight, linear_bias: (V, K) and (V,) or None.
        target: (...), int64 class indices.
        weight: (V,), of each class, without a gradient.
        reduction: "mean" (over the weights of the targets) or "sum".
        ignore_index: a target that plays no part.
        label_smoothing: share of the targets that is spread over all classes.
        backend: None for the best there is, "native", or "reference", which makes all the logits.

    Returns:
        The loss, (). The mean of no target is NaN, as in PyTorch.

    On the CPU float16 and bfloat16 are computed in float32. Under autocast the loss is float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    checks.rows("input", input, target)
    return loss_of_steps(
        input.reshape(1, target.numel(), input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(1, -1),
        weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        backend=backend,
    )
