"""A decoder's weights as the compiled engine reads them: from one end to the other."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..library import HAS_KERNEL
from ..ops.attention_decoder import layer_weights
from ..ops.modules import bias_of, make_weights
from .fits import check_fits
from .watch import WeightWatch

if TYPE_CHECKING:
    from ..nn.decoder import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
UNIT, WIDTH = 16, 64  # kBlock and kPanel of csrc/cpu/loops.h
FEW_TOKENS = 512  # of which the first layer's gates are made beforehand
MOST_GATES = 1 << 24  # of all tokens, which are made beforehand where values are projected
MANY_TOKENS = 1024  # of which the most probable one is sought among bytes first
MANY_SUMMED = 4096  # of which log-probabilities are made of sixteen bits
MOST_OF_SIX = 31  # what whole numbers of six bits are not above
# What numbers of sixteen bits are at most, and how long so many of a row, before they are rounded;
# directions that rows have in common, and what their part is too small by: SixteenRows of
# csrc/cpu/loops.h.
MOST_OF_SIXTEEN, BLOCK_OF_SIXTEEN, LENGTH_OF_SIXTEEN = 32767, 64, 46328
COMMON, SIXTEENTH = 16, 1 / 16
MOST_LOOKED_AT = 8192  # rows, for what they have in common
PART = 1024  # of which the bounds are made at once, in float64
MOST_INPUTS = 1 << 17  # of int8's products, whose sums fit into whole numbers of 32 bits
MOST_FEATURES = 1 << 16  # whose products fit into whole numbers of 32 bits there


class Packed(NamedTuple):
    """Tensors in one piece of memory, and where they lie there: see csrc/cpu/packed_product.h.
    Copies have none, since a copied `WeightWatch` does not hold: they are packed anew."""

    memory: Tensor  # uint8
    layout: Tensor  # (n, 7) int64

    def tensors(self) -> list[Tensor]:
        found = []
        for start, kind, dim, *sizes in self.layout.tolist():
            dtype, shape = _DTYPES[kind], sizes[:dim]
            n = math.prod(shape) * dtype.itemsize
            found.append(self.memory[start : start + n].view(dtype).view(shape))
        return found

    @classmethod
    def nothing(cls) -> "Packed":
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        return cls(memory, torch.empty(0, 7, dtype=torch.int64, device="cpu"))

    def __reduce__(self) -> tuple:
        return Packed.nothing, ()


_op = torch.ops.seq2seq_fast.pack_panels
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int16)


class Panels(NamedTuple):
    """Panels (P, K, width) of matrices (blocks * N, k) side by side, yet to be packed: see
    `pack_rows`."""

    parts: list[Tensor]
    blocks: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        unit = WIDTH if self.blocks == 1 else UNIT
        panels = -(-len(self.parts[0]) // (self.blocks * unit))
        return panels, sum(w.shape[1] for w in self.parts), self.blocks * unit

    def copy_to(self, place: Tensor) -> None:
        column = 0
        for w in self.parts:
            if self.dtype == torch.float32 and HAS_KERNEL["pack_panels", "cpu"]:
                _op(place, w.detach().float(), self.blocks, column)
            else:
                place[:, column : column + w.shape[1]] = pack_rows(w.to(self.dtype), self.blocks)
            column += w.shape[1]


class PackedDecoder(NamedTuple):
    """A decoder's weights, packed, and whether they are still the decoder's. If not, they say how
    to pack those that are."""

    weights: Packed  # in the order of PackedDecoder in csrc/cpu/decode_step.h
    dtype: str
    watch: WeightWatch
    projects_values: bool
    widths: tuple[int, int, int]  # H, D, A, which padded panels do not tell


def pack_decoder(
    decoder: "Decoder", dtype: str, seek: bool = True, project_values: bool = False
) -> PackedDecoder:
    """decoder's weights packed as "float32", "bfloat16" or "int8", a copy of all of them.

    In float32 and bfloat16 a large vocabulary's readout is there three times more where `seek`:
    rounded to six and eight bits, by which greedy decoding seeks the most probable token; to
    sixteen, of which log-probabilities are made; and row by row, by which tokens are decided on.

    Embedding, biases and v stay float32, as do the gates that few tokens have beforehand. bfloat16
    is rounded to nearest and summed up in float32. int8 has one scale for each output of a
    product: w = scale * whole number, scale = max |w| / 127. It is multiplied in whole numbers, by
    rows rounded to 14 bits: x = max |x| / 8191 * whole number.

    Where `project_values`, the first layer's weights of the context are apart, and a step has no
    product with them, nor with those of tokens, of which there may be MOST_GATES; see
    `Seq2Seq.prepare_inference`.
    """
    watch = watch_of(decoder)
    check_fits(decoder)
    with torch.no_grad():
        wide = _in_float32(decoder)
        weights = _side_by_side(_pack(wide, DTYPES[dtype], seek, project_values))
    A = 0 if decoder.attention is None else decoder.attention.Wa.weight.shape[0]
    widths = decoder.hidden_dim, decoder.context_dim, A
    return PackedDecoder(weights, dtype, watch, project_values, widths)


def _in_float32(decoder: "Decoder") -> "Decoder":
    """decoder, or one of the same numbers as far as packing looks."""
    if decoder.fc_out.weight.dtype == torch.float32:
        return decoder
    wide = copy.copy(decoder)
    names = [name for name in (*_PARTS, decoder.cell_type) if name in decoder._modules]
    wide._modules = {name: copy.deepcopy(decoder._modules[name]) for name in names}
    wide = wide.float()
    for module in wide.modules():
        if module is wide:
            continue
        for name, x in vars(module).items():
            if isinstance(x, Tensor):  # made of others by hooks, and no parameter
                setattr(module, name, x.float())
    return wide


_PARTS = ("embedding", "fc_out", "attention", "attentional")


def modules_of(decoder: "Decoder") -> Iterator[tuple[dict[str, Any], str]]:
    """Those whose weights are packed, as `WeightWatch` takes them: of the attention the query's
    projection alone, since prepared sources have the rest."""
    for name in ("embedding", decoder.cell_type, "fc_out", "attentional"):
        yield decoder._modules, name
    if decoder.attention is not None:
        yield decoder.attention._modules, "Wa"


_Kept = TypeVar("_Kept", PackedDecoder, "PackedLayers")


def let_go(packed: _Kept | None) -> _Kept | None:
    """The same without weights that are others by now, and without the memory of those."""
    if packed is None or packed.watch.holds():
        return packed
    return packed._replace(weights=Packed.nothing(), watch=WeightWatch())


@torch.no_grad()
def watch_of(decoder: "Decoder") -> WeightWatch:
    """Of the weights that decoding reads, as they are now."""
    for table, name in modules_of(decoder):
        if table.get(name) is not None:
            make_weights(*table[name].modules())
    attention = decoder._modules.get("attention")
    forward = [] if attention is None else [(vars(attention), "forward")]
    return WeightWatch(modules_of(decoder), [(decoder._modules, "attention"), *forward])


class PackedLayers(NamedTuple):
    """An encoder's recurrent layers, packed, and whether they are still the encoder's."""

    weights: Packed  # in the order of csrc/cpu/recurrent_layers.cpp
    watch: WeightWatch


def pack_layers(table: dict[str, Any], name: str) -> PackedLayers:
    """The weights of nn.LSTM, nn.GRU or nn.RNN, which has this name in a module's table, in
    float32: of each layer and direction the input's, the hidden state's, and the bias."""
    layers: nn.RNNBase = table[name]
    packed: list[Tensor | Panels] = []
    watch = WeightWatch([(table, name)])
    with torch.no_grad():
        weights = layer_weights(layers.all_weights, name)
        for i in range(0, len(weights), 3):
            for w in weights[i : i + 2]:
                packed += pack_matrix([w], len(w) // layers.hidden_size, torch.float32)
            bias = weights[i + 2]
            packed.append(pack_rows(bias[:, None], len(bias) // layers.hidden_size).flatten())
        return PackedLayers(_side_by_side(packed), watch)


def _side_by_side(weights: list[Tensor | Panels]) -> Packed:
    """The same numbers in one piece of memory, which large pages can hold: a step reads all of it,
    and would look up the place of each small page."""
    layout, total = [], 0
    for w in weights:
        sizes = [*w.shape] + [0] * (4 - len(w.shape))
        layout.append([total, _DTYPES.index(w.dtype), len(w.shape), *sizes])
        total += -(-math.prod(w.shape) * w.dtype.itemsize // 64) * 64
    like = torch.empty(0, device="cpu")
    memory = torch.ops.seq2seq_fast.weights_memory(like, total)
    packed = Packed(memory, torch.tensor(layout, device="cpu"))
    for place, w in zip(packed.tensors(), weights, strict=True):
        if isinstance(w, Panels):
            w.copy_to(place)
        else:
            place.copy_(w)
    return packed


def _pack(
    decoder: "Decoder", dtype: torch.dtype, seek: bool, project_values: bool
) -> list[Tensor | Panels]:
    H, kind = decoder.layers.hidden_size, decoder.cell_type
    layers, E = layer_weights(decoder.layers.all_weights, kind), decoder.embedding.embedding_dim
    like = decoder.fc_out.weight
    nothing = pack_matrix([like.new_empty(0, 1)], 1, dtype)
    context = nothing
    if project_values and not decoder.query_after:
        context = pack_matrix([layers[0][:, E:]], len(layers[0]) // H, dtype)
        layers[0] = layers[0][:, :E]
    gates = decoder.output_dim * len(layers[2])
    if decoder.output_dim <= FEW_TOKENS or (project_values and gates <= MOST_GATES):
        packed: list[Tensor | Panels] = [_gates_of_tokens(decoder, layers[0][:, :E], layers[2])]
        layers[0] = layers[0][:, E:]
    else:
        packed = [decoder.embedding.weight.detach().contiguous()]
    for i in range(0, len(layers), 3):
        w_input, w_hidden, bias = layers[i : i + 3]
        blocks = len(bias) // H
        if kind == "gru":  # its n has a part of each that must not be added up
            packed += pack_matrix([w_input], 3, dtype) if w_input.shape[1] > 0 else nothing
            packed += pack_matrix([w_hidden], 3, dtype)
        else:
            packed += [*pack_matrix([w_input, w_hidden], blocks, dtype), *nothing]
        packed.append(pack_rows(bias[:, None], blocks).flatten())
    query = None if decoder.attention is None else decoder.attention.Wa
    packed += _pack_linear(query, dtype) if query is not None else [*nothing, like.new_empty(0)]
    packed += context
    joined = None if decoder.attentional_dim is None else decoder.attentional
    packed += _pack_linear(joined, dtype) if joined is not None else [*nothing, like.new_empty(0)]
    packed += _pack_linear(decoder.fc_out, dtype)
    return packed + pack_screens(decoder, dtype, seek and dtype != torch.int8)


def _gates_of_tokens(decoder: "Decoder", w_input: Tensor, bias: Tensor) -> Tensor:
    """(V, P, gates of a unit's panel): each token's part of the first layer's gates and their bias,
    in the order of the gates' panels. A step then reads a row of them in place of w_input."""
    from_tokens = decoder.embedding.weight @ w_input.T
    gates = F.pad(from_tokens, (0, len(bias) - from_tokens.shape[1])) + bias
    blocks = len(bias) // decoder.layers.hidden_size
    return pack_rows(gates.T, blocks).transpose(0, 1).contiguous()


def _pack_linear(linear: nn.Linear, dtype: torch.dtype) -> list[Tensor | Panels]:
    bias = pack_rows(bias_of(linear)[:, None], 1).flatten()
    return [*pack_matrix([linear.weight], 1, dtype), bias]


def pack_rows(w: Tensor, blocks: int) -> Tensor:
    """w (blocks * N, K) -> panels (P, K, blocks * unit), each of `unit` rows of every block; the
    last one is filled up with zeros. So the gates of a unit lie in one panel."""
    unit, n = WIDTH if blocks == 1 else UNIT, len(w) // blocks
    panels = -(-n // unit)
    rows = F.pad(w.unflatten(0, (blocks, n)), (0, 0, 0, panels * unit - n))
    return rows.unflatten(1, (panels, unit)).permute(1, 3, 0, 2).flatten(2).contiguous()


def pack_matrix(
    parts: list[Tensor], blocks: int, dtype: torch.dtype
) -> tuple[Tensor | Panels, Tensor]:
    """Panels of a matrix (blocks * N, K), given as such with some of its columns each, and the
    scale of each of the panels' columns; none but of int8.

    Those of int8 are (P, K / 4, width, 4), K filled up with zeros: whole numbers + 128 in uint8.
    """
    none = parts[0].new_empty(0)
    if dtype != torch.int8:
        return Panels(parts, blocks, dtype), none
    w = torch.cat(parts, 1)
    if w.shape[1] > MOST_INPUTS:
        raise ValueError(
            f"dtype: got 'int8' of weights for {w.shape[1]} inputs, expected at most {MOST_INPUTS}"
        )
    whole, scale = _rounded(w, 127)
    return _by_fours(whole, 128, blocks), pack_rows(scale, blocks).flatten()


def pack_six_bits(w: Tensor) -> tuple[Tensor, Tensor]:
    """Panels (P, K / 4, 3, WIDTH) of w (N, K), K filled up with zeros, in three bytes for four
    numbers: whole numbers + 32, whose layout csrc/cpu/loops.h tells; and each column's scale."""
    whole, scale = _rounded(w, MOST_OF_SIX)
    blocks = _by_fours(whole, 32, 1).unflatten(2, (4, -1)).flatten(3)
    parts, above = blocks[:, :, :3], blocks[:, :, 3:]
    shifts = torch.tensor([[0], [2], [4]], dtype=torch.uint8, device=w.device)
    return parts | (above >> shifts & 3) << 6, pack_rows(scale, 1).flatten()


def _rounded(w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -most to most of w (N, K), and the scale (N, 1) of each row's."""
    # A scale is a normal number, which no mode of the processor flushes to zero.
    scale = (w.abs().amax(1, keepdim=True) / most).clamp_min(torch.finfo(torch.float32).tiny)
    return (w / scale).round(), scale


def _by_fours(whole: Tensor, zero: int, blocks: int) -> Tensor:
    """Whole numbers (blocks * N, K) + zero as panels (P, K / 4, width, 4) of uint8, K and N filled
    up with zeros."""
    filled = F.pad(whole, (0, -whole.shape[1] % 4))
    fours = pack_rows(filled, blocks).unflatten(1, (-1, 4)).transpose(2, 3)
    return (fours + zero).to(torch.uint8).contiguous()


def pack_screens(decoder: "Decoder", dtype: torch.dtype, wanted: bool) -> list[Tensor | Panels]:
    """What csrc/cpu/screen.h seeks the most probable tokens with. Of six bits, with scales, of the
    hidden state's part of the readout's weights, or of an attentional vector's, and int8 of the
    context's, none beside a vector; the bounds (5, P), largest of each panel's columns; neither
    mean nor directions. The same of sixteen bits, of all the weights, with both. The weights (V, K)
    in dtype. All empty where nothing is sought: not wanted, few tokens, or weights that are not
    finite."""
    linear, H = decoder.fc_out, decoder.layers.hidden_size
    if decoder.attentional_dim is not None:
        H = decoder.attentional_dim
    w, bias, (V, K) = linear.weight.detach(), bias_of(linear).detach(), linear.weight.shape
    none = w.new_empty(0)
    nothing = none[:, None]
    of_int8 = _by_fours(nothing, 128, 1), none
    no_pairs = _pack_pairs(none.view(0, 1), none.view(0, COMMON))
    no_sixteen = [no_pairs, none, *of_int8, *3 * [none]]
    no_six = [*pack_six_bits(nothing), *of_int8, *3 * [none]]
    if not wanted or V < MANY_TOKENS or K > MOST_FEATURES:
        return [*no_six, *no_sixteen, none]
    w = w.to(dtype).to(w.dtype)
    if not (w.isfinite().all() and (bias < torch.inf).all()):
        return [*no_six, *no_sixteen, none]
    of_context = pack_matrix([w[:, H:]], 1, torch.int8) if K > H else of_int8
    six, eight = (partial(_rounded, most=most) for most in (MOST_OF_SIX, 127))
    packed: list[Tensor | Panels] = [*pack_six_bits(w[:, :H]), *of_context]
    parts: list[_Part] = [(slice(H), six, w.new_zeros(1)), (slice(H, K), eight, w.new_zeros(1))]
    packed += [_largest_bounds(w, bias, parts), none, none]
    return [*packed, *(_pack_sixteen(w, bias) if V >= MANY_SUMMED else no_sixteen), w.to(dtype)]


def _pack_sixteen(w: Tensor, bias: Tensor) -> list[Tensor]:
    """Sixteen bits of w (V, K), in the order of `pack_screens`."""
    (_, K), none = w.shape, w.new_empty(0)
    mean, directions = _in_common(w)
    whole, of_common, scale = _rounded_to_sixteen(w - mean, directions)

    def rounding(rest: Tensor) -> tuple[Tensor, Tensor]:
        return _rounded_to_sixteen(rest, directions)[::2]

    bounds = _largest_bounds(w, bias, [(slice(K), rounding, mean), (slice(K, K), rounding, mean)])
    # What rounding takes from the rows is met by the directions' part of the weights too, which is
    # not longer than they are, but for rounding.
    bounds[1] *= 2.1
    fill = -K % BLOCK_OF_SIXTEEN
    directions = F.pad(directions / SIXTEENTH, (0, 0, 0, fill))
    numbers = _pack_pairs(whole, of_common), pack_rows(scale, 1).flatten()
    of_int8 = _by_fours(none[:, None], 128, 1), none
    return [*numbers, *of_int8, bounds, F.pad(mean, (0, fill)), directions]


def _pack_pairs(whole: Tensor, of_common: Tensor) -> Tensor:
    """Panels (P, K / 2, WIDTH, 2) of int16, of whole numbers side by side, the first ones filled up
    with zeros to an even number of columns."""
    rows = torch.cat([F.pad(whole, (0, -whole.shape[1] % 2)), of_common], 1).to(torch.int16)
    return pack_rows(rows.view(torch.int32), 1).view(torch.int16).unflatten(2, (WIDTH, 2))


def _in_common(w: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (K,) of rows w (V, K), and (K, COMMON) orthogonal directions that most of what is
    left lies in: of some rows, without those that are much longer than most. By subspace iteration
    (Halko, Martinsson and Tropp 2011), in float64, so that what threads there are is not seen."""
    some = w[:: -(-len(w) // MOST_LOOKED_AT)].double()
    size = some.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    some = some / size
    length = some.norm(dim=1)
    some = some[length <= 4 * length.median()]
    mean = some.mean(0)
    some -= mean
    random = torch.Generator().manual_seed(0)
    n = min(w.shape[1], COMMON + 8)
    q = torch.randn(w.shape[1], n, generator=random, dtype=torch.float64).to(w.device)
    for _ in range(3):
        q = torch.linalg.qr(some.T @ (some @ q)).Q
    part = some @ q
    found = q @ torch.linalg.eigh(part.T @ part)[1][:, -COMMON:]
    found = F.pad(found, (0, COMMON - found.shape[1]))
    return (mean * size).to(w.dtype), found.to(w.dtype)


def _rounded_to_sixteen(w: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers of w (N, K), and of its part (N, COMMON) in directions, with a scale (N, 1) for
    both that no block of them is too long for: sums of their products fit into 32 bits."""
    tiny = torch.finfo(torch.float32).tiny
    most = w.abs().amax(1, keepdim=True).clamp_min(tiny)
    part = w @ directions * SIXTEENTH
    # Of numbers up to 1, whose squares are finite.
    blocks = F.pad(w / most, (0, -w.shape[1] % BLOCK_OF_SIXTEEN)).unflatten(
        1, (-1, BLOCK_OF_SIXTEEN)
    )
    length = blocks.norm(dim=2).amax(1, keepdim=True).maximum((part / most).norm(dim=1)[:, None])
    scale = most * (length / LENGTH_OF_SIXTEEN).clamp_min(1 / MOST_OF_SIXTEEN)
    scale = scale.clamp_min(tiny)
    return (w / scale).round(), (part / scale).round(), scale


# Columns of a matrix, how they are rounded, and what is taken from all rows before.
_Part = tuple[slice, Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]


def _largest_bounds(w: Tensor, bias: Tensor, parts: list[_Part]) -> Tensor:
    """(5, P): the largest of each panel's rows, see `_bounds`."""
    bounds = [_bounds(*rows, parts) for rows in zip(w.split(PART), bias.split(PART), strict=True)]
    return F.pad(torch.cat(bounds, 1), (0, -len(w) % WIDTH)).unflatten(1, (-1, WIDTH)).amax(2)


def _bounds(w: Tensor, bias: Tensor, parts: list[_Part]) -> Tensor:
    """(5, N), of each row of w (N, K) and each of two parts of it: how far a product by their bits
    can be from that by floats, for a left factor of norm 1; the norm of what the bits stand for.
    Last the rounding of the bias."""
    unit, bounds = 2.0**-24, []  # of float32's rounding
    for columns, rounding, taken in parts:
        part = w[:, columns]
        if part.shape[1] == 0:
            bounds += 2 * [w.new_zeros(len(w), dtype=torch.float64)]
            continue
        whole, scale = rounding(part - taken)
        exact = scale.double() * whole
        of_bits, of_part = exact.norm(dim=1), part.double().norm(dim=1)
        # Sums of K products, each rounded, and the few roundings of digits and of scales.
        sizes = of_part + of_bits + taken.double().norm()
        rounded = (part.double() - taken - exact).norm(dim=1) + (w.shape[1] + 12) * unit * sizes
        bounds += [rounded, of_bits]
    of_bias = 3 * unit * bias.abs().masked_fill(bias == -torch.inf, 0)
    return torch.stack([*bounds, of_bias]).float()
