"""`crop`: afterwards a cache is one that has never seen the tokens."""

import pytest
import torch
from torch import Tensor

from kimi_kernels import backend, kda_step
from kimi_linear import KimiLinearCache, KimiLinearForCausalLM, rollback
from kimi_linear import modeling_kimi_linear as modeling
from kimi_linear.decode import DecodeGraphs
from kimi_linear.layout import DECODE_TOKENS
from kimi_linear.rollback import RECORDED
from tests.helpers import DEVICE, assert_as_good_as
from tests.model import test_decode as standins
from tests.model.helpers import build, random_ids, small_config
from tests.model.test_cache import assert_same, assert_unchanged, frozen, padded, run, states

CONFIG = small_config()
captures = standins.captures  # a fixture


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return build(CONFIG)


def recording(model, ids: Tensor, mask: Tensor | None = None) -> KimiLinearCache:
    cache = KimiLinearCache(model.config)
    run(model, ids, cache, mask)
    cache.activate_past_recording()
    return cache


def assert_same_caches(got: KimiLinearCache, want: KimiLinearCache) -> None:
    for a, b in zip(states(got), states(want), strict=True):
        assert_same(a, b)
    assert got.seen == want.seen and (got.lengths is None) == (want.lengths is None)
    assert got.lengths is None or torch.equal(got.lengths, want.lengths)
    for a, b in zip(got.layers, want.layers, strict=True):
        assert getattr(a, "length", None) == getattr(b, "length", None)


# ---- crop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("full_attn_layers", [(4,), (1, 3), (), (1, 2, 3, 4)], ids=str)
def test_crop(full_attn_layers, padding, dtype):
    """Each number of tokens of a step of eight, one after the other on the same cache."""
    model = build(small_config(full_attn_layers)).to(dtype)
    ids, mask = random_ids(CONFIG, 2, 100), None
    if padding is not None:
        mask = padded(padding, [5, 9], 9)
    cache, other = recording(model, ids[:, :9], mask), KimiLinearCache(model.config)
    run(model, ids[:, :9], other, mask)
    t = 9
    for removed in (1, 2, 3, 4, 5, 6, 7, 0, 8):
        kept = DECODE_TOKENS - removed
        drafts = random_ids(CONFIG, 2, removed, seed=removed + 2)
        run(model, torch.cat((ids[:, t : t + kept], drafts), 1), cache)
        cache.crop(-removed)
        if kept:
            run(model, ids[:, t : t + kept], other)
        t += kept
        assert_same_caches(cache, other)
        assert_same(run(model, ids[:, t : t + 1], cache), run(model, ids[:, t : t + 1], other))
        t += 1
        cache.crop(0)


def test_crop_by_the_kernel(monkeypatch):
    """All layers in one launch: its states are those of the reference, layer by layer."""
    model = build(CONFIG).to(DEVICE)

    def step(*args):
        with backend("triton"):
            return kda_step(*args)

    monkeypatch.setattr(rollback, "kda_step", step)
    ids = random_ids(CONFIG, 2, 20).to(DEVICE)
    with backend("reference"):
        cache, other = recording(model, ids[:, :9]), KimiLinearCache(CONFIG)
        run(model, ids[:, 9:17], cache)
        cache.crop(-3)
        run(model, ids[:, :9], other)
        run(model, ids[:, 9:14], other)
    assert_same_caches(cache, other)


def test_crop_by_a_tensor(model):
    """As `generate` does: no size of the cache becomes a tensor, which a graph cannot wait for."""
    ids = random_ids(CONFIG, 2, 20)
    caches = [recording(model, ids[:, :9]) for _ in range(2)]
    for cache, n in zip(caches, (-3, torch.tensor(-3)), strict=True):
        run(model, ids[:, 9:17], cache)
        cache.crop(n)
    assert type(caches[1].seen) is int
    assert all(type(x.length) is int for x in caches[1].layers if hasattr(x, "length"))
    assert_same_caches(caches[1], caches[0])


