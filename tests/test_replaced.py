"""Modules that were replaced, changed or used in unusual ways after they were made."""

import copy
import random
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, V_SRC, make, sources
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

import seq2seq_fast as s2s
from seq2seq_fast import decoding
from seq2seq_fast.decoding import evaluating
from seq2seq_fast.library import asked_for

OPTIONS = {"bos": BOS, "eos": EOS, "max_length": 6}
V, H, E = 11, 13, 6  # of `make`


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_packed_weights_follow_optimizers(name, fused):
    """Fused ones do not count versions up."""
    model, src = make().prepare_inference(), sources(5, 6)
    batch = SimpleNamespace(src=src, trg=torch.randint(3, V, (5, 9)))
    criterion = nn.CrossEntropyLoss()
    optimizer = getattr(torch.optim, name)(model.parameters(), 0.1, fused=fused)
    for _ in range(3):
        s2s.training.train(model, [batch], optimizer, criterion, 1.0)
        fresh = copy.deepcopy(model)
        fresh.encoder.packed = fresh.decoder.packed = None
        found = [
            (
                s2s.training.evaluate(m, [batch], criterion),
                m.generate(src, backend="native", **OPTIONS).tokens,
            )
            for m in (model, fresh)
        ]
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert torch.equal(found[0][1], found[1][1])


