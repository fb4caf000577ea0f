"""Rows that leave the decoder behind their last target, and an encoder behind their last token."""

import itertools
import random

import pytest
import torch
import torch.utils.checkpoint
from decoder_problems import MODULES, cast, ops_called, problem, results
from torch import nn
from torch.nn import functional as F

import seq2seq_fast as s2s
from seq2seq_fast import use_backend
from seq2seq_fast.nn.lengths import batch_sizes, leaving
from seq2seq_fast.ops.kernels import products
from seq2seq_fast.training import train

PAD = 0
LENGTHS = [3, 7, 1, 5, 0, 7, 2]  # of targets, behind the first token


def model(cell_type="lstm", attention=True, after=False, dropout=0.0, **options):
    torch.manual_seed(0)
    encoder = s2s.Encoder(11, 6, 24, 2, dropout, cell_type=cell_type)
    of_decoder = {"cell_type": cell_type, "attention": attention, "query_after": after} | options
    return s2s.Seq2Seq(encoder, s2s.Decoder(13, 6, 24, 2, dropout, **of_decoder), pad_idx=PAD)


def batch():
    g = torch.Generator().manual_seed(3)
    src = torch.randint(1, 11, (len(LENGTHS), 6), generator=g)
    trg = torch.randint(1, 13, (len(LENGTHS), 1 + max(LENGTHS)), generator=g)
    for b, n in enumerate(LENGTHS):
        trg[b, n + 1 :] = PAD
    trg[1, 3] = PAD  # within a target it is one that is ignored, and read all the same
    return src, trg


def sizes_of(call):
    """What the decoder's op is told, once for each time that it is called forward."""
    called = ops_called("seq2seq_fast::attention_decoder", call)
    forward = [args for op, args in called if op.name().endswith("::attention_decoder")]
    return [args[14] if len(args) > 14 else [] for args in forward]  # a default is left out


