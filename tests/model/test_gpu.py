"""The whole model on a GPU, where the kernels run, against the reference."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from kimi_kernels import backend
from kimi_linear import KimiLinearConfig, decode
from kimi_linear import modeling_kimi_linear as modeling
from kimi_linear import moe as experts
from kimi_linear.moe import KimiLinearMoE, KimiLinearTopkRouter
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches, rel_err
from tests.model.helpers import build, random_ids, small_config

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    return build(small_config()).to(DEVICE)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_hidden_states(model, dtype):
    """Of a layer, whose experts no rounding of an earlier layer has changed."""
    ids = random_ids(model.config, 2, 133).to(DEVICE)
    found = []
    for name, cast in (("auto", dtype), ("reference", dtype), ("reference", torch.float64)):
        with backend(name), torch.no_grad():
            copied = copy.deepcopy(model).to(cast)
            found.append(copied(ids, output_hidden_states=True).hidden_states[1])
    assert_as_good_as("hidden", *found, dtype)


def test_loss_and_gradients(model):
    ids = random_ids(model.config, 2, 133).to(DEVICE)
    found = []
    for name, cast in (("auto", None), ("reference", None), ("reference", torch.float64)):
        copied = copy.deepcopy(model).to(cast)
        with backend(name):
            loss = copied(ids, labels=ids, skip_logits=False).loss
            loss.backward()
        found.append({"loss": loss} | {n: p.grad for n, p in copied.named_parameters()})
    for name, got in found[0].items():  # A_log's is a small sum of large terms, of every layer
        assert rel_err(got, found[2][name]) < max(1e-4, 2 * rel_err(found[1][name], found[2][name]))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(model, beams):
    ids = random_ids(model.config, 2, 33).to(DEVICE)
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    got = model.generate(ids, **options)
    with backend("reference"):
        want = model.generate(ids, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_without_a_gradient(dtype):
    """16-bit products summed in fp32 are those of fp32."""
    router = KimiLinearTopkRouter(small_config(hidden_size=2304)).to(DEVICE, dtype)
    torch.nn.init.normal_(router.weight, std=0.02)
    x = torch.randn(100, 2304, device=DEVICE, dtype=dtype)
    logits = router(x)[0].detach()
    with torch.no_grad():
        other = router(x)[0]
    assert other.dtype == torch.float32
    gold = x.double() @ router.weight.double().mT
    assert_as_good_as("logits", other, logits, gold)


# ---- decoding in CUDA graphs -------------------------------------------------------------------


def tokens_and_cache(model, batch, **options):
    out = model.generate(**batch, do_sample=False, return_dict_in_generate=True, **options)
    return out.sequences, out.past_key_values


def batch_of(config, B, padded):
    ids = random_ids(config, B, 40).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :13] = 0
        ids[0, :13] = config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("T", [3, 48, 300])
@pytest.mark.parametrize("released", [False, True])
def test_the_shared_expert_beside_the_others(T, released, monkeypatch):
    """In a graph, of twenty layers, and each time in the memory that the layer before has left."""
    config, joins = KimiLinearConfig(num_experts=16) if released else small_config(), []
    with torch.device(DEVICE):
        moe = KimiLinearMoE(config).bfloat16()
    for p in moe.parameters():
        p.normal_(std=p.shape[-1] ** -0.5)

    def beside(work, x):
        joins.append(decode.beside(work, x))
        return joins[-1]

    monkeypatch.setattr(experts, "beside", beside)

    def chain(x):
        for _ in range(20):
            x = x + moe(x / x.norm(dim=-1, keepdim=True) * 30)[0] / 5
        return x

    x = torch.randn(1, T, config.hidden_size, device=DEVICE).bfloat16()
    check_early_launches(chain, x)
    assert [x.__name__ for x in joins] == 40 * ["<lambda>"] + 20 * ["join"]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("B, padded", [(1, False), (3, False), (3, True)])
def test_captured_generation(model, monkeypatch, B, padded, beams):
    """The same tokens as uncaptured, and every step from the second on comes from a graph."""
    batch = batch_of(model.config, B, padded)
    options = {"max_new_tokens": 30, "num_beams": beams, "eos_token_id": -1}
    got, cache = tokens_and_cache(model, batch, **options)
    ((shape, graph),) = cache.graphs.graphs.items()
    assert shape == (B * beams, 1) and graph is not None and graph.seen == cache.seen == 69
    monkeypatch.setattr(modeling, "decode_graphs", lambda *args: None)
    want, plain = tokens_and_cache(model, batch, **options)
    assert plain.graphs is None and torch.equal(got, want)


def test_captured_steps_through_the_life_of_a_cache(model):
    """Growth, reset of the tokens, snapshot, fork, fewer rows, more tokens at a time."""
    ids = random_ids(model.config, 2, 400).to(DEVICE)
    _, cache = tokens_and_cache(model, {"input_ids": ids[:, :10]}, max_new_tokens=4)
    twin = cache.fork()
    assert twin.graphs is None and not cache.graphs.active
    cache.graphs.active = True
    at = cache.seen

    def both(*where):
        nonlocal at
        for n in where:
            x = ids[: cache.batch_size, at : at + n]
            with torch.no_grad():
                a, b = (model(x, past_key_values=c).logits for c in (cache, twin))
            assert_as_good_as(f"{at}", a, b, b)
            at += n

    both(*[1] * 60)  # the buffer grows
    both(3, 3, 3, 1, 8, 8, 8, 1)
    marks, before = (cache.snapshot(), twin.snapshot()), at
    both(1, 1, 20, 1, 1)
    cache.restore(marks[0]), twin.restore(marks[1])
    at = before
    both(1, 1, 1, 2, 2, 2)
    for c in (cache, twin):
        c.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    both(1, 1)
    for c in (cache, twin):
        c.batch_select_indices(torch.tensor([1], device=DEVICE))
    both(1, 1, 1)
    assert all(graph is not None for graph in cache.graphs.graphs.values())


def test_what_cannot_be_captured(model):
    """It decodes all the same, and says why, once per call."""
    batch = batch_of(model.config, 1, False)
    want, _ = tokens_and_cache(model, batch, max_new_tokens=8)
    add_hook_to_module(model.model.layers[1].mlp, ModelHook())
    with pytest.warns(UserWarning, match="without a CUDA graph: model.layers.1.mlp has a hook"):
        got, cache = tokens_and_cache(model, batch, max_new_tokens=8)
    assert cache.graphs is None and torch.equal(got, want)


def test_a_second_call_uses_the_graphs_of_the_first(model):
    """And captures again when parameters have moved."""
    batch = batch_of(model.config, 1, False)
    seq, cache = tokens_and_cache(model, batch, max_new_tokens=8)
    first = cache.graphs
    more, _ = tokens_and_cache(model, {"input_ids": seq}, max_new_tokens=8, past_key_values=cache)
    assert cache.graphs is first
    assert torch.equal(more, tokens_and_cache(model, batch, max_new_tokens=16)[0])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    got, _ = tokens_and_cache(model, {"input_ids": more}, max_new_tokens=8, past_key_values=cache)
    assert cache.graphs is not first
    assert torch.equal(got, tokens_and_cache(model, {"input_ids": more}, max_new_tokens=8)[0])
