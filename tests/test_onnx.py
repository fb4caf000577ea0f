"""Encoder and decoder as ONNX programs, which is what plain PyTorch's form of them is good for."""

import warnings

import pytest
import torch

import seq2seq_fast as s2s
from seq2seq_fast.library import use_backend

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.unsanitized

PAD, BOS, EOS, T = 0, 1, 2, 8


def make(cell_type, bidirectional, query_after):
    torch.manual_seed(0)
    encoder = s2s.Encoder(
        30, 7, 16, 2, 0.1, cell_type=cell_type, bidirectional=bidirectional, bridge_dim=12
    )
    decoder = s2s.Decoder(
        11, 6, 12, 2, 0.1, cell_type=cell_type, encoder_dim=encoder.output_dim,
        query_after=query_after,
    )  # fmt: skip
    with torch.no_grad():
        decoder.fc_out.weight.mul_(6)
    return s2s.Seq2Seq(encoder, decoder, PAD, pack_padded=True).eval()


def session(folder, module, args, axes):
    """module as a program, of any size along `axes`; in it all is plain PyTorch."""
    path = str(folder / f"{type(module).__name__}.onnx")
    with torch.no_grad(), use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            module, args, path, dynamo=False, input_names=list(axes), dynamic_axes=axes
        )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(program, *args):
    names = [x.name for x in program.get_inputs()]
    found = program.run(None, dict(zip(names, (x.numpy() for x in args), strict=True)))
    return [torch.from_numpy(x) for x in found]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_programs_decode_as_the_library_does(cell_type, bidirectional, tmp_path):
    model = make(cell_type, bidirectional, query_after=False)
    src, lengths = torch.randint(1, 30, (2, 5)), torch.tensor([5, 3])
    rows = {"src": {0: "B", 1: "S"}, "lengths": {0: "B"}}
    encoder = session(tmp_path, model.encoder, (src, lengths), rows)

    outputs, *state = model.encoder(src, lengths)
    cell = state[1:] if cell_type == "lstm" else [None]
    inputs = (torch.tensor([BOS, BOS]), state[0], *cell, outputs, src != PAD)
    axes = {"token": {0: "B"}, "hidden": {1: "B"}, "cell": {1: "B"}}
    axes |= {"outputs": {0: "B", 1: "S"}, "mask": {0: "B", 1: "S"}}
    if cell_type != "lstm":
        del axes["cell"]
    decoder = session(tmp_path, model.decoder, inputs, axes)

    # Other sizes than those that the programs were made with
    lengths = torch.tensor([9, 1, 4, 9, 6])
    src = torch.randint(1, 30, (5, 9)).masked_fill(torch.arange(9) >= lengths[:, None], PAD)
    want = model.encoder(src, lengths)
    outputs, *state = run(encoder, src, lengths)
    for found, expected in zip([outputs, *state], want, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    token, tokens = torch.full((5,), BOS), []
    for _ in range(T):
        logits, *state = run(decoder, token, *state, outputs, src != PAD)
        token = logits.argmax(-1)
        tokens.append(token)
    options = {"bos": BOS, "eos": EOS, "max_length": T, "min_length": T}
    found = model.generate(src, **options).tokens
    tokens = torch.stack(tokens, 1)
    until_eos = (tokens == EOS).cumsum(1) == 0  # min_length has no eos, which the loop may have
    assert until_eos[:, :2].all() and torch.equal(tokens[until_eos], found[until_eos])
