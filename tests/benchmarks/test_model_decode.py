"""Prompts, decode steps and `generate` of a whole model: everyone computes the same, at a cost."""

from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from benchmarks import capacity, inputs, model_decode, model_step, timing
from benchmarks.guard import disagreement
from benchmarks.ops import OPS
from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear.cache import LatentLayerCache
from kimi_linear.info import parameter_counts
from kimi_linear.moe import KimiLinearTopkRouter

CPU = torch.device("cpu")
TOY = {"L": 4, "D": 32, "H": 2, "K": 16, "E": 12, "F": 16, "R": 16, "vocab": 64}
TOY = {"B": 2, "T": 70, "S": 37, "N": 3} | TOY
OP = {op.mode: op for op in OPS if op.name == "model"}
DECODE = OP["decode_step"]
MODES = pytest.mark.parametrize("mode", ["prefill", "decode_step", "generate"])
needs_no_fla = pytest.mark.skipif(
    find_spec("fla") is not None, reason="with fla, native needs a GPU"
)


def drawn(mode, dtype=torch.float32, **sizes):
    shape = {letter: size for letter, size in TOY.items() if letter in OP[mode].shapes[0]}
    return OP[mode].inputs(shape | sizes, dtype, CPU)


def build(mode, name, x):
    return OP[mode].providers[name].build(x)


@pytest.fixture
def caches(monkeypatch):
    """Every cache that a provider fills."""
    made = []
    for name in ("our_cache", "native_cache"):
        fill = getattr(model_decode, name)
        monkeypatch.setattr(
            model_decode,
            name,
            lambda *args, fill=fill, **options: made.append(fill(*args, **options)) or made[-1],
        )
    return made


# ---- everyone computes the same ----------------------------------------------------------------


@needs_no_fla
@MODES
def test_native_computes_the_same(mode):
    x = drawn(mode)
    ours, native = build(mode, "ours", x)(), build(mode, "native", x)()
    assert len(ours) == (TOY["N"] if mode == "generate" else 1)
    assert all(t.shape == (2, 64) if mode == "generate" else (2, 1, 64) for t in ours)
    assert all(t.std() > 0.01 and not t.requires_grad for t in ours)
    assert disagreement(native, ours) < 1e-4


@pytest.mark.parametrize(
    "mode, name",
    [(m, "ours") for m in ("prefill", "decode_step", "generate")]
    + [("prefill", "all_mla"), ("decode_step", "all_mla"), ("decode_step", "fp8")],
)
def test_reference_computes_the_same(mode, name):
    """On a CPU ours is the reference; in bf16 it is what `check` compares."""
    provider, small = OP[mode].providers[name], OP[mode].check
    assert small is not None
    small = {letter: size for letter, size in small.items() if letter in "ESN"}
    rounded = drawn(mode, torch.bfloat16, **small)
    exact = {n: t.float() if t.is_floating_point() else t for n, t in rounded.items()}
    expected = provider.expected or OP[mode].providers["reference"].build
    assert disagreement(provider.build(rounded)(), expected(exact)()) < 0.05


def test_prefill_is_the_last_position_of_a_forward():
    x = drawn("prefill")
    model = model_step.on_weights(model_step.our_config(x), x).eval()
    with torch.no_grad():
        logits = model(x["ids"], use_cache=False).logits
    call = build("prefill", "ours", x)
    for _ in range(2):  # each into a fresh cache
        assert disagreement(call(), (logits[:, -1:],)) < 1e-5


def test_prefill_of_every_layer_mla():
    """The same prompt through other mixers, at their cost."""
    x = drawn("prefill")
    ours, all_mla = (build("prefill", name, x)() for name in ("ours", "all_mla"))
    assert all_mla[0].shape == ours[0].shape and disagreement(all_mla, ours) > 0.01
    longest = max(OP["prefill"].shapes, key=lambda s: s["T"])
    for cost in ("flops", "bytes"):
        own = getattr(OP["prefill"].providers["all_mla"], cost)
        assert own(longest) > getattr(OP["prefill"], cost)(longest)


