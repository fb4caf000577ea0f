"""Arguments of the attention decoder, and what comes of them: for its tests on any device."""

import torch
from torch import nn

import seq2seq_fast as s2s

MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ORDERS = [(c, after) for c in MODULES for after in (False, True)]


def problem(
    cell_type="lstm", L=2, B=3, T=5, S=6, E=4, H=7, A=5, D=3, attention=True, after=False,
    dropout=False, feedback=(), strided=False, seed=0, V=9,
):  # fmt: skip
    """Arguments of attention_decoder in float64, {name: value}, gradients asked of them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        step = 2 if strided else 1
        x = torch.randn(*shape[:-1], step * shape[-1], generator=g, dtype=torch.float64) * size
        return x[..., ::step].requires_grad_()

    torch.manual_seed(seed)
    weights = MODULES[cell_type](E + D, H, L, dtype=torch.float64).all_weights
    args = {
        "inputs": draw(B, T, E),
        "hidden": draw(L, B, H),
        "cell": draw(L, B, H) if cell_type == "lstm" else None,
        "layers": [[w.detach().requires_grad_() for w in layer] for layer in weights],
        "cell_type": cell_type,
        "query_after": after,
    }
    if attention:
        args |= {
            "query": (draw(A, H, size=H**-0.5), draw(A)),
            "keys": draw(B, S, A),
            "values": draw(B, S, D),
        }
        mask = torch.rand(B, S, generator=g) < 0.7
        mask[0] = False  # a source that is masked everywhere
        args |= {"v": draw(A), "mask": mask}
    if after or not attention:
        args["context"] = draw(B, D)
    if dropout:
        args["dropout"] = (torch.rand(L - 1, B, T, H, generator=g) < 0.7).double() / 0.7
    if feedback:
        factors = torch.rand(B, T, E, generator=g).double() if dropout else None
        args["feedback"] = s2s.Feedback(feedback, draw(V, E), draw(V, H + D), draw(V), factors)
    return args


def tensors(args):
    """Every tensor of a problem that has a gradient, {name: tensor}."""
    named = {k: x for k, x in args.items() if isinstance(x, torch.Tensor)}
    named |= {f"query[{i}]": x for i, x in enumerate(args.get("query", ()))}
    for i, layer in enumerate(args["layers"]):
        named |= {f"layers[{i}][{j}]": x for j, x in enumerate(layer)}
    if "feedback" in args:
        named["embedding"] = args["feedback"].embedding
    return {k: x for k, x in named.items() if x.requires_grad}


def cast(x, dtype):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        grad = x.requires_grad
        return x.detach().to(dtype).requires_grad_(grad)
    if isinstance(x, s2s.Feedback):
        return s2s.Feedback(*(cast(y, dtype) for y in x))
    if isinstance(x, (list, tuple)):
        return type(x)(cast(y, dtype) for y in x)
    return {k: cast(y, dtype) for k, y in x.items()} if isinstance(x, dict) else x


def results(args, **options):
    """{name: tensor}: outputs, and every gradient of a sum of all of them."""
    out = s2s.attention_decoder(**args, **options)._asdict()
    tokens = out.pop("tokens")
    out.pop("logits")
    out = {name: x for name, x in out.items() if x is not None}
    g = torch.Generator().manual_seed(7)
    loss = 0
    for x in out.values():
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum()
    leaves = tensors(args)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = {f"d{n}": zeros[n] if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return {n: x.detach() for n, x in (out | found).items()}, tokens
