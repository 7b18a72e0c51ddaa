"""The model as a module: arguments, outputs, gradients, initialisation, precision."""

import copy
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM, linear, moe
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, native_twin, random_ids, small_config

LIMIT = FLOOR[torch.float32]


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(small_config())


@pytest.fixture
def ids(model) -> Tensor:
    return random_ids(model.config, 2, 33)


def gradients(model: torch.nn.Module, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# Arguments


@pytest.mark.parametrize(
    ("names", "word"), [((), "neither"), (("input_ids", "inputs_embeds"), "both")]
)
def test_either_ids_or_embeddings(names, word, model, ids):
    embeds = model.model.embed_tokens(ids)
    given = {k: x for k, x in {"input_ids": ids, "inputs_embeds": embeds}.items() if k in names}
    for call in (model, model.model):
        with pytest.raises(ValueError, match=f"input_ids or inputs_embeds: .* {word}"):
            call(**given)


def test_wrong_shapes_are_named(model, ids):
    embeds = model.model.embed_tokens(ids)
    bad = {
        r"input_ids has shape \[33\], want \[batch, tokens\]": {"input_ids": ids[0]},
        r"inputs_embeds has shape \[33, 48\]": {"inputs_embeds": embeds[0]},
        r"inputs_embeds has shape .* want \[batch, tokens, 48\]": {
            "inputs_embeds": embeds[..., 1:]
        },
        r"labels has shape \[2, 32\], want \[2, 33\]": {"input_ids": ids, "labels": ids[:, 1:]},
        "logits_to_keep with labels": {"input_ids": ids, "labels": ids, "logits_to_keep": 1},
        "with labels: the loss": {"input_ids": ids, "labels": ids, "logits_to_keep": ids[0, :1]},
        r"attention_mask has shape": {"input_ids": ids, "attention_mask": torch.ones(2, 32)},
        "values than 1 .* go into seq_idx": {"input_ids": ids, "attention_mask": 2 * ids.sign()},
        "attention_mask has other values": {"input_ids": ids, "attention_mask": -1.0 * ids},
        r"position_ids has shape": {"input_ids": ids, "position_ids": ids[:, 1:]},
    }
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=message):
            model(**inputs)


@pytest.mark.parametrize("name", ["token_type_ids", "output_attentions", "foo"])
@pytest.mark.parametrize("value", [True, 0.5, "eager", torch.ones(2, 33)])
def test_an_unknown_keyword_is_named(name, value, model, ids):
    for call in (model, model.model):
        with pytest.raises(ValueError, match=f"{name} is not an argument"):
            call(ids, **{name: value})


def test_keywords_that_ask_for_nothing_pass(model, ids):
    want = model(ids).logits
    assert torch.equal(model(ids, output_attentions=False, token_type_ids=None).logits, want)


def test_embeddings_instead_of_ids(model, ids):
    embeds = model.model.embed_tokens(ids)
    want, got = model(ids, labels=ids), model(inputs_embeds=embeds, labels=ids)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_logits_to_keep(model, ids):
    whole = model(ids).logits
    index = torch.tensor([0, 7, 32])
    for keep, want in (
        (0, whole),
        (1, whole[:, -1:]),
        (5, whole[:, -5:]),
        (index, whole[:, index]),
    ):
        got = model(ids, logits_to_keep=keep).logits
        assert got.shape == want.shape and rel_err(got, want) < LIMIT


def test_tuples_instead_of_a_dict(model, ids):
    asked = {"labels": ids, "output_hidden_states": True, "output_router_logits": True}
    want, got = model(ids, **asked), model(ids, **asked, return_dict=False)
    assert type(got) is tuple
    loss, logits, cache, states, routing = got
    assert torch.equal(loss, want.loss) and torch.equal(logits, want.logits)
    assert type(cache) is KimiLinearCache
    assert all(torch.equal(a, b) for a, b in zip(states, want.hidden_states, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(routing, want.router_logits, strict=True))
    assert torch.equal(model.model(ids, return_dict=False)[0], want.hidden_states[-1])


# Outputs


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_router_logits(padded, model, ids):
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :10] = mask[1, -4:] = 0
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_router_logits=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (2, 33, 48) for x in out.hidden_states)
    embeds = model.model.embed_tokens(ids) * mask[..., None]
    assert torch.equal(out.hidden_states[0], embeds)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)  # after the last norm
    assert len(out.router_logits) == 3  # layer 0 is dense
    assert all(x.shape == (2 * 33, 8) and x.dtype == torch.float32 for x in out.router_logits)
    hole = ~mask.bool()
    for x in (*out.hidden_states, *(r.view(2, 33, 8) for r in out.router_logits), out.logits):
        assert not x[hole].any() and x[mask.bool()].any(-1).all()


