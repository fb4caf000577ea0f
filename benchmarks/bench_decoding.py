"""Decoding T tokens of each source, encoding left out: the library's engine, the tutorial's code,
ONNX Runtime (`pip install onnxruntime onnx`), and what reading the weights once a step takes. Then
the encoder alone, and a step of the decoder alone, as loops of one's own call it."""

import copy
import io
import tempfile
import warnings
from pathlib import Path

import plain
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seq2seq_fast as s2s

EMB, H, LAYERS, BOS, EOS = 100, 256, 2, 1, 2
TUTORIAL = {"V": 10_000, "S": 30, "T": 30}
G2P = {"V": 100, "S": 10, "T": 10}
TOKENS = "greedy, tokens alone"  # as the others make no log-probabilities either
PROJECTED = ", values projected"  # prepare_inference(project_values=True)
ROWS = [  # name, sizes, B, mode, dtype
    ("tutorial model", TUTORIAL, 1, "greedy", "float32"),
    ("tutorial model", TUTORIAL, 1, TOKENS, "float32"),
    ("tutorial model", TUTORIAL, 1, TOKENS + PROJECTED, "float32"),
    ("tutorial model", TUTORIAL, 1, "greedy", "int8"),
    ("tutorial model", TUTORIAL, 64, "greedy", "float32"),
    ("tutorial model", TUTORIAL, 64, TOKENS, "float32"),
    ("tutorial model", TUTORIAL, 1, "beam 5" + PROJECTED, "float32"),
    ("tutorial model", TUTORIAL, 16, "beam 5", "float32"),
    ("tutorial model", TUTORIAL, 16, "beam 5" + PROJECTED, "float32"),
    ("G2P model", G2P, 1, "greedy", "float32"),
    ("G2P model", G2P, 1, "greedy" + PROJECTED, "float32"),
    ("G2P model", G2P, 1, "greedy", "int8"),
    ("G2P model", G2P, 256, "greedy", "float32"),
]
SAMPLED = {"": {}, ", top_k 50": {"top_k": 50}, ", top_p 0.9": {"top_p": 0.9}}
ONNX_RUNTIME_SPINS_S = 0.05  # its threads, up to 40 ms after its last call
NAMES = "name, sizes, B, mode, dtype"
IDS = [f"{name} B {B} {mode} {dtype}".replace(" ", "_") for name, _, B, mode, dtype in ROWS]
QUICK = FULL = {}


class Step(nn.Module):
    """A decoder's step as one would export it: keys are projected beforehand, argmax is inside."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, token, hidden, cell, keys, values):
        decoder, attention = self.decoder, self.decoder.attention
        query = attention.Wa(hidden[-1]).unsqueeze(1)
        weights = attention.Va(torch.tanh(query + keys)).squeeze(-1).softmax(-1)
        context = torch.bmm(weights.unsqueeze(1), values)
        x = torch.cat([decoder.embedding(token.unsqueeze(1)), context], 2)
        output, (hidden, cell) = decoder.lstm(x, (hidden, cell))
        logits = decoder.fc_out(torch.cat([output, context], 2).squeeze(1))
        return logits.argmax(-1), hidden, cell


def models(V):
    """The library's model and the decoder of the tutorial with its weights."""
    torch.manual_seed(0)
    model = s2s.Seq2Seq(s2s.Encoder(V, EMB, H, LAYERS, 0.0), s2s.Decoder(V, EMB, H, LAYERS, 0.0))
    twin = plain.Decoder(V, EMB, H, LAYERS, 0.0)
    twin.load_state_dict(model.decoder.state_dict())
    return model.eval(), twin.eval()


def tutorial(decoder, values, hidden, cell, T, choose=lambda logits: logits.argmax(-1)):
    """Its loop, which projects the keys at every step."""

    @torch.inference_mode()
    def call():
        h, c, token = hidden, cell, torch.full((len(values),), BOS, device=values.device)
        for _ in range(T):
            logits, h, c = decoder(token, h, c, values)
            token = choose(logits)

    return call


def drawn(logits, top_k=0, top_p=1.0):
    """As such loops draw."""
    if top_k:
        logits, tokens = logits.topk(top_k)
    elif top_p < 1:
        logits, tokens = logits.sort(descending=True)
        p = logits.softmax(-1)
        logits = logits.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    found = torch.multinomial(logits.softmax(-1), 1)
    return (found if top_k == 0 and top_p == 1 else tokens.gather(1, found)).squeeze(1)


