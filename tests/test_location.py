"""Location-sensitive attention inside the decoder: parity with its reference, with the formulas of
papers written out, machinery, bad input; and in modules and decoding."""

import pytest
import torch
from decoder_problems import MODULES, ORDERS, accuracy, cast, problem, problems, results, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import seq2seq_fast as s2s

CHANNELS = [("previous",), ("cumulative",), ("previous", "cumulative"), ("cumulative",) * 2]


@st.composite
def located(draw):
    return draw(problems(attention=True)) | {
        "channels": draw(st.sampled_from(CHANNELS)),
        "S": draw(st.integers(1, 140)),
        "N": draw(st.integers(1, 37)),
        "K": 2 * draw(st.integers(0, 60)) + 1,
        "start": draw(st.booleans()),
        "detach": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None)
@given(located(), st.booleans())
def test_outputs_and_every_gradient_keep_the_accuracy_rule(drawn, recompute):
    used = accuracy(drawn, recompute=recompute)
    assume(used is not None)
    assert max(used.values()) <= 1, used


@settings(max_examples=40, deadline=None)
@given(located(), st.booleans())
def test_in_float64_it_is_the_reference(drawn, recompute):
    args = problem(**drawn)
    want, ours = results(args, backend="reference"), results(args, recompute=recompute)
    if want[1] is not None:
        assert torch.equal(want[1], ours[1])
    for name, x in want[0].items():
        torch.testing.assert_close(ours[0][name], x, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("cell_type", "after"), ORDERS)
def test_gradcheck(cell_type, after):
    args = problem(
        cell_type, B=2, T=3, S=4, E=2, H=3, A=2, D=2, after=after, channels=CHANNELS[2], N=2, K=3
    )
    leaves = tensors(args)

    def run(*_):
        out = s2s.attention_decoder(**args)
        return tuple(x for x in (*out[:5], out.location) if x is not None)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


def test_coverage_is_that_of_see_et_al():
    """e = v tanh(W_h h + W_s s + w_c c + b), c the sum of all weights before: here of queries that
    do not depend on it, a cell of one layer whose context is not read."""
    B, T, S, A, D = 3, 6, 9, 5, 4
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    keys, values, v, w_c, bias = draw(B, S, A), draw(B, S, D), draw(A), draw(A), draw(A)
    inputs = draw(B, T, A).tanh()
    eye, none = torch.eye(A, dtype=torch.float64), torch.zeros(A, dtype=torch.float64)
    out = s2s.attention_decoder(
        inputs.atanh(),  # which the tanh cell makes inputs of
        draw(1, B, A),
        None,
        [[torch.cat([eye, torch.zeros(A, D, dtype=torch.float64)], 1), 0 * eye, none, none]],
        query=(eye, bias), keys=keys, values=values, v=v, cell_type="rnn", query_after=True,
        location=s2s.Location(torch.ones(1, 1, 1, dtype=torch.float64), w_c[:, None],
                              ("cumulative",)),
    )  # fmt: skip
    covered = torch.zeros(B, S, dtype=torch.float64)
    for t in range(T):
        e = torch.tanh(keys + (inputs[:, t] + bias)[:, None] + covered[..., None] * w_c) @ v
        weights = e.softmax(1)
        torch.testing.assert_close(out.weights[:, t], weights)
        torch.testing.assert_close(out.contexts[:, t], torch.bmm(weights[:, None], values)[:, 0])
        covered = covered + weights
    torch.testing.assert_close(out.location[:, 0], covered)


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("after", [False, True])
def test_a_sequence_goes_on_where_it_was_left(after, channels):
    args = cast(problem(T=7, after=after, channels=channels), torch.float32)
    whole = s2s.attention_decoder(**args)
    inputs, state = args["inputs"], {n: args[n] for n in ("hidden", "cell")}
    for t in range(0, 7, 2):
        part = s2s.attention_decoder(**args | state | {"inputs": inputs[:, t : t + 2]})
        torch.testing.assert_close(part.weights, whole.weights[:, t : t + 2])
        state = {"hidden": part.hidden, "cell": part.cell}
        state["location"] = args["location"]._replace(state=part.location)
        if after:
            state["context"] = part.contexts[:, -1]
    torch.testing.assert_close(part.location, whole.location)


def test_a_source_alone_and_in_a_batch_and_what_a_mask_hides():
    """Bit for bit, of lengths that end inside and between the chunks that the loops take."""
    args = cast(problem(B=5, S=140, N=10, K=31, channels=CHANNELS[2]), torch.float32)
    lengths = [140, 1, 64, 100, 128]
    args["mask"] = torch.arange(140) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        whole = s2s.attention_decoder(**args)
        noise = {n: args[n].clone() for n in ("keys", "values")}
        for n in noise:
            noise[n][~args["mask"]] = 1e3
        hidden = s2s.attention_decoder(**args | noise)
        torch.testing.assert_close(hidden.contexts, whole.contexts, rtol=0, atol=0)
        for b in range(5):
            row = {n: args[n][b : b + 1] for n in ("inputs", "keys", "values", "mask")}
            row |= {n: args[n][:, b : b + 1] for n in ("hidden", "cell")}
            row["location"] = args["location"]._replace(state=args["location"].state[b : b + 1])
            alone = s2s.attention_decoder(**args | row)
            torch.testing.assert_close(alone.weights[0], whole.weights[b])
    assert (whole.weights[~args["mask"][:, None].expand_as(whole.weights)] == 0).all()


