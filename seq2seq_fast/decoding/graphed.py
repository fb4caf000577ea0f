"""Decoding on a GPU: blocks of steps in a CUDA graph, over buffers that stay where they are.

All of it is float32, whatever the decoder is, as the decoder's kernels are.

The first call of its shapes launches the steps one by one, as does one that finds the buffers in
use by another thread; those after it replay a graph, if one could be captured. The host looks at
which searches are over one block late, so that the GPU never waits for it.
"""

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.attention_decoder import layer_weights
from ..ops.modules import bias_of
from . import native, sampling, stepwise, together
from .fits import check_fits
from .options import DecodingOptions
from .packing import watch_of
from .results import Generated
from .watch import WeightWatch

if TYPE_CHECKING:
    from ..nn.decoder import Decoder, DecoderState

BLOCK = 8  # steps of a graph
POSITIONS = 32  # sources are filled up to a multiple of it, so that lengths share their graphs
MOST_LOOPS = 8  # kept of a decoder

_ops = torch.ops.seq2seq_fast


_captured: "weakref.WeakSet[Graph]" = weakref.WeakSet()


def _stream_of_its_own() -> torch.cuda.Stream:
    """A stream that no graph here which is still there was captured on, as long as there are some:
    PyTorch hands out 32 in turn. Graphs that were captured on one stream share the workspace of its
    products, and when one of them goes PyTorch may free it."""
    taken = {graph.stream for graph in list(_captured)}
    for _ in range(32):
        stream = torch.cuda.Stream()
        if stream.cuda_stream not in taken:
            break
    return stream


class Graph:
    """A call's work on the GPU, to be done again by `replay`."""

    def __init__(self, call: Callable[[], None]):
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.current_blas_handle()  # this thread's first product would make it, uncapturably
        stream = _stream_of_its_own()
        self.stream = stream.cuda_stream
        _captured.add(self)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Not torch.cuda.graph, which collects garbage and returns memory first, and other
            # threads may go on.
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which would hide what went wrong
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        self.graph.replay()


class Watch:
    """How many searches were over when the GPU came by, read when it has."""

    def __init__(self, over: Tensor):
        self.over = over
        self.seen = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self.events = [torch.cuda.Event(), torch.cuda.Event()]
        self.end = torch.cuda.Event()

    def begin_run(self) -> None:
        """Waits for the run before, which may have been on another stream."""
        torch.cuda.current_stream().wait_event(self.end)

    def end_run(self) -> None:
        self.end.record()

    def hold(self, x: Tensor) -> None:
        """Keeps x's memory for what reads it on this stream, should its owner be forgotten."""
        x.record_stream(torch.cuda.current_stream())

    def note(self, block: int) -> None:
        self.seen[block % 2].copy_(self.over, non_blocking=True)
        self.events[block % 2].record()

    def read(self, block: int) -> int:
        self.events[block % 2].synchronize()
        return int(self.seen[block % 2])


class Made:
    """Tensors that are made on one stream, for others to read as well."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.ready = torch.cuda.Event()
        self.ready.record()

    def take(self) -> list[Tensor]:
        """They, for the current stream to read."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.ready)
        for x in self.tensors:
            x.record_stream(stream)  # or what is made next may get their memory too early
        return self.tensors


class Location(NamedTuple):
    """How a decoder's attention sees its location: nothing where it does not."""

    filters: list[Tensor]  # and their projection
    before: Tensor | None  # the first step
    accumulates: tuple[int, ...]

    @classmethod
    def of(cls, decoder: "Decoder", source: "stepwise.Source", state: "DecoderState") -> "Location":
        if isinstance(source, Tensor):
            return cls([], None, ())
        tensors, accumulates = native.located(decoder, source, state)
        return cls(tensors[:2], tensors[2] if tensors else None, accumulates)

    @property
    def form(self) -> tuple:
        return *(x.shape for x in self.filters), self.accumulates