def tutorial_beams(decoder, values, hidden, cell, T, K):
    """A careful one: keys projected once, the encoder expanded once, 2 K candidates by topk."""

    @torch.inference_mode()
    def call():
        B, attention = len(values), decoder.attention
        rows = torch.arange(B).repeat_interleave(K)
        expanded, keys = values[rows], attention.Ua(values)[rows]
        h, c = hidden[:, rows], cell[:, rows]
        tokens = torch.full((B * K, 1), BOS)
        log_probs = torch.full((B, K), -torch.inf)
        log_probs[:, 0] = 0
        for _ in range(T):
            query = attention.Wa(h[-1]).unsqueeze(1)
            weights = attention.Va(torch.tanh(query + keys)).squeeze(-1).softmax(-1)
            context = torch.bmm(weights.unsqueeze(1), expanded)
            x = torch.cat([decoder.embedding(tokens[:, -1:]), context], 2)
            output, (h, c) = decoder.lstm(x, (h, c))
            logits = decoder.fc_out(torch.cat([output, context], 2).squeeze(1))
            log_p = F.log_softmax(logits, -1)
            log_p[:, EOS] = -torch.inf
            total = (log_probs.unsqueeze(2) + log_p.view(B, K, -1)).view(B, -1)
            log_probs, index = total.topk(K)
            parents = (torch.arange(B).unsqueeze(1) * K + index // log_p.shape[1]).flatten()
            tokens = torch.cat([tokens[parents], (index % log_p.shape[1]).view(-1, 1)], 1)
            h, c = h[:, parents], c[:, parents]

    return call


def onnx_runtime(decoder, values, hidden, cell, T, dtype):
    """The exported step in ONNX Runtime's loop; its dynamic quantisation for int8."""
    onnxruntime = pytest.importorskip("onnxruntime")
    keys = decoder.attention.Ua(values)
    names = ["token", "hidden", "cell", "keys", "values"]
    inputs = (torch.full((len(values),), BOS), hidden, cell, keys, values)
    exported = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Step(decoder), inputs, exported, input_names=names,
            output_names=["next", "hidden_after", "cell_after"], dynamo=False,
        )  # fmt: skip
    model = exported.getvalue()
    if dtype == "int8":
        from onnxruntime.quantization import quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("float.onnx", "int8.onnx")]
            paths[0].write_bytes(model)
            quantize_dynamic(*paths)
            model = paths[1].read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    fixed = {"keys": keys.numpy(), "values": values.numpy()}
    start = [x.numpy() for x in inputs[:3]]

    def call():
        token, h, c = start
        for _ in range(T):
            token, h, c = session.run(None, fixed | {"token": token, "hidden": h, "cell": c})

    return call


