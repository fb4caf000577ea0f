"""Encoder and decoder over whole sequences; B batch, S source, T target length, batch first."""

import contextlib
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .. import decoding
from ..decoding import Generated, Scored
from ..library import choose, use_backend
from ..ops.attention_decoder import DecoderOutput
from ..ops.checks import WHOLE, flag, tensor, token_ids, whole
from ..ops.linear_cross_entropy import loss_of_logits, loss_of_steps
from ..ops.modules import bias_of, knows_no_rows, make_weights, reads_alone
from ..ops.readout import readout
from . import checks
from .attention import PreparedSource
from .decoder import Decoder, DecoderState
from .encoder import Encoder
from .lengths import leaving, read_lengths, values_are_known


class Seq2Seq(nn.Module):
    """Encoder and decoder over whole sequences, keys prepared once per source.

    A decoder without attention reads the encoder's last hidden state at every step.

    Args:
        encoder, decoder: of one cell type and n_layers, and of widths that fit.
        pad_idx: source token that is never attended to, or None.
        pack_padded: the encoder does not read the padding at a row's end either, as it does in the
            tutorial: it is given `lengths`. A row is then encoded alike alone and in any batch,
            whatever its length.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        pad_idx: int | None = None,
        *,
        pack_padded: bool = False,
    ):
        super().__init__()
        checks.part("encoder", encoder, "an Encoder", "cell_type", "state_dim", "layers")
        checks.part("decoder", decoder, "a Decoder", "cell_type", "check_state", "layers")
        handed_over = encoder.output_dim if decoder.attention is not None else encoder.state_dim
        for name, ours, theirs in (
            ("cell_type", decoder.cell_type, encoder.cell_type),
            ("hidden_size", decoder.layers.hidden_size, encoder.state_dim),
            ("num_layers", decoder.layers.num_layers, encoder.layers.num_layers),
            ("encoder_dim", decoder.context_dim, handed_over),
        ):
            if ours != theirs:
                raise ValueError(f"decoder: has {name} {ours}, expected {theirs} as encoder has")
        if pad_idx is not None:
            table = getattr(encoder, "embedding", None)  # an encoder of speech, say, has none
            whole("pad_idx", pad_idx, 0, getattr(table, "num_embeddings", WHOLE) - 1)
        flag(pack_padded=pack_padded)
        if pack_padded and pad_idx is None:
            raise ValueError("pack_padded: got True without a pad_idx, expected one")
        self.encoder = encoder
        self.decoder = decoder
        self.pad_idx = pad_idx
        self.pack_padded = pack_padded

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """src (B, S), trg (B, T) ids -> logits (B, T, V), zeros at t = 0.

        One random.random() draw per step decides for the whole batch whether the next input is
        trg's token or the model's own argmax; src equal to pad_idx is never attended to.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        out, feedback, _ = self._decode(src, trg, teacher_forcing_ratio)
        if not reads_alone(self.decoder.fc_out, nn.Linear):
            return F.pad(self.decoder.fc_out(out.features), (0, 0, 1, 0))
        features = out.outputs, out.contexts
        if out.vectors is not None:
            features = out.vectors, out.vectors.detach()[..., :0]
        return readout(
            *features,
            self.decoder.fc_out.weight,
            bias_of(self.decoder.fc_out),
            out.logits,
            feedback,
        )

    def loss(
        self,
        src: Tensor,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The cross entropy of forward's logits[:, 1:] and trg[:, 1:], without making them all.

        The arguments beyond `forward`'s are those of `nn.CrossEntropyLoss`, but for
        reduction="none". In place of targets that are to be ignored and no ids of the vocabulary,
        -100 say, 0 is fed. Of steps that feed back the model's own argmax there are logits, one
        step at a time without gradients; of the others some rows at a time (see
        `linear_cross_entropy`). On the CPU a row leaves the decoder after its last target that is
        not ignored, so that padding is not computed there; rows are then in another order, and draw
        other dropout. (Not where it would be seen: in a model that has hooks, or modules that are
        neither PyTorch's nor the library's.) The mean over no tokens, of T = 1 or nothing but
        ignore_index, is NaN, as PyTorch's.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        out, feedback, trg = self._decode(src, trg, teacher_forcing_ratio, ignore_index)
        if not reads_alone(self.decoder.fc_out, nn.Linear):
            logits = self.decoder.fc_out(out.features)
            options = weight, reduction, ignore_index, label_smoothing
            return loss_of_logits(logits, trg[:, 1:].long(), *options)
        return loss_of_steps(
            out.features,
            self.decoder.fc_out.weight,
            bias_of(self.decoder.fc_out),
            trg[:, 1:].long(),
            weight,
            None if out.logits is None else out.logits[:, 1:],
            [t - 1 for t in feedback],
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def _decode(
        self, src: Tensor, trg: Tensor, ratio: float, ignored: object = None
    ) -> tuple[DecoderOutput, list[int], Tensor]:
        """All steps but the readout, which of them are fed the argmax of the step before, and trg.

        If a target is ignored, rows may come in another order, trg's too, and what there is behind
        the last target of a row that is not may be anything.
        """
        checks.teacher_forcing_ratio(ratio)
        device, V, wanted = self.decoder.like.device, self.decoder.output_dim, trg
        if type(ignored) is int and not 0 <= ignored < V:
            trg = tensor("trg", trg).masked_fill(trg == ignored, 0)
        token_ids("trg", trg, "(B, T)", 2, V, device)
        checks.batches_agree(src, trg)
        if trg.shape[1] == 0:
            raise ValueError(f"trg: got shape {tuple(trg.shape)}, expected (B, T) with T above 0")
        sizes = None
        if type(ignored) is int and self._may_leave(src):
            found = leaving(wanted[:, 1:], ignored)
            if found is not None:
                order, sizes = found
                src, trg, wanted = src[order], trg[order], wanted[order]
        source, state = self.encode(src)
        # A draw after each step 1 ... T - 1 decides on the input of the next; the last on none.
        if torch.compiler.is_compiling() and ratio in (0, 1):  # which needs none and takes none
            forced = [ratio == 1] * (trg.shape[1] - 1)
        else:
            forced = [random.random() < ratio for _ in range(1, trg.shape[1])]
        feedback = [t for t, force in enumerate(forced[:-1], 1) if not force]
        if not feedback:  # else the steps make them, before they read them
            make_weights(self.decoder.fc_out)
        return self.decoder.steps(trg[:, :-1], state, source, feedback, sizes), feedback, wanted

    def _may_leave(self, src: Tensor) -> bool:
        """Whether nobody would see that rows are in another order, and the kernels let them leave
        the decoder."""
        decoder = self.decoder
        return (
            decoder.like.is_cpu
            and values_are_known()
            and type(self) is Seq2Seq
            and type(self.encoder) is Encoder
            and type(decoder) is Decoder
            and all(map(knows_no_rows, self.modules()))
            and not _has_any_global_hook()
            and isinstance(src, Tensor)
            and src.dim() == 2
            and choose("attention_decoder", decoder.like, None) == "native"
        )

    def encode(self, src: Tensor) -> tuple[Tensor | PreparedSource, DecoderState]:
        """src (B, S) ids -> what every step of the decoder reads, and the state before the first.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        if self.pack_padded and self.pad_idx is not None:
            values, hidden, cell = self.encoder(src, read_lengths(src, self.pad_idx))
        else:
            values, hidden, cell = self.encoder(src)
        if self.decoder.attention is None:
            source = self.decoder.source(hidden[-1])
        else:
            mask = None if self.pad_idx is None else src != self.pad_idx
            source = self.decoder.source(values, mask)
        return source, DecoderState(hidden, cell)

    @torch.no_grad()
    def generate(self, src: Tensor, *, backend: str | None = None, **options: Any) -> Generated:
        """Decodes src (B, S): greedily, by beam search, or by sampling.

        Args:
            backend: None for the best there is, "native" for the compiled engine or an error,
                "reference" for plain PyTorch.
            options: of `DecodingOptions`; bos, eos and max_length must be given.

        Returns:
            `Generated`. Rows of src that are padding all over are decoded without attention to
            anything; an empty batch gives empty tensors.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        decoding.check(self.decoder, checks.batch_of(src), backend, options)
        plain = use_backend("reference") if backend == "reference" else contextlib.nullcontext()
        with decoding.evaluating(self), plain:
            source, state = self.encode(src)
            return decoding.generate(self.decoder, source, state, backend=backend, **options)

    def score(self, src: Tensor, trg: Tensor, *, eos: int | None = None) -> Scored:
        """log P(trg | src) of trg (B, T), which is fed from its first token on, with gradients.

        What follows the first eos after trg[:, 0] counts nothing; eos=None counts all of trg.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        decoding.check_targets(self.decoder, trg, eos)
        checks.batches_agree(src, trg)
        source, state = self.encode(src)
        return decoding.score(self.decoder, source, state, trg, eos=eos)

    def prepare_inference(
        self, dtype: str | None = "float32", *, project_values: bool = False
    ) -> "Seq2Seq":
        """Keeps the decoder's weights packed for `generate`, which else packs them at every call,
        and those of the encoder's recurrent layers, in float32. Single calls of encoder and
        decoder that need no gradient read them too, of the decoder where dtype is "float32" and
        no values are projected.

        Any number of threads may generate at once. The packed copy follows the parameters: it is
        made anew at the next call after they were changed in place or exchanged, and is no part of
        copies and pickles, which make their own. (Changes through `.data`, NumPy or DLPack, and
        those of shared memory by another process, are not seen: call this again after them.) On a
        GPU `generate` keeps what it needs by itself, and this does no more than make it ready.

        But for int8 the readout of a large vocabulary is kept four times, twice in the dtype, in
        six and eight bits and, from 4,096 tokens on, in sixteen: greedy decoding then reads six
        and eight, and of the dtype's numbers those of the few tokens that the bits leave in
        question. The tokens are the same. Log-probabilities, and beam search, read sixteen bits of
        all tokens, and the dtype's numbers of those that may be chosen or are a large part of the
        sum over all: next to float64 they are about as exact as PyTorch's float32.

        Args:
            dtype: "float32"; or "bfloat16" or "int8" (a scale for each output), in which the
                weights are kept, while sums stay float32: less to read, and less exact. None lets
                go of what is kept.
            project_values: multiply each source's values by the weights that the context meets
                once, W (sum_s w[s] v[s]) = sum_s w[s] (W v[s]): those of the first layer, without
                query_after, and in beam search those of the readout where its numbers are not
                read in bits. A step then reads S rows of each source in place of the D rows of
                weights. On the CPU alone, and quicker for one or a few sources that are much
                shorter than the context is wide (a word); slower for large batches and long
                sources, and it takes memory for B S rows of gates, and of such a readout's logits.
                The tokens' part of the first layer's gates, if they are 64 MiB at most, is made
                beforehand too, as it always is of 512 tokens or fewer. It rounds differently;
                either way a row is decoded alike alone and in any batch.

        Returns:
            The model itself.

        Raises:
            TypeError, ValueError: another dtype, or a decoder that is not float32, bfloat16 or
                float16 on the CPU or a GPU; on a GPU any dtype but "float32"; "int8" of more than
                131,072 inputs; project_values on a GPU or without attention.
        """
        self.decoder.prepare_inference(dtype, project_values=project_values)
        if isinstance(self.encoder, Encoder):
            if dtype is None:
                self.encoder.packed = None
            else:
                self.encoder.prepare_inference()
        return self
