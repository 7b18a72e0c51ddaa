"""Against transformers' own kimi_linear: the same function, the same gradients, side by side.

The native model is an independent implementation. Its weights come from a checkpoint that ours
saved, so these tests also say that transformers reads what we write.
"""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.kimi_linear.configuration_kimi_linear import (
    KimiLinearConfig as NativeConfig,
)
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearModel as NativeModel

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, KimiLinearModel
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, native_twin, random_ids, small_config

CASES = {
    "released": {},  # KDA KDA KDA MLA, layer 0 dense, one shared expert, no groups
    "mla_first": {"full_attn_layers": (1, 3)},
    "all_mla": {"full_attn_layers": (1, 2), "num_hidden_layers": 2},
    "all_kda": {"full_attn_layers": (), "num_hidden_layers": 3},
    "q_lora": {"q_lora_rank": 14},
    "two_groups": {"num_expert_group": 2},
    "four_groups": {"num_expert_group": 4, "topk_group": 2, "num_experts_per_token": 3},
    "no_renormalize": {"moe_renormalize": False, "routed_scaling_factor": 1.5},
    "no_dense": {"first_k_dense_replace": 0},
    "two_dense": {"first_k_dense_replace": 2},
    "all_dense": {"first_k_dense_replace": 4},
    "every_other_sparse": {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    "two_shared": {"num_shared_experts": 2},
    "short_conv": {
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "head_dim": 12,
            "kda_layers": [1, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 3,
        }
    },
    "large_eps": {"rms_norm_eps": 0.1},  # shows which norms use it: those of latents do not
    "q_lora_large_eps": {"q_lora_rank": 14, "rms_norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True},
}
LENGTHS = (1, 63, 64, 65, 130)
LIMIT = FLOOR[torch.float32]
# Gradients carry more rounding: native sums the decays of up to 64 tokens before it subtracts two
# of the sums, so exponents of up to 60 are off by 4e-6 before exp and the chain rule see them. The
# gradient of A_log is one number per head, in which terms of both signs nearly cancel.
GRADIENT_LIMIT, A_LOG_LIMIT = 1e-4, 1e-3


@functools.cache
def pair(case: str) -> tuple[KimiLinearForCausalLM, NativeForCausalLM]:
    """Our model and transformers' own with the same weights."""
    ours = build(small_config(**CASES[case]))
    return ours, native_twin(ours)


@contextlib.contextmanager
def routing(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What each router returns in this block: logits, weights and experts. 5.17 has no argument."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, out: calls.append(out))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def dense_weights(logits: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Routing weights as `[T, E]`, zero for experts that were not chosen: no order of experts."""
    return torch.zeros_like(logits).scatter(1, index, weights)


# One function


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_router_logits(case, T):
    ours, native = pair(case)
    ids = random_ids(ours.config, 2, T)
    with torch.no_grad(), routing(native) as native_router:
        a = ours(ids, output_hidden_states=True, output_router_logits=True, use_cache=False)
        b = native(ids, output_hidden_states=True, use_cache=False)
    assert a.logits.shape == b.logits.shape == (2, T, ours.config.vocab_size)
    assert rel_err(a.logits, b.logits) < LIMIT
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert rel_err(x, y) < LIMIT
    assert len(a.router_logits) == ours.config.mlp_layer_types.count("sparse")
    for x, (y, _, _) in zip(a.router_logits, native_router, strict=True):
        assert x.shape == y.shape and rel_err(x, y) < LIMIT


@pytest.mark.parametrize("case", ["released", "two_groups", "four_groups", "no_renormalize"])
def test_the_same_experts_with_the_same_weights(case):
    ours, native = pair(case)
    ids = random_ids(ours.config, 4, 64)
    with torch.no_grad(), routing(ours) as a, routing(native) as b:
        ours(ids), native(ids)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(dense_weights(*x) != 0, dense_weights(*y) != 0)
        assert rel_err(dense_weights(*x), dense_weights(*y)) < LIMIT
        assert len(x[2].unique()) == ours.config.num_experts  # else this compares little


def gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("T", LENGTHS[1:])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(case, T):
    ours, native = pair(case)
    ids = random_ids(ours.config, 2, T)
    labels = ids.clone()
    labels[0, : T // 3] = labels[1, T // 2 :] = -100
    loss, grads = gradients(ours, ids, labels)
    native_loss, native_grads = gradients(native, ids, labels)
    assert abs(loss - native_loss) < LIMIT * native_loss
    if case == "tied":  # native has two parameters where we have one
        native_grads["model.embed_tokens.weight"] += native_grads.pop("lm_head.weight")
    assert grads.keys() == native_grads.keys()  # the same names in memory
    for name, grad in grads.items():
        other = native_grads[name]
        assert grad.shape == other.shape and other.abs().max() > 0, name
        limit = A_LOG_LIMIT if name.endswith("A_log") else GRADIENT_LIMIT
        assert rel_err(grad, other) < limit, name


def test_one_token_has_no_loss():
    ours, native = pair("released")
    ids = random_ids(ours.config, 2, 1)
    for model in (ours, native):
        assert model(ids, labels=ids).loss.isnan()  # a mean over nothing


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    ours, native = pair(case)
    ids = random_ids(ours.config, 2, 21)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    # native cannot count the tokens in a cache without MLA layers, and raises
    cached = "full_attention" in ours.config.layer_types
    want = native.generate(ids, **options, use_cache=cached)
    got = ours.generate(ids, **options)
    assert got.shape == (2, 37) and torch.equal(got, want)
    assert len(got[:, 21:].unique()) > 4


def test_greedy_tokens_of_a_left_padded_batch():
    ours, native = pair("released")
    ids, mask = random_ids(ours.config, 2, 21), torch.ones(2, 21, dtype=torch.long)
    ids[1, :8] = mask[1, :8] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    want = native.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), want)


def test_logits_to_keep():
    ours, native = pair("released")
    ids = random_ids(ours.config, 2, 9)
    with torch.no_grad():
        for keep in (1, 4, torch.tensor([0, 5, 8])):
            a, b = ours(ids, logits_to_keep=keep).logits, native(ids, logits_to_keep=keep).logits
            assert a.shape == b.shape and rel_err(a, b) < LIMIT


def test_the_cases_differ():
    """With the same weights, a rule of the router that a config changes moves the logits."""
    ids = random_ids(small_config(), 2, 33)
    with torch.no_grad():
        released = pair("released")[0](ids).logits
        for case in ("two_groups", "no_renormalize"):
            assert rel_err(pair(case)[0](ids).logits, released) > 1e-2


# Side by side in one process


def test_the_names_in_memory_are_native():
    for case in CASES:
        ours, native = pair(case)
        a, b = ours.state_dict(), native.state_dict()
        assert {k: x.shape for k, x in a.items()} == {k: x.shape for k, x in b.items()}, case
        for name, x in b.items():
            assert torch.equal(a[name], x), name


def test_auto_classes_give_ours(tmp_path):
    config = small_config()
    build(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is KimiLinearConfig
    assert type(AutoConfig.for_model("kimi_linear")) is KimiLinearConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is KimiLinearModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is KimiLinearForCausalLM
    assert type(AutoModel.from_config(config)) is KimiLinearModel
    assert type(AutoModelForCausalLM.from_config(config)) is KimiLinearForCausalLM


def test_native_classes_keep_working(tmp_path):
    """Loads and saves of both classes, in turns: none changes what a later one does."""
    ours, native = pair("released")
    before = repr(get_checkpoint_conversion_mapping("kimi_linear"))
    ours.save_pretrained(tmp_path / "ours")
    native.save_pretrained(tmp_path / "native")
    for _ in range(2):
        for folder in ("ours", "native"):
            for cls, config_cls in (
                (NativeForCausalLM, NativeConfig),
                (KimiLinearForCausalLM, KimiLinearConfig),
            ):
                model, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
                assert type(model) is cls and type(model.config) is config_cls
                assert not any(info.values()), info
                for name, x in native.state_dict().items():
                    assert torch.equal(model.state_dict()[name], x), name
                model.save_pretrained(tmp_path / f"{folder}_{config_cls is NativeConfig}")
    assert repr(get_checkpoint_conversion_mapping("kimi_linear")) == before
    native_config = NativeConfig.from_pretrained(tmp_path / "ours")
    assert type(native_config) is NativeConfig
    assert type(NativeModel(native_config)) is NativeModel
    assert type(AutoModelForCausalLM.from_config(native_config)) is NativeForCausalLM
    assert type(AutoModel.from_config(native_config)) is NativeModel


ALONE = """
import sys
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM
model = KimiLinearForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("kimi_linear", "kimi_kernels"))]
"""


def test_native_saves_the_same_file_where_ours_was_never_imported(tmp_path):
    ours, _ = pair("released")
    ours.save_pretrained(tmp_path / "ours")
    alone = [sys.executable, "-c", ALONE, str(tmp_path / "ours"), str(tmp_path / "alone")]
    subprocess.run(alone, check=True, cwd=tmp_path, capture_output=True)
    NativeForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "beside")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "beside" / file).read_bytes()


def test_a_tied_native_checkpoint_loads_with_its_own_head(tmp_path):
    """Native ignores `tie_word_embeddings` and saves both matrices; ours ties equal ones only."""
    ours, native = pair("tied")
    ids = random_ids(ours.config, 2, 9)
    native.save_pretrained(tmp_path / "equal")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "equal")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    other = native_twin(ours)
    other.lm_head.weight.data.normal_()
    other.save_pretrained(tmp_path / "different")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "different")
    with torch.no_grad():
        assert rel_err(loaded(ids).logits, other(ids).logits) < LIMIT


def test_a_tied_model_is_saved_with_its_head_for_native_which_never_ties(tmp_path):
    ours, _ = pair("tied")
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    native = NativeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(native.lm_head.weight, ours.model.embed_tokens.weight)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