@pytest.mark.parametrize("x", [float("nan"), float("inf"), 1e4, -1e4, 1e-30])
def test_numbers_of_any_size_as_plain_pytorch_takes_them(x):
    args = cast(problem(B=3, T=5, S=70, channels=CHANNELS[0]), torch.float32)
    args["mask"] = None
    for name in ("keys", "v", "conv", "projection"):
        args = cast(args, torch.float32)
        place = args[name] if name in args else getattr(args["location"], name)
        place.data.view(-1)[3] = x
        ours, _ = results(args)
        theirs, _ = results(args, backend="reference")
        place.data.view(-1)[3] = 0.5
        if name == "conv" and x == torch.inf:  # times the zeros beyond a source's ends
            continue
        if abs(x) > 100 and name != "keys":  # whose gradients are infinite, or noise
            ours = {n: ours[n] for n in ("outputs", "weights")}
        for n, got in ours.items():
            torch.testing.assert_close(
                got, theirs[n], rtol=1e-3, atol=1e-3, equal_nan=True, msg=f"{n} of {name}"
            )


@pytest.mark.parametrize("options", [{}, {"after": True, "dropout": True, "detach": True}])
@pytest.mark.parametrize("cell_type", MODULES)
def test_opcheck(cell_type, options):
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().startswith("seq2seq_fast::location_decoder"):
                called.append((function, args))
            return function(*args, **(kwargs or {}))

    args = problem(cell_type, channels=CHANNELS[2], feedback=[2], **options)
    with Record():
        results(cast(args, torch.float32))
    names = {"seq2seq_fast::location_decoder", "seq2seq_fast::location_decoder_backward"}
    assert {f.name() for f, _ in called} == names
    for function, arguments in called:
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.unsanitized
def test_compile_fullgraph():
    args = cast(problem(dropout=True, channels=CHANNELS[2]), torch.float32)
    leaves = list(tensors(args).values())

    def run(args):
        out = s2s.attention_decoder(**args)
        return out.outputs.sin().sum() + out.contexts.sum() + out.location.square().sum()

    found = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        loss = f(args)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    args = cast(problem(after=True, channels=CHANNELS[2]), dtype)
    (found, _), (want, _) = results(args), results(cast(args, torch.float32))
    for name in ("outputs", "weights", "location"):
        torch.testing.assert_close(found[name], want[name].to(dtype), msg=name)
    with torch.autocast("cpu", dtype):
        cast_down = s2s.attention_decoder(**cast(args, torch.float32))
    torch.testing.assert_close(cast_down.weights, want["weights"].to(dtype))


def test_each_gradient_alone_is_the_one_of_all():
    args = problem(after=True, channels=CHANNELS[2])
    every, leaves = results(args)[0], tensors(args)
    for name, leaf in leaves.items():
        for x in leaves.values():
            x.requires_grad_(x is leaf)
        out = results(args)[0]
        assert [n for n in out if n.startswith("d")] == [f"d{name}"]
        torch.testing.assert_close(out[f"d{name}"], every[f"d{name}"], rtol=0, atol=0)


@pytest.mark.parametrize("B", [0, 1])
@pytest.mark.parametrize("T", [0, 1])
def test_no_step_and_no_source(T, B):
    args = problem(B=max(B, 1), T=T, channels=CHANNELS[2])
    if B == 0:
        args = {
            n: x[:, :0] if n in ("hidden", "cell") else x[:0]
            if n in ("inputs", "keys", "values", "mask") else x for n, x in args.items()
        }  # fmt: skip
        args["location"] = args["location"]._replace(state=args["location"].state[:0])
    args = cast(args, torch.float32)
    (found, _), (want, _) = results(args), results(args, backend="reference")
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, msg=name)


X = torch.zeros
PLACE = s2s.Location(X(2, 1, 3), X(5, 2))
BAD = {
    "tuple": ((X(2, 1, 3), X(5, 2)), TypeError, "location: got tuple, expected a Location"),
    "channels": (
        PLACE._replace(channels=("before",)), ValueError, r"location.channels: got \('before',\)",
    ),
    "channels str": (PLACE._replace(channels="previous"), ValueError, "location.channels: got 'p"),
    "channels none": (PLACE._replace(channels=()), ValueError, r"location.channels: got \(\)"),
    "channels number": (PLACE._replace(channels=1), ValueError, "location.channels: got 1"),
    "conv rank": (PLACE._replace(conv=X(2, 3)), ValueError, "location.conv: got shape"),
    "conv width": (PLACE._replace(conv=X(2, 1, 4)), ValueError, "location.conv: .* K odd"),
    "conv channels": (PLACE._replace(conv=X(2, 2, 3)), ValueError, "location.conv: got shape"),
    "conv none": (
        s2s.Location(X(0, 1, 3), X(5, 0)), ValueError, "location.conv: .* expected N above 0",
    ),
    "conv dtype": (PLACE._replace(conv=X(2, 1, 3).double()), TypeError, "location.conv: got torch"),
    "projection": (PLACE._replace(projection=X(2, 5)), ValueError, "location.projection: got sha"),
    "projection None": (PLACE._replace(projection=None), TypeError, "location.projection: got No"),
    "state": (PLACE._replace(state=X(2, 1, 7)), ValueError, "location.state: got shape"),
    "detach": (PLACE._replace(detach=1), TypeError, "location.detach: got 1, expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize(("location", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(location, error, message):
    args = cast(problem(B=2, T=3), torch.float32)
    with pytest.raises(error, match=message):
        s2s.attention_decoder(**args, location=location)


def test_what_has_no_place_is_refused():
    args = cast(problem(B=2, T=3, attention=False), torch.float32)
    with pytest.raises(ValueError, match="location: got a Location, expected None without keys"):
        s2s.attention_decoder(**args, location=PLACE)
    args = cast(problem(B=2, T=3, channels=CHANNELS[0]), torch.float32)
    with pytest.raises(ValueError, match="no location_decoder kernel for cpu"):
        s2s.attention_decoder(**args, backend="triton")
