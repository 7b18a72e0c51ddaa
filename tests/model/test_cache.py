"""KimiLinearCache: what it holds, and that no way of filling it changes what the model says."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kimi_linear import KimiLinearCache, KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.cache import GROWTH, KDALayerCache, LatentLayerCache
from kimi_linear.layout import TokenLayout
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, random_ids, small_config

CONFIG = small_config((2, 5), num_hidden_layers=5)  # MLA before, between and after KDA layers
PADDING = ("left", "right", "holes")


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return build(CONFIG)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal up to the rounding of their dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (err := rel_err(got, want)) <= FLOOR[want.dtype], f"relative error {err}"


@torch.no_grad()
def run(model, ids: Tensor, cache=None, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def filled(model, ids: Tensor, mask: Tensor | None = None) -> KimiLinearCache:
    cache = KimiLinearCache(model.config)
    run(model, ids, cache, mask)
    return cache


def states(cache: KimiLinearCache) -> list[Tensor]:
    """All that a cache holds: conv states, S, and latents, with zeros where a row is shorter."""
    out: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, KDALayerCache):
            out += layer.states()
        else:
            out.append(layer.keys[:, : cache.seen].clone())
            for b, length in enumerate([] if cache.lengths is None else cache.lengths):
                out[-1][b, length:] = 0
    return out


def frozen(cache: KimiLinearCache) -> tuple:
    """A copy of all that may change, to compare with later."""
    held = [x.clone() for x in states(cache)] if cache.batch_size > 0 else []
    counts = cache.seen, cache.lengths, [getattr(layer, "length", None) for layer in cache.layers]
    return held, copy.deepcopy(counts)


def assert_unchanged(cache: KimiLinearCache, before: tuple) -> None:
    (held, counts), (held_, counts_) = frozen(cache), before
    assert all(map(torch.equal, held, held_)) and len(held) == len(held_)
    assert str(counts) == str(counts_)


def padded(kind: str, lengths: list[int], T: int) -> Tensor:
    """A mask [B, T] with `lengths[b]` real tokens in row b."""
    mask = torch.zeros(len(lengths), T, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        at = {"left": torch.arange(T - n, T), "right": torch.arange(n)}.get(kind)
        row[torch.randperm(T)[:n] if at is None else at] = 1
    return mask


# ---- contents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [2, 9])
def test_contents_after_prefill(T, dtype):
    model, ids, inputs = build(CONFIG).to(dtype), random_ids(CONFIG, 3, T), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _x, y, name=name: inputs.update({name: y}))
    cache = filled(model, ids)
    H, K, W = CONFIG.linear_num_heads, CONFIG.linear_head_dim, CONFIG.linear_conv_kernel_dim
    R, P = CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim
    for i, layer in enumerate(cache.layers):
        name = f"model.layers.{i}.self_attn."
        if isinstance(layer, KDALayerCache):
            conv, S = layer.states()
            qkv = torch.cat([inputs[f"{name}{x}_proj"] for x in "qkv"], -1)
            want = torch.cat((qkv.new_zeros(3, W - 1, 3 * H * K), qkv), 1)[:, -(W - 1) :]
            assert torch.equal(conv, want) and conv.dtype == dtype
            assert S.shape == (3, H, K, K) and S.dtype == torch.float32
        else:
            k_r = inputs[name + "kv_a_proj_with_mqa"][..., R:]
            want = torch.cat((inputs[name + "kv_a_layernorm"], k_r), -1)
            assert torch.equal(layer.keys[:, :T], want) and layer.keys.dtype == dtype
            assert layer.keys.shape[-1] == R + P
    assert (cache.get_seq_length(), cache.batch_size, cache.lengths) == (T, 3, None)
    assert [type(x) is LatentLayerCache for x in cache.layers] == [False, True, False, False, True]


def test_a_kda_state_is_all_that_a_kda_layer_keeps(model):
    """Not a view of all inputs of the prefill, which would be [B, T, 3 H K] per layer."""
    for T in (100, 1):
        cache = filled(model, random_ids(CONFIG, 2, T))
        for x in (x for i in (0, 2, 3) for x in cache.layers[i].states()):
            assert x.untyped_storage().nbytes() == x.nbytes


def test_bytes_per_token_of_the_released_model():
    folder = Path(__file__).parents[2] / "configs"
    config = KimiLinearConfig.from_json_file(folder / "kimi_linear_48b_a3b.json")
    latents = config.layer_types.count("full_attention")
    assert 2 * latents * (config.kv_lora_rank + config.qk_rope_head_dim) == 8064
    cache, T = KimiLinearCache(config), 3
    for layer in cache.layers:
        if isinstance(layer, LatentLayerCache):
            layer.update(torch.zeros(1, T, 576, dtype=torch.bfloat16), TokenLayout((1, T)))
    held = [x.keys.nbytes for x in cache.layers if isinstance(x, LatentLayerCache)]
    assert sum(held) == 8064 * T


# ---- one forward, pieces, single tokens ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1], [7], [64], [65], [1, 7, 64, 65], [131]])
def test_pieces_equal_the_whole(sizes, dtype):
    model, ids, T = build(CONFIG).to(dtype), random_ids(CONFIG, 2, 131), 131
    whole = KimiLinearCache(CONFIG)
    want, without = run(model, ids, whole), run(model, ids)
    assert torch.equal(want, without)
    cache, logits, start = KimiLinearCache(CONFIG), [], 0
    while start < T:
        size = sizes[min(len(logits), len(sizes) - 1)]
        logits.append(run(model, ids[:, start : start + size], cache))
        start += size
        assert cache.get_seq_length() == min(start, T)
    assert_same(torch.cat(logits, 1), want)
    for got, want in zip(states(cache), states(whole), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("kind", PADDING)
def test_turns_with_padding_equal_each_row_alone(kind, model):
    """Each turn has padding of another kind; some rows get nothing at all, or one token."""
    turns = [  # columns, real tokens of the three rows
        (70, [70, 1, 66]), (1, [1, 1, 1]), (1, [1, 0, 1]), (9, [4, 9, 0]), (5, [5, 5, 5]),
        (1, [0, 1, 0]), (66, [3, 65, 66]), (1, [1, 0, 0]), (2, [1, 2, 1]),
    ]  # fmt: skip
    cache, mask, ids, logits = KimiLinearCache(CONFIG), torch.ones(3, 0), torch.ones(3, 0), []
    kinds = PADDING[PADDING.index(kind) :] + PADDING[: PADDING.index(kind)]
    for i, (T, real) in enumerate(turns):
        new = random_ids(CONFIG, 3, T, seed=i)
        mask = torch.cat((mask, padded(kinds[i % 3], real, T)), 1)
        ids = torch.cat((ids, new), 1).long()
        logits.append(run(model, new, cache, mask))
    logits, real = torch.cat(logits, 1), mask.bool()
    assert cache.lengths.tolist() == mask.sum(1).tolist() and cache.seen == mask.shape[1]
    for b in range(3):
        alone = KimiLinearCache(CONFIG)
        assert_same(logits[b, real[b]], run(model, ids[b, real[b]][None], alone)[0])
        for got, want in zip(states(cache), states(alone), strict=True):
            n = want.shape[1]  # of latents: the tokens of this row
            assert_same(got[b, :n], want[0])
    assert (logits[~real] == 0).all()


def test_a_row_may_be_empty_until_later(model):
    ids, mask = random_ids(CONFIG, 2, 12), torch.ones(2, 12)
    mask[1, :8] = 0
    cache = filled(model, ids[:, :8], mask[:, :8])
    assert_same(run(model, ids[:, 8:], cache)[1:], run(model, ids[1:, 8:]))


def test_without_a_mask_all_new_tokens_are_real(model):
    ids, mask = random_ids(CONFIG, 2, 20), torch.ones(2, 20)
    mask[0, 2:7] = 0
    cache = filled(model, ids[:, :10], mask[:, :10])
    want = run(model, ids[:, 10:], cache.fork(), mask)
    assert torch.equal(run(model, ids[:, 10:], cache), want)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_padding", [False, True])
def test_latents_grow_by_a_factor(has_padding):
    """A constant number of copies per token; a buffer is never much larger than its contents."""
    layer, T, addresses, copied = LatentLayerCache(), 3000, [], 0
    for t in range(T):
        layout = TokenLayout((2, 1))
        if has_padding:
            layout.slots = torch.arange(2), torch.tensor([t, t])
        layer.update(torch.full((2, 1, 3), float(t)), layout)
        layer.length += 1
        if not addresses or layer.keys.data_ptr() != addresses[-1]:
            addresses.append(layer.keys.data_ptr())
            copied += t
        assert layer.keys.shape[1] <= GROWTH * (t + 1) + 1
    assert len(addresses) <= math.log(T) / math.log(GROWTH) + 4
    assert copied <= T * GROWTH / (GROWTH - 1) + 10
    assert torch.equal(layer.keys[1, :T, 0], torch.arange(T, dtype=torch.float32))


def test_a_decode_step_writes_where_the_latents_are(model):
    cache = filled(model, random_ids(CONFIG, 2, 100))
    run(model, random_ids(CONFIG, 2, 1), cache)  # makes room
    address = cache.layers[1].keys.data_ptr()
    for _ in range(20):
        run(model, random_ids(CONFIG, 2, 1), cache)
        assert cache.layers[1].keys.data_ptr() == address


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_padding", [False, True])
def test_forks_are_independent_and_exact(has_padding, model):
    prefix = random_ids(CONFIG, 2, 21)
    mask = padded("left", [4, 20], 20) if has_padding else None
    new = [random_ids(CONFIG, 2, 30, seed=seed).split([1, 1, 3, 1, 24], 1) for seed in (2, 3)]

    def start():
        cache = filled(model, prefix[:, :20], mask)
        run(model, prefix[:, 20:], cache)  # makes room: the next tokens go into the same buffer
        return cache

    want = []
    for pieces in new:
        cache = start()
        want.append([run(model, x, cache) for x in pieces])
    both = [cache := start(), cache.fork()]
    for i in range(5):  # in turns, so that one could disturb the other
        for cache, pieces, logits in zip(both, new, want, strict=True):
            assert torch.equal(run(model, pieces[i], cache), logits[i])


def masked_turn(model, cache):
    mask = torch.ones(2, cache.seen + 3)
    mask[0, -2:] = 0
    if cache.lengths is not None:
        mask[0, : cache.seen - int(cache.lengths[0])] = 0
    run(model, random_ids(CONFIG, 2, 3, seed=5), cache, mask)


DETOURS = {
    "nothing": lambda m, c: None,
    "a token": lambda m, c: run(m, random_ids(CONFIG, 2, 1, seed=3), c),
    "growth": lambda m, c: run(m, random_ids(CONFIG, 2, 90, seed=3), c),
    "padding": masked_turn,
    "reorder": lambda m, c: c.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda m, c: c.batch_repeat_interleave(3),
    "select": lambda m, c: c.batch_select_indices(torch.tensor([1])),
    "reset": lambda m, c: c.reset(),
}


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("detour", DETOURS)
def test_restore_is_exact_and_can_be_repeated(detour, has_padding, model):
    ids = random_ids(CONFIG, 2, 24)
    cache = filled(model, ids[:, :20], padded("left", [5, 20], 20) if has_padding else None)
    run(model, ids[:, 20:21], cache)  # makes room, as above
    snapshot, before = cache.snapshot(), frozen(cache)
    want = run(model, ids[:, 21:], cache.fork())
    for _ in range(2):
        DETOURS[detour](model, cache)
        cache.restore(snapshot)
        assert_unchanged(cache, before)
        assert torch.equal(run(model, ids[:, 21:], cache), want)


def test_snapshots_form_a_tree(model):
    """Going back and on from an early snapshot must not spoil a later one."""
    ids = random_ids(CONFIG, 2, 24)
    cache = filled(model, ids[:, :20])
    run(model, ids[:, 20:21], cache)  # makes room, as above
    early = cache.snapshot()
    run(model, ids[:, 21:23], cache)
    late = cache.snapshot()
    want = run(model, ids[:, 23:], cache.fork())
    cache.restore(early)
    run(model, random_ids(CONFIG, 2, 3, seed=9), cache)
    cache.restore(late)
    assert torch.equal(run(model, ids[:, 23:], cache), want)


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize(
    ("call", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move_with_all_they_own(call, argument, rows, has_padding, model):
    ids, B = random_ids(CONFIG, 3, 12), len(rows)
    mask = padded("left", [12, 3, 7], 12) if has_padding else torch.ones(3, 12).long()
    cache = filled(model, ids, mask)
    getattr(cache, call)(argument)
    assert cache.batch_size == B and cache.seen == 12
    assert not has_padding or cache.lengths.tolist() == [[12, 3, 7][b] for b in rows]
    new = random_ids(CONFIG, B, 6, seed=2)
    got = torch.cat([run(model, x, cache) for x in new.split([1, 5], 1)], 1)
    for i, b in enumerate(rows):
        alone = torch.cat((ids[b, mask[b].bool()], new[i]))[None]
        assert_same(got[i], run(model, alone)[0, -6:])


def test_an_empty_cache_has_no_rows_to_move(model):
    cache = KimiLinearCache(CONFIG)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    assert (cache.seen, cache.batch_size) == (0, -1)
    ids = random_ids(CONFIG, 2, 5)
    assert torch.equal(run(model, ids, cache), run(model, ids))


def test_a_reset_cache_is_as_new(model):
    cache = filled(model, random_ids(CONFIG, 2, 7), padded("right", [3, 7], 7))
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.lengths) == (0, -1, None)
    ids = random_ids(CONFIG, 3, 12, seed=2)  # also of another batch size
    got = [run(model, x, cache) for x in ids.split([5, 7], 1)]
    fresh = KimiLinearCache(CONFIG)
    want = [run(model, x, fresh) for x in ids.split([5, 7], 1)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- errors -------------------------------------------------------------------------------------


def mask_with(*zeros: int) -> Tensor:
    mask = torch.ones(2, 9)
    mask[0, list(zeros)] = 0
    return mask


ids = random_ids(CONFIG, 2, 4)  # the cache holds 5 columns
BAD = {  # name: (what the message says, arguments of the forward)
    "batch": ("holds 2 sequences, but the input has 3", {"input_ids": random_ids(CONFIG, 3, 4)}),
    "new mask only": ("attention_mask has shape", {"attention_mask": torch.ones(2, 4)}),
    "4-D mask": ("attention_mask has shape", {"attention_mask": torch.ones(2, 1, 4, 9)}),
    "mask of other rows": ("attention_mask has shape", {"attention_mask": torch.ones(1, 9)}),
    "past masked out": ("attention_mask marks other past", {"attention_mask": mask_with(1)}),
    "positions": ("position_ids has shape", {"position_ids": torch.arange(9)[None]}),
    "documents": ("packed documents", {"position_ids": torch.tensor([[0, 1, 0, 1]])}),
    "cu_seqlens": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 4])}),
    "two inputs": ("input_ids or inputs_embeds", {"inputs_embeds": torch.zeros(2, 4, 48)}),
    "unknown": ("cache_position is not an argument", {"cache_position": torch.arange(4)}),
    "labels": ("labels", {"labels": ids[:, :3]}),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_leaves_the_cache_as_it_was(name, model):
    message, arguments = BAD[name]
    cache = filled(model, random_ids(CONFIG, 2, 5))
    want, before = run(model, ids, cache.fork()), frozen(cache)
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids} | arguments), past_key_values=cache)
    assert_unchanged(cache, before)
    assert torch.equal(run(model, ids, cache), want)


def test_a_padded_past_cannot_become_real(model):
    cache = filled(model, random_ids(CONFIG, 2, 5), mask_with(0)[:, :5])
    before = frozen(cache)
    for mask in (torch.ones(2, 9), mask_with(0, 1)):
        with pytest.raises(ValueError, match="attention_mask marks other past"):
            run(model, ids, cache, mask)
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("kv_lora_rank", {"kv_lora_rank": 24, "qk_rope_head_dim": 4}),
        ("qk_rope_head_dim", {"qk_rope_head_dim": 8}),
        ("layer_types", {"full_attn_layers": (3, 5)}),
        ("layer_types", {"full_attn_layers": (2,), "num_hidden_layers": 4}),
    ],
)
def test_the_cache_of_another_config(field, changes, model):
    fields = {"full_attn_layers": (2, 5), "num_hidden_layers": 5} | changes
    cache = KimiLinearCache(small_config(**fields))
    with pytest.raises(ValueError, match=f"another config: its {field}"):
        run(model, ids, cache)
    with pytest.raises(ValueError, match="is a DynamicCache, want a kimi_linear"):
        run(model, ids, DynamicCache(config=CONFIG))


@pytest.mark.parametrize("full_attn_layers", [(4,), (1, 4), (1, 2, 3, 4)])
def test_crop_and_another_dtype_are_refused_by_every_pattern(full_attn_layers):
    config = small_config(full_attn_layers)
    model = build(config)
    cache = filled(model, ids)
    before = frozen(cache)
    for remove in (-2, 2):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(remove)
        assert_unchanged(cache, before)
    cache.crop(0)
    assert_unchanged(cache, before)
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(ValueError, match="float32"):
        run(model.to(torch.bfloat16), ids, cache)
    assert_unchanged(cache, before)


def test_gradient_checkpointing_and_a_cache_exclude_each_other():
    model = build(CONFIG).train()
    model.gradient_checkpointing_enable()
    cache = KimiLinearCache(CONFIG)
    with pytest.raises(ValueError, match="checkpointing"):
        model(ids, past_key_values=cache)
    assert (cache.seen, cache.batch_size) == (0, -1)
    assert model(ids).past_key_values is None


# ---- gradients ----------------------------------------------------------------------------------


def loss_of(model, ids: Tensor, cache: KimiLinearCache, **kwargs) -> Tensor:
    return model(ids, past_key_values=cache, **kwargs).logits.square().mean()


def test_gradients_of_new_tokens_stop_at_the_cache():
    """Against finite differences of the same continuation, one direction per weight."""
    model, ids = build(CONFIG).double(), random_ids(CONFIG, 2, 14)
    prefix = padded("left", [4, 8], 8)
    cache = filled(model, ids[:, :8], prefix)
    loss_of(model, ids[:, 8:], cache.fork()).backward()
    for name, p in model.named_parameters():
        x, direction, eps = p.detach().clone(), torch.randn_like(p), 1e-5
        loss = []
        for sign in (1, -1):
            p.data.copy_(x + sign * eps * direction)
            with torch.no_grad():
                loss.append(loss_of(model, ids[:, 8:], cache.fork()).item())
        p.data.copy_(x)
        want = (loss[0] - loss[1]) / (2 * eps)
        assert (p.grad * direction).sum().item() == pytest.approx(want, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("has_padding", [False, True])
def test_stored_states_never_require_gradients(has_padding, model):
    ids = random_ids(CONFIG, 2, 14)
    mask = padded("left", [4, 8], 8) if has_padding else None
    want = filled(model, ids[:, :8], mask)
    cache = KimiLinearCache(CONFIG)
    first = loss_of(model, ids[:, :8], cache, attention_mask=mask)
    assert not any(x.requires_grad for x in states(cache))
    grads = []
    for c in (cache, want):
        loss = loss_of(model, ids[:, 8:], c)
        assert not any(x.requires_grad for x in states(c))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.autograd.grad(
        first, list(model.parameters())
    )  # the cache has gone on, its graph is intact


@pytest.mark.parametrize("trained", ["", "layers.4.self_attn.q_proj"])
def test_gradients_through_several_steps(trained):
    """Also where the latents themselves need none, as under LoRA on the queries alone."""
    model, ids = build(CONFIG), random_ids(CONFIG, 2, 14)
    weights = [p.requires_grad_(trained in name) for name, p in model.named_parameters()]
    weights = [p for p in weights if p.requires_grad]
    pieces = ids[:, 8:].split(1, 1)
    cache = filled(model, ids[:, :8])
    total = sum(loss_of(model, x, cache) for x in pieces)
    got = torch.autograd.grad(total, weights)
    cache, want = filled(model, ids[:, :8]), []
    for x in pieces:
        want.append(torch.autograd.grad(loss_of(model, x, cache), weights))
    for g, w in zip(got, zip(*want, strict=True), strict=True):
        assert_same(g, sum(w))


def test_a_prefix_from_inference_mode_can_be_continued(model):
    ids = random_ids(CONFIG, 2, 12)
    with torch.inference_mode():
        cache = KimiLinearCache(CONFIG)
        for x in ids[:, :10].split([9, 1], 1):
            model(x, past_key_values=cache)
    assert_same(run(model, ids[:, 10:], cache), run(model, ids)[:, 10:])
