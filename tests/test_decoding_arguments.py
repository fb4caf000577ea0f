"""What decoding is asked for: wrong options, sources and states are named, on every way."""

import math

import pytest
import torch
from decoding_models import BOS, EOS, KINDS, make, sources

import seq2seq_fast as s2s
from seq2seq_fast import decoding

GOOD = {"bos": BOS, "eos": EOS, "max_length": 6}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bos": 11}, ValueError, "bos: got 11, expected 0 to 10"),
        ({"bos": torch.tensor([1, 11])}, ValueError, "bos: got token id 11, expected 0 to 10"),
        (
            {"bos": torch.tensor([1.0])},
            TypeError,
            "bos: got torch.float32, expected a Tensor of",
        ),
        ({"bos": torch.tensor(1)}, ValueError, r"bos: got shape \(\), expected \(B,\) = "),
        ({"bos": torch.ones(9).long()}, ValueError, r"bos: got shape \(9,\), expected \(B,\) = "),
        ({"eos": torch.tensor(2)}, TypeError, "eos: got Tensor, expected a whole number"),
        ({"eos": -1}, ValueError, "eos: got -1, expected 0 to 10"),
        ({"eos": 2.0}, TypeError, "eos: got float, expected a whole number"),
        ({"pad_idx": 11}, ValueError, "pad_idx: got 11"),
        ({"max_length": 0}, ValueError, "max_length: got 0, expected at least 1"),
        ({"min_length": 7}, ValueError, "min_length: got 7, expected 0 to 6"),
        ({"beam_size": 12}, ValueError, "beam_size: got 12, expected 1 to 11"),
        ({"beam_size": 2, "n_best": 3}, ValueError, "n_best: got 3, expected at most beam_s"),
        ({"length_penalty": math.inf}, ValueError, "length_penalty: got inf, expected a finite"),
        ({"coverage_penalty": math.nan}, ValueError, "coverage_penalty: got nan"),
        ({"length_penalty": -1.0}, ValueError, "length_penalty: got -1.0"),
        ({"max_length_ratio": 0.0}, ValueError, "max_length_ratio: got 0.0"),
        ({"no_repeat_ngram": -1}, ValueError, "no_repeat_ngram: got -1"),
        ({"sample": True, "temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"sample": True, "top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"sample": True, "beam_size": 2}, ValueError, "beam_size: got 2, expected 1 with sample"),
        ({"top_k": 3}, ValueError, "top_k: got 3, expected it only with sample"),
        ({"n_samples": 2}, ValueError, "n_samples: got 2, expected it only with sample"),
        ({"sample": True, "n_samples": 0}, ValueError, "n_samples: got 0, expected at least 1"),
        ({"prefix": torch.ones(7, dtype=torch.int64)}, ValueError, "prefix: got 7 tokens"),
        (
            {"prefix": torch.ones(2, 2, dtype=torch.int64)},
            ValueError,
            r"prefix: got shape \(2, 2\)",
        ),
        ({"prefix": torch.tensor([11])}, ValueError, "prefix: got token id 11"),
        ({"prefix": torch.tensor([3, EOS])}, ValueError, "prefix: got eos"),
        ({"prefix": [3]}, TypeError, "prefix: got list"),
        ({"prefix": torch.tensor([3]).to_sparse()}, TypeError, "prefix: got .*sparse_coo"),
        (
            {"prefix": torch.empty(3, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "prefix: is on meta",
        ),
        ({"max_length": 2**63}, ValueError, "max_length: got 9223372036854775808, expected 1 to"),
        ({"no_repeat_ngram": 2**63}, ValueError, "no_repeat_ngram: got .*, expected 0 to"),
        ({"length_penalty": "x"}, TypeError, "length_penalty: got str, expected a number"),
        ({"length_penalty": None}, TypeError, "length_penalty: got NoneType"),
        ({"length_penalty": 10**400}, ValueError, "length_penalty: got 1329 bits"),
        ({"coverage_penalty": torch.ones(2)}, TypeError, "coverage_penalty: got Tensor"),
        ({"max_length_ratio": "x"}, TypeError, "max_length_ratio: got str"),
        ({"sample": True, "temperature": None}, TypeError, "temperature: got NoneType"),
        ({"sample": True, "top_p": "x"}, TypeError, "top_p: got str"),
        ({"top_p": torch.ones(2)}, TypeError, "top_p: got Tensor"),
        ({"sample": True, "generator": 3}, TypeError, "generator: got int"),
        ({"sample": "yes"}, TypeError, "sample: got str, expected True or False"),
        ({"return_weights": "yes"}, TypeError, "return_weights: got str"),
        ({"return_scores": 0}, TypeError, "return_scores: got int"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' .* no decode kernel"),
        ({"backend": "other"}, ValueError, "backend: got 'other'"),
        ({"beams": 3}, TypeError, "beams"),
    ],
    ids=lambda x: None if isinstance(x, type) else str(x),
)
def test_bad_options_are_refused(options, error, message):
    model, src = make(), sources(3, 5)
    nothing = model.encode(src[:0])
    model.encoder.forward = None  # nothing is computed before
    with pytest.raises(error, match=message):
        model.generate(src, **GOOD | options)
    with pytest.raises(error, match=message):
        s2s.generate(model.decoder, *nothing, **GOOD | options)


def test_more_draws_than_rows_can_be_counted_are_refused():
    model, src = make(), sources(3, 5)
    model.encoder.forward = None
    with pytest.raises(ValueError, match="n_samples: got 1000000000, expected at most 715827882"):
        model.generate(src, sample=True, n_samples=10**9, **GOOD)


def test_bad_targets_are_refused_before_anything_is_computed():
    model, src = make(), sources(3, 5)
    model.encoder.forward = None
    trg = torch.full((4, 6), 3)
    for call in (model, model.loss, model.score):
        with pytest.raises(ValueError, match=r"trg: got shape \(4, 6\), expected .* B = 3 as src"):
            call(src, trg)
        with pytest.raises(ValueError, match=r"trg: got shape \(3, 0\), .* T above 0"):
            call(src, trg[:3, :0])
    with pytest.raises(ValueError, match="eos: got 11"):
        model.score(src, trg[:3], eos=11)


def test_options_that_are_not_known_or_not_given_are_named():
    model, src = make(), sources(3, 5)
    for options in ({}, {"prefix": torch.tensor([3])}):
        with pytest.raises(TypeError, match="beams: got an option that is not known"):
            model.generate(src, **GOOD, **options, beams=3)
        with pytest.raises(TypeError, match="eos: got nothing, expected a whole number"):
            model.generate(src, bos=BOS, max_length=3, **options)


def test_equal_options_of_other_types_are_refused_all_the_same():
    """Options that were found good once are not checked again; True == 1.0 == 1."""
    model, src = make(), sources(3, 5)
    options = GOOD | {"max_length": 1}
    for _ in range(2):
        assert model.generate(src, **options).tokens.shape == (3, 1)
        for other in (True, 1.0):
            with pytest.raises(TypeError, match=f"max_length: got {type(other).__name__}"):
                model.generate(src, **options | {"max_length": other})
    with pytest.raises(ValueError, match="eos: got 10"):  # of another vocabulary
        model.generate(src, **options | {"eos": 10})
        make(V=7).generate(src, **options | {"eos": 10})
    with pytest.raises(TypeError, match="vocabulary: got an option that is not known"):
        model.generate(src, **options, vocabulary=11)


def test_whole_numbers_may_be_numpys():
    numpy = pytest.importorskip("numpy")
    model, options = make(), GOOD | {"beam_size": 2, "n_best": 2}
    ours = model.generate(sources(2, 4), **options)
    theirs = model.generate(sources(2, 4), **{k: numpy.int32(x) for k, x in options.items()})
    assert torch.equal(ours.tokens, theirs.tokens)
    with pytest.raises(ValueError, match="bos: got 11, expected 0 to 10"):
        model.generate(sources(2, 4), **options | {"bos": numpy.int64(11)})


def test_a_length_beyond_all_numbers_is_the_greatest():
    model, src = make(), sources(3, 5)
    options = GOOD | {"min_length": 6}
    for ratio in (1e19, 1e300):
        for backend in (None, "reference"):
            found = model.generate(src, max_length_ratio=ratio, backend=backend, **options)
            assert found.lengths.tolist() == [6, 6, 6]
    most = decoding.DecodingOptions(BOS, EOS, 2**63 - 1, max_length_ratio=1e300)
    assert most.limits(torch.tensor([3])) >= 2**62


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]])
def test_another_default_device_changes_nothing(kind):
    src, options = sources(3, 5), GOOD | ({"max_length_ratio": 1.5} if kind[1] else {})
    want = make(kind).generate(src, **options)
    model = make(kind)
    with torch.device("meta"):
        for backend in (None, "reference"):
            for prepared in (False, True):
                if prepared:
                    model.prepare_inference()
                found = model.generate(src, backend=backend, **options)
                assert torch.equal(found.tokens, want.tokens)
                assert model.generate(src, **options | {"beam_size": 2}).tokens.is_cpu


