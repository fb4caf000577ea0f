"""Location-sensitive attention inside the decoder: parity with its reference, with the formulas of
papers written out, machinery, bad input; and in modules and decoding."""

import functools

import pytest
import torch
import torch.utils.checkpoint
from decoder_draws import problems
from decoder_problems import (
    MODULES,
    ORDERS,
    accuracy,
    cast,
    check_in_float64,
    ops_called,
    problem,
    results,
    tensors,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import seq2seq_fast as s2s

X = torch.zeros
CHANNELS = [("previous",), ("cumulative",), ("previous", "cumulative"), ("cumulative",) * 2]


@st.composite
def located(draw):
    return draw(problems(attention=True, vectors=True, ragged=True, ids=True)) | {
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
    check_in_float64(drawn, recompute=recompute)


def test_checkpointing_reads_what_is_kept_once():
    draw = functools.partial(torch.randn, requires_grad=True)
    args = draw(3, 4), draw(3, 5, 4), draw(3, 5, 6), draw(4)
    place = s2s.Location(draw(3, 1, 3), draw(4, 3), ("previous",), draw(3, 1, 5))

    def run():
        return s2s.location_attention(*args, place)[0].sin().sum()

    (want,) = torch.autograd.grad(run(), args[:1])
    again = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, args[:1])[0], want)


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


def test_a_large_v_chooses_as_plain_pytorch_does():
    """Of features whose tanh is 1, a vector of them apart."""
    torch.manual_seed(0)
    q, k, values, v = X(1, 32) + 20, torch.randn(1, 9, 32), torch.randn(1, 9, 3), torch.randn(32)
    q[0, 0] = 0.1
    place = s2s.Location(torch.randn(2, 1, 3), torch.randn(32, 2))
    for size in (1e20, 1e24, 1e30):
        found = s2s.location_attention(q, k, values, v * size, place)
        want = s2s.location_attention(q, k, values, v * size, place, backend="reference")
        assert torch.equal(found[1], want[1])


