"""Decoders whose attention sees where it has attended before, at shapes of speech and summarisation
systems, and one that reads attentional vectors, of a translation system, against a loop over
PyTorch's cells with the keys projected once per source: all steps with their gradients, and greedy
decoding of one source."""

from dataclasses import dataclass

import plain
import torch
from cases import BOTH

import seq2seq_fast as s2s


@dataclass(frozen=True)
class System:
    name: str
    B: int
    T: int
    S: int
    H: int
    E: int
    A: int
    D: int
    filters: int
    width: int
    location: tuple[str, ...]
    query_after: bool
    cell: str = "lstm"
    V: int = 80
    vector: int = 0

    def shape(self):
        sizes = {name: getattr(self, name) for name in ("B", "T", "S", "H", "A", "D")}
        if self.vector:
            return sizes | {"vector": self.vector}
        return sizes | {"filters": f"{self.filters} x {self.width}"}

    def models(self):
        """The same decoder in plain PyTorch and of the library."""
        torch.manual_seed(0)
        args = (self.V, self.E, self.H, self.D, self.A, self.location, self.filters, self.width)
        theirs = plain.OneLayerDecoder(*args, self.query_after, self.cell, self.vector)
        ours = s2s.Decoder(
            self.V, self.E, self.H, 1, 0.0, cell_type=self.cell, query_after=self.query_after,
            encoder_dim=self.D, attention_dim=self.A, location=self.location,
            location_filters=self.filters, location_kernel_size=self.width,
            attentional_dim=self.vector or None,
        )  # fmt: skip
        ours.load_state_dict(theirs.library_state_dict())
        return theirs, ours

    def source(self):
        g = torch.Generator().manual_seed(1)
        values = torch.randn(self.B, self.S, self.D, generator=g)
        lengths = torch.randint(self.S // 2, self.S + 1, (self.B, 1), generator=g)
        return values, torch.arange(self.S) < lengths

    def start(self):
        hidden = torch.zeros(1, self.B, self.H)
        return s2s.DecoderState(hidden, hidden if self.cell == "lstm" else None)


BOTH_CHANNELS = ("previous", "cumulative")
# R5, R7, R6 and R10 of the workloads, with fewer steps and rows than their training has.
SYSTEMS = [
    System("Tacotron 2", 16, 60, 128, 1024, 256, 128, 512, 32, 31, BOTH_CHANNELS, True),
    System("ESPnet", 10, 40, 400, 300, 300, 320, 320, 10, 201, ("previous",), False),
    System("SpeechBrain", 8, 20, 400, 1024, 128, 1024, 512, 10, 201, ("previous",), True, "gru"),
    System("pointer-generator", 16, 30, 400, 512, 128, 512, 512, 1, 1, ("cumulative",), True),
]
# IWSLT's, of a bidirectional encoder.
JOEYNMT = System("JoeyNMT", 64, 30, 30, 512, 256, 512, 512, 1, 1, (), True, vector=512)
QUICK = FULL = {
    "test_training": (("system",), [(system,) for system in [*SYSTEMS, JOEYNMT]]),
    "test_greedy": (("system",), [(SYSTEMS[1],), (JOEYNMT,)]),
}


def test_training(system, compare):
    theirs, ours = system.models()
    values, mask = system.source()
    values.requires_grad_()
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(system.V, (system.B, system.T), generator=g)

    def library():
        out = ours.run(tokens, system.start(), ours.source(values, mask))
        ours.fc_out(out.features).square().mean().backward()
        ours.zero_grad()

    def in_plain_pytorch():
        theirs(tokens, values, mask).square().mean().backward()
        theirs.zero_grad()

    compare(
        {"library": library, "plain": in_plain_pytorch},
        kind="located", name=system.name, mode=BOTH, shape=system.shape(), steps=system.T,
    )  # fmt: skip


def test_greedy(system, compare):
    theirs, ours = (model.eval() for model in system.models())
    values, mask = (x[:1] for x in system.source())
    mask = torch.ones_like(mask)
    ours.prepare_inference()
    state = s2s.DecoderState(*(x[:, :1] for x in system.start()[:2]))
    options = {"bos": 1, "eos": 2, "max_length": system.T, "min_length": system.T}

    def library():
        with torch.inference_mode():
            source = ours.source(values, mask)
            return s2s.generate(ours, source, state, **options)

    compare(
        {"library": library, "plain": lambda: theirs.greedy(values, mask, 1, system.T)},
        kind="located", name=system.name, mode="greedy", shape=system.shape() | {"B": 1},
        steps=system.T,
    )  # fmt: skip
