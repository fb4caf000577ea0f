"""Modules whose attention sees where it has attended before."""

import plain
import pytest
import torch
from decoding_models import BOS, EOS, LOCATIONS, make, sources

import seq2seq_fast as s2s

X = torch.zeros


def decoder(location, after=False, dropout=0.0):
    torch.manual_seed(0)
    return s2s.Decoder(
        9, 4, 7, 2, dropout, query_after=after, encoder_dim=10, attention_dim=5,
        location=location, location_filters=3, location_kernel_size=5,
    )  # fmt: skip


def start():
    torch.manual_seed(1)
    mask = torch.arange(8) < torch.tensor([8, 3, 6])[:, None]
    state = s2s.DecoderState(torch.randn(2, 3, 7), torch.randn(2, 3, 7))
    return torch.randint(9, (3, 6)), torch.randn(3, 8, 10), mask, state


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("location", LOCATIONS, ids=str)
def test_the_sequence_is_its_steps(location, after, prepared):
    """Decoder.forward token by token, with packed weights too, against one call."""
    model = decoder(location, after).eval()
    tokens, values, mask, state = start()
    source = model.source(values, mask)
    out = model.run(tokens, state, source)
    want = model.fc_out(torch.cat([out.outputs, out.contexts], -1))
    if prepared:
        model.prepare_inference()
    with torch.set_grad_enabled(not prepared):
        kept, carried = state[:2], {}
        for t in range(6):
            logits, *found = model(tokens[:, t], *kept, source, **carried)
            torch.testing.assert_close(logits, want[:, t])
            names = ["context", "location"] if after else ["location"]
            kept, carried = found[:2], dict(zip(names, found[2:], strict=True))
    torch.testing.assert_close(carried["location"], out.location)


@pytest.mark.parametrize("location", LOCATIONS, ids=str)
def test_one_query_of_the_attention_alone(location):
    model = decoder(location)
    tokens, values, mask, state = start()
    out = model.run(tokens, state, model.source(values, mask))
    hidden = state.hidden[-1]
    place = X(3, len(location), 8)
    for t in range(2):  # before the first step, and after it
        context, weights = model.attention(hidden, values, mask, location=place if t else None)
        torch.testing.assert_close(context[:, 0], out.contexts[:, t])
        torch.testing.assert_close(weights, out.weights[:, t])
        place = torch.stack([weights] * len(location), 1)
        hidden = out.outputs[:, t]


@pytest.mark.parametrize(("cell_type", "after"), [("lstm", False), ("lstm", True), ("gru", True)])
@pytest.mark.parametrize("location", LOCATIONS, ids=str)
def test_against_a_loop_over_pytorch_s_cells(location, cell_type, after):
    """Logits, their gradients and greedy decoding, from the same state dict in float64."""
    torch.manual_seed(0)
    theirs = plain.OneLayerDecoder(9, 4, 7, 10, 5, location, 3, 5, after, cell_type).double()
    ours = s2s.Decoder(
        9, 4, 7, 1, 0.0, cell_type=cell_type, query_after=after, encoder_dim=10, attention_dim=5,
        location=location, location_filters=3, location_kernel_size=5,
    ).double()  # fmt: skip
    ours.load_state_dict(theirs.library_state_dict())
    tokens, values, mask, _ = start()
    values = values.double().requires_grad_()
    zeros = X(1, 3, 7).double()
    state = s2s.DecoderState(zeros, zeros if cell_type == "lstm" else None)
    source = ours.source(values, mask)
    out = ours.run(tokens, state, source)
    logits = ours.fc_out(torch.cat([out.outputs, out.contexts], -1))
    want = theirs(tokens, values, mask)
    torch.testing.assert_close(logits, want)
    (found,) = torch.autograd.grad(logits.square().sum(), values)
    (expected,) = torch.autograd.grad(want.square().sum(), values)
    torch.testing.assert_close(found, expected)
    options = {"bos": 1, "eos": 2, "max_length": 8}
    with torch.no_grad():
        greedy = theirs.greedy(values, mask, 1, 8)
        decoded = s2s.generate(ours.eval(), source, state, **options)
        float32 = ours.float()
        source = float32.source(values.float(), mask)
        state = s2s.DecoderState(*(None if x is None else x.float() for x in state[:2]))
        fast = s2s.generate(float32, source, state, backend="native", **options)
    for b, n in enumerate(decoded.lengths.tolist()):
        assert torch.equal(decoded.tokens[b, :n], greedy[b, :n])
        assert torch.equal(fast.tokens[b, :n], greedy[b, :n])