@needs_no_fla
def test_decode_steps_follow_each_other(caches):
    x = drawn("decode_step")
    ours, native = build("decode_step", "ours", x), build("decode_step", "native", x)
    first, *others = [ours() for _ in range(3)]
    assert disagreement(others[0], first) > 1e-3, "the context does not matter"
    for logits in (first, *others):
        assert disagreement(native(), logits) < 1e-4
    assert [cache.get_seq_length() for cache in caches] == 2 * [TOY["S"] + 3]


@needs_no_fla
def test_generate_goes_on_from_the_prompt():
    """N tokens, each of them the likeliest after those before."""
    x = drawn("generate")
    model = model_step.on_weights(model_step.our_config(x), x).eval()
    logits, ids = build("generate", "ours", x)(), x["ids"]
    for found in logits:
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[:, -1]
        assert disagreement((found,), (expected,)) < 1e-4
        ids = torch.cat((ids, found.argmax(-1, keepdim=True)), 1)


# ---- the context -------------------------------------------------------------------------------


def prefilled(all_mla=False, native=False):
    """A model and its cache after a prompt of 37 tokens; what it leaves behind, copied; a token."""
    x = drawn("generate")
    config = model_step.our_config(x)
    if all_mla:
        model = model_step.model_of(config.all_mla(), CPU).eval()
    else:
        model = model_step.on_weights(config, x).eval()
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        token = model(x["ids"], past_key_values=cache).logits[:, -1:].argmax(-1)
    states = [
        (layer.keys[:, : layer.length].clone(),)
        if isinstance(layer, LatentLayerCache)
        else tuple(t.clone() for t in layer.states())
        for layer in cache.layers
    ]
    if native:
        model = model_step.on_weights(config := model_step.native_config(x), x).eval()
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(x["ids"], past_key_values=cache)
    return model, cache, states, token


def assert_same_steps(model, caches, token):
    with torch.no_grad():
        for _ in range(3):
            expected, got = (model(token, past_key_values=cache).logits for cache in caches)
            assert disagreement((got,), (expected,)) < 1e-5


@pytest.mark.parametrize("all_mla", [False, True])
def test_our_cache_is_that_of_a_prompt(all_mla):
    model, cache, states, token = prefilled(all_mla)
    filled = model_decode.our_cache(model.config, TOY["S"], states)
    assert (filled.seen, filled.batch_size) == (cache.seen, cache.batch_size)
    assert_same_steps(model, (cache, filled), token)


@needs_no_fla
def test_native_cache_is_that_of_a_prompt():
    model, cache, states, token = prefilled(native=True)
    filled = model_decode.native_cache(model.config, states)
    for a, b in zip(cache.layers, filled.layers, strict=True):
        assert type(a) is type(b)
        for name in ("conv_states", "recurrent_states", "keys", "values"):
            left, right = (getattr(layer, name, None) for layer in (a, b))
            left, right = (t[0] if isinstance(t, dict) else t for t in (left, right))
            assert (left is None) == (right is None), name
            if left is not None:
                assert (left.shape, left.stride()) == (right.shape, right.stride()), name
                assert (left.dtype, left.device) == (right.dtype, right.device), name
    assert_same_steps(model, (cache, filled), token)