ALL = [(c, a, after) for c in MODULES for a, after in ((True, False), (True, True), (False, False))]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("cell_type", "attention", "after"), ALL)
def test_the_loss_and_its_gradients_are_those_of_all_logits(cell_type, attention, after, ratio):
    m, (src, trg) = model(cell_type, attention, after).double(), batch()
    found = []
    for fused in (True, False):
        random.seed(1)
        if fused:
            loss = m.loss(src, trg, ratio, ignore_index=PAD)
        else:
            logits = m(src, trg, ratio)[:, 1:].flatten(0, 1)
            loss = F.cross_entropy(logits, trg[:, 1:].flatten(), ignore_index=PAD)
        grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
        found.append([loss, *(g if g is not None else torch.zeros(()) for g in grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.expand_as(a))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_targets_to_be_ignored_may_be_no_ids(ratio, backend):
    """PyTorch's -100, which is fed as token 0."""
    m, (src, trg) = model().double(), batch()
    found = []
    for ignored in (PAD, -100, 10**6):
        random.seed(1)
        targets = trg.masked_fill(trg == PAD, ignored)
        with use_backend(backend):
            loss = m.loss(src, targets, ratio, ignore_index=ignored)
        found.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
        assert (targets == ignored).any()  # which nobody has changed
    for first, *others in zip(*found, strict=True):
        for x in others:
            torch.testing.assert_close(x, first)
    with pytest.raises(ValueError, match="trg: got token id -100, expected 0 to 12"):
        m.loss(src, trg.masked_fill(trg == PAD, -100), ratio, ignore_index=PAD)


def test_rows_leave_behind_their_last_target():
    m, (src, trg) = model(), batch()
    want = [sum(n > t for n in LENGTHS) for t in range(max(LENGTHS))]
    assert want == [6, 5, 4, 3, 3, 2, 2]
    _, of_decoder = sizes_of(lambda: m.loss(src, trg, 1.0, ignore_index=PAD).backward())
    assert of_decoder == want
    order, sizes = leaving(trg[:, 1:], PAD)
    assert order.tolist() == [1, 5, 3, 0, 6, 2, 4] and sizes == want
    assert leaving(torch.ones(3, 4), PAD) is None and leaving(torch.ones(3, 0), PAD) is None
    assert leaving(torch.ones(0, 3), PAD) is None
    assert batch_sizes(torch.tensor([2, 2, 0]), 3) == [2, 2, 0]


def test_nobody_leaves_where_somebody_would_see_it():
    """The order of rows, or that some are missing: in forward, hooks, parts of other classes."""

    class Other(s2s.Encoder):
        pass

    m, (src, trg) = model(), batch()

    def told(m, **options):
        return sizes_of(lambda: m.loss(src, trg, 1.0, ignore_index=PAD, **options))[-1]

    assert told(m)
    assert not sizes_of(lambda: m(src, trg, 1.0))[-1]
    assert not sizes_of(lambda: m.loss(src, trg, 1.0))[-1]  # which counts padding
    seen = []
    hook = m.encoder.embedding.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert not told(m) and torch.equal(seen[0], src)
    hook.remove()
    encoder, m.encoder = m.encoder, Other(11, 6, 24, 2, 0.0)
    assert not told(m)
    m.encoder = encoder

    class Table(nn.Embedding):
        pass

    table, m.decoder.embedding = m.decoder.embedding, Table(13, 6)
    assert not told(m)
    m.decoder.embedding = table
    encode = m.encode
    m.encode = lambda src: encode(src)
    assert not told(m)
    del m.encode
    steps = m.decoder.steps
    m.decoder.steps = lambda *args: steps(*args)
    assert not told(m)
    del m.decoder.steps
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert not told(m)
    hook.remove()
    assert told(m)
    with use_backend("reference"):
        assert m.loss(src, trg, 1.0, ignore_index=PAD).isfinite()


@pytest.mark.parametrize(
    "options",
    [{"location": ("cumulative", "previous")}, {"after": True, "attentional_dim": 5}],
    ids=str,
)
def test_rows_leave_decoders_of_all_kinds(options):
    m, (src, trg) = model(**options).double(), batch()
    found = []

    def fused():
        loss = m.loss(src, trg, 1.0, ignore_index=PAD)
        found.append([loss, *torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)])

    called = ops_called("seq2seq_fast::extended_decoder", fused)
    assert [args[-1] for _, args in called] == [[6, 5, 4, 3, 3, 2, 2]] * 2
    with use_backend("reference"):
        fused()
    for a, b in zip(*found, strict=True):
        assert (a is None or not a.any()) if b is None else True
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_trace_of_an_encoder_takes_other_lengths(bidirectional):
    encoder = s2s.Encoder(11, 6, 8, 1, 0.0, bidirectional=bidirectional)
    src = torch.randint(11, (4, 5))
    traced = torch.jit.trace(encoder.requires_grad_(False), (src, torch.tensor([1, 5, 2, 3])))
    lengths = torch.tensor([5, 1, 4, 4])
    for got, want in zip(traced(src, lengths), encoder(src, lengths), strict=True):
        torch.testing.assert_close(got, want)


def test_checkpointing_reads_what_is_kept_once():
    m, (src, trg) = model(), batch()

    def loss():
        return m.loss(src, trg, 1.0, ignore_index=PAD)

    grads = []
    for call in (loss, lambda: torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)):
        m.zero_grad()
        call().backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("H", [1, 8])
def test_what_lies_behind_a_rows_end_is_not_looked_at(H, dtype):
    args = problem(H=H, attention=False, batch_sizes=[3, 3, 2, 1, 0])
    for b, n in enumerate((4, 3, 2)):
        args["inputs"].data[b, n:] = torch.nan
    found, _ = results(cast(args, dtype))
    assert all(x.isfinite().all() for name, x in found.items())


def test_training_with_dropout_learns_and_is_reproducible():
    src, trg = batch()
    losses = []
    for _ in range(2):
        m = model(dropout=0.1)
        optimizer = torch.optim.Adam(m.parameters(), 1e-2)
        random.seed(0)
        torch.manual_seed(0)
        data = [type("Batch", (), {"src": src, "trg": trg})] * 30
        criterion = nn.CrossEntropyLoss(ignore_index=PAD)
        losses.append([train(m, data, optimizer, criterion, 1.0) for _ in range(3)])
    assert losses[0] == losses[1] and losses[0][2] < 0.6 * losses[0][0]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("cell_type", MODULES)
def test_each_row_is_itself_alone_up_to_its_end(cell_type, after):
    sizes = [3, 3, 2, 1, 0]
    args = problem(cell_type, after=after, batch_sizes=sizes)
    out = s2s.attention_decoder(**args)
    for b in range(3):
        n = sum(size > b for size in sizes)
        row = {k: args[k] for k in ("layers", "query", "v", "cell_type", "query_after")}
        row |= {k: args[k][b : b + 1] for k in ("keys", "values", "mask")}
        row |= {k: args[k][b : b + 1] for k in ("context",) if k in args}
        row["inputs"] = args["inputs"][b : b + 1, :n]
        for k in ("hidden", "cell"):
            row[k] = None if args[k] is None else args[k][:, b : b + 1]
        alone = s2s.attention_decoder(**row)
        for name in ("outputs", "contexts", "weights"):
            x = getattr(out, name)[b]
            torch.testing.assert_close(x[:n], getattr(alone, name)[0])
            assert name == "outputs" or not x[n:].any()
        for name in ("hidden", "cell") if cell_type == "lstm" else ("hidden",):
            torch.testing.assert_close(getattr(out, name)[:, b], getattr(alone, name)[:, 0])