def test_the_config_asks_for_outputs_too(model, ids):
    plain = model(ids)
    assert plain.hidden_states is None and plain.router_logits is None
    model.config.output_hidden_states = model.config.output_router_logits = True
    out = model(ids)
    assert len(out.hidden_states) == 5 and len(out.router_logits) == 3
    out = model(ids, output_hidden_states=False, output_router_logits=False)
    assert out.hidden_states is None and out.router_logits is None


def test_loss(model, ids):
    labels = ids.clone()
    labels[0, :20] = -100
    out = model(ids, labels=labels)
    flat = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.allclose(out.loss, F.cross_entropy(*flat))
    total = F.cross_entropy(*flat, reduction="sum")
    for count in (7, torch.tensor(7)):  # gradient accumulation: the mean over several batches
        assert torch.allclose(model(ids, labels=labels, num_items_in_batch=count).loss, total / 7)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert torch.allclose(model(ids, labels=labels, shift_labels=shifted).loss, out.loss)


def test_training_mode_computes_the_same(model, ids):
    want = model(ids, use_cache=False).logits
    assert torch.equal(model.train()(ids).logits, want)  # no dropout anywhere


def test_copies_compute_the_same(model, ids):
    want = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is KimiLinearForCausalLM and twin.config == model.config
        assert torch.equal(twin(ids).logits, want)
        assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_a_larger_vocabulary(model, ids):
    want = model(ids).logits
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model.config.vocab_size == 101
    out = model(ids + 0, labels=ids)
    assert rel_err(out.logits[..., :97], want) < LIMIT and out.logits.shape[-1] == 101


# Gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_a_gradient(use_reentrant, model, ids):
    model.train()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    inputs |= {"output_router_logits": True, "output_hidden_states": True}
    want = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # what reentrant checkpointing needs, and PEFT calls
    runs = []
    layer = model.model.layers[1].self_attn
    hook = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(model, **inputs)
    hook.remove()
    assert len(runs) == 2  # once more for the backward pass
    for name, grad in want.items():
        assert grad.abs().max() > 0 and torch.equal(got[name], grad), name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradients_of_the_inputs(model, ids):
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 20].sum().backward()
    assert embeds.grad[:, :21].any(-1).all() and not embeds.grad[:, 21:].any()  # causal


# Initialisation and structure


def big_fresh() -> KimiLinearForCausalLM:
    linear = {"full_attn_layers": [2], "kda_layers": [1], "short_conv_kernel_size": 4}
    linear |= {"head_dim": 8, "num_heads": 512}
    return KimiLinearForCausalLM(small_config(num_hidden_layers=2, linear_attn_config=linear))


def test_initialisation():
    fresh = big_fresh()
    gate = fresh.model.layers[0].self_attn.forget_gate
    A = gate.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and abs(A.mean() - 8.5) < 0.7 and A.std() > 3.5
    dt = F.softplus(gate.dt_bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 1.01e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.15  # log-uniform
    for name, x in fresh.state_dict().items():
        if name.endswith("norm.weight"):
            assert (x == 1).all(), name
        elif name.endswith("e_score_correction_bias"):
            assert not x.any()
        elif "forget_gate" not in name or name.endswith("proj.weight"):
            assert abs(x.std() / 0.02 - 1) < 0.2 and abs(x.mean()) < 0.005, name
    assert not fresh.model.embed_tokens.weight[fresh.config.pad_token_id].any()
    ids = random_ids(fresh.config, 2, 9)
    assert abs(fresh(ids, labels=ids).loss - math.log(97)) < 0.2


def test_initialisation_follows_the_seed():
    torch.manual_seed(5)
    a = big_fresh().state_dict()
    b = big_fresh().state_dict()
    torch.manual_seed(5)
    c = big_fresh().state_dict()
    for name, x in a.items():
        assert torch.equal(x, c[name]), name
        constant = name.endswith(("norm.weight", "e_score_correction_bias"))
        assert constant or not torch.equal(x, b[name]), name


def test_layers_that_must_not_be_split(model):
    assert set(model._no_split_modules) == {"KimiLinearDecoderLayer"}
    assert {type(layer).__name__ for layer in model.model.layers} == {"KimiLinearDecoderLayer"}


def test_parallel_plans_name_what_exists(model):
    """Every entry matches a module or parameter, and experts and router carry what plans read."""
    config, prefix = model.config, f"{model.base_model_prefix}."
    plans = [config.base_model_tp_plan, config.base_model_pp_plan, config.base_model_ep_plan]
    wanted = [prefix + key for plan in plans for key in plan] + [*model._tp_plan, *model._pp_plan]
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    for key in wanted:
        pattern = re.escape(key).replace(r"\*", r"\d+")
        assert any(re.fullmatch(pattern, name) for name in names), key
    native = native_twin(model)
    assert model._tp_plan == native._tp_plan and model._pp_plan == native._pp_plan
    moe = model.model.layers[1].mlp
    assert moe.experts.num_experts == moe.gate.num_experts == config.num_experts


# Precision

DENSE = {"first_k_dense_replace": 4}  # no expert to flip: errors stay rounding errors


def test_half_precision_is_no_worse_than_native(tmp_path):
    model = build(small_config(**DENSE))
    ids = random_ids(model.config, 2, 65)
    model.save_pretrained(tmp_path)
    gold = model.double()(ids).logits
    for dtype in (torch.bfloat16, torch.float16):
        ours = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        native = NativeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        logits = ours(ids).logits
        assert logits.dtype == dtype
        assert rel_err(logits, gold) < 1.2 * rel_err(native(ids).logits, gold)


def test_training_in_bf16(tmp_path):
    for changes in ({}, DENSE):
        model = build(small_config(**changes))
        ids = random_ids(model.config, 2, 33)
        model.save_pretrained(tmp_path)
        half = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
        want, got = gradients(model, input_ids=ids, labels=ids), {}
        got = gradients(half, input_ids=ids, labels=ids)
        for (name, p), grad in zip(half.named_parameters(), got.values(), strict=True):
            assert grad.dtype == p.dtype and grad.isfinite().all() and grad.any(), name
            assert changes == {} or rel_err(grad, want[name]) < 0.3, name
        assert half.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 36)


