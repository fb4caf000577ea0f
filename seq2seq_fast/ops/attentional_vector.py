"""What a decoder feeds itself and reads out in place of output and context: their joint vector."""

from typing import NamedTuple

from torch import Tensor

from .checks import probability

ACTIVATIONS = ("tanh", "none")


class AttentionalVector(NamedTuple):
    """activation(weight [output; context] + bias) after each step, which the first layer reads in
    the next one, and the readout in place of output and context: the attentional vector and input
    feeding of Luong, Pham, Manning, "Effective approaches to attention-based neural machine
    translation" (2015).

    OpenNMT-py has it with additive attention and no activation, and weights over [context; output]:
    its halves have to be exchanged. JoeyNMT has it with tanh, and drops what the vector is made of
    (`input_dropout`) and what the layers read (`context_dropout`), and not the vector that is read
    out.

    Args:
        weight: (O, H + D), as of `nn.Linear(H + D, O)`.
        bias: (O,), or None for no bias.
        activation: "tanh" or "none".
        dropout: of the vector, wherever it is read; the probability, or factors (B, T, O).
        input_dropout: of [output; context], as the vector reads them; the probability, or factors
            (B, T, H + D).
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "tanh"
    dropout: float | Tensor = 0.0
    input_dropout: float | Tensor = 0.0


def check(vector: AttentionalVector, tensor, B: int, T: int, H: int, D: int) -> int:
    """The vector's width O. tensor(name, x, spelled, *shape) checks what a tensor is."""
    tensor("vector.weight", vector.weight, "(O, H + D)", None, H + D)
    width = vector.weight.shape[0]
    if width == 0:
        raise ValueError("vector.weight: got O = 0, expected O above 0")
    if vector.bias is not None:
        tensor("vector.bias", vector.bias, "(O,)", width)
    activation_name("vector.activation", vector.activation)
    for name, spelled, of in (("dropout", "O", width), ("input_dropout", "H + D", H + D)):
        factors = getattr(vector, name)
        if isinstance(factors, Tensor):
            tensor(f"vector.{name}", factors, f"(B, T, {spelled})", B, T, of)
        else:
            probability(f"vector.{name}", factors)
    return width


def activation_name(name: str, x: object) -> None:
    if x not in ACTIVATIONS:
        raise ValueError(f"{name}: got {x!r}, expected one of {list(ACTIVATIONS)}")