class Loop:
    """The buffers of decoding sources of one shape with the same options, and a graph over them."""

    def __init__(
        self,
        decoder: "Decoder",
        weights: list[Tensor],
        source: "stepwise.Source",
        state: "DecoderState",
        location: Location,
        options: DecodingOptions,
    ):
        self.lock = threading.Lock()
        self.graph: Graph | None = None
        self.weights, self.options, self.runs = weights, options, 0
        self.kind = decoder.cell_type, decoder.query_after
        self.vector, self.accumulates = native.vector_of(decoder), location.accumulates
        (L, B, H), K, N = state.hidden.shape, options.beam_size, options.n_best
        M, T = B * K, _up(options.max_length, BLOCK)
        like = weights[0]

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self.source: list[Tensor] = []
        self.mask, S = None, 0
        self.locations, self.attended = new(0), new(0)
        if not isinstance(source, Tensor):
            S, A = _positions(source), source.v.shape[0]
            keys = new(B, S, A)
            powers = new(0) if location.filters else _ops.prepare_keys(keys)  # read without alone
            self.source = [keys, powers, new(B, S, decoder.context_dim), new(A)]
            if location.filters:
                self.source += [torch.empty_like(x) for x in location.filters]
                self.locations = new(2, M, len(self.accumulates), S)
                self.attended = new(M, S)
            self.mask = new(B, S, dtype=torch.bool)
        covers, keeps = options.coverage_penalty > 0, options.return_weights
        lengths = torch.arange(T + 1, dtype=torch.float64, device=like.device)
        self.penalties = ((5 + lengths) / 6) ** options.length_penalty
        self.limits = new(B, dtype=torch.int64)
        self.seed = new(1, dtype=torch.int64) if options.sample else None
        self.most = min(options.top_k, decoder.output_dim)
        self.prefix = new(B, 0 if options.prefix is None else options.prefix.shape[-1],
                          dtype=torch.int64)  # fmt: skip
        # What csrc/cuda/decode_search.cuh calls Search, beside states and weights.
        self.hidden = new(L, M, H)
        self.cell = new(L, M, H) if decoder.cell_type == "lstm" else new(0)
        self.context = new(M, decoder.fed_dim)
        self.covered = new(M, S) if covers else new(0)
        self.counters = new(2, dtype=torch.int32)
        self.watch = Watch(self.counters[1])
        self.counts = new(2, B, dtype=torch.int32)
        self.rows = new(2, M, dtype=torch.int32)
        self.log_probs = new(M, dtype=torch.float64)
        self.nodes = new(2, T, M, dtype=torch.int32)
        self.kept = new(T, M, S) if keeps else new(0)
        self.state = [
            self.hidden,
            self.cell,
            self.context,
            self.covered,
            self.counters,
            self.counts,
            self.rows,
            self.log_probs,
            self.nodes,
            self.kept,
            new(4, B, N, dtype=torch.int32),
            new(2, B, N, dtype=torch.float64),
            self.locations,
            self.attended,
        ]
        first, bos = torch.arange(B, dtype=torch.int32, device=like.device) * K, options.whole[0]
        self.first_rows = torch.stack(
            [torch.full_like(first, bos).repeat_interleave(K), first.repeat_interleave(K)]
        )
        self.watch.end_run()  # another stream may be the first to run it

    def _steps(self) -> None:
        o = self.options
        _ops.decode_steps(
            self.state,
            self.weights,
            *self.kind,
            self.source,
            self.mask,
            self.limits,
            self.prefix,
            self.penalties,
            self.seed,
            o.whole,
            float(o.coverage_penalty),
            float(o.temperature),
            self.most,
            float(o.top_p),
            self.accumulates,
            self.vector,
            BLOCK,
        )

    def _load(
        self,
        source: "stepwise.Source",
        state: "DecoderState",
        location: Location,
        options: DecodingOptions,
    ) -> None:
        """Puts a call's numbers where the steps read them."""
        (_, B, _), K = state.hidden.shape, options.beam_size
        self.hidden[:, ::K].copy_(state.hidden)
        if state.cell is not None:
            self.cell[:, ::K].copy_(state.cell)
        context = source if isinstance(source, Tensor) else state.context
        if context is None:
            self.context.zero_()
        else:
            self.context.unflatten(0, (B, K)).copy_(context.unsqueeze(1))
        if not isinstance(source, Tensor):
            keys, powers, values, v, *filters = self.source
            mask, S = self.mask, source.values.shape[1]
            assert mask is not None
            keys[:, :S].copy_(source.keys.keys)
            values[:, :S].copy_(source.values)
            keys[:, S:].zero_()
            values[:, S:].zero_()  # nothing of an earlier call, which might not be finite
            ready = source.keys.powers
            if not location.filters:
                powers.copy_(
                    ready if ready is not None and ready.shape == powers.shape
                    else _ops.prepare_keys(keys)
                )  # fmt: skip
            v.copy_(source.v)
            mask[:, :S] = True if source.mask is None else source.mask
            mask[:, S:] = False
            for x, y in zip(filters, location.filters, strict=True):
                x.copy_(y)
            if location.before is not None:
                self.locations.zero_()
                self.locations[0, ::K, :, :S].copy_(location.before)
        if options.max_length_ratio is None:
            self.limits.fill_(options.max_length)  # copied from the host it would be waited for
        else:
            self.limits.copy_(stepwise.row_limits(source, options, B))
        if options.prefix is not None:
            self.prefix.copy_(options.prefix)
        if self.seed is not None:
            self.seed.copy_(sampling.seed_of(options, self.seed.device))
        self.covered.zero_()
        self.counters[0] = -1
        self.counters[1] = 0
        self.counts[0] = 1
        self.counts[1] = 0
        self.rows.copy_(self.first_rows)
        bos = options.bos_of_rows(self.rows.device)
        if bos is not None:
            self.rows[0].unflatten(0, (B, K)).copy_(bos[:, None])
        self.log_probs.zero_()

    def run(
        self,
        source: "stepwise.Source",
        state: "DecoderState",
        location: Location,
        options: DecodingOptions,
    ) -> Generated:
        """`generate`, by who holds the lock."""
        self.watch.begin_run()
        try:
            return self._run(source, state, location, options)
        finally:  # who comes next waits for it, whatever has ended it here
            self.watch.end_run()

    def _run(
        self,
        source: "stepwise.Source",
        state: "DecoderState",
        location: Location,
        options: DecodingOptions,
    ) -> Generated:
        self._load(source, state, location, options)
        if self.runs == 1:
            try:
                self.graph = Graph(self._steps)
            except RuntimeError as error:
                warnings.warn(
                    f"seq2seq_fast: decoding goes on without a CUDA graph: {error}", stacklevel=4
                )
        self.runs += 1
        advance = self._steps if self.graph is None else self.graph.replay
        for block in range(-(-options.max_length // BLOCK)):
            advance()
            self.watch.note(block)
            if block > 0 and self.watch.read(block - 1) == len(self.limits):
                break
        return self._results(source)

    def _results(self, source: "stepwise.Source") -> Generated:
        o = self.options
        tokens, rows, *of_each = _ops.decode_results(self.state, o.fill)
        n = int(of_each[0].max())
        tokens, rows, weights = tokens[..., :n], rows[..., :n], None
        if o.return_weights and not isinstance(source, Tensor):
            steps = torch.arange(n, device=rows.device)
            weights = self.kept[steps, rows.clamp_min(0), : source.values.shape[1]]
            self.watch.hold(self.kept)  # all else has been waited for
            weights = (weights * (rows >= 0)[..., None]).to(source.values.dtype)
        found = [tokens.contiguous(), *of_each, weights]
        if o.beam_size == 1:
            found = [None if x is None else x.squeeze(1) for x in found]
        return Generated(*found)


class Loops:
    """Of a decoder, by shapes and options; forgotten when its weights change, and by copies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watch = WeightWatch()
        self.weights: dict[tuple, Made] = {}
        self.kept: OrderedDict[tuple, Loop] = OrderedDict()

    def __reduce__(self):
        return Loops, ()

    def let_go(self) -> None:
        """Of what was made of weights that are others by now."""
        with self.lock:
            if not self.watch.holds():
                self.watch = WeightWatch()
                self.weights.clear()
                self.kept.clear()

    def weights_of(self, decoder: "Decoder", *form) -> list[Tensor]:
        """A decoder's weights as they are now, by who holds the lock; see `weights_of`."""
        if not self.watch.holds():
            watch = watch_of(decoder)
            check_fits(decoder)
            self.watch = watch
            self.weights.clear()
            self.kept.clear()
        if form not in self.weights:
            self.weights[form] = Made(weights_of(decoder, *form))
        return self.weights[form].take()

    def take(
        self,
        decoder: "Decoder",
        source: "stepwise.Source",
        state: "DecoderState",
        location: Location,
        options: DecodingOptions,
    ) -> Loop:
        """A loop of these shapes, locked."""
        key = *_key(source, state, options), *location.form, *native.vector_of(decoder)
        with self.lock:
            weights = self.weights_of(decoder)
            loop = self.kept.get(key)
            if loop is None:
                loop = Loop(decoder, weights, source, state, location, options)
                self.kept[key] = loop
                if len(self.kept) > MOST_LOOPS:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
        if not loop.lock.acquire(blocking=False):
            loop = Loop(decoder, weights, source, state, location, options)
            loop.lock.acquire()
        return loop


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _positions(source: "stepwise.Source") -> int:
    return (
        0 if isinstance(source, Tensor) else max(POSITIONS, _up(source.values.shape[1], POSITIONS))
    )


def _key(source: "stepwise.Source", state: "DecoderState", o: DecodingOptions) -> tuple:
    prefix = 0 if o.prefix is None else o.prefix.shape[-1]
    shapes = (state.hidden.shape[1], _positions(source), _up(o.max_length, BLOCK), prefix)
    drawn = (o.temperature, o.top_k, o.top_p) if o.sample else ()
    return *shapes, *o.whole, o.length_penalty, o.coverage_penalty, o.return_weights, *drawn


@torch.no_grad()
def weights_of(
    decoder: "Decoder", dtype: torch.dtype = torch.float32, multiple: int = 1
) -> list[Tensor]:
    """A decoder's weights in the order of csrc/cuda/decode_steps.cu, the layers' side by side, and
    the readout's over [context | hidden state]: what lies so in the buffer of a step.

    Those of products are of `dtype`, their rows filled up with zeros to a multiple.
    """

    def cast(x: Tensor) -> Tensor:
        return x.detach().float().contiguous()

    def product(*parts: Tensor) -> Tensor:
        w = torch.cat(parts, 1)
        return F.pad(w, (0, _up(w.shape[1], multiple) - w.shape[1])).to(dtype)

    all_weights = [[cast(w) for w in layer] for layer in decoder.layers.all_weights]
    layers = layer_weights(all_weights, decoder.cell_type)
    weights = [cast(decoder.embedding.weight)]
    for w_input, w_hidden, bias in zip(*(layers[i::3] for i in range(3)), strict=True):
        G = len(bias)
        from_input = F.pad(w_input, (0, 0, 0, G - len(w_input)))
        from_hidden = F.pad(w_hidden, (0, 0, G - len(w_hidden), 0))
        weights += [product(from_input, from_hidden), bias]
    if decoder.attention is not None:
        weights += [product(cast(decoder.attention.Wa.weight)), cast(bias_of(decoder.attention.Wa))]
    H, readout = decoder.layers.hidden_size, cast(decoder.fc_out.weight)
    if decoder.attentional_dim is None:
        return [*weights, product(readout[:, H:], readout[:, :H]), cast(bias_of(decoder.fc_out))]
    of_vector = cast(decoder.attentional.weight)
    weights += [product(of_vector[:, H:], of_vector[:, :H]), cast(bias_of(decoder.attentional))]
    return [*weights, product(readout), cast(bias_of(decoder.fc_out))]


def prepare(decoder: "Decoder") -> None:
    """Makes the weights ready, so that the first call need not."""
    if decoder.loops is None:
        decoder.loops = Loops()
    device = torch.cuda.device_of(decoder.fc_out.weight)
    with torch.inference_mode(False), device, decoder.loops.lock:
        decoder.loops.weights_of(decoder)


def generate(
    decoder: "Decoder",
    source: "stepwise.Source",
    state: "DecoderState",
    options: DecodingOptions,
) -> Generated:
    """See `seq2seq_fast.generate`; arguments are checked already."""
    if decoder.loops is None:
        decoder.loops = Loops()
    device = torch.cuda.device_of(decoder.fc_out.weight)
    with torch.inference_mode(False), torch.no_grad(), device:
        location = Location.of(decoder, source, state)
        if together.wanted(options) and not location.filters and decoder.attentional_dim is None:
            found = together.generate(decoder, decoder.loops, source, state, options)
            if found is not None:
                return found
        loop = decoder.loops.take(decoder, source, state, location, options)
        try:
            return loop.run(source, state, location, options)
        finally:
            loop.lock.release()