def test_an_attention_from_before_there_was_a_location():
    model = decoder(())
    del model.attention.__dict__["location"]
    tokens, values, mask, state = start()
    model.run(tokens, state, model.source(values, mask))
    model.attention(state.hidden[-1], values, mask)


def test_a_run_takes_encoder_outputs_and_a_decoder_none_for_no_location():
    tokens, values, _, state = start()
    model = decoder(("previous",))
    out, want = (model.run(tokens, state, x) for x in (values, model.source(values)))
    assert torch.equal(out.outputs, want.outputs)
    assert decoder(None).attention.location == ()


def test_state_dicts_are_what_they_were_but_for_the_location_s():
    names = decoder(()).state_dict().keys()
    more = decoder(("previous",)).state_dict().keys() - names
    assert not any("location" in name for name in names)
    assert more == {"attention.location_conv.weight", "attention.location_dense.weight"}


def test_a_model_learns_by_its_location_and_is_decoded_as_plain_pytorch_does():
    """Every parameter has a gradient; prepared in all dtypes it decodes what the reference does."""
    model, src = make(V=40, H=32, location=LOCATIONS[1]), sources(6, 30)
    trg = torch.randint(3, 40, (6, 8))
    model.train().loss(src, trg, 1.0).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "location" in n}
    assert all(g.abs().max() > 0 for g in gradients.values()) and len(gradients) == 2
    model.eval()
    options = {"bos": BOS, "eos": EOS, "max_length": 12, "return_weights": True}
    want = model.generate(src, backend="reference", **options)
    for dtype in ("float32", "bfloat16", "int8"):
        model.prepare_inference(dtype)
        found = model.generate(src, backend="native", **options)
        assert found.weights.shape == (*found.tokens.shape, 30)
        if dtype == "float32":
            assert torch.equal(found.tokens, want.tokens)
            torch.testing.assert_close(found.weights, want.weights, rtol=1e-4, atol=1e-5)
    scored = model.score(src, torch.cat([X(6, 1).long() + BOS, want.tokens], 1), eos=EOS)
    torch.testing.assert_close(scored.log_probs.detach(), want.log_probs, rtol=1e-4, atol=1e-4)


def test_decoding_goes_on_from_a_location():
    """Given the state after some steps, the weights are those of a call that made them all."""
    model = make(V=40, H=32, location=LOCATIONS[1])
    source, state = model.encode(sources(3, 30))
    options = {"bos": BOS, "eos": EOS, "max_length": 6, "min_length": 6, "return_weights": True}
    with torch.no_grad():
        whole = s2s.generate(model.decoder, source, state, **options)
        first = torch.cat([X(3, 1).long() + BOS, whole.tokens[:, :2]], 1)
        out = model.decoder.run(first[:, :2], state, source)
        state = s2s.DecoderState(out.hidden, out.cell, location=out.location)
        for backend in ("native", "reference"):
            rest = options | {"prefix": whole.tokens[:, 2:], "max_length": 4, "min_length": 0}
            # Fed what the whole was fed: its second token is where this begins.
            again = model.decoder.run(whole.tokens[:, 1:4], state, source)
            torch.testing.assert_close(again.weights, whole.weights[:, 2:5])
            found = s2s.generate(model.decoder, source, state, backend=backend, **rest)
            torch.testing.assert_close(found.weights[:, 0], whole.weights[:, 2])


