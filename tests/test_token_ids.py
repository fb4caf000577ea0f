"""Token ids as the decoder's inputs: a small vocabulary is multiplied once, not at every step."""

import pytest
import torch
from decoder_problems import MODULES, cast, ops_called, problem, results, tensors
from torch import nn

import seq2seq_fast as s2s
from seq2seq_fast import use_backend


def multiplied(call):
    """Of each forward call of the op whether it was given what the first layer makes of inputs."""
    called = [
        args for op, args in ops_called("seq2seq_fast::", call) if op.name().endswith("_decoder")
    ]
    assert called
    return [args[3][0].shape[1] == 0 and args[0].shape[2] > 0 for args in called]


def drop(args):
    B, T = args["inputs"].shape
    args["feedback"] = args["feedback"]._replace(dropout=torch.ones(B, T, 4).double())
    return args


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (problem(B=3, T=5, ids=7), True),
        (problem(B=3, T=5, ids=8), False),  # as many products as steps have rows
        (problem(B=3, T=5, ids=7, attention=False), True),
        (problem(B=3, T=5, ids=7, after=True, joined="tanh"), True),
        (problem(B=3, T=5, ids=7, feedback=[2]), True),
        (drop(problem(B=3, T=5, ids=7, feedback=[2])), False),
        (problem(B=3, T=5), False),
    ],
    ids=[
        "often read", "seldom read", "no attention", "vectors", "fed back", "fed back, dropped",
        "embedded",
    ],
)  # fmt: skip
def test_an_embedding_that_is_read_often_is_multiplied_once(args, expected):
    assert multiplied(lambda: s2s.attention_decoder(**args)) == [expected]
    want, ours = results(args, backend="reference")[0], results(args)[0]
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("cell_type", MODULES)
def test_ids_are_the_rows_that_they_name(cell_type):
    args = problem(cell_type, ids=3, B=4)
    embedded = args | {"inputs": args["embedding"][args["inputs"]], "embedding": None}
    for backend in ("native", "reference"):
        for found, want in zip(
            s2s.attention_decoder(**args, backend=backend),
            s2s.attention_decoder(**embedded, backend=backend),
            strict=True,
        ):
            if want is not None:
                torch.testing.assert_close(found, want)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("cell_type", MODULES)
def test_gradcheck(cell_type, attention):
    args = problem(
        cell_type, B=3, T=3, S=3, E=2, H=3, A=2, D=2, ids=4, attention=attention, feedback=[1]
    )
    leaves = tensors(args)

    def run(*_):
        return tuple(x for x in s2s.attention_decoder(**args)[:5] if x is not None)

    assert all(multiplied(run))
    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


def test_without_gradients_and_with_int32():
    args = problem(ids=3, feedback=[2, 3])
    want = s2s.attention_decoder(**args)
    with torch.no_grad():
        found = s2s.attention_decoder(**args | {"inputs": args["inputs"].int()})
    assert torch.equal(want.tokens, found.tokens)
    assert torch.equal(want.outputs, found.outputs)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}])
def test_no_rows_and_no_steps(sizes):
    args = problem(ids=3)
    B, T = sizes.get("B", 3), sizes.get("T", 5)
    args |= {"inputs": args["inputs"][:B, :T]}
    for name in ("keys", "values", "mask"):
        args[name] = args[name][:B]
    args |= {"hidden": args["hidden"][:, :B], "cell": args["cell"][:, :B]}
    out = s2s.attention_decoder(**args)
    assert out.outputs.shape == (B, T, 7) and out.hidden.shape == (2, B, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_and_autocast(dtype):
    args = cast(problem(ids=3), torch.float32)
    want = s2s.attention_decoder(**args)
    with torch.autocast("cpu", dtype):
        found = s2s.attention_decoder(**args)
    assert found.outputs.dtype == dtype
    assert torch.equal(found.outputs, want.outputs.to(dtype))
    args = cast(args, dtype)
    ours, _ = results(args)
    theirs, _ = results(args, backend="reference")
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype
        torch.testing.assert_close(ours[name], x, rtol=0.02, atol=0.02, msg=name)


def test_the_op_given_products_passes_opcheck_and_says_what_does_not_fit():
    args = cast(problem("gru", ids=3, feedback=[2]), torch.float32)
    calls = ops_called("seq2seq_fast::", lambda: s2s.attention_decoder(**args))
    op, given = next((op, args) for op, args in calls if op.name().endswith("_decoder"))
    assert given[3][0].shape == (21, 0) and given[0].shape[2] == 21
    torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="expected inputs as wide as weights, or gates"):
        op(given[0][..., :20].contiguous(), *given[1:])