@pytest.mark.parametrize("name", ["outputs", "contexts", "weights"])
def test_what_comes_behind_takes_no_gradient(name):
    args = cast(problem(batch_sizes=[3, 2, 2, 1, 0], after=True), torch.float32)
    for backend in ("native", "reference"):
        x = getattr(s2s.attention_decoder(**args, backend=backend), name)
        behind = torch.tensor([[t >= n for t in range(5)] for n in (4, 3, 1)])
        (grad,) = torch.autograd.grad(x[behind].sum(), [args["inputs"]], allow_unused=True)
        assert grad is None or not grad.any()


def test_no_row_and_all_rows_at_all_steps():
    for sizes, same in (([0] * 5, None), ([3] * 5, {})):
        args = problem(batch_sizes=sizes)
        found, _ = results(args)
        if same is not None:
            want, _ = results(args | {"batch_sizes": None})
            assert all(torch.equal(found[name], x) for name, x in want.items())
        else:
            assert torch.equal(found["hidden"], args["hidden"])
            names = "contexts", "weights", "dinputs", "dkeys"
            assert not any(found[name].any() for name in names)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_sizes": 3}, TypeError, "batch_sizes: got 3, expected a sequence of whole"),
        ({"batch_sizes": [3.0] * 5}, TypeError, r"batch_sizes: got \[3.0"),
        ({"batch_sizes": [3, 2]}, ValueError, r"batch_sizes: got \[3, 2\], expected T = 5 numbers"),
        ({"batch_sizes": [3, 2, 3, 2, 1]}, ValueError, "from B = 3 down to 0 that never grow"),
        ({"batch_sizes": [4, 3, 3, 2, 1]}, ValueError, r"batch_sizes: got \[4"),
        ({"batch_sizes": [3, 2, 1, 0, -1]}, ValueError, r"batch_sizes: got \[3, 2, 1, 0, -1\]"),
    ],
    ids=str,
)
def test_bad_batch_sizes_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        s2s.attention_decoder(**problem() | changes)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", MODULES)
def test_an_encoder_reads_each_row_to_its_end_alone(cell_type, bidirectional):
    torch.manual_seed(0)
    encoder = s2s.Encoder(11, 6, 24, 2, 0.0, cell_type=cell_type, bidirectional=bidirectional)
    src, lengths = torch.randint(11, (5, 6)), torch.tensor([2, 6, 0, 4, 6])
    told = sizes_of(lambda: encoder(src, lengths))
    assert len(told) == (4 if bidirectional else 1)
    assert all(sizes == [4, 4, 3, 3, 2, 2] for sizes in told)
    assert not any(sizes_of(lambda: encoder(src, torch.full((5,), 6))))


def test_products_leave_out_what_are_zeros():
    sizes, B = [7, 7, 5, 2, 0], 7
    kept = list(itertools.chain(*(range(t * B, t * B + n) for t, n in enumerate(sizes))))
    a, b = torch.zeros(35, 40), [torch.randn(35, n) for n in (3, 64, 70)]
    a[kept] = torch.randn(len(kept), 40)
    found = products(a.T, b, sums=True, batch_sizes=sizes)
    want = products(a[kept].T, [x[kept] for x in b], sums=True)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)
    b[0][[14 + 5, 28 + 3]] = torch.nan  # behind an end
    for x in (a.T, a.T.contiguous()):
        for of, dtype in itertools.product(([b[0]], b), (torch.float32, torch.float64)):
            found = products(x.to(dtype), [y.to(dtype) for y in of], True, sizes)
            for y, z in zip(found, [*want[: len(of)], want[-1]], strict=True):
                torch.testing.assert_close(y.float(), z)
    for wrong in ([36, 0], [-1], [5] * 6):
        with pytest.raises(RuntimeError, match="expected batch_sizes of"):
            products(a.T, b, batch_sizes=wrong)
    nothing = products(torch.zeros(40, 14).T.contiguous().T, [torch.randn(14, 3)], True, [0, 0])
    assert not any(x.any() for x in nothing)
