"""Takes a model apart into two programs that run without its Python source.

    python examples/export_step.py FOLDER [--word W] [--checkpoint F]

Writes FOLDER/encoder.pt2 and FOLDER/step.pt2, of a checkpoint that examples/pronounce.py saved or
of a model as it is born, loads them again and decodes W with nothing but the two programs: `step`
is one greedy step, and all that does not change from step to step is made by `encoder`.

torch.export unrolls an nn.LSTM over the source: an encoder serves sources of one length, here W's.
The step serves all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from pronounce import EOS, LETTERS, LONGEST, PHONEMES, SOS, build, saved, spelled
from torch import Tensor, nn
from torch.export import Dim

import seq2seq_fast as s2s


class EncoderProgram(nn.Module):
    """src (B, S) -> what every step reads: keys and values (B, S, H), mask (B, S); and the state
    before the first step: hidden and cell (L, B, H)."""

    def __init__(self, model: s2s.Seq2Seq):
        super().__init__()
        self.encoder, self.attention, self.pad_idx = model.encoder, model.decoder.attention, 0

    def forward(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        values, hidden, cell = self.encoder(src)
        return self.attention.Ua(values), values, src != self.pad_idx, hidden, cell


class StepProgram(nn.Module):
    """token (B,) and the state -> the likeliest next token, the attention weights (B, S) and the
    state after the step."""

    def __init__(self, model: s2s.Seq2Seq):
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        token: Tensor,
        hidden: Tensor,
        cell: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v = self.decoder.attention.Va.weight[0]
        source = s2s.PreparedSource(s2s.PreparedKeys(keys), values, v, mask)
        logits, state, weights = self.decoder.step(token, s2s.DecoderState(hidden, cell), source)
        return logits.argmax(-1), weights, state.hidden, state.cell


def export(model: s2s.Seq2Seq, length: int, folder: Path) -> None:
    """Both programs, for any B. They are made of PyTorch's own operations alone, so that whoever
    loads them needs neither this library nor a compiler."""
    B, S = Dim("B", min=1, max=4096), Dim("S", min=1, max=4096)
    src = torch.full((2, length), len(LETTERS) - 1)
    encoder, step = EncoderProgram(model).eval(), StepProgram(model).eval()
    with torch.no_grad(), s2s.use_backend("reference"):
        keys, values, mask, hidden, cell = encoder(src)
        args = (torch.full((2,), SOS), hidden, cell, keys, values, mask)
        rows, state = {0: B, 1: S}, {1: B}
        shapes = ({0: B}, state, state, rows, rows, rows)
        programs = {
            "encoder": torch.export.export(encoder, (src,), dynamic_shapes=({0: B},)),
            "step": torch.export.export(step, args, dynamic_shapes=shapes),
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")


def decode(folder: Path, src: Tensor) -> list[list[int]]:
    """Greedy decoding of src (B, S) by the two programs."""
    encoder, step = (
        torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "step")
    )
    with torch.no_grad():
        *source, hidden, cell = encoder(src)
        token, tokens = torch.full((len(src),), SOS), []
        ended = torch.zeros(len(src), dtype=torch.bool)
        while len(tokens) < LONGEST and not ended.all():
            token, _, hidden, cell = step(token, hidden, cell, *source)
            ended |= token == EOS
            tokens.append(token)
    rows = torch.stack(tokens, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exports encoder and decoder step.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--word", default="pronounce")
    parser.add_argument("--checkpoint", type=Path, help="what examples/pronounce.py saved")
    args = parser.parse_args(argv)
    if not (args.word.isascii() and args.word.isalpha()):
        parser.error(f"--word: got {args.word!r}, expected a word of letters")
    src = spelled([args.word.lower()], "cpu")
    hidden, weights = 256, None
    if args.checkpoint:
        checkpoint = saved(args.checkpoint)
        hidden, weights = checkpoint["hidden"], checkpoint["model"]
    model = build(hidden).eval()
    if weights:
        model.load_state_dict(weights)
    export(model, src.shape[1], args.folder)
    (row,) = decode(args.folder, src)
    print(f"{args.word}: {' '.join(PHONEMES[i] for i in row)}")


if __name__ == "__main__":
    main()