def reading(decoder, T, dtype):
    """A sum over as many bytes as a step reads of weights, T times."""
    read = [p for name, p in decoder.named_parameters() if not name.startswith("embedding")]
    numbers = torch.ones(sum(p.numel() for p in read) // (4 if dtype == "int8" else 1))

    def call():
        for _ in range(T):
            numbers.sum()

    return call


@pytest.mark.parametrize(NAMES, ROWS, ids=IDS)
@torch.no_grad()
def test_decoding(name, sizes, B, mode, dtype, compare):
    (V, S, T), beam = sizes.values(), 5 if mode.startswith("beam 5") else 1
    model, twin = models(V)
    values, hidden, cell = model.encoder(torch.randint(V, (B, S)))
    source, state = model.decoder.source(values), s2s.DecoderState(hidden, cell)
    model.prepare_inference(dtype, project_values=mode.endswith(PROJECTED))
    options = {"bos": BOS, "eos": EOS, "max_length": T, "min_length": T, "beam_size": beam}
    options["return_scores"] = not mode.startswith(TOKENS)
    contenders = {"library": lambda: s2s.generate(model.decoder, source, state, **options)}
    if beam > 1:
        contenders["tutorial code"] = tutorial_beams(twin, values, hidden, cell, T, beam)
    else:
        contenders["tutorial code"] = tutorial(twin, values, hidden, cell, T)
        contenders["ONNX Runtime"] = onnx_runtime(
            copy.deepcopy(twin), values, hidden, cell, T, dtype
        )
    contenders["reading the weights"] = reading(twin, T, dtype)
    compare(
        contenders,
        pause_s=ONNX_RUNTIME_SPINS_S,
        kind="decoding",
        name=name,
        mode=mode,
        shape={"B": B} | sizes | {"H": H},
        dtype=dtype,
        steps=T,
    )


@pytest.mark.parametrize("kept", SAMPLED, ids=["all", "top_k", "top_p"])
@pytest.mark.parametrize("B", [1, 64])
@torch.no_grad()
def test_sampling(B, kept, compare):
    V, S, T = TUTORIAL.values()
    model, twin = models(V)
    values, hidden, cell = model.encoder(torch.randint(V, (B, S)))
    source, state = model.decoder.source(values), s2s.DecoderState(hidden, cell)
    model.prepare_inference()
    options = {"bos": BOS, "eos": EOS, "max_length": T, "min_length": T, "return_scores": False}
    options |= {"sample": True} | SAMPLED[kept]
    compare(
        {
            "library": lambda: s2s.generate(model.decoder, source, state, **options),
            "tutorial code": tutorial(
                twin, values, hidden, cell, T, lambda logits: drawn(logits, **SAMPLED[kept])
            ),
        },
        kind="decoding",
        name="tutorial model",
        mode="sampled" + kept,
        shape={"B": B} | TUTORIAL | {"H": H},
        steps=T,
    )


@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize(
    ("name", "sizes"), [("tutorial model", TUTORIAL), ("G2P model", G2P)], ids=["tutorial", "G2P"]
)
@torch.no_grad()
def test_encoder(name, sizes, B, compare):
    V, S, _ = sizes.values()
    model, _ = models(V)
    twin, src = plain.Encoder(V, EMB, H, LAYERS, 0.0).eval(), torch.randint(V, (B, S))
    twin.load_state_dict(model.encoder.state_dict())
    encoder = model.encoder.prepare_inference()
    compare(
        {"library": lambda: encoder(src), "tutorial code": lambda: twin(src)},
        kind="part",
        name=name,
        mode="`encoder(src)`, the whole source",
        shape={"B": B, "V": V, "S": S, "H": H},
        steps=1,
    )


@pytest.mark.parametrize("trained", [False, True])
def test_encoder_of_rows_that_end(trained, compare):
    """Against nn.LSTM of packed sequences, in the tutorial's encoder."""
    (V, S, _), B = TUTORIAL.values(), 64
    model, _ = models(V)
    twin = plain.Encoder(V, EMB, H, LAYERS, 0.0)
    twin.load_state_dict(model.encoder.state_dict())
    lengths = torch.randint(1, S + 1, (B,))
    src = torch.randint(1, V, (B, S)).masked_fill(torch.arange(S) >= lengths[:, None], 0)
    encoder = (model.encoder if trained else model.encoder.prepare_inference()).train(trained)

    def packed():
        pack = nn.utils.rnn.pack_padded_sequence
        rows = pack(twin.embedding(src), lengths, batch_first=True, enforce_sorted=False)
        outputs, (hidden, cell) = twin.lstm(rows)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=S)
        return outputs, hidden, cell

    def run(found, module):
        with torch.set_grad_enabled(trained):
            results = found()
            if trained:
                module.zero_grad()
                sum(x.sum() for x in results).backward()

    compare(
        {
            "library": lambda: run(lambda: encoder(src, lengths), encoder),
            "tutorial code": lambda: run(packed, twin),
        },
        kind="part",
        name="tutorial model",
        mode="`encoder(src, lengths)` of 1 to S tokens" + (", training" if trained else ""),
        shape={"B": B, "V": V, "S": S, "H": H},
        steps=1,
    )


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize(
    ("name", "sizes"), [("tutorial model", TUTORIAL), ("G2P model", G2P)], ids=["tutorial", "G2P"]
)
@torch.no_grad()
def test_step(name, sizes, B, prepared, compare):
    V, S, _ = sizes.values()
    model, twin = models(V)
    if prepared:
        model.prepare_inference()
    values, hidden, cell = model.encoder(torch.randint(V, (B, S)))
    source, token = model.decoder.source(values), torch.full((B,), BOS)
    compare(
        {
            "library": lambda: model.decoder(token, hidden, cell, source),
            "tutorial code": lambda: twin(token, hidden, cell, values),
        },
        kind="part",
        name=name,
        mode="`decoder(…)`, one step" + (", prepared" if prepared else ""),
        shape={"B": B, "V": V, "S": S, "H": H},
        steps=1,
    )