@pytest.mark.parametrize("all_mla", [False, True])
def test_drawn_states_are_as_a_prompt_leaves_them(all_mla):
    model, _, states, _ = prefilled(all_mla)
    args = (model.config, TOY["B"], TOY["S"])
    found = list(model_decode.drawn_states(*args, torch.float32, CPU))
    assert [[(t.shape, t.dtype) for t in ts] for ts in found] == [
        [(t.shape, t.dtype) for t in ts] for ts in states
    ]
    rounded = list(model_decode.drawn_states(*args, torch.bfloat16, CPU))
    for a, b in zip(found, rounded, strict=True):
        assert torch.equal(a[0].bfloat16(), b[0])  # the same numbers in each dtype
        assert [t.dtype for t in b[1:]] == [torch.float32] * (len(b) - 1)
        assert len(b) == 1 or torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_is_drawn_in_place(monkeypatch, caches, dtype):
    """Piece by piece, where a step reads it: no second copy of any size."""
    monkeypatch.setattr(inputs, "PIECE", 100)
    sizes = []
    normal = inputs.Draw.normal
    monkeypatch.setattr(
        inputs.Draw, "normal",
        lambda self, *shape, **options: sizes.append(shape) or normal(self, *shape, **options),
    )  # fmt: skip
    drawn_layers = []
    states = model_decode.drawn_states
    monkeypatch.setattr(
        model_decode, "drawn_states",
        lambda *args: (drawn_layers.append(layer) or layer for layer in states(*args)),
    )  # fmt: skip
    build("decode_step", "all_mla", drawn("decode_step", dtype))
    (cache,) = caches
    for layer, (latents,) in zip(cache.layers, drawn_layers, strict=True):
        assert layer.keys.data_ptr() == latents.data_ptr()
        assert layer.keys.shape == (2, 37 + model_decode.ROOM, 24) and layer.keys.dtype == dtype
        used = layer.keys[:, :37].float()
        assert used.std().item() == pytest.approx(1, abs=0.1) and abs(used.mean().item()) < 0.1
        assert not layer.keys[:, 37:].any()
    assert max(shape[0] for shape in sizes if len(shape) == 1) == 100


@pytest.mark.parametrize("name", ["ours", "all_mla", "fp8", "native"])
def test_a_context_of_any_length(name, caches):
    if name == "native" and find_spec("fla") is not None:
        pytest.skip("with fla, native needs a GPU")
    for S in (1, 5000):
        call = build("decode_step", name, drawn("decode_step", torch.bfloat16, S=S))
        assert caches[-1].get_seq_length() == S
        (logits,) = call()
        assert logits.shape == (2, 1, 64) and logits.isfinite().all()


def test_a_measurement_moves_no_latents(caches):
    calls = 1 + timing.WARM_UP + (1 + timing.MAX_ROUNDS) * timing.BURST
    assert calls < model_decode.ROOM
    call = build("decode_step", "ours", drawn("decode_step"))
    (cache,) = caches
    before = [t.data_ptr() for t in cache.tensors()]
    for _ in range(8):
        call()
    assert [t.data_ptr() for t in cache.tensors()] == before
    assert [t.shape[1] for t in cache.tensors()][-1] >= cache.seen - 8 + calls


@pytest.mark.parametrize("name", ["ours", "all_mla", "fp8"])
def test_steps_are_graphs_on_a_gpu(name, caches, monkeypatch):
    """Asked for there alone; a CPU gives a reason why there are none."""
    build("decode_step", name, x := drawn("decode_step"))
    monkeypatch.setattr(KimiLinearForCausalLM, "device", torch.device("cuda"))
    with pytest.warns(UserWarning, match="without a CUDA graph: its kernels do not run"):
        build("decode_step", name, x)
    assert [cache.graphs for cache in caches] == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "all_mla", "fp8"])
def test_graphs(name, caches):
    shape = {letter: TOY[letter] for letter in DECODE.shapes[0]}
    x = DECODE.inputs(shape, torch.bfloat16, torch.device("cuda"))
    call, eager = (build("decode_step", name, x) for _ in "ab")
    caches[1].graphs = None
    for _ in range(4):
        assert disagreement(call(), eager()) < 0.02
    assert list(caches[0].graphs.graphs.values()) != [None] and not caches[0].graphs.failed


# ---- every layer MLA ---------------------------------------------------------------------------


