"""The modules of examples/drop_in.py against the formulas of what they stand for."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("drop_in", ROOT / "examples" / "drop_in.py")
drop_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drop_in)

B, T, S, N, A = 3, 4, 7, 6, 5
LENGTHS = torch.tensor([7, 2, 5])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def softmax_of(scores, lengths=LENGTHS):
    """Over the source, of scores (..., S) of which rows are the first axis."""
    behind = torch.arange(S) >= lengths[:, None]
    while behind.dim() < scores.dim():
        behind = behind[:, None]
    return scores.masked_fill(behind, -torch.inf).softmax(-1)


def check(module, plain, *inputs, ours=lambda module, *inputs: module(*inputs)):
    """Results and gradients of ours are those of plain(module, *inputs) in float64."""

    def results(call, module, inputs):
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        found = call(module, *leaves)
        found = found if isinstance(found, tuple) else (found,)
        finite = [x.masked_fill(x.isinf(), 0) for x in found]
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in finite)
        wanted = [x for x in leaves if x.requires_grad] + list(module.parameters())
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        zeros = [torch.zeros_like(x) for x in wanted]
        return [*found, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]

    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = results(plain, copy.deepcopy(module).double(), double)
    for found, want in zip(results(ours, module, inputs), exact, strict=True):
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gnmt(normalize, batch_first):
    module = drop_in.GNMTAttention(N, N, A, normalize, batch_first)
    names = {"linear_q.weight", "linear_k.weight", "linear_att"}
    names |= {"normalize_scalar", "normalize_bias"} if normalize else set()
    assert module.state_dict().keys() == names
    if normalize:
        torch.nn.init.normal_(module.normalize_bias)

    def plain(m, query, keys):
        one = query.dim() == 2
        if not batch_first:
            keys, query = keys.transpose(0, 1), query if one else query.transpose(0, 1)
        x = m.linear_q(query[:, None] if one else query)[:, :, None] + m.linear_k(keys)[:, None]
        v = m.linear_att
        if normalize:
            x, v = x + m.normalize_bias, m.normalize_scalar * v / v.norm()
        w = softmax_of(x.tanh() @ v)
        context = w @ keys
        if one:
            return context[:, 0], w[:, 0]
        return (context, w) if batch_first else (context.transpose(0, 1), w.transpose(0, 1))

    keys, query = torch.randn(B, S, N), torch.randn(B, T, N)
    if not batch_first:
        keys, query = keys.transpose(0, 1), query.transpose(0, 1)
    module.set_mask(LENGTHS, keys)
    check(module, plain, query, keys)
    check(module, plain, torch.randn(B, N), keys)


def test_speechbrain():
    module = drop_in.SpeechBrainAttention(N, N + 1, A, N + 2, scaling=1.5)
    assert {k.split(".")[0] for k in module.state_dict()} == {
        *("mlp_enc", "mlp_dec", "mlp_attn", "mlp_out"),
    }

    def plain(m, outputs, query):
        x = m.mlp_enc(outputs) + m.mlp_dec(query)[:, None]
        w = softmax_of(1.5 * m.mlp_attn(x.tanh())[..., 0])
        return m.mlp_out((w[:, None] @ outputs)[:, 0]), w

    def ours(m, outputs, query):
        m.reset()
        return m(outputs, LENGTHS, query)

    source = torch.randn(B, S, N)
    check(module, plain, source, torch.randn(B, N + 1), ours=ours)
    module.reset()
    first = module(source, LENGTHS, torch.zeros(B, N + 1))[1]
    other = torch.randn(B, S, N)  # not seen before reset
    assert torch.equal(first, module(other, LENGTHS, torch.zeros(B, N + 1))[1])
    module.reset()
    assert not torch.equal(first, module(other, LENGTHS, torch.zeros(B, N + 1))[1])


def test_espnet():
    module = drop_in.ESPnetAttention(N, N + 1, A)

    def plain(m, outputs, query):
        x = m.mlp_enc(outputs) + m.mlp_dec(query)[:, None]
        w = softmax_of(2 * m.gvec(x.tanh())[..., 0])
        return (w[:, None] @ outputs)[:, 0], w

    def ours(m, outputs, query):
        m.reset()
        return m(outputs, LENGTHS.tolist(), query, None)

    source = torch.randn(B, S, N)
    check(module, plain, source, torch.randn(B, N + 1), ours=ours)
    module.reset()
    begun = module(source, LENGTHS, None)
    for found, want in zip(begun, plain(module, source, torch.zeros(B, N + 1)), strict=True):
        torch.testing.assert_close(found, want)


def plain_location(m, outputs, query, places, scale, scores):
    """Weights and context of location-aware attention, in the names that two systems share."""
    x = m.mlp_enc(outputs) + m.mlp_dec(query)[:, None] + places
    w = softmax_of(scale * scores(x.tanh())[..., 0])
    return (w[:, None] @ outputs)[:, 0], w


def uniform():
    there = (torch.arange(S) < LENGTHS[:, None]).double()
    return there / LENGTHS[:, None]


def test_speechbrain_location():
    module = drop_in.SpeechBrainLocationAttention(N, N + 1, A, N + 2, 3, 2, scaling=1.5)

    def plain(m, outputs, *queries):
        found, before = [], uniform().to(outputs.dtype)
        for query in queries:
            features = F.conv1d(before[:, None], m.conv_loc.weight, padding=2).transpose(1, 2)
            places = m.mlp_loc(features)
            context, w = plain_location(m, outputs, query, places, 1.5, m.mlp_attn)
            before = w.detach()
            found += [m.mlp_out(context), w]
        return tuple(found)

    def ours(m, outputs, *queries):
        m.reset()
        return tuple(x for query in queries for x in m(outputs, LENGTHS, query))

    queries = [torch.randn(B, N + 1) for _ in range(3)]
    check(module, plain, torch.randn(B, S, N), *queries, ours=ours)


def test_espnet_location():
    module = drop_in.ESPnetLocationAttention(N, N + 1, A, 3, 2)

    def plain(m, outputs, *queries):
        found, before = [], uniform().to(outputs.dtype)
        for query in queries:
            kernel = m.loc_conv.weight[:, :, 0]
            places = m.mlp_att(F.conv1d(before[:, None], kernel, padding=2).transpose(1, 2))
            context, before = plain_location(m, outputs, query, places, 2, m.gvec)
            found += [context, before]
        return tuple(found)

    def ours(m, outputs, *queries):
        m.reset()
        found, before = [], None
        for query in queries:
            context, before = m(outputs, LENGTHS.tolist(), query, before)
            found += [context, before]
        return tuple(found)

    queries = [torch.randn(B, N + 1) for _ in range(3)]
    check(module, plain, torch.randn(B, S, N), *queries, ours=ours)


@pytest.mark.parametrize("kind", ["ESPnet", "SpeechBrain"])
def test_a_row_of_no_length_leaves_gradients_finite(kind):
    if kind == "ESPnet":
        module, dec = drop_in.ESPnetLocationAttention(N, N, A, 3, 2), torch.randn(B, N)
    else:
        module, dec = drop_in.SpeechBrainLocationAttention(N, N, A, N, 3, 2), torch.randn(B, N)
    module(torch.randn(B, S, N), torch.tensor([7, 0, 5]), dec)[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_tacotron(masked):
    module = drop_in.TacotronAttention(N + 1, N, A, 3, 5)
    assert module.state_dict().keys() == {
        "query_layer.linear_layer.weight",
        "memory_layer.linear_layer.weight",
        "v.linear_layer.weight",
        "location_layer.location_conv.conv.weight",
        "location_layer.location_dense.linear_layer.weight",
    }
    lengths = LENGTHS if masked else torch.full((B,), S)
    mask = torch.arange(S) >= lengths[:, None] if masked else None

    def plain(m, query, memory, weights):
        layer = m.location_layer
        f = F.conv1d(weights, layer.location_conv.conv.weight, padding=2).transpose(1, 2)
        x = m.memory_layer.linear_layer(memory) + layer.location_dense.linear_layer(f)
        x = x + m.query_layer.linear_layer(query)[:, None]
        w = softmax_of(m.v.linear_layer(x.tanh())[..., 0], lengths)
        return (w[:, None] @ memory)[:, 0], w

    def ours(m, query, memory, weights):
        return m(query, memory, m.memory_layer.linear_layer(memory), weights, mask)

    inputs = torch.randn(B, N + 1), torch.randn(B, S, N), torch.rand(B, 2, S)
    check(module, plain, *inputs, ours=ours)


@pytest.mark.parametrize("frames", [1, 2])
def test_tacotron_decoder(frames):
    """The loop over both cells, evaluated; the prenet drops always, by the same draw."""
    sizes = (4, frames, N, 6, 7, 5, A, 3, 5)
    module = drop_in.TacotronDecoder(*sizes).eval()
    names = {n.split(".")[0] for n in module.state_dict()}
    assert names == {
        "prenet", "attention_rnn", "attention_layer", "decoder_rnn", "linear_projection",
        "gate_layer",
    }  # fmt: skip
    assert "prenet.layers.1.linear_layer.weight" in module.state_dict()

    def plain(m, memory, decoder_inputs):
        torch.manual_seed(1)
        x = decoder_inputs.transpose(1, 2).reshape(B, T, 4 * frames)
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)[:, :-1]
        for layer in m.prenet.layers:
            x = F.dropout(F.relu(layer.linear_layer(x)), 0.5)
        keys = m.attention_layer.memory_layer.linear_layer(memory)
        hidden, cell = memory.new_zeros(2, B, 6)
        above, memories = memory.new_zeros(2, B, 7)
        context, weights = memory.new_zeros(B, N), memory.new_zeros(B, S)
        total = weights
        mels, gates, all_weights = [], [], []
        for t in range(T):
            hidden, cell = m.attention_rnn(torch.cat([x[:, t], context], 1), (hidden, cell))
            layer = m.attention_layer.location_layer
            f = F.conv1d(
                torch.stack([weights, total], 1), layer.location_conv.conv.weight, padding=2
            )
            places = keys + layer.location_dense.linear_layer(f.transpose(1, 2))
            places = places + m.attention_layer.query_layer.linear_layer(hidden)[:, None]
            weights = softmax_of(m.attention_layer.v.linear_layer(places.tanh())[..., 0])
            context, total = (weights[:, None] @ memory)[:, 0], total + weights
            above, memories = m.decoder_rnn(torch.cat([hidden, context], 1), (above, memories))
            features = torch.cat([above, context], 1)
            mels.append(m.linear_projection.linear_layer(features))
            gates.append(m.gate_layer.linear_layer(features)[:, 0])
            all_weights.append(weights)
        mels = torch.stack(mels, 1).view(B, T * frames, 4).transpose(1, 2)
        return mels, torch.stack(gates, 1), torch.stack(all_weights, 1)

    def ours(m, memory, decoder_inputs):
        torch.manual_seed(1)
        return m(memory, decoder_inputs, LENGTHS)

    check(module, plain, torch.randn(B, S, N), torch.randn(B, 4, T * frames), ours=ours)
    with pytest.raises(
        ValueError, match=r"decoder_inputs: got shape .* expected \(B, n_mel_channels"
    ):
        module(torch.ones(B, S, N), torch.ones(B, 5, 4 * frames), LENGTHS)
    evaluated = ours(module, torch.ones(B, S, N), torch.ones(B, 4, T * frames))[0]
    module.train()
    found = [ours(module, torch.ones(B, S, N), torch.ones(B, 4, T * frames))[0] for _ in "ab"]
    assert torch.equal(*found) and not torch.equal(found[0], evaluated)  # a mask, from one seed


def test_opennmt():
    def plain(m, query, memory, lengths):
        x = m.linear_query(query)[..., None, :] + m.linear_context(memory).view(B, 1, S, N)
        w = softmax_of(m.v(x.tanh())[..., 0], lengths)
        return m.linear_out(torch.cat([w @ memory, query], -1)), w

    module, memory = drop_in.OpenNMTAttention(N), torch.randn(B, S, N)
    check(module, plain, torch.randn(B, T, N), memory, LENGTHS)
    query = torch.randn(B, N)
    want = plain(module, query[:, None], memory, torch.full((B,), S))
    for found, expected in zip(module(query, memory), want, strict=True):
        torch.testing.assert_close(found, expected[:, 0])


@pytest.mark.parametrize("layers", [1, 2])
def test_opennmt_decoder(layers):
    """The loop over cells with input feeding, evaluated."""
    E = 5
    module = drop_in.OpenNMTDecoder(layers, E, N, 0.4).eval()
    assert f"rnn.layers.{layers - 1}.weight_ih" in module.state_dict()
    assert "attn.linear_out.weight" in module.state_dict()

    def plain(m, emb, memory, hidden, cell):
        hidden, cell = list(hidden), list(cell)
        feed, outputs, all_weights = memory.new_zeros(B, N), [], []
        for x in emb.unbind(1):
            x = torch.cat([x, feed], 1)
            for i, layer in enumerate(m.rnn.layers):
                hidden[i], cell[i] = layer(x, (hidden[i], cell[i]))
                x = hidden[i]
            feed, weights = m.attn(x, memory, LENGTHS)
            outputs.append(feed)
            all_weights.append(weights)
        states = torch.stack(hidden), torch.stack(cell)
        return torch.stack(outputs, 1), torch.stack(all_weights, 1), *states

    def ours(m, emb, memory, *state):
        outputs, weights, after = m(emb, memory, LENGTHS, state)
        return outputs, weights, *after

    inputs = [torch.randn(s) for s in ((B, T, E), (B, S, N), (layers, B, N), (layers, B, N))]
    check(module, plain, *inputs, ours=ours)
    first, _, state = module(inputs[0][:, :1], inputs[1], LENGTHS, tuple(inputs[2:]))
    rest = module(inputs[0][:, 1:], inputs[1], LENGTHS, state, first[:, 0])[0]
    torch.testing.assert_close(torch.cat([first, rest], 1), ours(module, *inputs)[0])
    module.train()
    dropped = ours(module, *inputs)[0]
    assert 0.2 < (dropped == 0).float().mean() < 0.6


@pytest.mark.parametrize("clip", [None, 10.0])
def test_pointer(clip):
    def plain(m, query, source, mask):
        scores = (m.query(query)[:, :, None] + m.key(source)[:, None]).tanh() @ m.v
        scores = scores if clip is None else clip * scores.tanh()
        return scores.masked_fill(~mask, -torch.inf)

    mask = torch.rand(B, T, S) < 0.7
    check(drop_in.PointerScores(N, clip), plain, torch.randn(B, T, N), torch.randn(B, S, N), mask)


@pytest.mark.parametrize("is_train", [True, False])
def test_text_recognition(is_train):
    classes, H = 9, 8
    module = drop_in.TextRecognitionHead(N, H, classes)
    torch.nn.init.normal_(module.generator.weight)

    def plain(m, features, text):
        cell, state = m.attention_cell, (features.new_zeros(B, H), features.new_zeros(B, H))
        logits, character = [], text[:, 0]
        for t in range(T):
            x = cell.i2h(features) + cell.h2h(state[0])[:, None]
            w = cell.score(x.tanh())[..., 0].softmax(-1)
            context = (w[:, None] @ features)[:, 0]
            one_hot = F.one_hot(character, classes).to(features.dtype)
            state = cell.rnn(torch.cat([context, one_hot], 1), state)
            logits.append(m.generator(state[0]))
            if t + 1 < T:
                character = text[:, t + 1] if is_train else logits[-1].argmax(-1)
        return torch.stack(logits, 1)

    text = torch.randint(classes, (B, T))
    check(
        module, plain, torch.randn(B, S, N), text,
        ours=lambda m, features, text: m(features, text, is_train, T - 1),
    )  # fmt: skip