@pytest.mark.unsanitized
@torch._dynamo.config.patch(allow_rnn=True)
def test_a_step_is_exported_and_compiled_whole():
    model = decoder(LOCATIONS[1]).eval()
    tokens, values, mask, state = start()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = model

        def forward(self, token, hidden, cell, values, mask, location):
            return self.decoder(token, hidden, cell, values, mask, location=location)

    args = (tokens[:, 0], *state[:2], values, mask, torch.rand(3, 2, 8))
    want = Step()(*args)
    with torch.no_grad():
        compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")(*args)
        with s2s.use_backend("reference"):
            exported = torch.export.export(Step(), args).module()(*args)
    for found in (compiled, exported):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)


def with_step(**changes):
    def call():
        tokens, values, mask, state = start()
        model = decoder(changes.pop("of", ("previous",)))
        model(tokens[:, 0], *state[:2], values, mask, **changes)

    return call


def running(of=("previous",), **changes):
    tokens, values, mask, state = start()
    model = decoder(of)
    args = {"tokens": tokens, "state": state, "source": model.source(values, mask)}
    model.run(**args | changes)


BAD = {
    "channels": (lambda: decoder(("now",)), ValueError, r"location: got \('now',\), expected a se"),
    "channels str": (lambda: decoder("previous"), ValueError, "location: got 'previous'"),
    "an even width": (
        lambda: s2s.Attention(5, location=("previous",), location_kernel_size=4),
        ValueError,
        "location_kernel_size: got 4, expected an odd number",
    ),
    "filters": (
        lambda: s2s.Attention(5, location=("previous",), location_filters=0),
        ValueError,
        "location_filters: got 0",
    ),
    "without attention": (
        lambda: s2s.Decoder(9, 4, 7, 1, 0.0, attention=False, location=("previous",)),
        ValueError,
        r"location: got \('previous',\), expected none without attention",
    ),
    "a state of none": (
        with_step(of=(), location=X(3, 1, 8)),
        ValueError,
        "location: got a Tensor, expected None: the attention sees no location",
    ),
    "a state's shape": (
        with_step(location=X(3, 2, 8)),
        ValueError,
        r"location: got shape \(3, 2, 8\), expected \(B, C, S\) = \(3, 1, 8\)",
    ),
    "a state's dtype": (with_step(location=X(3, 1, 8).double()), TypeError, "location: got t"),
    "a run's tokens": (lambda: running(tokens=X(2, 6).long()), ValueError, "tokens: got batch 2"),
    "a run's ids": (lambda: running(tokens=X(3, 6).long() + 9), ValueError, "tokens: got tok"),
    "a run's state": (lambda: running(state=(X(2, 3, 7), X(2, 3, 7))), TypeError, "state: got t"),
    "a run's location": (
        lambda: running(of=(), state=start()[3]._replace(location=X(3, 1, 8))),
        ValueError,
        "location: got a Tensor, expected None",
    ),
    "a run's context": (
        lambda: running(state=start()[3]._replace(context=X(3, 10))),
        ValueError,
        "context: got a Tensor, expected None without query_after",
    ),
    "a query's": (
        lambda: s2s.Attention(5)(X(3, 5), X(3, 8, 5), location=X(3, 1, 8)),
        ValueError,
        "location: got a Tensor, expected None",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_generate_checks_the_state_s_location():
    model = make(location=LOCATIONS[0])
    model.prepare_inference()
    source, state = model.encode(sources(3, 5))
    options = {"bos": BOS, "eos": EOS, "max_length": 3}
    with pytest.raises(ValueError, match=r"location: got shape \(3, 2, 5\)"):
        s2s.generate(model.decoder, source, state._replace(location=X(3, 2, 5)), **options)
    plain = make()
    plain.prepare_inference()
    source, state = plain.encode(sources(3, 5))
    with pytest.raises(ValueError, match="location: got a Tensor, expected None"):
        s2s.generate(plain.decoder, source, state._replace(location=X(3, 1, 5)), **options)
