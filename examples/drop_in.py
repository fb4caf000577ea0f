"""The additive attention of known systems by the library's operations, to be copied.

Each module has the parameters of the original, so that state dicts load, and is called as it is.
What is said of a system is what its source had in 2024; formulas are of scores e over source s.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seq2seq_fast as s2s


def within(lengths: Tensor, size: int) -> Tensor:
    """(B, size) mask: True where a row of these lengths has something to attend to."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class GNMTAttention(nn.Module):
    """NVIDIA GNMT's BahdanauAttention: e = (g v / |v|) tanh(W query + U key + b), or without g and
    b; values are the keys before U. All target positions are one call, for which the plain form
    has a tensor of B T S H numbers. `set_mask` hides what lies behind each source's end."""

    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_units: int,
        normalize: bool = False,
        batch_first: bool = False,
    ):
        super().__init__()
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units).uniform_(-0.1, 0.1))
        scalar = nn.Parameter(torch.full((1,), num_units**-0.5)) if normalize else None
        bias = nn.Parameter(torch.zeros(num_units)) if normalize else None
        self.register_parameter("normalize_scalar", scalar)
        self.register_parameter("normalize_bias", bias)
        self.batch_first = batch_first
        self.mask: Tensor | None = None

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        self.mask = within(context_len, context.shape[1 if self.batch_first else 0])

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """query (T, B, N) or (B, N), keys (S, B, N); with batch_first (B, T, N) and (B, S, N).
        Returns the context and the weights, in query's order of axes."""
        turned = not self.batch_first and query.dim() == 3
        if not self.batch_first:
            keys = keys.transpose(0, 1)
        q, v = self.linear_q(query.transpose(0, 1) if turned else query), self.linear_att
        if self.normalize_scalar is not None:
            q, v = q + self.normalize_bias, v / v.norm() * self.normalize_scalar
        context, weights = s2s.additive_attention(q, self.linear_k(keys), keys, v, mask=self.mask)
        return (context.transpose(0, 1), weights.transpose(0, 1)) if turned else (context, weights)


class _OfOneSource(nn.Module):
    """Keeps what all steps of a source share, until `reset`."""

    source: tuple[s2s.PreparedKeys, Tensor, Tensor] | None = None

    def reset(self) -> None:
        self.source = None

    def begin(self, projection: nn.Linear, outputs: Tensor, lengths: Tensor) -> None:
        if self.source is None:
            mask = within(torch.as_tensor(lengths, device=outputs.device), outputs.shape[1])
            self.source = s2s.prepare_keys(projection(outputs)), outputs, mask

    def uniform(self) -> Tensor:
        """(B, S): the same weight wherever a row may be attended to."""
        assert self.source is not None
        _, values, mask = self.source
        return mask.to(values.dtype) / mask.sum(1, keepdim=True).clamp(min=1)

    def attend(
        self, query: Tensor, v: Tensor, scale: float, location: s2s.Location | None
    ) -> tuple[Tensor, Tensor]:
        assert self.source is not None
        keys, values, mask = self.source
        if location is None:
            return s2s.additive_attention(query, keys, values, v, mask=mask, scale=scale)
        return s2s.location_attention(query, keys, values, v, location, mask=mask, scale=scale)[:2]