@pytest.mark.parametrize("kept", range(0, 34, 3))
def test_crop_over_several_forwards(kept, model):
    """As an assistant drafts: all since the last crop, also more than a decode step."""
    ids = random_ids(CONFIG, 1, 60)
    cache = recording(model, ids[:, :9])
    t = 9
    for T in (2, 1, 1, 21, 1, 8):
        run(model, ids[:, t : t + T], cache)
        t += T
    cache.crop(kept - 34)
    other = KimiLinearCache(CONFIG)
    for part in (ids[:, :9], ids[:, 9 : 9 + kept]):
        if part.shape[1]:
            run(model, part, other)
    assert_same_caches(cache, other)
    assert_same(run(model, ids[:, 50:], cache), run(model, ids[:, 50:], other))


@pytest.mark.parametrize("removed", [0, 1, 5, 12])
def test_crop_of_a_prompt(removed, model):
    ids = random_ids(CONFIG, 2, 20)
    cache, other = KimiLinearCache(CONFIG), KimiLinearCache(CONFIG)
    cache.activate_past_recording()
    run(model, ids[:, :12], cache)
    cache.crop(-removed)
    if removed == 12:
        assert (cache.seen, cache.batch_size) == (0, -1)
    else:
        run(model, ids[:, : 12 - removed], other)
        assert_same_caches(cache, other)
    assert_same(run(model, ids[:, 12:], cache), run(model, ids[:, 12:], other))


def test_what_is_recorded_is_bounded(model):
    """One by one without a crop: no more than so many can be dropped, but those exactly."""
    ids = random_ids(CONFIG, 1, RECORDED + 40)
    cache = recording(model, ids[:, :4])
    for t in range(4, RECORDED + 20, 8):
        run(model, ids[:, t : t + 8], cache)
    count = cache.rollback.count
    assert 8 <= count <= RECORDED and cache.rollback.log.shape[2] <= RECORDED
    with pytest.raises(ValueError, match=f"and {count} are recorded"):
        cache.crop(-count - 1)
    cache.crop(-count)
    other = KimiLinearCache(CONFIG)
    run(model, ids[:, : cache.seen], other)
    for a, b in zip(states(cache), states(other), strict=True):
        assert_as_good_as("state", a, b, b)


def test_memory_is_made_by_a_forward_that_no_graph_holds(model):
    ids, cache = random_ids(CONFIG, 2, 60), KimiLinearCache(CONFIG)
    cache.activate_past_recording()
    cache.begin(8)
    assert not cache.rollback.fits(2)
    run(model, ids[:, :8], cache)
    cache.begin(8)
    assert cache.rollback.fits(2) and not cache.rollback.fits(1)
    log = cache.rollback.log
    run(model, ids[:, 8:16], cache)
    assert cache.rollback.log is log
    cache.begin(log.shape[2] - 15)
    assert not cache.rollback.fits(2)


def test_nothing_is_recorded_unasked(model):
    cache = KimiLinearCache(CONFIG)
    model.generate(random_ids(CONFIG, 1, 30), max_new_tokens=5, past_key_values=cache)
    assert cache.rollback.log is None and cache.rollback.states is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_recorded_in_another_mode(mode, model):
    """And cropped without a gradient, or the other way round."""
    ids = random_ids(CONFIG, 1, 30)
    other = KimiLinearCache(CONFIG)
    run(model, ids[:, :9], other)
    for inside, outside in ((mode, torch.no_grad), (torch.no_grad, mode)):
        cache = KimiLinearCache(CONFIG)
        with inside():
            model(ids[:, :7], past_key_values=cache)
            cache.activate_past_recording()
            model(ids[:, 7:15], past_key_values=cache)
        with outside():
            cache.crop(-6)
            fork = cache.fork()
            got = model(ids[:, 15:16], past_key_values=cache).logits
        assert_same_caches(fork, other)
        assert_same(got.detach(), run(model, ids[:, 15:16], other.fork()))


