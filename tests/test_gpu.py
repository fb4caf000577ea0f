"""What only a GPU shows: CUDA graphs, streams of several GPUs, memory, sizes beyond 32 bits."""

import copy
import threading

import decoder_problems
import decoding_models
import pytest
import torch
from cuda_graphs import capture

import seq2seq_fast as s2s
from seq2seq_fast import decoding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(params=["steps", "together"])
def loop(request, gpu, monkeypatch):
    """How the steps of the compiled kernels follow each other."""
    if gpu.backend != "native" and request.param == "together":
        pytest.skip("of the compiled kernels")
    monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", request.param)
    return request.param


@pytest.fixture
def gpu(on):
    if on.device != "cuda":
        pytest.skip("runs with --on cuda:BACKEND")
    return on


def inputs(B=2, T=5, S=19, H=12, D=6, device="cuda", grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, H), (B, S, H), (B, S, D), (H,)]
    return [torch.randn(s, generator=g).to(device).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("T", [1, 5])
def test_a_captured_call_replays_on_new_numbers(T, gpu):
    x = inputs(T=T)
    mask = torch.rand(2, 19, device="cuda") < 0.7

    def call():
        leaves = [y.detach().requires_grad_() for y in x]
        context, weights = s2s.additive_attention(*leaves, mask=mask, backend=gpu.backend)
        return context, weights, *torch.autograd.grad(context, leaves, torch.ones_like(context))

    graph, captured = capture(call)
    for size in (0.5, 30.0):  # the modes are chosen anew
        for y in x:
            y.copy_(torch.randn_like(y) * size)
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode, gpu):
    def attend(q, k, values, v):
        context, weights = s2s.additive_attention(q.tanh(), k, values, v, backend=gpu.backend)
        one, _ = s2s.additive_attention(q[:, 0], k, values, v, backend=gpu.backend)
        scores = s2s.additive_scores(q, k, v, backend=gpu.backend)
        return context.sum() + (weights * scores).sum() + one.sin().sum()

    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for _ in range(3):  # the third replays a graph
        x, results = inputs(grad=True), []
        for f in (attend, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            loss = f(*x)
            results.append([y.clone() for y in (loss.detach(), *torch.autograd.grad(loss, x))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 64])
def test_the_same_bits_every_time(T, gpu):
    x = inputs(B=7, T=T, S=300, H=256, D=64, grad=True)
    first, again = (
        torch.autograd.grad(s2s.additive_attention(*x, backend=gpu.backend)[0].sum(), x)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_tensor_of_size_btsh_is_ever_made(gpu):
    if gpu.backend == "reference":
        pytest.skip("the plain form makes one")
    B, T, S, H = 4, 256, 256, 256
    x = inputs(B, T, S, H, H, grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = s2s.additive_attention(*x, backend=gpu.backend)
    torch.autograd.grad(out, x, [y.detach() for y in out])
    assert torch.cuda.max_memory_allocated() - before < 4 * B * T * S * H / 5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_another_gpu_than_the_current_one(gpu):
    x = inputs(device="cuda:1", grad=True)
    out = s2s.additive_attention(*x, backend=gpu.backend)
    want = s2s.additive_attention(*x, backend="reference")
    for a, b in zip(out, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.autograd.grad(out[0].sum(), x)


@pytest.mark.parametrize("T", [1, 2])
def test_offsets_beyond_32_bits(T, gpu):
    """Keys and values whose rows lie far apart in one large tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("takes 5 GB, beside all else")
    large = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    k = large.as_strided((2, 3, 64), (2**31, 64, 1))
    q, _, values, v = (x.bfloat16() for x in inputs(2, T, 3, 64, 5))
    k.copy_(torch.randn(2, 3, 64))
    got = s2s.additive_attention(q, k, values, v, backend=gpu.backend)
    want = s2s.additive_attention(q, k.contiguous(), values, v, backend=gpu.backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tensors_of_several_devices_are_refused(gpu):
    q, k, values, v = inputs()
    for i, name in enumerate(("keys", "values", "v", "mask")):
        x = [q, k, values, v, torch.ones(2, 19, dtype=torch.bool, device="cuda")]
        x[i + 1] = x[i + 1].cpu()
        with pytest.raises(ValueError, match=f"{name}: is on cpu, expected cuda"):
            s2s.additive_attention(*x[:4], mask=x[4], backend=gpu.backend)


DECODERS = {
    "gru, query after": dict(cell_type="gru", after=True),
    "rnn, one layer": dict(cell_type="rnn", L=1),
    "no attention": dict(attention=False),
    "a long source": dict(B=1, S=400, A=150, D=70, H=130),
    "wide": dict(B=5, S=50, A=256, D=256, H=256),
}


def decoder_arguments(T=5, **options):
    """On the CPU, and the same on the GPU."""
    args = decoder_problems.problem(**dict(T=T, dropout=True, feedback=[2]) | options)
    args = decoder_problems.cast(args, torch.float32)
    return args, torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.detach().cuda().requires_grad_(x.requires_grad), args
    )


class TestDecoder:
    @pytest.fixture(autouse=True)
    def kernels(self, gpu, loop):
        if gpu.backend == "reference":
            pytest.skip("of kernels")

    @pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
    def test_of_every_kind_it_is_the_reference(self, options, gpu):
        args, on_gpu = decoder_arguments(**options)
        want, _ = decoder_problems.results(args, backend="reference")
        found, _ = decoder_problems.results(on_gpu, backend=gpu.backend)
        for name, x in want.items():
            torch.testing.assert_close(found[name].cpu(), x, rtol=1e-4, atol=1e-4, msg=name)

    def test_it_is_the_reference(self, gpu):
        args, on_gpu = decoder_arguments()
        want, tokens = decoder_problems.results(args, backend="reference")
        found, same = decoder_problems.results(on_gpu, backend=gpu.backend)
        assert torch.equal(tokens, same.cpu())
        for name, x in want.items():
            torch.testing.assert_close(found[name].cpu(), x, rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("joined", ["", "tanh"])
    def test_with_location_and_vectors_it_is_the_reference(self, joined, after, gpu):
        """And a captured training step replays on new numbers."""
        if gpu.backend != "native":
            pytest.skip("of the compiled kernels")
        if joined and not after:
            pytest.skip("vectors are made of the context after the step")
        sizes = dict(B=5, S=150, A=200, D=70, H=130, N=32, K=31, after=after)
        sizes |= dict(joined=joined, O=90, vectors_dropped=True, features_dropped=True)
        args, on_gpu = decoder_arguments(channels=("previous", "cumulative"), **sizes)
        want, tokens = decoder_problems.results(args, backend="reference")
        found, same = decoder_problems.results(on_gpu, backend=gpu.backend)
        assert torch.equal(tokens, same.cpu())
        for name, x in want.items():
            scale = max(1.0, x.abs().max().item())
            assert (found[name].cpu() - x).abs().max().item() < 1e-3 * scale, name
        leaves = list(decoder_problems.tensors(on_gpu).values())

        def call():
            out = s2s.attention_decoder(**on_gpu, backend=gpu.backend)
            return out.location, *torch.autograd.grad(out.outputs.square().sum(), leaves)

        graph, captured = capture(call)
        with torch.no_grad():
            on_gpu["inputs"].copy_(torch.randn_like(on_gpu["inputs"]))
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_captured_run_replays_on_new_numbers(self, gpu):
        _, on_gpu = decoder_arguments()
        del on_gpu["feedback"]

        def call():
            with torch.no_grad():
                return s2s.attention_decoder(**on_gpu, backend=gpu.backend)[:5]

        graph, captured = capture(call)
        with torch.no_grad():
            on_gpu["inputs"].copy_(torch.randn_like(on_gpu["inputs"]))
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)

    def test_a_captured_training_step_is_fed_its_own_tokens(self, gpu):
        _, on_gpu = decoder_arguments()
        leaves = list(decoder_problems.tensors(on_gpu).values())

        def call():
            out = s2s.attention_decoder(**on_gpu, backend=gpu.backend)
            return out.tokens, *torch.autograd.grad(out.outputs.square().sum(), leaves)

        graph, captured = capture(call)
        with torch.no_grad():
            on_gpu["inputs"].copy_(torch.randn_like(on_gpu["inputs"]))
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            torch.testing.assert_close(a, b)  # an embedding's gradient is summed in any order

    @pytest.mark.parametrize("B", [1, 64, 150])
    def test_many_steps_of_many_rows(self, B, gpu):
        """Blocks that did not see each other's numbers in time would be far off."""
        args, on_gpu = decoder_arguments(T=60, B=B, S=50, A=128, D=128, H=192, feedback=[])
        want, _ = decoder_problems.results(args, backend="reference")
        for _ in range(3):
            found, _ = decoder_problems.results(on_gpu, backend=gpu.backend)
            for name, x in want.items():
                scale = max(1.0, x.abs().max().item())
                error = (found[name].cpu() - x).abs().max().item() / scale
                assert error < 1e-3, name

    def test_launches_of_a_step(self, gpu, loop):
        """Six of two layers: query, attention, and for each layer a product and its cell. A product
        may be split, which adds one. Together there are none."""
        counts = []
        for T in (10, 20):
            _, on_gpu = decoder_arguments(T)
            del on_gpu["feedback"]
            with torch.no_grad():
                s2s.attention_decoder(**on_gpu, backend=gpu.backend)
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                ) as profile:
                    s2s.attention_decoder(**on_gpu, backend=gpu.backend)
                    torch.cuda.synchronize()
            counts.append(sum(x.count for x in profile.key_averages() if x.device_time_total > 0))
        a_step = (counts[1] - counts[0]) / 10
        assert a_step == 0 if loop == "together" else 6 <= a_step <= 9


@pytest.mark.skipif(not s2s.library.HAS_KERNEL["decode_steps", "cuda"], reason="no such kernel")
class TestDecoding:
    """The model and its tokens on the CPU are what a GPU is held to."""

    OPTIONS = {"bos": decoding_models.BOS, "eos": decoding_models.EOS}

    @pytest.fixture(autouse=True)
    def native(self, gpu, monkeypatch):
        if gpu.backend != "native":
            pytest.skip("of the compiled kernels")
        # What cuDNN makes of the source otherwise is off by more than ties.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def found(self, model, src, **options):
        on_cpu = copy.deepcopy(model).cpu().generate(src, **self.OPTIONS, **options)
        on_gpu = model.generate(src.cuda(), backend="native", **self.OPTIONS, **options)
        cpu = [None if x is None else x.cpu() for x in on_gpu]
        return type(on_gpu)(*cpu), on_cpu

    @pytest.mark.parametrize("kind", decoding_models.KINDS, ids=str)
    @pytest.mark.parametrize("beam_size", [1, 4])
    def test_replays_decode_as_the_cpu_does(self, kind, beam_size, monkeypatch):
        monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", "steps")
        model = decoding_models.make(kind, V=600, H=40).cuda().prepare_inference()
        options = {"max_length": 20, "beam_size": beam_size, "length_penalty": 0.7}
        if kind[1]:
            options |= {"coverage_penalty": 0.2, "return_weights": True}
        for seed in range(5):  # launched, captured, replayed
            src = decoding_models.sources(7, 9, seed)
            on_gpu, on_cpu = self.found(model, src, **options)
            decoding_models.check_same(copy.deepcopy(model).cpu(), src, on_gpu, on_cpu)
        (loop,) = model.decoder.loops.kept.values()
        assert loop.graph is not None

    @pytest.mark.parametrize("O", [None, 24])
    @pytest.mark.parametrize("location", [(), *decoding_models.LOCATIONS], ids=str)
    @pytest.mark.parametrize("beam_size", [1, 4])
    def test_locations_and_attentional_vectors(self, O, location, beam_size):  # noqa: E741
        kind = decoding_models.KINDS[1]
        model = decoding_models.make(kind, V=600, H=40, location=location, O=O).cuda()
        for seed in range(3):
            src = decoding_models.sources(7, 300, seed)
            found = self.found(
                model, src, max_length=20, beam_size=beam_size, return_weights=True
            )  # fmt: skip
            decoding_models.check_same(copy.deepcopy(model).cpu(), src, *found)

    @pytest.mark.parametrize("kind", decoding_models.KINDS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_launch_decodes_as_the_cpu_does(self, kind, dtype, monkeypatch):
        """In 16 bits, as the model of the same weights in float32."""
        monkeypatch.setenv("SEQ2SEQ_FAST_GPU_LOOP", "together")
        model = decoding_models.make(kind, V=600, H=40)
        model.decoder.to(dtype).float()
        on_gpu, together = copy.deepcopy(model).cuda(), decoding.together
        options = {"max_length": 20, "length_penalty": 0.7, "return_weights": kind[1]}
        for seed, B in enumerate((1, 7, 70, 150)):
            src = decoding_models.sources(B, 9, seed)
            want = model.generate(src, **self.OPTIONS, **options)
            source, state = on_gpu.encode(src.cuda())
            half = copy.deepcopy(on_gpu.decoder).to(dtype)
            asked = decoding.DecodingOptions(**self.OPTIONS, **options)
            half.loops = decoding.graphed.Loops()
            with torch.no_grad():
                found = together.generate(half, half.loops, source, state, asked)
            cpu = [None if x is None else x.cpu() for x in found]
            decoding_models.check_same(model, src, type(found)(*cpu), want)

    @pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.8}, {"n_samples": 3}], ids=str)
    def test_draws_are_those_of_plain_pytorch(self, cut):
        """But for ties within rounding."""
        model = decoding_models.make(V=600, H=40).cuda()
        src = decoding_models.sources(70, 9).cuda()
        for seed in range(4):  # launched, captured, replayed
            ours, plain = (
                model.generate(
                    src, sample=True, max_length=20, backend=backend, **cut, **self.OPTIONS,
                    generator=torch.Generator("cuda").manual_seed(seed),
                )
                for backend in ("native", "reference")
            )  # fmt: skip
            alike = (ours.tokens[..., :2] == plain.tokens[..., :2]).float().mean()
            assert alike > 0.97
        (loop,) = model.decoder.loops.kept.values()
        assert loop.graph is not None

    def test_many_rows_and_words(self, loop):
        model = decoding_models.make(V=10_000, H=256).cuda()
        src = decoding_models.sources(64, 50)
        for beam_size in (1, 5):
            for _ in range(3):
                on_gpu, on_cpu = self.found(model, src, max_length=30, beam_size=beam_size)
                torch.testing.assert_close(on_gpu.scores, on_cpu.scores, rtol=1e-4, atol=1e-3)

    def test_threads_with_streams_of_their_own(self, loop):
        model, src = decoding_models.make().cuda(), decoding_models.sources(5, 9).cuda()
        options = self.OPTIONS | {"max_length": 20, "beam_size": 1 if loop == "together" else 3}
        want, found = model.generate(src, **options), []

        def decode():
            with torch.cuda.stream(torch.cuda.Stream()):
                found.extend(model.generate(src, **options) for _ in range(20))

        threads = [threading.Thread(target=decode) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 80
        for result in found:
            assert torch.equal(result.tokens, want.tokens)
            torch.testing.assert_close(result.scores, want.scores)

    def test_inference_mode(self):
        model, src = decoding_models.make().cuda(), decoding_models.sources(5, 9).cuda()
        options = self.OPTIONS | {"max_length": 9}
        want = model.generate(src, **options)
        for _ in range(3):
            with torch.inference_mode():
                inside = model.generate(src, **options)
            assert torch.equal(inside.tokens, want.tokens)
            assert torch.equal(model.generate(src, **options).tokens, want.tokens)

    def test_dtypes_of_the_weights(self):
        model = decoding_models.make().cuda()
        with pytest.raises(ValueError, match="dtype: got 'int8', expected 'float32' on cuda"):
            model.prepare_inference("int8")