WIDE = s2s.Decoder(11, 2, 1, 1, 0.0, encoder_dim=140_000)
STATE = s2s.DecoderState(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
CALLS = {
    "decoder": (lambda: ask(make()), TypeError, "decoder: got Seq2Seq, expected a Decoder"),
    "no decoder": (lambda: ask(None), TypeError, "decoder: got NoneType"),
    "state": (lambda: ask(state=tuple(STATE)), TypeError, "state: got tuple, expected a Decoder"),
    "no state": (lambda: ask(state=None), TypeError, "state: got NoneType"),
    "no hidden": (
        lambda: ask(state=STATE._replace(hidden=None)),
        TypeError,
        "hidden: got NoneType, expected a Tensor",
    ),
    "hidden rank": (
        lambda: ask(state=STATE._replace(hidden=torch.zeros(4))),
        ValueError,
        r"hidden: got shape \(4,\), expected \(n_layers, B, H\)",
    ),
    "keys' type": (lambda: ask(keys=lambda k: k.keys), TypeError, "encoder_outputs.keys: got Ten"),
    "no keys": (
        lambda: ask(keys=lambda k: k._replace(keys=None)),
        TypeError,
        "encoder_outputs.keys: got NoneType",
    ),
    "keys' dtype": (
        lambda: ask(keys=lambda k: k._replace(keys=k.keys.long())),
        TypeError,
        "encoder_outputs.keys: got torch.int64",
    ),
    "keys' device": (
        lambda: ask(keys=lambda k: k._replace(keys=k.keys.to("meta"))),
        ValueError,
        "encoder_outputs.keys: is on meta",
    ),
    "powers": (
        lambda: ask(keys=lambda k: k._replace(powers=torch.zeros(3, 4))),
        ValueError,
        r"keys.powers: got torch.float32 of shape \(3, 4\)",
    ),
    "no v": (lambda: ask(v=None), TypeError, "encoder_outputs.v: got NoneType"),
    "v's dtype": (
        lambda: ask(v=torch.zeros(4).double()),
        TypeError,
        "encoder_outputs.v: got torch.float64",
    ),
    "int8 too wide": (
        lambda: decoding.prepare_inference(WIDE, "int8"),
        ValueError,
        "dtype: got 'int8' of weights for 14000[0-9] inputs, expected at most 131072",
    ),
    "dtype": (lambda: make().prepare_inference(["a"]), ValueError, r"dtype: got \['a'\]"),
    "project_values": (
        lambda: make().prepare_inference(project_values="x"),
        TypeError,
        "project_values: got str",
    ),
}
CALLS |= {
    f"eos {eos!r}": (lambda eos=eos: ask(eos=eos), error, message)
    for eos, error, message in [
        (11, ValueError, "eos: got 11, expected 0 to 10"),
        (-5, ValueError, "eos: got -5"),
        (2.5, TypeError, "eos: got float"),
        (True, TypeError, "eos: got bool"),
        ("a", TypeError, "eos: got str"),
        (torch.tensor(2), TypeError, "eos: got Tensor"),
    ]
}


def ask(decoder=0, state=STATE, keys=None, eos=None, **changes):
    """Calls `generate`, or `score` where an eos is given, on a source with changes."""
    small = make(H=4, layers=1).decoder
    decoder = small if decoder == 0 else decoder
    source = small.source(torch.zeros(3, 5, 4))
    source = source._replace(**changes, keys=keys(source.keys) if keys else source.keys)
    if eos is None:
        return s2s.generate(decoder, source, state, **GOOD)
    return s2s.score(decoder, source, state, torch.ones(3, 4, dtype=torch.int64), eos=eos)


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_calls_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_bad_input_is_refused():
    model, src = make(), sources(3, 5)
    bare = make(KINDS[5])
    refused = {"return_weights": True}, {"coverage_penalty": 0.1}, {"max_length_ratio": 0.5}
    for option in refused:
        with pytest.raises(ValueError, match=f"{next(iter(option))}: .*without attention"):
            bare.generate(src, **GOOD, **option)
    source, state = model.encode(src)
    with pytest.raises(ValueError, match="hidden: got shape"):
        s2s.generate(model.decoder, source, state._replace(hidden=state.hidden[:, :2]), **GOOD)
    with pytest.raises(TypeError, match="cell: got NoneType"):
        s2s.generate(model.decoder, source, state._replace(cell=None), **GOOD)
    of_others = [
        s2s.Decoder(11, 6, 13, 2, 0.0, **widths).source(torch.zeros(3, 5, D))
        for D, widths in ((40, {"encoder_dim": 40}), (13, {"attention_dim": 40}))
    ]
    for prepared in (False, True):  # which reads weights without another check
        twin = make().prepare_inference() if prepared else make()
        for other in of_others:
            with pytest.raises(ValueError, match="encoder_outputs: got "):
                s2s.generate(twin.decoder, other, state, **GOOD)
            with pytest.raises(ValueError, match="encoder_outputs: got "), torch.no_grad():
                twin.decoder(torch.zeros(3, dtype=torch.int64), *state[:2], other)
    with pytest.raises(ValueError, match="trg: got shape"):
        model.score(src, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="trg: got torch.float32"):
        model.score(src, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="trg: is on meta, expected cpu"):
        model.score(src, torch.zeros(3, 4, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="trg: got token id 11"):
        model.score(src, torch.full((3, 4), 11))
    with pytest.raises(ValueError, match="dtype: got 'int4'"):
        model.prepare_inference("int4")
    with pytest.raises(ValueError, match="decoder: is torch.float64"):
        make().double().prepare_inference()
    with pytest.raises(ValueError, match="project_values: got True, .* without attention"):
        make(KINDS[5]).prepare_inference(project_values=True)
    assert model.decoder.packed is None


WRONG = {
    "hidden of float64": lambda s, t: (s, t._replace(hidden=t.hidden.double())),
    "hidden of int64": lambda s, t: (s, t._replace(hidden=t.hidden.long())),
    "hidden of 4 dimensions": lambda s, t: (s, t._replace(hidden=t.hidden.unsqueeze(3))),
    "hidden of 2 dimensions": lambda s, t: (s, t._replace(hidden=t.hidden[0])),
    "hidden, sparse": lambda s, t: (s, t._replace(hidden=t.hidden.to_sparse())),
    "hidden on meta": lambda s, t: (s, t._replace(hidden=t.hidden.to("meta"))),
    "hidden of other layers": lambda s, t: (s, t._replace(hidden=t.hidden[:1])),
    "hidden, wider": lambda s, t: (s, t._replace(hidden=torch.zeros(2, 3, 14))),
    "cell of other rows": lambda s, t: (s, t._replace(cell=t.cell.transpose(0, 1).contiguous())),
    "cell, none": lambda s, t: (s, t._replace(cell=None)),
    "context": lambda s, t: (s, t._replace(context=torch.zeros(3, 13))),
    "another state": lambda s, t: (s, tuple(t)),
    "another source": lambda s, t: (tuple(s), t),
    "values of other rows": lambda s, t: (s._replace(values=s.values[:2]), t),
    "values, fewer": lambda s, t: (s._replace(values=s.values[:, :4]), t),
    "values, wider": lambda s, t: (s._replace(values=torch.zeros(3, 5, 14)), t),
    "values of bfloat16": lambda s, t: (s._replace(values=s.values.bfloat16()), t),
    "v, longer": lambda s, t: (s._replace(v=torch.zeros(14)), t),
    "v of 2 dimensions": lambda s, t: (s._replace(v=s.v[None]), t),
    "keys of bfloat16": lambda s, t: (
        s._replace(keys=s.keys._replace(keys=s.keys.keys.bfloat16())),
        t,
    ),
    "powers of others": lambda s, t: (
        s._replace(keys=s.keys._replace(powers=s.keys.powers[:, :-16])),
        t,
    ),
    "mask of bytes": lambda s, t: (s._replace(mask=torch.ones(3, 5, dtype=torch.uint8)), t),
    "mask of other places": lambda s, t: (s._replace(mask=torch.ones(3, 4).bool()), t),
    "mask of 3 dimensions": lambda s, t: (s._replace(mask=torch.ones(3, 5, 1).bool()), t),
}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", WRONG)
def test_prepared_weights_ask_the_same_questions(name, dtype):
    """Those that are asked by the engine itself too: the errors are alike."""
    errors = []
    for prepare in (False, True):
        model = make()
        if prepare:
            model.prepare_inference(dtype)
        source, state = WRONG[name](*model.encode(sources(3, 5)))
        for options in (GOOD, GOOD | {"sample": True}):  # on the short way, and the long one
            with pytest.raises((TypeError, ValueError)) as raised:
                s2s.generate(model.decoder, source, state, **options)
            errors.append((raised.type, str(raised.value)))
    assert len(set(errors)) == 1


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"return_scores": False}])
def test_prepared_weights_take_the_short_way(monkeypatch, options):
    """Without the questions that the engine asks, to the same result."""
    model = make().prepare_inference()
    source, state = model.encode(sources(3, 5))

    def generate():
        return s2s.generate(model.decoder, source, state, **GOOD, **options)

    short = generate()
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "_rows", None)  # the long way's first question
        generate()
    monkeypatch.setattr(decoding, "_at_once", lambda *_: None)
    for name, x in generate()._asdict().items():
        assert x is None if getattr(short, name) is None else torch.equal(x, getattr(short, name))


def test_prepared_weights_draw_what_others_do():
    """No random number is lost on the way."""
    model, src = make(), sources(3, 5)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(model.generate(src, sample=True, **GOOD).tokens)
        model.prepare_inference()
    assert torch.equal(*found)
