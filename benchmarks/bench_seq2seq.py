"""Models in the tutorial's form: training steps, the decoder alone, evaluation, peak memory.

Baselines: the tutorial's code, and the same model in PyTorch with all that is no recurrence moved
out of its loop by hand, which knows no feedback.
"""

import random
import sys
from dataclasses import asdict, dataclass, replace

import memory
import plain
import torch
from torch import nn

import seq2seq_fast as s2s

STEP, DECODER, EVALUATION = "training step", "decoder, forward + backward", "evaluation"


@dataclass(frozen=True)
class Model:
    name: str
    what: str
    B: int
    S: int
    T: int
    V: int
    H: int = 256
    emb: int = 100
    layers: int = 2
    ratio: float = 1.0  # of teacher forcing
    padded: bool = False  # rows of a quarter of S and T to all of them

    def shape(self):
        kept = asdict(self)
        return {k: kept[k] for k in ("B", "S", "T", "V", "H", "emb", "layers", "ratio")}


WORDS = Model("tutorial, 10,000 words", STEP, 64, 30, 30, 10_000)
LETTERS = Model("tutorial, 100 tokens", DECODER, 64, 50, 50, 100)
SPEECH = Model("speech", DECODER, 8, 400, 60, 100, 1024, 128, 1)
PHONEMES = Model("grapheme-to-phoneme", STEP, 64, 9, 9, 42, ratio=0.5)
PADDED = replace(LETTERS, name="tutorial, 100 tokens, padded", what=STEP, padded=True)
PAD = 0
STEPS = (25, 50, 100, 200)

QUICK = {
    "test_model": (("case",), [(WORDS,), (LETTERS,), (PHONEMES,), (PADDED,), (SPEECH,)]),
    "test_peak_memory": (("case",), [(WORDS,)]),
}
FULL = {
    "test_model": (
        ("case",),
        [
            *QUICK["test_model"][1],
            *[(replace(WORDS, ratio=ratio),) for ratio in (0.5, 0.0)],
            *[(replace(LETTERS, what=STEP, ratio=ratio),) for ratio in (1.0, 0.5, 0.0)],
            (replace(WORDS, what=EVALUATION, ratio=0.0),),
            (replace(LETTERS, B=8),),
            (replace(LETTERS, B=1),),
        ],
    ),
    "test_peak_memory": (("case",), [(WORDS,), (LETTERS,), (SPEECH,)]),
}


class Given(s2s.Encoder):
    """Stands for an encoder: the same random outputs and states each time, as leaves."""

    def __init__(self, case):
        super().__init__(case.V, 1, case.H, case.layers, 0.0)
        g = torch.Generator().manual_seed(0)

        def leaf(*shape):
            return nn.Parameter(torch.randn(shape, generator=g) * 0.1)

        self.values = leaf(case.B, case.S, case.H)
        self.states = nn.ParameterList([leaf(case.layers, case.B, case.H) for _ in range(2)])

    def forward(self, src):
        return self.values, *self.states


def build(kind, case):
    torch.manual_seed(0)
    dropout = 0.1 if case.what == STEP else 0.0
    parts = s2s if kind is s2s.Seq2Seq else plain
    if case.what == DECODER:
        encoder = Given(case)
    else:
        encoder = parts.Encoder(case.V, case.emb, case.H, case.layers, dropout)
    decoder = parts.Decoder(case.V, case.emb, case.H, case.layers, dropout)
    return kind(encoder, decoder, PAD if case.padded else None)


def contender(kind, case):
    """A call that does what the case measures, on a model of its own."""
    model = build(kind, case)
    g = torch.Generator().manual_seed(1)
    src = torch.randint(case.V, (case.B, case.S), generator=g)
    trg = torch.randint(case.V, (case.B, case.T + 1), generator=g)
    if case.padded:
        ends = torch.randint(case.S // 4, case.S + 1, (case.B, 1), generator=g)
        src = src.clamp_min(PAD + 1).masked_fill_(torch.arange(case.S) >= ends, PAD)
        trg = trg.clamp_min(PAD + 1).masked_fill_(torch.arange(case.T + 1) > ends, PAD)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # for all, as in the demo
    grad = torch.randn(case.B, case.T + 1, case.V, generator=g) if case.what == DECODER else None
    ignored = PAD if case.padded else -100

    def loss():
        if kind is s2s.Seq2Seq:  # as training.train has it
            return model.loss(src, trg, case.ratio, ignore_index=ignored)
        logits = model(src, trg, case.ratio)[:, 1:].flatten(0, 1)
        return nn.functional.cross_entropy(logits, trg[:, 1:].flatten(), ignore_index=ignored)

    def train():
        random.seed(0)
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def decode():
        optimizer.zero_grad()
        model(src, trg, case.ratio).backward(grad)

    def evaluate():
        model.eval()
        with torch.no_grad():
            model(src, trg, case.ratio)

    return {STEP: train, DECODER: decode, EVALUATION: evaluate}[case.what]


def kinds(case):
    kinds = {"library": s2s.Seq2Seq, "tutorial": plain.Seq2Seq}
    return kinds | ({"hoisted": plain.Hoisted} if case.ratio == 1.0 else {})


def test_model(case, compare):
    compare(
        {name: contender(kind, case) for name, kind in kinds(case).items()},
        kind="model",
        name=case.name,
        mode=case.what,
        shape=case.shape(),
        scale="as stated",
    )


def test_growth(compare):
    """The same decoder over more and more steps, in turns."""
    of_steps = {T: contender(s2s.Seq2Seq, replace(LETTERS, T=T)) for T in STEPS}
    compare(
        {"library" if T == STEPS[0] else f"T {T}": call for T, call in of_steps.items()},
        kind="growth",
        name=LETTERS.name,
        mode=LETTERS.what,
        shape=LETTERS.shape(),
        steps=STEPS,
    )


def print_peak(name, which):
    """Runs in a process of its own: what one call adds to the resident memory."""
    (case,) = (case for (case,) in FULL["test_peak_memory"][1] if case.name == name)
    tiny = replace(case, B=1, S=2, T=2)
    contender(kinds(case)[which], tiny)()  # the libraries' own memory
    call = contender(kinds(case)[which], case)
    memory.print_added(call)


def test_peak_memory(case, rows):
    peaks = memory.peaks(__file__, case.name, {"library": "library", "eager": "tutorial"})
    for row in rows:
        what = row["kind"], row["name"], row["shape"], row["mode"]
        if what == ("model", case.name, case.shape(), case.what):
            row["peak_bytes"] = peaks


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
