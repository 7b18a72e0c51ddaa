"""A cache with latents in fp8: it goes through the same life, and rounds where it says it does."""

import json

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from kimi_kernels import quantize_latents
from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear import modeling_kimi_linear as modeling
from kimi_linear.cache import LatentLayerCache
from kimi_linear.decode import DecodeGraphs
from kimi_linear.info import cache_bytes
from kimi_linear.layout import DECODE_TOKENS
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.model import test_decode as standins
from tests.model.helpers import build, random_ids, small_config
from tests.model.test_cache import PADDING, assert_same, padded, run
from tests.model.test_cli import config_of

CONFIG = small_config((2, 5), num_hidden_layers=5)  # MLA before, between and after KDA layers
FP8 = torch.float8_e4m3fn
captures = standins.captures  # a fixture


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return build(CONFIG).double()


def filled(model, ids: Tensor, mask: Tensor | None = None) -> KimiLinearCache:
    cache = KimiLinearCache(CONFIG, FP8)
    run(model, ids, cache, mask)
    return cache


def latent_layers(cache: KimiLinearCache) -> list[LatentLayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LatentLayerCache)]


# ---- what is stored ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kimi_linear_48b_a3b", "tiny"])
def test_bytes_per_token(name):
    config = config_of(name)
    cache, L = KimiLinearCache(config, FP8), config.kv_lora_rank + config.qk_rope_head_dim
    layout = modeling.TokenLayout((1, 3))
    for layer in latent_layers(cache):
        layer.update(torch.randn(1, 3, L, dtype=torch.bfloat16), layout)
    held = sum(x.nbytes for layer in latent_layers(cache) for x in layer.tensors())
    assert held == 3 * cache_bytes(config, fp8=True)[0]


def test_what_is_stored_is_the_definition(model):
    """Of the first MLA layer, before which nothing was rounded."""
    ids, plain = random_ids(CONFIG, 2, 30), KimiLinearCache(CONFIG)
    run(model, ids, plain)
    cache = filled(model, ids)
    latent = latent_layers(plain)[0].keys[:, :30]
    want = quantize_latents(latent, CONFIG.kv_lora_rank)
    c, k_r, scale = (x[:, :30] for x in latent_layers(cache)[0].tensors())
    assert torch.equal(c.view(FP8).float(), want.c.float())
    assert torch.equal(k_r, want.k_r) and torch.equal(scale, want.scale)


# ---- one forward, pieces, single tokens --------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [7], [1, 7, 30], [50]])
def test_pieces_equal_the_whole(sizes, model):
    """A token is seen rounded by those that came with it as well."""
    ids = random_ids(CONFIG, 2, 60)
    want, cache, t, got = run(model, ids, KimiLinearCache(CONFIG, FP8)), None, 0, []
    cache = KimiLinearCache(CONFIG, FP8)
    while t < 60:
        for size in sizes:
            got.append(run(model, ids[:, t : t + size], cache))
            t += got[-1].shape[1]
    assert_same(torch.cat([x for x in got if x.shape[1]], 1), want)


@pytest.mark.parametrize("kind", PADDING)
def test_padding_equals_each_row_alone(kind, model):
    lengths, T = [9, 4, 0], 9
    mask, ids = padded(kind, lengths, T), random_ids(CONFIG, 3, T)
    cache, more = filled(model, ids, mask), random_ids(CONFIG, 3, 6, seed=2)
    got = torch.cat([run(model, more[:, t : t + 2], cache) for t in (0, 2, 4)], 1)
    for b in range(3):
        row = torch.cat((ids[b][mask[b].bool()], more[b]))[None]
        assert_same(got[b : b + 1], run(model, row, KimiLinearCache(CONFIG, FP8))[:, -6:])


def test_prompt_in_pieces(model, monkeypatch):
    ids, found = random_ids(CONFIG, 2, 60), []
    for piece in (modeling.PIECE, 18):
        monkeypatch.setattr(modeling, "PIECE", piece)
        cache = KimiLinearCache(CONFIG, FP8)
        found.append((run(model, ids, cache), run(model, ids[:, :1], cache)))
    for got, want in zip(*found, strict=True):
        assert_same(got, want)