# ---- copies -------------------------------------------------------------------------------------


def test_crop_of_a_fork(model):
    """It has the record as well, and neither disturbs the other."""
    ids = random_ids(CONFIG, 2, 60)
    cache, want = recording(model, ids[:, :9]), []
    for kept in (3, 6):
        want.append(KimiLinearCache(CONFIG))
        run(model, ids[:, :9], want[-1])
        run(model, ids[:, 9 : 9 + kept], want[-1])
    run(model, ids[:, 9:17], cache)
    fork = cache.fork()
    cache.crop(-5)
    run(model, ids[:, 20:28], cache)
    fork.crop(-2)
    assert_same_caches(fork, want[1])
    cache.crop(-8)
    assert_same_caches(cache, want[0])
    assert cache.fork().rollback.log is None  # nothing recorded, nothing copied


def test_crop_and_snapshots(model):
    """Tokens after a crop do not overwrite those of a snapshot taken before it."""
    ids = random_ids(CONFIG, 2, 60)
    cache = recording(model, ids[:, :9])
    run(model, ids[:, 9:17], cache)
    snapshot, before = cache.snapshot(), frozen(cache)
    cache.crop(-5)
    other = KimiLinearCache(CONFIG)
    run(model, ids[:, :9], other)
    run(model, ids[:, 9:12], other)
    assert_same_caches(cache, other)
    for x in (ids[:, 30:31], ids[:, 31:37]):
        assert_same(run(model, x, cache), run(model, x, other))
    cache.restore(snapshot)
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match="and 0 are recorded"):
        cache.crop(-1)
    assert_unchanged(cache, before)
    run(model, ids[:, 17:25], cache)
    cache.crop(-8)
    for a, b in zip(states(cache), before[0], strict=True):
        assert torch.equal(a, b)


# ---- errors -------------------------------------------------------------------------------------


def test_what_cannot_be_cropped(model):
    ids, mask = random_ids(CONFIG, 2, RECORDED + 20), torch.ones(2, 20)
    mask[0, 17] = 0
    lives = {  # what comes after a step of eight
        "cropped": lambda c: c.crop(-3),
        "kept": lambda c: c.crop(0),
        "rows": lambda c: c.reorder_cache(torch.tensor([1, 0])),
        "too much": lambda c: run(model, ids[:, : RECORDED + 1], c),
        "padding": lambda c: run(model, ids[:, 17:20], c, mask),
    }
    for go_on in lives.values():
        cache = recording(model, ids[:, :9])
        run(model, ids[:, 9:17], cache)
        go_on(cache)
        held = frozen(cache)
        for remove in (-1, 1):
            with pytest.raises(ValueError, match=f"tokens_to_remove is {remove}, .* 0 are record"):
                cache.crop(remove)
            assert_unchanged(cache, held)
        cache.crop(0)
        assert_unchanged(cache, held)
    cache = recording(model, ids[:, :9])
    run(model, ids[:, 9:20], cache, mask)
    run(model, ids[:, 20:28], cache)  # after padding
    held = frozen(cache)
    for remove in (-9, 3):
        with pytest.raises(ValueError, match="and 8 are recorded"):
            cache.crop(remove)
        assert_unchanged(cache, held)
    cache.crop(-8)
    assert cache.lengths.tolist() == [19, 20] and cache.seen == 20


def test_an_offloaded_convolution_says_so():
    model, ids = build(CONFIG), random_ids(CONFIG, 1, 20)
    cache = recording(model, ids[:, :9])
    with pytest.raises(ValueError, match="offloaded"):
        cache.begin(1)
        meta = torch.empty(96, 4, device="meta")
        cache.rollback.write(0, (ids, ids, ids), ids, ids, (meta, meta, meta))


# ---- captured steps -----------------------------------------------------------------------------


