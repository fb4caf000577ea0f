"""Models that decode, and how two results of it are compared: for its tests on any device."""

import copy

import torch

import seq2seq_fast as s2s

BOS, EOS, V_SRC = 1, 2, 13
KINDS = [  # cell_type, attention, query_after
    ("lstm", True, False),
    ("lstm", True, True),
    ("gru", True, False),
    ("gru", True, True),
    ("rnn", True, False),
    ("lstm", False, False),
    ("gru", False, False),
]
PROJECT = [kind for kind in KINDS if kind[1]]  # those that may project values


LOCATIONS = [("previous",), ("previous", "cumulative")]


def make(
    kind=KINDS[0], V=11, H=13, layers=2, seed=0, pad_idx=0, size=4.0, location=(), O=None,  # noqa: E741
    activation="tanh",
):  # fmt: skip
    """A model whose next tokens are neither certain nor all alike. O: of attentional vectors."""
    cell_type, attention, query_after = kind
    torch.manual_seed(seed)
    encoder = s2s.Encoder(V_SRC, 5, H, layers, 0.0, cell_type=cell_type)
    decoder = s2s.Decoder(
        V, 6, H, layers, 0.0, cell_type=cell_type, attention=attention, query_after=query_after,
        location=location, location_filters=3, location_kernel_size=5, attentional_dim=O,
        attentional_activation=activation,
    )  # fmt: skip
    model = s2s.Seq2Seq(encoder, decoder, pad_idx).eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.startswith(("fc_out", "embedding", "attention")):
                p.mul_(size)
    return model


def suited(options, kind):
    """options, of a decoder without attention those that make sense there."""
    of_attention = ("return_weights", "coverage_penalty", "max_length_ratio")
    return {k: x for k, x in options.items() if kind[1] or k not in of_attention}


def sources(B, S, seed=0):
    """Rows of different lengths, filled up with padding."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(1, V_SRC, (B, S), generator=g)
    lengths = torch.randint(1, S + 1, (B, 1), generator=g)
    lengths[0] = S
    return src.masked_fill(torch.arange(S) >= lengths, 0)


@torch.no_grad()
def rescored(model, src, found):
    """log P of each hypothesis, in float64, by the model's own forward pass."""
    exact = copy.deepcopy(model).double()
    tokens, lengths = found.tokens, found.lengths
    if tokens.dim() == 3:
        src = src.repeat_interleave(tokens.shape[1], 0)
        tokens, lengths = tokens.flatten(0, 1), lengths.flatten()
    trg = torch.cat([torch.full_like(tokens[:, :1], BOS), tokens], 1)
    log_p = exact.score(src, trg).token_log_probs
    log_p = log_p.masked_fill(torch.arange(log_p.shape[1]) >= lengths[:, None], 0)
    return log_p.sum(1).view(found.lengths.shape)


def check_same(model, src, ours, plain):
    """Equal, but for ties within rounding: hypotheses that differ must have equal scores."""
    there = plain.lengths > 0
    assert torch.equal(ours.lengths > 0, there)
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)
    exact = rescored(model, src, ours).float()
    torch.testing.assert_close(ours.log_probs[there], exact[there], rtol=1e-5, atol=5e-5)
    if ours.tokens.shape == plain.tokens.shape and torch.equal(ours.tokens, plain.tokens):
        assert torch.equal(ours.lengths, plain.lengths)
        assert torch.equal(ours.finished, plain.finished)
        if plain.weights is None:
            assert ours.weights is None
        else:
            torch.testing.assert_close(ours.weights, plain.weights, rtol=1e-4, atol=1e-5)
