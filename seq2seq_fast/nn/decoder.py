"""The recurrent decoder with attention; B batch, T steps, V vocabulary, batch first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import decoding
from ..decoding import native
from ..decoding.fits import check_linear, check_read
from ..decoding.graphed import Loops
from ..decoding.packing import PackedDecoder, let_go
from ..library import asked_for
from ..ops.attention_decoder import DecoderOutput, Feedback, attention_decoder
from ..ops.attentional_vector import AttentionalVector, activation_name
from ..ops.checks import flag, probability, token_ids
from ..ops.dropout import dropout_factors
from ..ops.linear import linear
from ..ops.modules import (
    bias_of,
    dropout_rate,
    make_weights,
    rate_between_layers,
    reads_alone,
    table_of,
)
from . import checks
from .attention import Attention, PreparedSource
from .cells import recurrent
from .fed_back import steps_by_calls


class DecoderState(NamedTuple):
    """What a decoder carries from step to step.

    Args:
        hidden, cell: (n_layers, B, H); cell is None but of an LSTM.
        context: (B, D) of the step before, with query_after; the attentional vector (B, O) of a
            decoder that has it; None for zeros.
        location: (B, C, S), where was attended before, of an attention that sees it; None for
            zeros.
    """

    hidden: Tensor
    cell: Tensor | None
    context: Tensor | None = None
    location: Tensor | None = None


_READ: tuple[tuple[str, type[nn.Module]], ...] = (
    ("embedding", nn.Embedding),
    ("fc_out", nn.Linear),
)


class Decoder(nn.Module):
    """Embedding, recurrent layers over [embedded token; context], logits of [output; context].

    Args:
        output_dim: size of the vocabulary (V).
        emb_dim, hidden_dim (H), n_layers: widths and depth.
        dropout: on the embedded token, between layers and on attentional vectors.
        cell_type: "lstm", "gru" or "rnn" (tanh); the layers are the module of that name.
        attention: False for a decoder that reads one fixed context vector at every step.
        query_after: the query is the top layer's hidden state after the step, and the layers read
            the context of the step before; otherwise it is the state before the step, and they
            read the step's own context.
        encoder_dim: width of the encoder's outputs, or of the fixed context (D); None for H.
        attention_dim: width that the scores are summed over; None for H.
        location, location_filters, location_kernel_size: what the scores see of where was
            attended before; see `Attention`.
        attentional_dim: width of attentional vectors (O), activation(attentional([output;
            context])), which the layers and fc_out read in place of the context, with query_after;
            None for none. See `AttentionalVector`.
        attentional_activation: "tanh" or "none".
        recompute: keep no gates for backward over a sequence, but make them anew there.
    """

    attentional: nn.Linear
    attentional_dim: int | None = None  # of modules too that were pickled before there was one
    packed: PackedDecoder | None = None  # what prepare_inference left
    loops: Loops | None = None  # what decoding on a GPU left

    def __init__(
        self,
        output_dim: int,
        emb_dim: int,
        hidden_dim: int,
        n_layers: int,
        dropout: float,
        *,
        cell_type: str = "lstm",
        attention: bool = True,
        query_after: bool = False,
        encoder_dim: int | None = None,
        attention_dim: int | None = None,
        location: Sequence[str] | None = (),
        location_filters: int = 32,
        location_kernel_size: int = 31,
        attentional_dim: int | None = None,
        attentional_activation: str = "tanh",
        recompute: bool = False,
    ):
        super().__init__()
        checks.at_least_one(
            output_dim=output_dim, emb_dim=emb_dim, hidden_dim=hidden_dim, n_layers=n_layers
        )
        probability("dropout", dropout)
        flag(attention=attention, query_after=query_after, recompute=recompute)
        encoder_dim = hidden_dim if encoder_dim is None else encoder_dim
        attention_dim = hidden_dim if attention_dim is None else attention_dim
        checks.at_least_one(encoder_dim=encoder_dim, attention_dim=attention_dim)
        self.output_dim, self.context_dim = output_dim, encoder_dim
        self.n_layers, self.hidden_dim = n_layers, hidden_dim
        self.cell_type, self.query_after, self.recompute = cell_type, query_after, recompute
        self.embedding = nn.Embedding(output_dim, emb_dim)
        if location and not attention:
            raise ValueError(f"location: got {location!r}, expected none without attention")
        self.attention = (
            Attention(
                attention_dim,
                query_dim=hidden_dim,
                key_dim=encoder_dim,
                location=location,
                location_filters=location_filters,
                location_kernel_size=location_kernel_size,
            )
            if attention
            else None
        )
        features, fed = hidden_dim + encoder_dim, encoder_dim
        activation_name("attentional_activation", attentional_activation)
        if attentional_dim is not None:
            checks.at_least_one(attentional_dim=attentional_dim)
            if not (attention and query_after):
                raise ValueError(
                    f"attentional_dim: got {attentional_dim}, expected None without query_after"
                    " and attention"
                )
            self.attentional = nn.Linear(features, attentional_dim)
            self.attentional_dim = attentional_dim
            self.attentional_activation = attentional_activation
            features = fed = attentional_dim
        layers = recurrent(cell_type, emb_dim + fed, hidden_dim, n_layers, dropout)
        self.add_module(cell_type, layers)
        self.fc_out = nn.Linear(features, output_dim)
        self.dropout = nn.Dropout(dropout)

    @property
    def layers(self) -> nn.RNNBase:
        return getattr(self, self.cell_type)

    @property
    def like(self) -> Tensor:
        """A weight, whose dtype and device all of them should have."""
        weight = getattr(self.layers, "weight_hh_l0", None)
        if weight is None:
            check_read(self)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def fed_dim(self) -> int:
        """Width of what the layers read beside the token: D, or O of attentional vectors."""
        return self.context_dim if self.attentional_dim is None else self.attentional_dim

    def _apply(self, fn: Any, recurse: bool = True) -> "Decoder":
        super()._apply(fn, recurse)  # to(), double(), cuda(): where weights may become others
        self.packed = let_go(self.packed)
        if self.loops is not None:
            self.loops.let_go()
        return self

    def forward(
        self,
        input: Tensor,
        hidden: Tensor,
        cell: Tensor | None,
        encoder_outputs: Tensor | PreparedSource,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        location: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One token further.

        Args:
            input: (B,) token ids.
            hidden, cell: (n_layers, B, H); cell is None unless the layers are an LSTM.
            encoder_outputs: (B, S, D), or what `attention.precompute` made of them, which spares
                every step but the first the projection of the keys. Without attention the
                context (B, D).
            mask: (B, S) bool, True = attend; given to `precompute` where that was used.
            context: (B, D), what the step before returned, of a decoder with query_after; (B, O)
                of one with attentional vectors.
            location: (B, C, S), what the step before returned, of a decoder with location; None
                at the first step, for zeros, which are taken too where it is forgotten later.

        Returns:
            logits (B, V), hidden and cell; with query_after the context (B, D) too, or the
            attentional vector (B, O), and the location (B, C, S) of a decoder that has it.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        source = self.source(encoder_outputs, mask)
        device = self.like.device
        token_ids("input", input, "(B,)", 1, self.output_dim, device)
        B = (source.values if isinstance(source, PreparedSource) else source).shape[0]
        if input.shape[0] != B:
            raise ValueError(f"input: got batch {input.shape[0]}, expected {B} as the source has")
        state = DecoderState(hidden, cell, context, location)
        self.check_state(state, source)
        logits, state, _ = self.step(input, state, source)
        after = (state.context,) if self.query_after else ()
        where = () if state.location is None else (state.location,)
        return (logits, *state[:2], *after, *where)

    def prepare_inference(
        self, dtype: str | None = "float32", *, project_values: bool = False
    ) -> "Decoder":
        """Keeps the weights packed for `seq2seq_fast.generate`, which else packs them at every
        call; for those whose encoder is none of this library. See `Seq2Seq.prepare_inference`.

        Returns:
            The decoder itself.

        Raises:
            TypeError, ValueError: as `Seq2Seq.prepare_inference`.
        """
        decoding.prepare_inference(self, dtype, project_values)
        return self

    def source(
        self, encoder_outputs: Tensor | PreparedSource, mask: Tensor | None = None
    ) -> Tensor | PreparedSource:
        """What every step needs of the source, made once.

        Args:
            encoder_outputs: (B, S, D), of the dtype and device of the decoder's weights; what this
                returned, which comes back as it is; without attention the context (B, D).
            mask: (B, S) bool, True = attend, or None.

        Returns:
            `PreparedSource`; without attention the context.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        if self.attention is not None:
            return self.attention.source(encoder_outputs, mask)
        if mask is not None:
            raise ValueError("mask: got a Tensor, expected None: the decoder has no attention")
        checks.context("encoder_outputs", encoder_outputs, self.context_dim, self.like)
        return encoder_outputs

    def step(
        self, input: Tensor, state: DecoderState, source: Tensor | PreparedSource
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """`forward` on a prepared source, unchecked: input (B,) ids -> logits (B, V), the state
        after it, and the attention weights (B, S), None without attention."""
        packed = self._packed_for_steps()
        if packed is not None and len(input) > 0:
            return native.step(self, packed, input, state, source)
        out = self.steps(input.unsqueeze(1), state, source)
        fed = out.contexts if out.vectors is None else out.vectors
        context = fed[:, 0] if self.query_after else None
        weights = None if out.weights is None else out.weights[:, 0]
        state = DecoderState(out.hidden, out.cell, context, out.location)
        return linear(self.fc_out, out.features[:, 0]), state, weights

    def _packed_for_steps(self) -> PackedDecoder | None:
        """The weights, if they lie prepared as a step that needs no gradient reads them."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self._drops():
            return None
        packed = self.packed
        if packed is None or packed.dtype != "float32" or packed.projects_values:
            return None
        if self.like.dtype != torch.float32:  # which is what the results would be
            return None
        if asked_for(None) not in (None, "native") or torch.is_autocast_enabled("cpu"):
            return None
        if self._has_own("steps") or self.called() is not None:
            return None
        return packed if packed.watch.holds() else None

    def _has_own(self, name: str) -> bool:
        kind = type(self)
        own = kind is not Decoder and getattr(kind, name) is not getattr(Decoder, name)
        return own or name in vars(self)

    def called(self) -> str | None:
        """What of it does more than its weights tell, so that to read them will not do, or None."""
        for name, kind in _READ:
            module = self._modules[name]
            assert module is not None
            if not reads_alone(module, kind):
                return f"decoder.{name} does more than its weights tell: {module}"
        return None

    def refusal(self) -> str | None:
        """Why engines that read weights would not do what it does, or None."""
        for name in ("step", "steps"):
            if self._has_own(name):
                return f"{type(self).__name__} has its own {name}"
        return self.called()

    def run(
        self,
        tokens: Tensor,
        state: DecoderState,
        source: Tensor | PreparedSource,
        feedback: Sequence[int] = (),
    ) -> DecoderOutput:
        """All steps but the readout, as one operation.

        Args:
            tokens: (B, T) ids, the input of each step.
            state: before the first step.
            source: what `source` returned, or encoder outputs (B, S, D) with nothing masked.
            feedback: the steps, from 1 on, whose input is the argmax of the step before instead.

        Returns:
            `DecoderOutput`, of which `fc_out` reads `features`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.decoder_state(state)
        source, device = self.source(source), self.like.device
        self.check_state(state, source)
        token_ids("tokens", tokens, "(B, T)", 2, self.output_dim, device)
        if tokens.shape[0] != state.hidden.shape[1]:
            B = state.hidden.shape[1]
            raise ValueError(f"tokens: got batch {tokens.shape[0]}, expected {B} as the source has")
        return self.steps(tokens, state, source, feedback)

    def steps(
        self,
        tokens: Tensor,
        state: DecoderState,
        source: Tensor | PreparedSource,
        feedback: Sequence[int] = (),
        batch_sizes: Sequence[int] | None = None,
    ) -> DecoderOutput:
        """`run`, unchecked; batch_sizes as in `attention_decoder`."""
        check_read(self)
        make_weights(self.layers, self._modules.get("attentional"))
        if self.attention is not None:
            make_weights(self.attention.Wa)
        table = table_of(self.embedding)
        args = tokens, state, source, table, feedback, batch_sizes
        if feedback and (table is None or not reads_alone(self.fc_out, nn.Linear)):
            return steps_by_calls(self, *args)
        return self.run_of_steps(*args)

    def run_of_steps(
        self,
        tokens: Tensor,
        state: DecoderState,
        source: Tensor | PreparedSource,
        table: Tensor | None,
        feedback: Sequence[int],
        batch_sizes: Sequence[int] | None,
    ) -> DecoderOutput:
        """`steps`, with weights that have been made; table is what `table_of` has found."""
        factors, between_layers, of_vectors = self._dropout_factors(
            tokens.shape[1], tokens.shape[0], table
        )
        inputs, of_ids = tokens, table
        if factors is not None or table is None:
            # Time first, as the operation has it inside
            embedded = self.embedding(tokens.T) if table is None else F.embedding(tokens.T, table)
            if factors is not None:
                embedded = embedded * factors
                factors = factors.transpose(0, 1)
            inputs, of_ids = embedded.transpose(0, 1), None
        attends: dict[str, Any] = {"context": state.context}
        if isinstance(source, PreparedSource):
            assert self.attention is not None
            query = self.attention.Wa.weight, self.attention.Wa.bias
            attends |= {"query": query, **source._asdict()}
            attends["location"] = self.attention.located(state.location)
            attends["vector"] = self._vector(of_vectors)
        else:
            attends["context"] = source
        fed_back = None
        if feedback:
            make_weights(self.fc_out)
            assert table is not None
            readout = table, self.fc_out.weight, bias_of(self.fc_out)
            fed_back = Feedback(feedback, *readout, factors)
        return attention_decoder(
            inputs,
            state.hidden,
            state.cell,
            self.layers.all_weights,
            **attends,
            cell_type=self.cell_type,
            query_after=self.query_after,
            dropout=0.0 if between_layers is None else between_layers,
            feedback=fed_back,
            recompute=self.recompute,
            batch_sizes=batch_sizes,
            embedding=of_ids,
        )

    def _drops(self) -> bool:
        embedded = dropout_rate("decoder.dropout", self.dropout)
        return embedded > 0 or rate_between_layers(self.layers) > 0

    def _vector(self, factors: Tensor | None) -> AttentionalVector | None:
        if self.attentional_dim is None:
            return None
        shape = self.attentional_dim, self.hidden_dim + self.context_dim
        check_linear("attentional", self.attentional, shape, self.like)
        weight, bias = self.attentional.weight, self.attentional.bias
        dropout = 0.0 if factors is None else factors
        return AttentionalVector(weight, bias, self.attentional_activation, dropout)

    def _dropout_factors(self, T: int, B: int, table: Tensor | None) -> list[Tensor | None]:
        """(T, B, E) of embedded tokens, from a table (V, E) if they are, (n_layers - 1, B, T, H)
        between layers and (B, T, O) of attentional vectors, or None."""
        p, like = dropout_rate("decoder.dropout", self.dropout), self.like
        between = rate_between_layers(self.layers)
        found: list[Tensor | None] = [None, None, None]
        if p > 0 and T > 0:
            E = self.layers.input_size - self.fed_dim if table is None else table.shape[1]
            found[0] = dropout_factors((T, B, E), p, like)
        if between > 0 and T > 0:
            shape = (self.layers.num_layers - 1, T, B, self.layers.hidden_size)
            found[1] = dropout_factors(shape, between, like).transpose(1, 2)
        if p > 0 and T > 0 and self.attentional_dim is not None:
            found[2] = dropout_factors((T, B, self.fed_dim), p, like).transpose(0, 1)
        return found

    def check_state(self, state: DecoderState, source: Tensor | PreparedSource) -> None:
        """state is one of a prepared source's rows."""
        values = source if isinstance(source, Tensor) else source.values
        shape, weight = (self.n_layers, len(values), self.hidden_dim), self.like
        checks.state("hidden", state.hidden, shape, weight)
        if self.cell_type == "lstm":
            checks.state("cell", state.cell, shape, weight)
        elif state.cell is not None:
            raise ValueError(f"cell: got a Tensor, expected None: the layers are {self.cell_type}")
        if state.context is not None:
            if not self.query_after:
                raise ValueError("context: got a Tensor, expected None without query_after")
            checks.context("context", state.context, self.fed_dim, weight, len(values))
        channels = () if self.attention is None else getattr(self.attention, "location", ())
        checks.location(state.location, channels, values)