def test_in_a_compiler():
    args = cast(problem(ids=3), torch.float32)
    want, _ = results(args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: s2s.attention_decoder(**args), fullgraph=True)
    found = compiled()
    assert torch.equal(found.outputs, want["outputs"])
    (grad,) = torch.autograd.grad(found.outputs.sum(), args["embedding"])
    (expected,) = torch.autograd.grad(
        s2s.attention_decoder(**args).outputs.sum(), args["embedding"]
    )
    torch.testing.assert_close(grad, expected)


BAD = [
    ({"inputs": torch.full((3, 5), 3)}, ValueError, r"inputs: got token id 3, expected 0 to 2"),
    ({"inputs": torch.full((3, 5), -1)}, ValueError, r"inputs: got token id -1"),
    ({"inputs": torch.zeros(3, 5)}, TypeError, "inputs: got torch.float32, expected int64 or int3"),
    ({"inputs": torch.zeros(3, 5, 4).long()}, ValueError, r"inputs: got shape \(3, 5, 4\), expec"),
    ({"inputs": [1]}, TypeError, "inputs: got list, expected a Tensor"),
    ({"inputs": torch.zeros(2, 5).long()}, ValueError, r"hidden: got shape \(2, 3, 7\), expected"),
    ({"embedding": torch.zeros(3)}, ValueError, r"embedding: got shape \(3,\), expected \(V"),
    ({"embedding": torch.zeros(3, 4).long()}, TypeError, "embedding: got torch.int64, expec"),
    ({"embedding": nn.Embedding(3, 4)}, TypeError, "embedding: got Embedding, expected a floating"),
    ({"embedding": torch.zeros(3, 4)}, TypeError, "hidden: got torch.float64, expected"),
    (
        {"embedding": torch.zeros(3, 9).double()},
        ValueError,
        r"layers\[0\]\[0\]: got shape \(28, 7\), expected \(gates, inputs\) = \(28, 12\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        s2s.attention_decoder(**problem(ids=3) | changed)


def decoder_run(decoder):
    g, like = torch.Generator().manual_seed(1), decoder.fc_out.weight
    trg = torch.randint(decoder.output_dim, (4, 6), generator=g)
    state = s2s.DecoderState(like.new_zeros(1, 4, 8), like.new_zeros(1, 4, 8))
    values = torch.randn(4, 5, 8, generator=g).to(like)
    return lambda: decoder.run(trg, state, decoder.source(values), [3]).features


class Table(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("table", "dropout", "expected"),
    [
        (None, 0.0, True),
        (None, 0.5, False),
        (nn.Embedding(5, 3, padding_idx=2), 0.0, True),
        (nn.Embedding(5, 3, max_norm=1.0), 0.0, False),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), 0.0, False),
        (Table(5, 3), 0.0, False),
    ],
    ids=["plain", "dropout", "padding_idx", "max_norm", "scale_grad_by_freq", "subclass"],
)
def test_a_decoder_s_embedding_that_does_more_is_called(table, dropout, expected):
    torch.manual_seed(0)
    decoder = s2s.Decoder(5, 3, 8, 1, dropout)
    decoder.embedding = decoder.embedding if table is None else table
    run = decoder_run(decoder.double())
    assert set(multiplied(run)) == {expected}
    hook = decoder.embedding.register_forward_hook(lambda *_: None)
    assert not any(multiplied(run))
    hook.remove()
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(2)
        with use_backend(backend):
            grads = torch.autograd.grad(run().square().sum(), decoder.embedding.weight)
        found.append(grads[0])
    torch.testing.assert_close(*found)
