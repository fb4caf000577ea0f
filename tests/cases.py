"""Shapes that tests and benchmarks share: B batch, T queries, S source, H attention, D values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    T: int
    S: int
    H: int
    D: int
    scale_of: int | None = None  # the published batch size, where B was scaled down from it
    prepared: bool = False  # the library's keys come from prepare_keys, made beforehand
    recurrent: bool = False  # attention runs inside the recurrence, one query per call

    @property
    def elements(self) -> int:
        return self.B * self.T * self.S * self.H

    @property
    def plain_bytes(self) -> int:
        """The (B, T, S, H) float32 tensor that plain PyTorch makes."""
        return 4 * self.elements

    @property
    def scale(self) -> str:
        return (
            "as published" if self.scale_of in (None, self.B) else f"B {self.B} of {self.scale_of}"
        )

    def inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query (B, T, H), keys (B, S, H) of magnitude size; values (B, S, D) and v (H,)."""
        B, T, S, H, D = self.B, self.T, self.S, self.H, self.D
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        tensors = (draw(B, T, H) * size, draw(B, S, H) * size, draw(B, S, D), draw(H))
        return tuple(x.to(dtype) for x in tensors)

    def step(self) -> "Case":
        """One query at the published batch size: what a decoder asks for at each of its steps."""
        return replace(self, name=f"{self.name}, one step", B=self.scale_of or self.B, T=1)


ODD = [
    Case("one position", 1, 1, 1, 1, 1),
    Case("one source position", 3, 5, 1, 7, 2),
    Case("one hidden unit", 2, 3, 19, 1, 5),
    Case("one query", 3, 1, 17, 13, 11),
    Case("tiny", 1, 1, 3, 8, 8),
    Case("primes", 2, 5, 7, 13, 3),
    Case("above a block of 16", 2, 17, 33, 64, 31),
    Case("below a block of 16", 3, 15, 31, 63, 47),
    Case("long and thin", 1, 2, 211, 3, 1),
    Case("wide", 1, 9, 70, 257, 20),
]

# B is bounded so that the plain tensor of a row stays below 200 MB. Where a source leaves S or T
# open, they are guesses (R1, R6).
WORKLOADS = [
    Case("R1 tutorial LSTM", 64, 50, 50, 256, 256, 64, prepared=True, recurrent=True),
    Case("R2 Bahdanau et al. 2014", 16, 50, 50, 1000, 2000, 80, prepared=True, recurrent=True),
    Case("R3 GNMT v2", 16, 50, 50, 1024, 1024, 128),
    Case("R4 Britz et al. 2017", 32, 50, 50, 512, 512, 128, prepared=True, recurrent=True),
    # Its location term changes the keys at every step, so that nothing can be prepared.
    Case("R5 Tacotron 2", 4, 600, 128, 128, 512, 128, recurrent=True),
    Case("R6 SpeechBrain CRDNN", 2, 60, 400, 1024, 1024, 8, prepared=True, recurrent=True),
    Case("R7 ESPnet RNN", 2, 150, 400, 320, 320, 10, prepared=True, recurrent=True),
    Case("R8 scene-text OCR", 192, 26, 26, 256, 256, 192, prepared=True, recurrent=True),
    Case("R9 pointer network", 32, 100, 100, 128, 128, 128, prepared=True, recurrent=True),
    Case("R10 pointer-generator", 2, 100, 400, 512, 512, 16, prepared=True, recurrent=True),
    Case("G1 grapheme-to-phoneme", 256, 8, 8, 256, 256, 256, prepared=True, recurrent=True),
]
STEPS = [case.step() for case in WORKLOADS if case.recurrent]

_sentences = Case("sentences", 8, 64, 64, 256, 256)
_speech = Case("speech", 1, 60, 400, 1024, 1024)
_tiny = Case("tiny", 1, 1, 3, 8, 8)
FIGURES = [
    (_sentences, FORWARD),
    (_sentences, BOTH),
    (_speech, FORWARD),
    (_speech, BOTH),
    (Case("decoder step", 64, 1, 50, 256, 256, prepared=True), FORWARD),
    (_tiny, FORWARD),
    (replace(_tiny, name="tiny step", prepared=True), FORWARD),
    (_tiny, BOTH),
]