def test_packed_weights_follow_a_replaced_attention():
    model, src = make().prepare_inference(), sources(5, 6)
    model.decoder.attention = s2s.Attention(H).eval()
    for p in model.decoder.attention.parameters():
        nn.init.normal_(p, std=3.0)
    ours, plain = (
        model.generate(src, return_weights=True, backend=b, **OPTIONS).weights[:, 0]
        for b in (None, "reference")
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_packed_weights_follow_those_of_inference_mode():
    with torch.inference_mode():
        model, src = make().prepare_inference(), sources(5, 6)
        for p in model.parameters():
            p.mul_(-3)
        ours, plain = (model.generate(src, backend=b, **OPTIONS) for b in (None, "reference"))
    torch.testing.assert_close(ours.log_probs, plain.log_probs)


def test_packed_weights_follow_another_tensors_data():
    """Whose memory may be where the last one's was."""
    model, src = make(V=100, H=64).prepare_inference(), sources(3, 6)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with torch.no_grad():
        for _ in range(20):
            found = []
            nn.utils.vector_to_parameters(theta + 0.3 * torch.randn_like(theta), model.parameters())
            for backend in (None, "reference"):
                found.append(model.generate(src, backend=backend, **OPTIONS).scores)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            nn.utils.vector_to_parameters(theta, model.parameters())


@pytest.mark.parametrize("cell_type", ["gru", "rnn", "lstm"])
def test_states_and_outputs_of_an_encoder_share_no_memory(cell_type):
    encoder, src = make((cell_type, True, False)).encoder, sources(3, 5)
    with torch.no_grad():
        outputs, hidden, _ = encoder(src)
        before = outputs.clone()
        hidden.zero_()
        assert torch.equal(outputs, before)
    outputs, hidden, _ = encoder(src)
    hidden.mul_(0.5)
    (outputs.sum() + hidden.sum()).backward()


MISFITS = {
    "embedding": (nn.Embedding(V, 9), "lstm: has input_size 19, expected 22"),
    "embedding ": (nn.Embedding(9, E), r"embedding.weight: got shape \(9, 6\), expected \(11, 6\)"),
    "lstm": (nn.LSTM(E + H, 4, 2, batch_first=True), "lstm: has hidden_size 4, expected 13"),
    "lstm ": (
        nn.LSTM(E + H, H, 2),
        "lstm: got LSTM.*, expected one direction of LSTM, batch_first",
    ),
    "lstm  ": (nn.GRU(E + H, H, 2, batch_first=True), "lstm: got GRU.*, expected one direction"),
    "lstm   ": (nn.LSTM(E + H, H, 3, batch_first=True), "lstm: has num_layers 3, expected 2"),
    "fc_out": (nn.Linear(12, V), r"fc_out.weight: got shape \(11, 12\), expected \(11, 26\)"),
    "fc_out ": (nn.Linear(2 * H, 10), r"fc_out.weight: got shape \(10, 26\), expected \(11, 26\)"),
    "fc_out   ": (
        nn.Linear(2 * H, V).half(),
        "embedding.weight: is torch.float32 .* torch.float16",
    ),
    "attention.Wa": (nn.Linear(H, 300), r"Wa.weight: got shape \(300, 13\), expected \(13, 13\)"),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("place", MISFITS)
def test_modules_that_do_not_fit_are_named(place, prepared):
    model, src = make(), sources(3, 5)
    if prepared:
        model.prepare_inference()
    module, message = MISFITS[place]
    owner, _, name = place.strip().rpartition(".")
    setattr(model.decoder.get_submodule(owner), name, module.eval())
    if place != "fc_out   ":  # which no engine decodes; it is refused where it is prepared
        with pytest.raises(
            ValueError, match="decoder." + ("attention." if owner else "") + message
        ):
            model.generate(src, backend="native", **OPTIONS)


def test_a_vocabulary_may_be_replaced():
    model, src = make().prepare_inference(), sources(3, 5)
    model.decoder.embedding, model.decoder.fc_out = nn.Embedding(30, E), nn.Linear(2 * H, 30)
    model.decoder.output_dim = 30
    model.eval()
    ours, plain = (model.generate(src, backend=b, **OPTIONS) for b in ("native", "reference"))
    assert torch.equal(ours.tokens, plain.tokens)


def test_what_a_prepared_step_is_given_must_fit():
    model, src = make().prepare_inference(), sources(3, 5)
    source, state = model.encode(src)
    token = torch.full((3,), BOS)
    wrong = {
        "cell": (state._replace(cell=None), source),
        "width": (state._replace(hidden=state.hidden[..., :5], cell=state.cell[..., :5]), source),
        "batch": (state, source._replace(values=source.values[:2])),
        "source": (state, torch.zeros(3, H)),
    }
    with torch.no_grad():
        model.decoder.step(token, state, source)
        for bad in wrong.values():
            with pytest.raises(RuntimeError, match="expected"):
                model.decoder.step(token, *bad)
        model.decoder.output_dim = 2_000_000_000
        with pytest.raises(RuntimeError, match="expected bos and eos of the vocabulary"):
            model.generate(src, bos=1_999_999_999, eos=EOS, max_length=3)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("rnn", nn.RNN(5, H, 2, batch_first=True, nonlinearity="relu")),
        ("lstm", nn.LSTM(5, H, 2, batch_first=True, bias=False)),
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_that_no_loop_computes_are_torchs(kind, layers):
    """In place of an encoder's."""
    encoder, src = make((kind, True, False)).encoder.prepare_inference(), sources(3, 5)
    setattr(encoder, kind, layers.eval())
    torch.testing.assert_close(encoder(src)[0], layers(encoder.embedding(src))[0])


def test_a_decoder_alone_is_prepared():
    model, src = make(), sources(3, 5)
    source, state = model.encode(src)
    want = s2s.generate(model.decoder, source, state, **OPTIONS)
    assert model.decoder.prepare_inference(project_values=True) is model.decoder
    assert model.decoder.packed.projects_values and model.encoder.packed is None
    found = s2s.generate(model.decoder, source, state, **OPTIONS)
    torch.testing.assert_close(found.scores, want.scores)
    with pytest.raises(ValueError, match="dtype: got 'float8'"):
        model.decoder.prepare_inference("float8")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
def test_generate_under_autocast(kind, prepared):
    model, src = make(kind), sources(4, 6)
    if prepared:
        model.prepare_inference()
    want = model.generate(src, **OPTIONS)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for options in ({}, {"beam_size": 3}, {"sample": True}, {"return_scores": False}):
                model.generate(src, **OPTIONS, **options)
            found = model.generate(src, **OPTIONS)
        assert found.scores.dtype == torch.float32
        first = (found.tokens[:, 0] == want.tokens[:, 0]).float().mean()
        assert first >= 0.5


def test_a_backend_is_forced_in_its_thread_alone():
    inside, seen = threading.Event(), []
    done = threading.Event()

    def other():
        inside.wait()
        seen.append(asked_for(None))
        with s2s.use_backend("native"):
            seen.append(asked_for(None))
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with s2s.use_backend("reference"):
        inside.set()
        done.wait()
        thread.join()
        assert asked_for(None) == "reference"
        with s2s.use_backend("native"):
            assert asked_for(None) == "native"
        assert asked_for(None) == "reference"
    assert seen == [None, "native"] and asked_for(None) is None


@pytest.mark.filterwarnings("ignore:decoding a model in training mode")
def test_dropout_is_off_until_the_last_call_has_ended():
    model = make().train()
    model.encoder.eval()
    first, second = evaluating(model), evaluating(model.decoder)
    first.__enter__()
    second.__enter__()
    assert not any(m.training for m in model.modules())
    first.__exit__()
    assert model.training and not model.decoder.training and not model.decoder.lstm.training
    second.__exit__()
    assert all(m.training for m in model.decoder.modules()) and not model.encoder.training
    assert not evaluating._inside


def test_dropout_stays_off_whenever_another_call_ends():
    """One that had seen a model in evaluation mode, and not who had put it there."""
    model, asked = make().train(), decoding._training
    first, second = evaluating(model), evaluating(model)

    def meanwhile(module):
        found = asked(module)
        other = threading.Thread(target=first.__exit__)
        other.start()
        other.join(0.2)  # where it must not wait for the lock, it has ended
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.__enter__()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "_training", meanwhile)
            second.__enter__()
    time.sleep(0.2)
    assert not any(m.training for m in model.modules())
    second.__exit__()
    assert model.training and not evaluating._inside


def test_forward_mode_is_refused():
    """No tangent is lost without a word."""
    q, k, values, v = (
        torch.randn(2, 3, 8),
        torch.randn(2, 5, 8),
        torch.randn(2, 5, 6),
        torch.randn(8),
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            s2s.additive_attention(dual, k, values, v, backend="native")
        with pytest.raises(NotImplementedError, match="jvp"):
            s2s.additive_scores(dual, k, v, backend="native")
        layers, zeros = (
            [[*layer] for layer in nn.LSTM(8 + 6, 13).all_weights],
            torch.zeros(1, 2, 13),
        )
        with torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
            s2s.attention_decoder(dual, zeros, zeros, layers, context=torch.zeros(2, 6))
        rows = forward_ad.make_dual(torch.randn(4, 8), torch.ones(4, 8))
        with pytest.raises(NotImplementedError, match="jvp"):
            s2s.linear_cross_entropy(rows, torch.randn(7, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        torch.func.jvp(
            lambda q: s2s.additive_attention(q, k, values, v, backend="native")[0], (q,), (q,)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["fc_out", "attention.Wa", "lstm"])
def test_weights_that_are_made_of_others_in_16_bits(place, dtype):
    """The engine, in float32, has the very numbers that the model has."""
    model, plain, src = make(size=1.0).to(dtype), make(size=1.0).to(dtype), sources(3, 5)
    name = "weight_hh_l0" if place == "lstm" else "weight"
    module = _weight_normed(model.decoder.get_submodule(place), name)
    with torch.no_grad():
        getattr(plain.decoder.get_submodule(place), name).copy_(getattr(module, name))
    for prepared in (False, True):
        if prepared:
            model.prepare_inference()
        found, want = (m.generate(src, **OPTIONS).log_probs for m in (model, plain))
        assert torch.equal(found, want)


@pytest.mark.parametrize("place", ["attention.Ua", "attention.Va", "attention.Wa", "fc_out"])
def test_weights_that_hooks_make_are_packed_once(place, monkeypatch):
    model, src = make(), sources(3, 5)
    _pruned(model.decoder.get_submodule(place), "weight")
    model.prepare_inference()
    packings, pack = [], decoding.pack_decoder
    monkeypatch.setattr(
        decoding, "pack_decoder", lambda *a, **k: packings.append(1) or pack(*a, **k)
    )
    first = model.generate(src, **OPTIONS)
    for _ in range(3):
        assert torch.equal(model.generate(src, **OPTIONS).log_probs, first.log_probs)
    assert not packings


def test_one_power_iteration_a_call():
    model, src, trg = make().train(), sources(3, 5), torch.randint(3, V, (3, 7))
    fc_out = nn.utils.spectral_norm(model.decoder.fc_out)
    (hook,) = fc_out._forward_pre_hooks.values()
    counted, compute = [], hook.compute_weight
    hook.compute_weight = lambda *args, **kw: counted.append(1) or compute(*args, **kw)
    source, state = model.encode(src)
    for call in (
        lambda: model(src, trg, 1.0),
        lambda: model(src, trg, 0.0),
        lambda: model.loss(src, trg, 0.5),
        lambda: model.score(src, trg),
        lambda: model.decoder(trg[:, 0], *state[:2], source),
    ):
        counted.clear()
        call()
        assert len(counted) == 1


NORMED = ["fc_out", "attention.Wa", "attention.Ua", "attention.Va", "embedding", "lstm"]


def _pruned(module, name):
    return prune.random_unstructured(module, name, 0.5)


def _weight_normed(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        return nn.utils.weight_norm(module, name)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("made_by", [_pruned, _weight_normed, nn.utils.spectral_norm])
@pytest.mark.parametrize("place", NORMED)
def test_weights_that_are_made_of_others_are_made_anew(made_by, place, prepared):
    """In training, decoding and steps alone, where PyTorch would make them as it calls a module."""
    model, src = make(), sources(3, 5)
    if prepared:
        model.prepare_inference()
    model.generate(src, **OPTIONS)
    name = "weight_hh_l0" if place == "lstm" else "weight"
    module = made_by(model.decoder.get_submodule(place), name)
    changed = next(p for key, p in module.named_parameters(recurse=False) if key.startswith(name))
    trg = torch.randint(3, V, (3, 7))
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        model(src, trg, 0.0).square().sum().backward()
        assert changed.grad.abs().sum() > 0
        ours, token = {}, torch.full((3,), BOS)
        with torch.no_grad():
            for backend in ("native", "reference"):
                with s2s.use_backend(backend):
                    source, state = model.encode(src)
                    ours[backend] = [
                        model(src, trg, 0.0),
                        model.decoder(token, *state[:2], source)[0],
                        model.generate(src, **OPTIONS).log_probs,
                    ]
            plain = [[*x] for x in zip(*ours.values(), strict=True)]
            for found, wanted in plain:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
            changed.copy_(torch.randn_like(changed))  # and is seen
            with s2s.use_backend("native"):
                assert not torch.equal(model(src, trg, 0.0), ours["native"][0])
                assert not torch.equal(model.generate(src, **OPTIONS).log_probs, ours["native"][2])


@pytest.mark.parametrize(
    "layers",
    [
        nn.RNN(E + H, H, 2, batch_first=True, nonlinearity="relu"),
        nn.RNN(E + H, H, 2, batch_first=True, bias=False),
        nn.RNN(E + H, H, 2, batch_first=True, bidirectional=True),
    ],
    ids=str,
)
def test_layers_of_a_decoder_that_are_others_are_refused(layers):
    """The operation would compute what it always does."""
    model, src, trg = make(("rnn", True, False)), sources(3, 5), torch.randint(3, V, (3, 7))
    source, state = model.encode(src)
    model.decoder.rnn = layers.eval()
    calls = {
        "forward": lambda: model(src, trg),
        "loss": lambda: model.loss(src, trg),
        "score": lambda: model.score(src, trg),
        "generate": lambda: model.generate(src, backend="reference", **OPTIONS),
        "run": lambda: model.decoder.run(trg, state, source),
        "step": lambda: model.decoder(trg[:, 0], *state[:2], source),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="decoder.rnn: got RNN.*, expected one direction of"):
            call()


@pytest.mark.parametrize("place", ["fc_out", "attention.Wa", "attention.Ua", "attention.Va"])
def test_a_linear_layer_without_a_bias_has_one_of_zeros(place):
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 7))
    with torch.no_grad():
        model.decoder.get_submodule(place).bias.zero_()
    without = copy.deepcopy(model)
    without.decoder.get_submodule(place).bias = None
    for prepared in (False, True):
        found = []
        for m in (model, without):
            if prepared:
                m.prepare_inference(project_values=True)
            torch.manual_seed(0)
            random.seed(0)
            logits = m(src, trg)
            loss = m.loss(src, trg, 1.0)
            loss.backward()
            generated = m.generate(src, beam_size=2, **OPTIONS)
            source, state = m.encode(src)
            step = m.decoder(trg[:, 0], *state[:2], source)[0]
            grads = m.decoder.lstm.weight_hh_l0.grad
            found.append([logits, loss, grads, generated.scores, step, m.score(src, trg).log_probs])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_dropout_is_what_its_modules_say(part):
    """In evaluation mode too, as Monte Carlo dropout wants it; and none in training where they are
    in evaluation mode."""
    torch.manual_seed(0)
    parts = [cls(V_SRC, 6, 8, 2, 0.5) for cls in (s2s.Encoder, s2s.Decoder)]
    model, src = s2s.Seq2Seq(*parts).eval().prepare_inference(), sources(3, 5)
    trg = torch.randint(3, V_SRC, (3, 7))
    owner = getattr(model, part)

    def differs():
        with torch.no_grad():
            source, state = model.encode(src)
            step = [model.decoder(trg[:, 0], *state[:2], source)[0] for _ in range(2)]
            whole = [model(src, trg, 1.0) for _ in range(2)]
        if part == "decoder":
            assert torch.equal(*whole) == torch.equal(*step)
        return not torch.equal(*whole)

    assert not differs()
    for module in (owner.dropout, owner.lstm):
        module.train()
        assert differs()
        model.eval()
        model.train()
        (model.decoder if part == "encoder" else model.encoder).eval()
        assert differs()
        owner.dropout.eval()
        assert differs()
        owner.lstm.eval()
        assert not differs()
        owner.dropout.train()
        owner.lstm.train()
        owner.lstm.dropout = 0.0
        owner.dropout.p = 0.0
        assert not differs()
        owner.lstm.dropout, owner.dropout.p = 0.5, 0.5
        model.eval()
    owner.dropout = nn.Identity().train()
    assert not differs()
    owner.dropout = nn.AlphaDropout(0.5)
    if part == "encoder":
        assert differs()  # which is called
    else:
        with pytest.raises(ValueError, match="decoder.dropout: got AlphaDropout, expected nn.Drop"):
            differs()


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 4


class Adapted(nn.Linear):
    """A readout with an adapter beside it, as LoRA has one."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2), nn.Linear(2, sizes[1])

    def forward(self, input):
        return super().forward(input) + self.up(self.down(input))


def _replace(model, what):
    torch.manual_seed(3)
    decoder = model.decoder
    if what == "readout":
        decoder.fc_out = Adapted(decoder.fc_out.in_features, V)
    elif what == "hook":
        decoder.embedding.register_forward_hook(lambda _, __, out: out * 4)
    elif what == "patched":
        lookup = decoder.embedding.forward
        decoder.embedding.forward = lambda input: lookup(input) * 4
    elif what == "sequence":
        decoder.embedding = nn.Sequential(nn.Embedding(V, 3), nn.Linear(3, E))
        decoder.fc_out = nn.Sequential(nn.Linear(2 * H, 7), nn.Tanh(), nn.Linear(7, V))
    elif what == "scaled":
        decoder.embedding = Scaled(V, E)
    elif what == "padding_idx":
        decoder.embedding = nn.Embedding(V, E, padding_idx=5)
        with torch.no_grad():
            decoder.fc_out.bias[5] += 0.5  # and is fed back
    else:
        decoder.embedding = nn.Embedding(V, E, max_norm=0.3)
    return model.eval()


def _by_hand(model, src, trg, fed_back):
    """Logits (B, T, V) of a loop over PyTorch's modules."""
    source, state = model.encode(src)
    decoder, logits, token = model.decoder, [], trg[:, 0]
    for t in range(1, trg.shape[1]):
        x = decoder.embedding(token)
        attended = decoder.attention(state.hidden[-1], source)[0][:, 0]
        out, (hidden, cell) = decoder.lstm(
            torch.cat([x, attended], -1)[:, None], (state.hidden, state.cell)
        )
        state = s2s.DecoderState(hidden, cell)
        logits.append(decoder.fc_out(torch.cat([out[:, 0], attended], -1)))
        token = logits[-1].argmax(-1) if t in fed_back else trg[:, t]
    return torch.stack(logits, 1)


CALLED = ["readout", "hook", "patched", "scaled", "max_norm", "sequence"]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("what", [*CALLED, "padding_idx"])
def test_an_embedding_or_readout_that_is_more_than_a_weight_is_so_in_training(what, backend, ratio):
    model, src, trg = _replace(make(), what), sources(3, 5), torch.randint(3, V, (3, 7))
    random.seed(1)
    forced = [random.random() < ratio for _ in range(6)]
    fed_back = [t for t, force in enumerate(forced, 1) if not force]
    found = []
    for how in ("fused", "loss", "by hand"):
        random.seed(1)
        with s2s.use_backend(backend if how != "by hand" else "reference"):
            if how == "loss":
                loss = model.loss(src, trg, ratio)
            else:
                hand = how == "by hand"
                logits = (
                    _by_hand(model, src, trg, fed_back) if hand else model(src, trg, ratio)[:, 1:]
                )
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), trg[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([loss, *(torch.zeros(()) if g is None else g for g in grads)])
    for x, y, want in zip(*found, strict=True):
        torch.testing.assert_close(x, want.expand_as(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, want.expand_as(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("what", CALLED)
def test_an_embedding_or_readout_that_is_more_than_a_weight_is_so_in_decoding(what, prepared):
    """Where it was put there after the weights had been packed, too."""
    model, src = make(), sources(3, 5)
    if prepared:
        model.prepare_inference()
        model.generate(src, **OPTIONS)
    _replace(model, what)
    ours = model.generate(src, **OPTIONS)
    plain = model.generate(src, backend="reference", **OPTIONS)
    assert torch.equal(ours.tokens, plain.tokens)
    torch.testing.assert_close(ours.log_probs, plain.log_probs)
    trg = torch.cat([torch.full((3, 1), BOS), ours.tokens], 1)
    scored = model.score(src, trg, eos=EOS).log_probs
    torch.testing.assert_close(ours.log_probs, scored, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        source, state = model.encode(src)
        step = model.decoder(trg[:, 0], *state[:2], source)[0]
        torch.testing.assert_close(step, _by_hand(model, src, trg[:, :2], [])[:, 0])
    name = "fc_out" if what == "readout" else "embedding"
    with pytest.raises(ValueError, match=f"backend: .*decoder.{name} does more than its weights"):
        model.generate(src, backend="native", **OPTIONS)
    with pytest.raises(ValueError, match=f"decoder: cannot be prepared: decoder.{name} does more"):
        model.prepare_inference()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("made_by", [_pruned, _weight_normed, nn.utils.spectral_norm])
def test_weights_that_are_made_of_others_beside_an_embedding_that_is_called(made_by, ratio):
    """Once a call, and with gradients, whoever reads them."""
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 9))
    made_by(model.decoder.fc_out, "weight")
    model.decoder.embedding.register_forward_hook(lambda *_: None)
    model.train()
    found = []
    for backend in ("native", "reference"):
        for call in (model.loss, lambda *args: model(*args).square().mean()):
            again = copy.deepcopy(model.state_dict())
            random.seed(1)
            with s2s.use_backend(backend):
                grads = torch.autograd.grad(call(src, trg, ratio), list(model.parameters()))
            model.load_state_dict(again)  # a norm's vectors among it
            found.append(grads)
    for ours, plain in zip(found[:2], found[2:], strict=True):
        for x, want in zip(ours, plain, strict=True):
            torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_that_are_over_are_fed_nothing_by_an_embedding_that_is_called(backend):
    torch.manual_seed(0)
    decoder = s2s.Decoder(V, E, H, 2, 0.0, query_after=True)
    source = decoder.source(torch.randn(3, 5, H))
    state = s2s.DecoderState(torch.randn(2, 3, H), torch.randn(2, 3, H))
    args = torch.randint(V, (3, 6)), state, source, (1, 3, 4), [3, 3, 2, 1, 1, 1]
    with s2s.use_backend(backend):
        read = decoder.steps(*args)
        decoder.embedding.register_forward_hook(lambda *_: None)
        called = decoder.steps(*args)
    for name, x, want in zip(read._fields, called, read, strict=True):
        if name == "logits":  # of those steps alone
            x, want = x[:, args[3]], want[:, args[3]]
        if want is not None:
            torch.testing.assert_close(x, want, msg=name)


def test_a_forward_of_an_instance_s_own_is_called():
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 7))
    model.prepare_inference()
    encoder = s2s.Encoder(V_SRC, 5, H, 1, 0.0, bidirectional=True, bridge_dim=5).eval()
    encoder.bridge_hidden.forward = lambda x: 10 + 0 * nn.Linear.forward(encoder.bridge_hidden, x)
    assert (encoder(src)[1] == 1).all()  # tanh
    layers = encoder.prepare_inference().lstm
    with torch.no_grad():
        before = encoder(src)[0]
        layers.forward = lambda x: (
            2 * nn.LSTM.forward(layers, x)[0],
            nn.LSTM.forward(layers, x)[1],
        )
        torch.testing.assert_close(encoder(src)[0], 2 * before)
    fc_out = model.decoder.fc_out
    fc_out.forward = lambda x: -nn.Linear.forward(fc_out, x)
    for call in (
        lambda: model(src, trg, 0.0),
        lambda: model.score(src, trg).log_probs,
        lambda: model.generate(src, **OPTIONS).log_probs,
        lambda: model.decoder(trg[:, 0], *model.encode(src)[1][:2], model.encode(src)[0])[0],
    ):
        with torch.no_grad():
            ours = call()
            with s2s.use_backend("reference"):
                torch.testing.assert_close(ours, call(), rtol=1e-4, atol=1e-4)
    del fc_out.forward
    model.generate(src, backend="native", **OPTIONS)
    wa = model.decoder.attention.Wa
    wa.forward = lambda x: -nn.Linear.forward(wa, x)  # after the weights have been packed
    with pytest.raises(ValueError, match="attention.Wa: got Linear, whose forward is its own"):
        model.generate(src, **OPTIONS)


def test_a_called_readout_s_loss_is_asked_the_same_questions():
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 7))
    model.decoder.fc_out.register_forward_hook(lambda *_: None)
    for options, message in (
        ({"reduction": "none"}, "reduction: got 'none', expected"),
        ({"label_smoothing": 2.0}, "label_smoothing: got 2.0, expected between 0 and 1"),
        ({"weight": torch.ones(3)}, r"weight: got shape \(3,\), expected \(V,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.loss(src, trg, **options)


def test_steps_of_its_own_are_taken_once():
    """By prepared weights too, and where an embedding is called."""

    class Shifted(s2s.Decoder):
        def steps(self, *args, **options):
            out = super().steps(*args, **options)
            return out._replace(outputs=out.outputs + 1)

    model, src = make().prepare_inference(), sources(3, 5)
    model.decoder.__class__ = Shifted
    source, state = model.encode(src)
    ours, plain = (
        s2s.generate(model.decoder, source, state, backend=b, **OPTIONS).log_probs
        for b in (None, "reference")
    )
    torch.testing.assert_close(ours, plain)
    tokens = torch.randint(V, (3, 6))
    once = model.decoder.run(tokens, state, source, [2, 4])
    model.decoder.embedding.register_forward_hook(lambda *_: None)
    called = model.decoder.run(tokens, state, source, [2, 4])
    assert torch.equal(once.tokens, called.tokens)
    torch.testing.assert_close(once.outputs, called.outputs)


def test_a_decoder_with_steps_of_its_own_takes_them():
    class Sharper(s2s.Decoder):
        def step(self, *args):
            logits, *others = super().step(*args)
            return 3 * logits, *others

    model, src = make().prepare_inference(), sources(3, 5)
    before = model.generate(src, **OPTIONS)
    model.decoder.__class__ = Sharper
    found = model.generate(src, **OPTIONS)
    assert torch.equal(found.tokens, before.tokens)
    assert (found.log_probs > before.log_probs).all()
    with pytest.raises(ValueError, match="Sharper has its own step"):
        model.generate(src, backend="native", **OPTIONS)


class Query(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class OwnLayers(nn.LSTM):
    def forward(self, *args):
        raise NotImplementedError


class Attends(s2s.Attention):
    def forward(self, *args):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("attention.Wa", Query(H, H)),
        ("attention.Va", Query(H, 1)),
        ("attention", Attends(H)),
        ("lstm", OwnLayers(E + H, H, 2, batch_first=True)),
    ],
    ids=["Wa", "Va", "attention", "lstm"],
)  # fmt: skip
def test_a_forward_that_would_not_be_called_is_refused(place, module):
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 7))
    model.prepare_inference().generate(src, **OPTIONS)
    parent, _, name = place.rpartition(".")
    setattr(model.decoder.get_submodule(parent), name, module)
    calls = {
        "forward": lambda: model(src, trg),
        "loss": lambda: model.loss(src, trg),
        "score": lambda: model.score(src, trg),
        "generate": lambda: model.generate(src, **OPTIONS),
        "reference": lambda: model.generate(src, backend="reference", **OPTIONS),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{place}: got .*, whose forward is its own"):
            call()
            pytest.fail(name)


def test_parts_without_what_is_read_are_named():
    model, src, trg = make(), sources(3, 5), torch.randint(3, V, (3, 7))
    model.decoder.lstm = nn.Linear(3, 4)
    for call in (lambda: model(src, trg), lambda: model.generate(src, **OPTIONS)):
        with pytest.raises(ValueError, match="decoder.lstm: got Linear.*, expected one direction"):
            call()


class Speech(nn.Module):
    """An encoder of frames (B, S, 5), of what `Seq2Seq` reads of one."""

    cell_type, output_dim, state_dim = "lstm", H, H

    def __init__(self):
        super().__init__()
        self.layers = nn.LSTM(5, H, 2, batch_first=True)

    def forward(self, src):
        outputs, (hidden, cell) = self.layers(src)
        return outputs, hidden, cell


def test_an_encoder_of_another_kind():
    torch.manual_seed(0)
    model, src = s2s.Seq2Seq(Speech(), make().decoder).eval(), torch.randn(3, 9, 5)
    trg = torch.randint(3, V, (3, 7))
    assert model(src, trg).shape == (3, 7, V) and model.loss(src, trg).isfinite()
    ours, plain = (model.generate(src, backend=b, **OPTIONS).tokens for b in (None, "reference"))
    assert torch.equal(ours, plain)
    assert s2s.Seq2Seq(Speech(), model.decoder, pad_idx=10**6).pad_idx == 10**6
    with pytest.raises(ValueError, match="pad_idx: got -1, expected at least 0"):
        s2s.Seq2Seq(Speech(), model.decoder, pad_idx=-1)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("made_by", [_pruned, _weight_normed, nn.utils.spectral_norm])
@pytest.mark.parametrize("name", ["location_conv", "location_dense"])
@torch.no_grad()
def test_the_weights_of_a_location_that_are_made_of_others_are_made_anew(name, made_by, prepared):
    torch.manual_seed(0)
    decoder = s2s.Decoder(V, E, H, 1, 0.0, location=("cumulative",)).eval()
    for p in decoder.parameters():
        nn.init.normal_(p)
    module = made_by(decoder.attention.get_submodule(name), "weight")
    source = decoder.source(torch.randn(3, 8, H))
    state = s2s.DecoderState(torch.randn(1, 3, H), torch.randn(1, 3, H))
    if prepared:
        decoder.prepare_inference()
    for _ in range(2):
        for p in module.parameters(recurse=False):
            p.copy_(3 * torch.randn_like(p))
        ours, plain = (
            s2s.generate(decoder, source, state, backend=b, return_weights=True, **OPTIONS)
            for b in ("native", "reference")
        )
        torch.testing.assert_close(ours.weights[:, 0], plain.weights[:, 0], rtol=1e-3, atol=1e-4)
