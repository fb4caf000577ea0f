"""Arguments of the attention decoder, and what comes of them: for its tests on any device."""

import statistics

import torch
from torch import nn

import seq2seq_fast as s2s

MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ORDERS = [(c, after) for c in MODULES for after in (False, True)]


def problem(
    cell_type="lstm", L=2, B=3, T=5, S=6, E=4, H=7, A=5, D=3, attention=True, after=False,
    dropout=False, feedback=(), strided=False, seed=0, V=9, channels=(), N=3, K=3, start=True,
    detach=False, states_dropped=False, joined="", O=6, vectors_dropped=False,  # noqa: E741
    contexts_dropped=False, features_dropped=False, batch_sizes=None, ids=0,
):  # fmt: skip
    """Arguments of attention_decoder in float64, {name: value}, gradients asked of them. ids: what
    token ids are below, if inputs are some."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        step = 2 if strided else 1
        x = torch.randn(*shape[:-1], step * shape[-1], generator=g, dtype=torch.float64) * size
        return x[..., ::step].requires_grad_()

    torch.manual_seed(seed)
    fed, features = (O, O) if joined else (D, H + D)
    weights = MODULES[cell_type](E + fed, H, L, dtype=torch.float64).all_weights
    args = {
        "inputs": draw(B, T, E),
        "hidden": draw(L, B, H),
        "cell": draw(L, B, H) if cell_type == "lstm" else None,
        "layers": [[w.detach().requires_grad_() for w in layer] for layer in weights],
        "cell_type": cell_type,
        "query_after": after,
        "batch_sizes": batch_sizes,
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
    if channels:
        C = len(channels)
        conv, projection = draw(N, C, K, size=(C * K) ** -0.5), draw(A, N)
        state = draw(B, C, S) if start else None
        args["location"] = s2s.Location(conv, projection, channels, state, detach)
    if (after and start) or not attention:
        args["context"] = draw(B, fed)
    if joined:
        kept = (torch.rand(B, T, O, generator=g) < 0.7).double() / 0.7
        weights = draw(O, H + D, size=(H + D) ** -0.5), draw(O)
        read = (torch.rand(B, T, H + D, generator=g) < 0.7).double() / 0.7
        args["vector"] = s2s.AttentionalVector(
            *weights, joined, kept if vectors_dropped else 0.0, read if features_dropped else 0.0
        )
    if dropout:
        args["dropout"] = (torch.rand(L - 1, B, T, H, generator=g) < 0.7).double() / 0.7
    if states_dropped:
        args["state_dropout"] = (torch.rand(L, B, T, H, generator=g) < 0.7).double() / 0.7
    if contexts_dropped:
        args["context_dropout"] = (torch.rand(B, T, fed, generator=g) < 0.7).double() / 0.7
    if feedback:
        factors = torch.rand(B, T, E, generator=g).double() if dropout and not ids else None
        args["feedback"] = s2s.Feedback(feedback, draw(V, E), draw(V, features), draw(V), factors)
    if ids:
        args["inputs"] = torch.randint(ids, (B, T), generator=g)
        args["embedding"] = draw(ids, E)
    return args


def tensors(args):
    """Every tensor of a problem that has a gradient, {name: tensor}."""
    named = {k: x for k, x in args.items() if isinstance(x, torch.Tensor)}
    named |= {f"query[{i}]": x for i, x in enumerate(args.get("query", ()))}
    for i, layer in enumerate(args["layers"]):
        named |= {f"layers[{i}][{j}]": x for j, x in enumerate(layer)}
    if "location" in args:
        conv, projection, _, state, _ = args["location"]
        named |= {"conv": conv, "projection": projection}
        named |= {} if state is None else {"location": state}
    if "vector" in args:
        named |= {"vector.weight": args["vector"].weight, "vector.bias": args["vector"].bias}
    if "feedback" in args:
        named["feedback.embedding"] = args["feedback"].embedding
    return {k: x for k, x in named.items() if x.requires_grad}


def cast(x, dtype):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        grad = x.requires_grad
        return x.detach().to(dtype).requires_grad_(grad)
    if isinstance(x, (s2s.Feedback, s2s.Location, s2s.AttentionalVector)):
        return type(x)(*(cast(y, dtype) for y in x))
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


def ops_called(prefix, call):
    """[(op, arguments)] of those whose names begin so, detached, as `call` calls them."""
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().startswith(prefix):
                called.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        call()
    detach = torch.Tensor.detach
    map_only = torch.utils._pytree.tree_map_only
    return [(function, map_only(torch.Tensor, detach, args)) for function, args in called]


def check_in_float64(drawn, **options):
    """There outputs and every gradient are the reference's."""
    args = problem(**drawn)
    want, ours = results(args, backend="reference"), results(args, **options)
    if want[1] is not None:
        assert torch.equal(want[1], ours[1])
    for name, x in want[0].items():
        torch.testing.assert_close(ours[0][name], x, rtol=1e-9, atol=1e-9, msg=name)


def accuracy(drawn, **options):
    """{name: what of the accuracy rule's room is used} by outputs and gradients of the problem that
    was drawn. Errors are against float64, ours at most twice plain PyTorch's in float32 plus
    rounding: the median of five draws, as gradients of attention nearly cancel and one draw's are
    luck. None of a tie that rounding decides, which is another problem."""
    used: dict[str, list[float]] = {}
    for seed in range(5):
        args = problem(**drawn | {"seed": drawn["seed"] + seed})
        args32 = cast(args, torch.float32)
        exact, tokens = results(args, backend="reference")
        ours, our_tokens = results(args32, **options)
        theirs, their_tokens = results(args32, backend="reference")
        if tokens is not None:
            if not (torch.equal(tokens, our_tokens) and torch.equal(tokens, their_tokens)):
                return None
        assert ours.keys() == theirs.keys() == exact.keys()
        eps, T = torch.finfo(torch.float32).eps, args["inputs"].shape[1]
        for name, want in exact.items():
            if want.numel() == 0:
                continue
            error, allowed = ((x[name] - want).abs().max().item() for x in (ours, theirs))
            # Terms are of size 1, and may cancel; a sum over steps is rounded at each of them.
            rounding = 4 * eps * T * max(want.abs().max().item(), 1)
            used.setdefault(name, []).append(error / (2 * allowed + rounding))
    return {name: statistics.median(ratios) for name, ratios in used.items()}