class SpeechBrainAttention(_OfOneSource):
    """SpeechBrain's ContentBasedAttention: e = scaling v tanh(W query + b + U key + c), and the
    context goes through a linear layer. One step a call; `reset` before another source."""

    before: Tensor | None = None  # the weights of the step before

    def __init__(
        self, enc_dim: int, dec_dim: int, attn_dim: int, output_dim: int, scaling: float = 1.0
    ):
        super().__init__()
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling

    def reset(self) -> None:
        super().reset()
        self.before = None

    def location(self) -> s2s.Location | None:
        """How the weights of the step before are seen."""
        return None

    def query(self, dec_states: Tensor) -> Tensor:
        return self.mlp_dec(dec_states)

    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, S, enc_dim), (B,), (B, dec_dim) -> context (B, output_dim), weights (B, S)."""
        self.begin(self.mlp_enc, enc_states, enc_len)
        q, v = self.query(dec_states), self.mlp_attn.weight[0]
        context, weights = self.attend(q, v, self.scaling, self.location())
        self.before = weights.detach()
        return self.mlp_out(context), weights


class SpeechBrainLocationAttention(SpeechBrainAttention):
    """SpeechBrain's LocationAwareAttention: e = scaling v tanh(W query + b + U key + c + F f), f a
    convolution of the weights of the step before, which have no gradient."""

    def __init__(
        self, enc_dim: int, dec_dim: int, attn_dim: int, output_dim: int, conv_channels: int,
        kernel_size: int, scaling: float = 1.0,
    ):  # fmt: skip
        super().__init__(enc_dim, dec_dim, attn_dim, output_dim, scaling)
        width = 2 * kernel_size + 1
        self.conv_loc = nn.Conv1d(1, conv_channels, width, padding=kernel_size, bias=False)
        self.mlp_loc = nn.Linear(conv_channels, attn_dim)

    def location(self) -> s2s.Location:
        before = self.uniform() if self.before is None else self.before
        state = before[:, None]
        return s2s.Location(self.conv_loc.weight, self.mlp_loc.weight, ("previous",), state)

    def query(self, dec_states: Tensor) -> Tensor:
        return super().query(dec_states) + self.mlp_loc.bias


class ESPnetAttention(_OfOneSource):
    """ESPnet's AttAdd: e = scaling (v tanh(W query + U key + b) + c), scaling 2. One step a call;
    `reset` before another source. c is the same for all of a source and changes no weight."""

    def __init__(self, eprojs: int, dunits: int, att_dim: int):
        super().__init__()
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.gvec = nn.Linear(att_dim, 1)

    def location(self, att_prev: Tensor | None) -> s2s.Location | None:
        """How the weights of the step before are seen."""
        return None

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Tensor,
        dec_z: Tensor | None,
        att_prev: Tensor | None = None,
        scaling: float = 2.0,
    ) -> tuple[Tensor, Tensor]:
        """(B, S, eprojs), (B,), (B, dunits) or None for zeros, the weights (B, S) of the step
        before or None at first -> context (B, eprojs), weights (B, S)."""
        self.begin(self.mlp_enc, enc_hs_pad, enc_hs_len)
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), self.mlp_dec.in_features)
        query, v = self.mlp_dec(dec_z), self.gvec.weight[0]
        return self.attend(query, v, scaling, self.location(att_prev))


class ESPnetLocationAttention(ESPnetAttention):
    """ESPnet's AttLoc: e = scaling (v tanh(W query + U key + b + F f) + c), f a convolution of the
    weights of the step before."""

    def __init__(self, eprojs: int, dunits: int, att_dim: int, aconv_chans: int, aconv_filts: int):
        super().__init__(eprojs, dunits, att_dim)
        self.mlp_att = nn.Linear(aconv_chans, att_dim, bias=False)
        width = (1, 2 * aconv_filts + 1)
        self.loc_conv = nn.Conv2d(1, aconv_chans, width, padding=(0, aconv_filts), bias=False)

    def location(self, att_prev: Tensor | None) -> s2s.Location:
        before = self.uniform() if att_prev is None else att_prev
        conv, state = self.loc_conv.weight[:, :, 0], before[:, None]
        return s2s.Location(conv, self.mlp_att.weight, ("previous",), state)


def _named(**modules: nn.Module) -> nn.Module:
    """A module that has these, for the names that parameters have elsewhere."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