def test_all_mla_is_the_same_model_but_for_its_mixers(monkeypatch, caches):
    x, models = drawn("decode_step"), []
    on_weights = model_step.on_weights
    monkeypatch.setattr(
        model_decode, "on_weights", lambda *args: models.append(on_weights(*args)) or models[-1]
    )
    build("decode_step", "all_mla", x)
    (model,), (cache,) = models, caches
    assert model.config.layer_types == 4 * ["full_attention"]
    assert all(isinstance(layer, LatentLayerCache) for layer in cache.layers)
    latents = cache.tensors()
    assert not any(torch.equal(latents[0], t) for t in latents[1:])
    own = {
        name
        for name, p in model.named_parameters()
        if name not in x or p.data_ptr() != x[name].data_ptr()
    }
    mixers = {n for n, _ in model.named_parameters() if "self_attn" in n and ".3." not in n}
    assert own == mixers
    parameters = dict(model.named_parameters())
    for name in mixers:
        like = x["model.layers.3.self_attn." + name.split(".self_attn.")[1]]
        assert torch.equal(parameters[name], like)
        assert parameters[name].data_ptr() != like.data_ptr(), "read once, it stays in the L2"


# ---- costs -------------------------------------------------------------------------------------


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


WIDE = {"B": 1, "D": 256, "F": 256, "vocab": 512}


def test_prefill_flops():
    """Against products counted as they are called, where the chunks of KDA are little."""
    call = build("prefill", "ours", drawn("prefill", T=64, **WIDE))
    assert OP["prefill"].flops(TOY | WIDE | {"T": 64}) == pytest.approx(counted(call), rel=0.1)


@pytest.mark.parametrize("name", ["ours", "all_mla"])
def test_decode_flops(name):
    """The part of the weights, and what each token of context adds, in the absorbed form."""
    flops = DECODE.providers[name].flops or DECODE.flops
    found = {
        S: counted(build("decode_step", name, drawn("decode_step", S=S, **WIDE)))
        for S in (10, 1010)
    }
    shape = TOY | WIDE
    assert flops(shape | {"S": 10}) == pytest.approx(found[10], rel=0.03)
    per_token = (flops(shape | {"S": 1010}) - flops(shape | {"S": 10})) / 1000
    assert per_token == pytest.approx((found[1010] - found[10]) / 1000, rel=1e-6)


