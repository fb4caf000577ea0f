"""Whether a decoder's modules, some of which may have been replaced, still fit each other."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops.modules import check_is_read

if TYPE_CHECKING:
    from ..nn.decoder import Decoder

MODES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN_TANH"}


def plain_layers(layers: nn.Module, cell_type: str) -> bool:
    """Whether these recurrent layers are what the library's loops compute."""
    return (
        isinstance(layers, nn.RNNBase)
        and layers.mode == MODES[cell_type]
        and layers.batch_first
        and layers.bias
        and layers.proj_size == 0
    )


def check_read(decoder: "Decoder") -> None:
    """Raises ValueError of modules whose weights are read where that is not all there is to them:
    recurrent layers that are others than a decoder computes, and what has a forward of its own."""
    layers = decoder.layers
    if not plain_layers(layers, decoder.cell_type) or layers.bidirectional:
        raise ValueError(
            f"decoder.{decoder.cell_type}: got {layers}, expected one direction of"
            f" {MODES[decoder.cell_type]}, batch_first, with biases and no projection"
        )
    attention = decoder.attention
    parts: dict[str, object] = {decoder.cell_type: layers}
    if decoder.attentional_dim is not None:
        parts["attentional"] = decoder.attentional
    if attention is not None:
        parts["attention"] = attention
        for name in ("Wa", "location_conv", "location_dense"):
            if name in attention._modules:
                parts[f"attention.{name}"] = attention._modules[name]
    for name, module in parts.items():
        check_is_read(f"decoder.{name}", module)


def check_fits(decoder: "Decoder") -> None:
    """Raises ValueError, naming the module, what it has and what was expected: the engines read
    weights by the decoder's widths."""
    check_read(decoder)
    V, H, D, layers = decoder.output_dim, decoder.hidden_dim, decoder.context_dim, decoder.layers
    E = decoder.embedding.weight.shape[1]
    features, fed = H + D, decoder.fed_dim
    wanted = {"input_size": E + fed, "hidden_size": H, "num_layers": decoder.n_layers}
    for name, expected in wanted.items():
        if getattr(layers, name) != expected:
            got = getattr(layers, name)
            raise ValueError(
                f"decoder.{decoder.cell_type}: has {name} {got}, expected {expected} as the"
                " decoder has"
            )
    like = decoder.fc_out.weight
    _weight("embedding.weight", decoder.embedding.weight, (V, E), like)
    if decoder.attentional_dim is not None:
        check_linear("attentional", decoder.attentional, (fed, features), like)
        features = fed
    check_linear("fc_out", decoder.fc_out, (V, features), like)
    for weight in layers.parameters():
        _weight(decoder.cell_type, weight, weight.shape, like)
    if decoder.attention is not None:
        A = decoder.attention.Ua.weight.shape[0]
        check_linear("attention.Wa", decoder.attention.Wa, (A, H), like)
        check_linear("attention.Ua", decoder.attention.Ua, (A, D), like)
        _weight("attention.Va.weight", decoder.attention.Va.weight, (1, A), like)


def check_linear(name: str, module: nn.Module, shape: tuple[int, int], like: Tensor) -> None:
    _weight(f"{name}.weight", getattr(module, "weight", None), shape, like)
    if getattr(module, "bias", None) is not None:
        _weight(f"{name}.bias", module.bias, shape[:1], like)


def _weight(name: str, weight: object, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"decoder.{name}: got {type(weight).__name__}, expected a Tensor")
    if weight.shape != shape:
        raise ValueError(
            f"decoder.{name}: got shape {tuple(weight.shape)}, expected {tuple(shape)}"
        )
    if weight.dtype != like.dtype or weight.device != like.device:
        raise ValueError(
            f"decoder.{name}: is {weight.dtype} on {weight.device}, expected {like.dtype} on"
            f" {like.device} as fc_out.weight"
        )