class TacotronAttention(nn.Module):
    """The location-sensitive attention of NVIDIA's Tacotron 2 (Shen et al. 2018), of the weights of
    the step before and of the sum of all before. `processed_memory` is memory_layer's of memory."""

    def __init__(
        self, attention_rnn_dim: int, embedding_dim: int, attention_dim: int,
        attention_location_n_filters: int, attention_location_kernel_size: int,
    ):  # fmt: skip
        super().__init__()

        def linear(n: int, m: int) -> nn.Module:
            return _named(linear_layer=nn.Linear(n, m, bias=False))

        self.query_layer = linear(attention_rnn_dim, attention_dim)
        self.memory_layer = linear(embedding_dim, attention_dim)
        self.v = linear(attention_dim, 1)
        filters, width = attention_location_n_filters, attention_location_kernel_size
        conv = nn.Conv1d(2, filters, width, padding=width // 2, bias=False)
        dense = linear(filters, attention_dim)
        self.location_layer = _named(location_conv=_named(conv=conv), location_dense=dense)

    def forward(
        self,
        attention_hidden_state: Tensor,
        memory: Tensor,
        processed_memory: Tensor,
        attention_weights_cat: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, rnn_dim), (B, S, D), (B, S, A), (B, 2, S), (B, S) True = PADDING -> context (B, D),
        weights (B, S)."""
        query = self.query_layer.linear_layer(attention_hidden_state)
        layer, v = self.location_layer, self.v.linear_layer.weight[0]
        conv, dense = layer.location_conv.conv, layer.location_dense.linear_layer
        location = s2s.Location(
            conv.weight, dense.weight, ("previous", "cumulative"), attention_weights_cat
        )
        mask = None if mask is None else ~mask
        return s2s.location_attention(query, processed_memory, memory, v, location, mask=mask)[:2]


class TacotronDecoder(nn.Module):
    """The decoder of NVIDIA's Tacotron 2 in training, given the frames of speech: two operations
    over all steps, of the attention's LSTM and of the one behind it, where the original goes
    through both step by step. It takes numbers where the original takes hparams, and begins with
    PyTorch's initial weights. There is no `inference`: the original's takes `attention_layer` as it
    takes its own."""

    def __init__(
        self,
        n_mel_channels: int = 80,
        n_frames_per_step: int = 1,
        encoder_embedding_dim: int = 512,
        attention_rnn_dim: int = 1024,
        decoder_rnn_dim: int = 1024,
        prenet_dim: int = 256,
        attention_dim: int = 128,
        attention_location_n_filters: int = 32,
        attention_location_kernel_size: int = 31,
        p_attention_dropout: float = 0.1,
        p_decoder_dropout: float = 0.1,
    ):
        super().__init__()
        frame, D = n_mel_channels * n_frames_per_step, encoder_embedding_dim
        self.n_mel_channels, self.frame_dim = n_mel_channels, frame
        self.p_attention_dropout, self.p_decoder_dropout = p_attention_dropout, p_decoder_dropout
        widths = (frame, prenet_dim), (prenet_dim, prenet_dim)
        layers = [_named(linear_layer=nn.Linear(n, m, bias=False)) for n, m in widths]
        self.prenet = _named(layers=nn.ModuleList(layers))
        self.attention_rnn = nn.LSTMCell(prenet_dim + D, attention_rnn_dim)
        self.attention_layer = TacotronAttention(
            attention_rnn_dim, D, attention_dim, attention_location_n_filters,
            attention_location_kernel_size,
        )  # fmt: skip
        self.decoder_rnn = nn.LSTMCell(attention_rnn_dim + D, decoder_rnn_dim)
        out = decoder_rnn_dim + D
        self.linear_projection = _named(linear_layer=nn.Linear(out, frame))
        self.gate_layer = _named(linear_layer=nn.Linear(out, 1))

    def forward(
        self, memory: Tensor, decoder_inputs: Tensor, memory_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """memory (B, S, D), frames (B, n_mel_channels, T n_frames_per_step), lengths (B,) ->
        frames, gates (B, T), weights (B, T, S)."""
        B, S, _ = memory.shape
        of_step = self.frame_dim // self.n_mel_channels
        shape = B, self.n_mel_channels, decoder_inputs.shape[2] // of_step * of_step
        if decoder_inputs.shape != shape:
            raise ValueError(
                f"decoder_inputs: got shape {tuple(decoder_inputs.shape)}, expected (B,"
                f" n_mel_channels, T n_frames_per_step) = {shape}"
            )
        frames = decoder_inputs.transpose(1, 2).reshape(B, -1, self.frame_dim)
        x = F.pad(frames, (0, 0, 1, 0))[:, :-1]  # each step reads the frame before
        for layer in self.prenet.layers:
            x = F.dropout(F.relu(layer.linear_layer(x)), 0.5, training=True)
        attends, location = self.attention_layer, self.attention_layer.location_layer
        query, keys = attends.query_layer.linear_layer, attends.memory_layer.linear_layer(memory)
        out = self._over_steps(
            self.attention_rnn,
            x,
            self.p_attention_dropout,
            query=(query.weight, None),
            keys=keys,
            values=memory,
            v=attends.v.linear_layer.weight[0],
            mask=within(torch.as_tensor(memory_lengths, device=memory.device), S),
            query_after=True,
            location=s2s.Location(
                location.location_conv.conv.weight,
                location.location_dense.linear_layer.weight,
                ("previous", "cumulative"),
            ),
        )
        x = out.features
        none = memory.new_empty(B, 0)
        hidden = self._over_steps(self.decoder_rnn, x, self.p_decoder_dropout, context=none).outputs
        features = torch.cat([hidden, out.contexts], 2)
        frames = self.linear_projection.linear_layer(features)
        gates = self.gate_layer.linear_layer(features).squeeze(2)
        assert out.weights is not None
        return frames.view(B, -1, self.n_mel_channels).transpose(1, 2), gates, out.weights

    def _over_steps(
        self, cell: nn.LSTMCell, x: Tensor, dropout: float, **attention: Any
    ) -> s2s.DecoderOutput:
        """A cell's states over all steps from zeros, each dropped in part."""
        zeros = x.new_zeros(1, len(x), cell.hidden_size)
        return s2s.attention_decoder(
            x,
            zeros,
            zeros.clone(),
            [list(cell.parameters())],
            state_dropout=dropout if self.training else 0.0,
            **attention,
        )


class OpenNMTAttention(nn.Module):
    """OpenNMT-py's GlobalAttention of type "mlp": e = v tanh(W query + b + U key), and the result
    is a linear layer of [context; query]. Any number of target positions."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_context = nn.Linear(dim, dim, bias=False)
        self.linear_query = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim)

    def forward(
        self, source: Tensor, memory_bank: Tensor, src_len: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, dim) or (B, dim), (B, S, dim), (B,) -> result in source's shape, weights (B, T, S)
        or (B, S)."""
        mask = None if src_len is None else within(src_len, memory_bank.shape[1])
        context, weights = s2s.additive_attention(
            self.linear_query(source), self.linear_context(memory_bank), memory_bank,
            self.v.weight[0], mask=mask,
        )  # fmt: skip
        return self.linear_out(torch.cat([context, source], -1)), weights


class OpenNMTDecoder(nn.Module):
    """OpenNMT-py's InputFeedRNNDecoder of LSTM cells with attention of type "mlp", all steps as one
    operation: what the attention returns is dropped in part, read out, and fed to the next step."""

    def __init__(self, num_layers: int, input_size: int, rnn_size: int, dropout: float):
        super().__init__()
        widths = [input_size + rnn_size] + [rnn_size] * (num_layers - 1)
        layers = nn.ModuleList(nn.LSTMCell(n, rnn_size) for n in widths)
        self.rnn, self.attn = _named(layers=layers), OpenNMTAttention(rnn_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        emb: Tensor,
        memory_bank: Tensor,
        src_len: Tensor,
        state: tuple[Tensor, Tensor],
        input_feed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Embedded tokens (B, T, input_size), (B, S, rnn_size), (B,), hidden and cell (num_layers,
        B, rnn_size), and what the last call ended with (B, rnn_size), zeros if None -> outputs
        (B, T, rnn_size), weights (B, T, S), hidden and cell."""
        p = self.dropout.p if self.training else 0.0
        joined = self.attn.linear_out
        of_context, of_output = joined.weight.chunk(2, 1)  # the library has the output first
        out = s2s.attention_decoder(
            emb,
            *state,
            [list(cell.parameters()) for cell in self.rnn.layers],
            query=(self.attn.linear_query.weight, self.attn.linear_query.bias),
            keys=self.attn.linear_context(memory_bank),
            values=memory_bank,
            v=self.attn.v.weight[0],
            mask=within(src_len, memory_bank.shape[1]),
            context=input_feed,
            query_after=True,
            dropout=p,
            vector=s2s.AttentionalVector(
                torch.cat([of_output, of_context], 1), joined.bias, "none", p
            ),
        )
        assert out.vectors is not None and out.weights is not None and out.cell is not None
        return out.vectors, out.weights, (out.hidden, out.cell)


class PointerScores(nn.Module):
    """The logits of a pointer network: C tanh(v tanh(W query + U key)), -inf where it must not
    point (Bello et al., "Neural combinatorial optimization with reinforcement learning", 2016,
    C = 10; Vinyals et al., "Pointer networks", 2015, without C)."""

    def __init__(self, dim: int, clip: float | None = 10.0):
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.clip = clip

    def forward(self, query: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """(B, T, dim) or (B, dim), (B, S, dim), mask of the result's shape, True = may point there
        -> (B, T, S) or (B, S)."""
        scores = s2s.additive_scores(self.query(query), self.key(source), self.v)
        if self.clip is not None:
            scores = self.clip * torch.tanh(scores)
        return scores.masked_fill(~mask, -torch.inf)


class TextRecognitionHead(nn.Module):
    """The attention head of clovaai's deep-text-recognition-benchmark, and of what came of it: an
    LSTM reads [context; one-hot of the character before], e = v tanh(W state + b + U key) with the
    state before the step. All steps are one operation, with characters of its own too."""

    def __init__(self, input_size: int, hidden_size: int, num_classes: int):
        super().__init__()
        self.attention_cell = _named(
            i2h=nn.Linear(input_size, hidden_size, bias=False),
            h2h=nn.Linear(hidden_size, hidden_size),
            score=nn.Linear(hidden_size, 1, bias=False),
            rnn=nn.LSTMCell(input_size + num_classes, hidden_size),
        )
        self.generator = nn.Linear(hidden_size, num_classes)

    def forward(
        self, batch_H: Tensor, text: Tensor, is_train: bool = True, batch_max_length: int = 25
    ) -> Tensor:
        """batch_H (B, S, input_size), text (B, at least batch_max_length + 1), of which only the
        first character is read where not is_train -> logits (B, batch_max_length + 1, classes).
        Where not is_train each step reads the likeliest character of the step before."""
        cell, readout, (B, _, D) = self.attention_cell, self.generator, batch_H.shape
        steps, classes, H = batch_max_length + 1, readout.out_features, readout.in_features
        one_hot = torch.eye(classes, dtype=batch_H.dtype, device=batch_H.device)
        feedback = None
        if not is_train and steps > 1:
            text = text[:, :1].expand(-1, steps)
            over_both = torch.cat([readout.weight, readout.weight.new_zeros(classes, D)], 1)
            feedback = s2s.Feedback(range(1, steps), one_hot, over_both, readout.bias)
        w = cell.rnn.weight_ih  # over [context; input]
        weights = torch.cat([w[:, D:], w[:, :D]], 1), *list(cell.rnn.parameters())[1:]
        zeros = batch_H.new_zeros(1, B, H)
        out = s2s.attention_decoder(
            one_hot[text[:, :steps]],
            zeros,
            zeros,
            [weights],
            query=(cell.h2h.weight, cell.h2h.bias),
            keys=cell.i2h(batch_H),
            values=batch_H,
            v=cell.score.weight[0],
            feedback=feedback,
        )
        return readout(out.outputs)