def test_autocast_with_fp32_master_weights():
    for changes in ({}, DENSE):
        model = build(small_config(**changes)).train()
        ids = random_ids(model.config, 2, 33)
        out = model(ids, labels=ids)
        want = gradients(model, input_ids=ids, labels=ids)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(ids, labels=ids, output_router_logits=True)
        model.zero_grad()
        half.loss.backward()
        assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in half.router_logits)
        for name, p in model.named_parameters():
            assert p.dtype == p.grad.dtype == torch.float32
            assert p.grad.isfinite().all() and p.grad.any(), name
            assert changes == {} or rel_err(p.grad, want[name]) < 0.3, name
        assert abs(half.loss - out.loss) < 0.02 * out.loss


def test_autocast_halves_the_experts_but_not_the_router(model):
    moe = model.model.layers[1].mlp
    x = torch.randn(33, 48)
    want = moe.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe.gate(x)
        assert moe.experts(x, got[2], got[1]).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dense_layer_of_a_decode_step(model, monkeypatch):
    """With its norm and residual, as a shared expert without others; one with a hook is not."""
    layer, x, calls = model.double().model.layers[0], torch.randn(2, 1, 48).double(), []
    norm = layer.post_attention_layernorm
    monkeypatch.setattr(moe, "decodes", lambda x: True)
    call = moe.expert_mlp
    monkeypatch.setattr(moe, "expert_mlp", lambda *args: calls.append(args) or call(*args))
    with torch.no_grad():
        want = x + layer.mlp(norm(x))
        assert not calls
        assert rel_err(layer.mlp(x, norm), want) <= FLOOR[torch.float64] and len(calls) == 1
        layer.mlp.up_proj.register_forward_hook(lambda *args: None)
        assert rel_err(layer.mlp(x, norm), want) <= FLOOR[torch.float64] and len(calls) == 1


@pytest.mark.parametrize(
    "tokens, dtype, launch, with_norm",
    [
        (2, torch.float32, True, True),
        (3, torch.float32, False, False),
        (3, torch.bfloat16, True, False),
        (128, torch.bfloat16, True, False),
        (129, torch.bfloat16, False, False),
    ],
    ids=str,
)
def test_projections_of_few_tokens(tokens, dtype, launch, with_norm, model, monkeypatch):
    """In one launch, and with the norm for one or two tokens; one with a hook is called."""
    layer, calls = model.to(dtype).model.layers[0], []
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    x, h = torch.randn(tokens, 48).to(dtype), torch.randn(tokens, 56).to(dtype)
    call = linear.fused_linears
    monkeypatch.setattr(
        linear, "fused_linears", lambda *a, **options: calls.append(options) or call(*a, **options)
    )

    def run():
        return *linear.project(x, gate, up, norm=norm), *linear.project(h, down, residual=x)

    with torch.no_grad():
        want = run()
        assert not calls
        monkeypatch.setattr(linear, "infers", lambda x: True)
        assert all(map(torch.equal, run(), want))
        assert [c["norm"] is not None for c in calls] == [with_norm] * launch + [False] * (
            tokens < 3
        )
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
        down.register_forward_hook(lambda module, inputs, output: 3 * output)
        calls.clear()
        assert torch.equal(linear.project(x, gate, up, norm=norm)[1], up(norm(x)))
        assert [c["norm"] for c in calls] == [None] * launch
        assert torch.equal(linear.project(h, down, residual=x)[0], x + down(h))
        assert len(calls) == launch


def test_who_infers(monkeypatch):
    """Nobody who wants a gradient, or autocast, or is not on a GPU."""
    on_gpu = SimpleNamespace(is_cuda=True)
    assert not linear.infers(on_gpu)
    with torch.no_grad():
        assert linear.infers(on_gpu) and not linear.infers(torch.ones(1))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not linear.infers(on_gpu)