def test_gradients_are_those_of_the_latents_before_rounding(model):
    """Equal in one forward and in pieces, as far as they do not stop at the cache."""
    ids, cache = random_ids(CONFIG, 1, 12), filled(model, random_ids(CONFIG, 1, 5))
    kv = model.model.layers[4].self_attn.kv_a_proj_with_mqa.weight
    logits = model(ids, past_key_values=cache).logits
    (got,) = torch.autograd.grad(logits.sum(), kv)
    with torch.no_grad():
        again = run(model, ids, filled(model, random_ids(CONFIG, 1, 5)))
    assert_same(logits.detach(), again)
    assert got.isfinite().all() and got.abs().max() > 0


# ---- its life ----------------------------------------------------------------------------------


def steps(model, cache: KimiLinearCache, n: int, seed: int = 3) -> Tensor:
    ids = random_ids(CONFIG, cache.batch_size, n, seed=seed)
    return torch.cat([run(model, ids[:, t : t + 1], cache) for t in range(n)], 1)


@pytest.mark.parametrize("has_padding", [False, True])
def test_forks_and_snapshots_are_exact(has_padding, model):
    mask = padded("left", [5, 9], 9) if has_padding else None
    cache = filled(model, random_ids(CONFIG, 2, 9), mask)
    fork, mark = cache.fork(), cache.snapshot()
    want = steps(model, cache, 30)
    for seed in (4, 5):
        cache.restore(mark)
        steps(model, cache, 20, seed)
    cache.restore(mark)
    assert torch.equal(steps(model, cache, 30), want)
    assert torch.equal(steps(model, fork, 30), want)


def test_a_snapshot_of_another_kind_of_cache(model):
    """One in the model's dtype, and of another config."""
    mark = filled(model, random_ids(CONFIG, 2, 5)).snapshot()
    for other in (KimiLinearCache(CONFIG), KimiLinearCache(small_config(kv_lora_rank=8), FP8)):
        with pytest.raises(ValueError, match="snapshot is of another kind of cache"):
            other.restore(mark)
        assert other.seen == 0


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [1], [0, 1, 1]])
def test_rows_move_with_all_they_own(rows, model):
    ids = random_ids(CONFIG, 2, 9)
    cache, want = filled(model, ids), filled(model, ids[rows])
    mark = cache.snapshot() if len(rows) > 2 else None
    cache.batch_select_indices(torch.tensor(rows))
    assert_same(steps(model, cache, 5), steps(model, want, 5))
    if mark is not None:
        cache.restore(mark)
        assert_same(steps(model, cache, 5), steps(model, filled(model, ids), 5))


@pytest.mark.parametrize("removed", [1, 3, 8])
def test_crop(removed, model):
    ids = random_ids(CONFIG, 2, 9)
    cache, want = filled(model, ids), filled(model, ids)
    cache.activate_past_recording()
    drafts = random_ids(CONFIG, 2, DECODE_TOKENS, seed=9)
    run(model, drafts, cache)
    cache.crop(-removed)
    if removed < DECODE_TOKENS:
        run(model, drafts[:, :-removed], want)
    assert_same(steps(model, cache, 5), steps(model, want, 5))


def test_a_reset_cache_is_as_new(model):
    cache = filled(model, random_ids(CONFIG, 2, 9))
    cache.reset()
    assert latent_layers(cache)[0].scales is None
    ids = random_ids(CONFIG, 1, 9)
    assert torch.equal(run(model, ids, cache), run(model, ids, KimiLinearCache(CONFIG, FP8)))


def test_with_fixed_addresses(model, monkeypatch, captures):
    """Stand-ins for CUDA graphs, which are captured again when the buffers have moved."""
    monkeypatch.setattr(modeling, "use_triton", lambda x: True)
    ids = random_ids(CONFIG, 2, 9)
    cache, plain = filled(model, ids), filled(model, ids)
    cache.graphs = DecodeGraphs(model)
    assert_same(steps(model, cache, 30), steps(model, plain, 30))
    assert 1 < captures[2, 1] < 8
    with torch.no_grad():
        for c in (cache, plain):
            c.reorder_cache(torch.tensor([1, 0]))
    before = captures[2, 1]
    assert_same(steps(model, cache, 2), steps(model, plain, 2))
    assert captures[2, 1] == before


