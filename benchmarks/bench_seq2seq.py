"""The small tutorial model: a training step and an evaluation pass, S = T = 20, B 32, V 1000."""

import contextlib
import copy
import random

import pytest
import torch
from torch import nn

import seq2seq_fast as s2s

B, S, T, V, EMB, H, LAYERS = 32, 20, 20, 1000, 100, 256, 2
MODES = ("training step", "evaluation")
QUICK = FULL = {}


def project_at_every_step(model, src, trg, teacher_forcing_ratio):
    """The tutorial's loop, which projects the keys anew at each step."""
    values, hidden, cell = model.encoder(src)
    token = trg[:, 0]
    steps = [values.new_zeros(len(trg), V)]
    for t in range(1, trg.shape[1]):
        logits, hidden, cell = model.decoder(token, hidden, cell, values)
        steps.append(logits)
        token = trg[:, t] if random.random() < teacher_forcing_ratio else logits.argmax(-1)
    return torch.stack(steps, 1)


def using(backend):
    return s2s.use_backend(backend) if backend else contextlib.nullcontext()


def contender(model, src, trg, mode, forward, backend):
    """A call on a copy of the model; the same draws of teacher forcing in every contender."""
    model = copy.deepcopy(model).train(mode == "training step")
    optimizer = torch.optim.Adam(model.parameters())

    def evaluate():
        with torch.no_grad(), using(backend):
            forward(model, src, trg, 0.0)

    def train():
        random.seed(0)
        optimizer.zero_grad()
        with using(backend):
            logits = forward(model, src, trg, 0.5)
            loss = nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), trg[:, 1:].flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return train if mode == "training step" else evaluate


@pytest.mark.parametrize("mode", MODES)
def test_model(mode, compare):
    torch.manual_seed(0)
    encoder = s2s.Encoder(V, EMB, H, LAYERS, 0.1)
    model = s2s.Seq2Seq(encoder, s2s.Decoder(V, EMB, H, LAYERS, 0.1))
    src, trg = torch.randint(V, (B, S)), torch.randint(V, (B, T))

    def call(forward, backend):
        return contender(model, src, trg, mode, forward, backend)

    compare(
        {
            "library": call(s2s.Seq2Seq.__call__, None),
            "reference": call(s2s.Seq2Seq.__call__, "reference"),
            "reference, keys projected at every step": call(project_at_every_step, "reference"),
        },
        kind="model",
        name="tutorial model",
        mode=mode,
        shape={"B": B, "T": T, "S": S, "H": H, "V": V},
        scale="as stated",
    )