@pytest.mark.parametrize("place", [22, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_that_a_mask_hides_leave_no_gradient_whatever_they_are(dtype, place):
    args = cast(problem(S=40, channels=CHANNELS[2]), dtype)
    args["mask"] = (torch.arange(40) < 21).expand(3, 40)
    clean, _ = results(args)
    args["keys"].data[1, place, 2] = torch.nan
    found, _ = results(args)
    for name, x in clean.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("options", [{}, {"after": True, "dropout": True, "detach": True}])
@pytest.mark.parametrize("cell_type", MODULES)
def test_opcheck(cell_type, options):
    args = problem(cell_type, channels=CHANNELS[2], feedback=[2], **options)
    called = ops_called(
        "seq2seq_fast::extended_decoder", lambda: results(cast(args, torch.float32))
    )
    names = {"seq2seq_fast::extended_decoder", "seq2seq_fast::extended_decoder_backward"}
    assert {f.name() for f, _ in called} == names
    for function, arguments in called:
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
def test_a_sum_over_many_steps_does_not_stand_still_in_16_bits(dtype):
    """1 / 512 is lost beside 1 in bfloat16: of 800 steps about 1.6 must have come to each place."""
    args = [x.to(dtype) for x in (X(1, 8), X(1, 512, 8), X(1, 512, 3), X(8))]
    conv, projection, state = X(1, 1, 1).to(dtype), X(8, 1).to(dtype), None
    sums = []
    for step in (args, [args[0], *(x.float() for x in args[1:])]):
        for _ in range(800):
            place = s2s.Location(conv.to(step[1]), projection.to(step[1]), ("cumulative",), state)
            with torch.autocast("cpu", dtype, enabled=step is not args):
                _, _, state = s2s.location_attention(*step, place)
        sums.append(state)
        state = None
    for total in sums:
        torch.testing.assert_close(total, torch.full((1, 1, 512), 800 / 512))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    args = cast(problem(after=True, channels=CHANNELS[2]), dtype)
    (found, _), (want, _) = results(args), results(cast(args, torch.float32))
    for name in ("outputs", "weights"):
        torch.testing.assert_close(found[name], want[name].to(dtype), msg=name)
    torch.testing.assert_close(found["location"], want["location"])
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


def step_problem(B=3, S=70, A=5, D=4, C=2, N=3, K=5, seed=0, dtype=torch.float64):
    """Arguments of location_attention, gradients asked of them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    place = s2s.Location(draw(N, C, K), draw(A, N), CHANNELS[C], draw(B, C, S))
    args = [draw(B, A), draw(B, S, A), draw(B, S, D), draw(A), place]
    return args, torch.rand(B, S, generator=g) < 0.7


def step_results(args, mask, **options):
    """Outputs, and every gradient of a sum of all of them."""
    leaves = [*args[:4], *args[4][:2], args[4].state]
    found = s2s.location_attention(*args, mask=mask, scale=1.5, **options)
    g = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in found)
    return [*found, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_alone(C, masked, detach):
    """Against the formula in float64; in float32 by the accuracy rule; and the same without a
    gradient, on prepared keys, and by way of tensors (B, S, A)."""
    args, mask = step_problem(C=C)
    args[4] = args[4]._replace(detach=detach)
    mask[0] = False
    mask = mask if masked else None
    query, keys, values, v, place = args
    features = F.conv1d(place.state, place.conv, padding=2).transpose(1, 2)
    scores = torch.tanh(query[:, None] + keys + features @ place.projection.T) @ (1.5 * v)
    if masked:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(1).nan_to_num()
    kept = weights.detach() if detach else weights
    want = [torch.bmm(weights[:, None], values)[:, 0], weights]
    want.append(torch.stack([kept if n == "previous" else place.state[:, i] + kept
                             for i, n in enumerate(place.channels)], 1))  # fmt: skip
    found, plain = step_results(args, mask), step_results(args, mask, backend="reference")
    for got, again, exact in zip(found, plain, want + plain[3:], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, again, rtol=1e-10, atol=1e-10)
    args32 = cast(args, torch.float32)
    ours, theirs = step_results(args32, mask), step_results(args32, mask, backend="reference")
    for got, allowed, exact in zip(ours, theirs, found, strict=True):
        error, room = ((x - exact).abs().max().item() for x in (got, allowed))
        assert error <= 4 * room + 1e-6 * max(1, exact.abs().max().item())
    with torch.no_grad():
        prepared = [args32[0], s2s.prepare_keys(args32[1]), *args32[2:]]
        alone = s2s.location_attention(*prepared, mask=mask, scale=1.5)
    assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=False))


def test_a_step_s_machinery():
    """gradcheck, opcheck, torch.compile, other dtypes, autocast, no double backward."""
    args, mask = step_problem(B=2, S=4)
    leaves = [*args[:4], *args[4][:2], args[4].state]
    assert torch.autograd.gradcheck(
        lambda *_: s2s.location_attention(*args, mask=mask), leaves, fast_mode=True
    )
    (grad,) = torch.autograd.grad(
        s2s.location_attention(*args)[0].square().sum(), args[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()
    args = cast(args, torch.float32)
    want = s2s.location_attention(*args, mask=mask)
    compiled = torch.compile(s2s.location_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args, mask=mask), want, strict=True):
        torch.testing.assert_close(a, b)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = cast(args, dtype)
        halves = s2s.location_attention(*rounded, mask=mask)
        want = s2s.location_attention(*cast(rounded, torch.float32), mask=mask)
        with torch.autocast("cpu", dtype):
            mixed = s2s.location_attention(rounded[0], *cast(rounded[1:], torch.float32), mask=mask)
        for a, b, c in zip(halves[:2], want, mixed, strict=False):
            assert a.dtype == c.dtype == dtype
            assert torch.equal(a, b.to(dtype)) and torch.equal(c, a)
        assert torch.equal(halves[2], want[2]) and torch.equal(mixed[2], want[2])
        assert halves[2].dtype == torch.float32
    detached = [x.detach() for x in cast(args[:4], torch.float32)]
    place = [x.detach() for x in (*args[4][:2], args[4].state)]
    ops = torch.ops.seq2seq_fast
    utilities = {"test_utils": ("test_schema", "test_faketensor")}
    forward = (*detached, mask, place, [0, 1])
    torch.library.opcheck(ops.location_attention, forward, **utilities)
    context, weights, after = ops.location_attention(*forward)
    backward = (context, weights, after, *detached, weights, place, [0, 1], False)
    torch.library.opcheck(ops.location_attention_backward, backward, **utilities)


PLACE = s2s.Location(X(2, 1, 3), X(5, 2))
BAD = {
    "channels tensor": (
        s2s.Location(X(2, 1, 3), X(5, 2), X(2, 1, 6)), ValueError, "channels: got Tensor, expected",
    ),
    "tuple": ((X(2, 1, 3), X(5, 2)), TypeError, "location: got tuple, expected a Location"),
    "channels": (
        PLACE._replace(channels=("before",)), ValueError, r"location.channels: got \('before',\)",
    ),
    "channels str": (PLACE._replace(channels="previous"), ValueError, "location.channels: got 'p"),
    "channels none": (PLACE._replace(channels=()), ValueError, r"location.channels: got \(\)"),
    "channels number": (PLACE._replace(channels=1), ValueError, "location.channels: got int"),
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
    with pytest.raises(error, match=message):
        s2s.location_attention(X(2, 5), args["keys"], args["values"], args["v"], location)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": X(2, 1, 5)}, ValueError, r"query: got shape \(2, 1, 5\), expected \(B, A\)"),
        ({"query": None}, TypeError, "query: got NoneType"),
        ({"keys": X(2, 6, 4)}, ValueError, "keys: got shape"),
        ({"values": X(2, 6, 4).double()}, TypeError, "values: got torch.float64"),
        ({"mask": X(2, 6)}, TypeError, "mask: got torch.float32"),
        ({"scale": "x"}, TypeError, "scale: got str"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
    ids=str,
)
def test_a_step_s_other_arguments(changes, error, message):
    args = {"query": X(2, 5), "keys": X(2, 6, 5), "values": X(2, 6, 3), "v": X(5)}
    with pytest.raises(error, match=message):
        s2s.location_attention(**args | {"location": PLACE} | changes)


def test_ops_refuse_what_is_of_another_dtype():
    args, mask = step_problem(dtype=torch.float32)
    tensors = [x.detach() for x in args[:4]]
    place = [x.detach() for x in (*args[4][:2], args[4].state)]
    op = torch.ops.seq2seq_fast.location_attention
    op(*tensors, mask, place, [0, 1])
    for i in range(3):
        with pytest.raises(RuntimeError, match="expected tensors of one dtype"):
            op(*tensors, mask, [x.double() if i == j else x for j, x in enumerate(place)], [0, 1])


def test_what_has_no_place_is_refused():
    args = cast(problem(B=2, T=3, attention=False), torch.float32)
    for context in (args["context"], None):
        with pytest.raises(ValueError, match="location: got a Location, expected None without k"):
            s2s.attention_decoder(**args | {"context": context}, location=PLACE)
    args = cast(problem(B=2, T=3, channels=CHANNELS[0]), torch.float32)
    with pytest.raises(ValueError, match="no extended_decoder kernel for cpu"):
        s2s.attention_decoder(**args, backend="triton")