@pytest.mark.parametrize("name", ["ours", "all_mla"])
def test_decode_bytes(name, caches):
    """One row: the weights but the embedding and 4 of 12 experts; both states, latents; logits."""
    shape = TOY | {"B": 1}
    x = drawn("decode_step", torch.bfloat16, B=1)
    (logits,) = build("decode_step", name, x)()
    (cache,) = caches
    config = model_step.our_config(x)
    config = config.all_mla() if name == "all_mla" else config
    n = parameter_counts(config)
    moved = 2 * (n["total"] - n["routed"] * 4 // 12 - n["head"] + shape["D"] + logits.numel())
    for layer in cache.layers:
        if isinstance(layer, LatentLayerCache):
            assert layer.keys is not None
            moved += 2 * layer.keys[:, : shape["S"] + 1].numel()
        else:
            moved += 2 * sum(t.numel() * t.element_size() for t in layer.states())
    assert (DECODE.providers[name].bytes or DECODE.bytes)(shape) == pytest.approx(moved, rel=1e-9)


def test_generate_is_a_prompt_and_steps():
    op, N = OP["generate"], 5
    for cost in ("flops", "bytes"):
        prompt = getattr(OP["prefill"], cost)(TOY | {"T": TOY["S"]})
        steps = [getattr(DECODE, cost)(TOY | {"S": TOY["S"] + i}) for i in range(1, N)]
        total = getattr(op, cost)(TOY | {"N": N})
        assert total == pytest.approx(prompt + sum(steps), rel=0.01)


def test_declared_floors():
    """Of 8 layers by hand, on a GPU that copies 3.02 TB/s and multiplies at 690 TFLOP/s; in GB.

    Batch 1: 0.79 of 8 x 7 experts, 0.75 of head, 0.65 of mixers and feed-forwards; 0.17 of states.
    Batch 32: 16.2 of 7 x 163 experts.
    """
    shapes = [s for s in DECODE.shapes if s["L"] == 8]
    ms = {(s["B"], s["S"]): DECODE.bytes(s) / 3.02e9 for s in shapes}
    assert ms[1, 1024] == pytest.approx(0.795, abs=2e-3)
    by_hand = 0.793 + 0.755 + 2 * (6 * 39.5 + 2 * 29.1 + 63.7 + 7 * 7.67) / 1e3
    states = 2 * 6 * (2.097 + 0.074) / 1e3
    assert ms[1, 1024] == pytest.approx((by_hand + states + 0.0024) / 3.02, rel=2e-3)
    experts = 7 * 163.3 * 3 * 2304 * 1024 * 2 / 1e9
    rows = 32 * (states + 0.0024)
    assert ms[32, 1024] == pytest.approx((by_hand - 0.793 + experts + rows) / 3.02, rel=2e-3)
    (prefill,) = (s for s in OP["prefill"].shapes if (s["L"], s["T"]) == (8, 8192))
    assert OP["prefill"].flops(prefill) / 690e12 == pytest.approx(21.5e-3, rel=0.01)
    longest = {"B": 1, "S": 1048576, "L": 8}
    (shape,) = (s for s in DECODE.shapes if longest.items() <= s.items())
    assert DECODE.providers["all_mla"].bytes is not None
    assert DECODE.providers["all_mla"].bytes(shape) / 1e9 == pytest.approx(9.66 + 2.25, rel=0.01)


def test_what_fits():
    """8 layers on 80 GB, all 27 on 141 GB, with the contexts of all who are timed together."""
    for op in (OP["prefill"], DECODE, OP["generate"]):
        for shape in op.shapes:
            chosen = [p for p in op.providers.values() if p.fits(shape)]
            size = capacity.needed(op.memory(shape), chosen, shape)
            assert size < 80e9 if shape["L"] == 8 else 84e9 < size < 149e9


def test_largest_batches():
    """8 layers: of 1,048,576 tokens 21 and 5 sequences on 80 GB, 49 and 12 on 141 GB.

    With half of the experts 27 and 6, 54 and 13.
    """
    op = OP["throughput"]
    found = {
        (s["S"], s["E"], free): [
            capacity.largest_batch(op.memory(s), op.providers[name], s, free)
            for name in ("ours", "all_mla")
        ]
        for s in op.shapes
        for free in (84e9, 150e9)
    }
    assert found[4096, 256, 84e9] == found[4096, 256, 150e9] == [capacity.MOST_ROWS] * 2
    assert [found[1048576, 256, free] for free in (84e9, 150e9)] == [[21, 5], [49, 12]]
    assert [found[1048576, 128, free] for free in (84e9, 150e9)] == [[27, 6], [54, 13]]


def test_a_step_hits_as_many_experts_as_its_bytes_say():
    """The drawn context does not make rows alike."""
    sizes = {"B": 32, "S": 8, "D": 256, "E": 256, "F": 8, "vocab": 512}
    hits: list[int] = []

    def count(module, args, output):
        if isinstance(module, KimiLinearTopkRouter):
            hits.append(output[2].unique().numel())

    call = build("decode_step", "ours", drawn("decode_step", **sizes))
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        for _ in range(4):
            call()
    finally:
        hook.remove()
    assert len(hits) == 3 * 4
    assert sum(hits) / len(hits) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 32), rel=0.06)


def test_who_is_timed_where():
    fits = {
        name: {(s["B"], s["S"]) for s in DECODE.shapes if provider.fits(s)}
        for name, provider in DECODE.providers.items()
    }
    assert (
        fits["ours"] == fits["all_mla"] == fits["fp8"] == {(s["B"], s["S"]) for s in DECODE.shapes}
    )
    assert fits["native"] == {(1, 1024), (1, 4096), (1, 32768), (32, 1024)}
    assert fits["reference"] == set()