@pytest.fixture
def static(monkeypatch):
    """In fp64; the reference attends to whole buffers, as the kernels do."""
    monkeypatch.setattr(modeling, "use_triton", lambda x: True)
    return build(CONFIG).double()


@pytest.mark.parametrize("has_padding", [False, True])
def test_captured_crops(has_padding, static, captures):
    """Of steps of eight, of several small ones; nothing moves, so each is captured once."""
    ids, mask = random_ids(CONFIG, 2, 400), torch.ones(2, 10, dtype=torch.int64)
    mask[0, 3:7] = int(not has_padding)
    caches = standins.pair(static, ids[:, :10], attention_mask=mask)
    for cache in caches:
        cache.plan(400)
        cache.reserve(300)
        cache.activate_past_recording()
    t = 10
    for removed in (1, 2, 3, 4, 5, 6, 7, 0, 8):
        for steps in ((8,), (2, 1, 1, 1, 3)):
            for T in steps:
                standins.agree(static, caches, ids[:, t : t + T])
                t += T
            for cache in caches:
                cache.crop(-removed)
            t -= removed
            other = KimiLinearCache(CONFIG)
            run(static, ids[:, :10], other, mask)
            run(static, ids[:, 10:t], other)
            for cache in caches:
                for a, b in zip(states(cache), states(other), strict=True):
                    assert_as_good_as(f"after {t}", a, b, b)
                assert cache.lengths is None or torch.equal(cache.lengths, other.lengths)
    for shape, n in captures.items():
        assert n <= 2, shape  # again where the log has grown


def test_graphs_of_a_cache_that_records_now_and_then(static, captures):
    ids = random_ids(CONFIG, 1, 400)
    caches = standins.pair(static, ids[:, :10])
    t = 10
    for on in (False, True, False, True):
        for cache in caches:
            cache.rollback.on = on
            cache.crop(0)
        for T in (1, 1, 1, 3, 3, 3):
            standins.agree(static, caches, ids[:, t : t + T])
            t += T
        if on:
            for cache in caches:
                cache.crop(-7)
            t -= 7
    assert captures[1, 1] >= 4  # with the record and without it


def test_reordered_rows_of_different_lengths(static, captures):
    ids, mask = random_ids(CONFIG, 3, 60), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5], mask[2, 4:9] = 0, 0
    caches = standins.pair(static, ids[:, :12], attention_mask=mask)
    for t in range(12, 30):
        standins.agree(static, caches, ids[:, t : t + 1])
        if t == 20:
            with torch.no_grad():
                for cache in caches:
                    cache.reorder_cache(torch.tensor([1, 0, 2]))


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("has_padding", [False, True])
def test_captured_crops_on_a_gpu(has_padding):
    """As above, with kernels and graphs, against the same kernels one after the other."""
    model = build(CONFIG).to(DEVICE)
    ids, mask = random_ids(CONFIG, 2, 400).to(DEVICE), torch.ones(2, 10).long().to(DEVICE)
    mask[0, 3:7] = int(not has_padding)
    caches = [recording(model, ids[:, :10], mask) for _ in range(2)]
    caches[0].graphs, other = DecodeGraphs(model), recording(model, ids[:, :10], mask)
    t = 10
    for removed in (1, 2, 3, 4, 5, 6, 7, 0, 8):
        for steps in ((8,), (2, 1, 1, 1, 3)):
            for T in steps:
                a, b = (run(model, ids[:, t : t + T], cache) for cache in caches)
                assert_as_good_as(f"{t}", a, b, b)
                t += T
            for cache in caches:
                cache.crop(-removed)
            if removed < 8:
                run(model, ids[:, t - 8 : t - removed], other)
            t -= removed
            for cache in caches:
                for a, b in zip(states(cache), states(other), strict=True):
                    assert_as_good_as(f"state after {t}", a, b, b)
    assert not caches[0].graphs.failed
    assert all(graph is not None for graph in caches[0].graphs.graphs.values())