@pytest.mark.parametrize("latent_dtype", [None, FP8], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_decode_step_norms_latents_as_a_prompt(dtype, latent_dtype, monkeypatch):
    """To the bit, in the launch of the store; by its module where that has a hook."""
    config = small_config((1, 5), num_hidden_layers=5, kv_lora_rank=32, qk_rope_head_dim=8)
    model, stored, calls = build(config).to(DEVICE, dtype), [], []
    ids, more = (random_ids(config, 2, n, seed=n).to(DEVICE) for n in (9, 1))
    norm = model.model.layers[0].self_attn.kv_a_layernorm
    forward = type(norm).forward
    monkeypatch.setattr(
        type(norm), "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    for static, hooked in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(modeling, "use_triton", lambda x, static=static: static)
        if hooked:
            norm.register_forward_hook(lambda *args: None)
        cache = KimiLinearCache(config, latent_dtype)
        run(model, ids, cache)
        calls.clear()
        run(model, more, cache)
        assert calls.count(norm) == (not static or hooked)
        layer = latent_layers(cache)[0]
        stored.append([x[:, : cache.seen] for x in layer.tensors()])
    for other in stored[1:]:
        assert all(map(torch.equal, other, stored[0]))


# ---- how to ask for it -------------------------------------------------------------------------


def test_generate(model):
    """By `cache_config`, which a generation_config.json may hold, or with a cache."""
    ids = random_ids(CONFIG, 2, 20)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "eos_token_id": -1}
    config = {"latent_dtype": "float8_e4m3fn"}
    saved = json.loads(GenerationConfig(cache_config=config).to_json_string())
    found = [
        model.generate(ids, **options, cache_config=config),
        model.generate(ids, **options, generation_config=GenerationConfig.from_dict(saved)),
        model.generate(ids, **options, past_key_values=KimiLinearCache(CONFIG, FP8)),
    ]
    assert all(out.past_key_values.latent_dtype == FP8 for out in found)
    plain = model.generate(ids, **options)
    assert plain.past_key_values.latent_dtype is None
    for out in found[1:]:
        assert torch.equal(out.sequences, found[0].sequences)
        assert all(map(torch.equal, out.logits, found[0].logits))
    assert not torch.equal(plain.logits[0], found[0].logits[0])
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    got = model.generate(ids, **beams, cache_config=config)
    assert torch.equal(
        got, model.generate(ids, **beams, past_key_values=KimiLinearCache(CONFIG, FP8))
    )


@pytest.mark.parametrize("bad", ["fp8", torch.float8_e5m2, torch.bfloat16, True])
def test_other_dtypes_are_refused(bad, model):
    for make in (
        lambda: KimiLinearCache(CONFIG, bad),
        lambda: model.generate(random_ids(CONFIG, 1, 3), cache_config={"latent_dtype": bad}),
    ):
        with pytest.raises(ValueError, match=r"^latent_dtype is .* want None or torch\.float8"):
            make()


def test_other_options_are_refused(model):
    ids = random_ids(CONFIG, 1, 3)
    with pytest.raises(ValueError, match=r"^cache_config has \['nbits'\], want latent_dtype alone"):
        model.generate(ids, cache_config={"nbits": 4})
    config = {"latent_dtype": "float8_e4m3fn"}
    with pytest.raises(ValueError, match="but past_key_values was made with None"):
        model.generate(ids, cache_config=config, past_key_values=KimiLinearCache(CONFIG))


def test_another_model_dtype_is_refused(model):
    layer = latent_layers(filled(model, random_ids(CONFIG, 1, 5)))[0]
    with pytest.raises(
        ValueError, match=r"holds torch\.float64 latents, the new ones are torch\.fl"
    ):
        layer.update(torch.zeros(1, 1, 24), modeling.TokenLayout((1, 1)))


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [{}, {"kv_lora_rank": 256, "qk_rope_head_dim": 16}], ids=str)
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_captured_steps(dtype, padding, sizes):
    """A cache with graphs and one without: the same logits, and the same latents to the bit."""
    config = small_config((2, 5), num_hidden_layers=5, **sizes)
    model, mask = build(config).to(DEVICE, dtype), None
    if padding is not None:
        mask = padded(padding, [40, 27], 40).to(DEVICE)
    ids, more = (random_ids(config, 2, n, seed=n).to(DEVICE) for n in (40, 60))
    caches = KimiLinearCache(config, FP8), KimiLinearCache(config, FP8)
    for cache in caches:
        run(model, ids, cache, mask)
    caches[0].graphs, t = DecodeGraphs(model), 0
    for n in [1] * 30 + [3, 3, 3, 1, 8, 8, 1]:
        a, b = (run(model, more[:, t : t + n], cache) for cache in caches)
        assert_as_good_as(f"after {t}", a, b, b)
        t += n
    assert all(graph is not None for graph in caches[0].graphs.graphs.values())
    for a, b in zip(*map(latent_layers, caches), strict=True):
        assert all(map(torch.equal, a.tensors(), b.tensors()))
