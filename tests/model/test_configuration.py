"""KimiLinearConfig: lossless files, layer pattern, validation, exchange with transformers."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.models.kimi_linear.configuration_kimi_linear import (
    KimiLinearConfig as NativeKimiLinearConfig,
)

from kimi_linear.configuration_kimi_linear import KimiLinearConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = ("kimi_linear_48b_a3b.json", "kimi_linear_128e.json", "tiny.json")
RELEASED = json.loads((CONFIGS / FILES[0]).read_text())
KDA, MLA = "linear_attention", "full_attention"
PATTERN = {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}


def save(config: PreTrainedConfig, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def pattern(kda: Any, full: Any, **dims: Any) -> dict[str, Any]:
    """A linear_attn_config."""
    return PATTERN | dims | {"kda_layers": kda, "full_attn_layers": full}


def meaning(config: PreTrainedConfig) -> dict:
    """What a model is built from, under names that both classes have."""
    names = {field.name for field in dataclasses.fields(NativeKimiLinearConfig)}
    names -= {"architectures", "transformers_version"}
    names -= {"attention_bias", "attention_dropout", "pretraining_tp"}  # not in the released file
    return {name: getattr(config, name) for name in names | {"qk_head_dim"}}


# Files


@pytest.mark.parametrize("file", FILES)
def test_a_file_loses_nothing(file, tmp_path):
    text = (CONFIGS / file).read_text()
    given = json.loads(text)
    (tmp_path / "config.json").write_text(text)
    for config in (
        KimiLinearConfig.from_pretrained(tmp_path),
        KimiLinearConfig.from_json_file(CONFIGS / file),
        KimiLinearConfig.from_dict(given),
    ):
        saved = save(config, tmp_path / "saved")
        assert saved | {"transformers_version": given["transformers_version"]} == given | {
            "output_router_logits": False
        }
        assert isinstance(config.dtype, torch.dtype)


def test_an_unknown_field_is_kept(tmp_path):
    config = KimiLinearConfig(foo=1, bar=None, linear_attn_config=None)
    config.linear_attn_config["baz"] = [2]
    saved = save(config, tmp_path)
    assert (saved["foo"], saved["bar"], saved["linear_attn_config"]["baz"]) == (1, None, [2])
    assert save(KimiLinearConfig.from_pretrained(tmp_path), tmp_path) == saved


def test_rope_fields_are_kept(tmp_path):
    rope = {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    saved = save(KimiLinearConfig(**rope), tmp_path)
    assert {name: saved[name] for name in rope} == rope
    assert "rope_parameters" not in saved


def test_the_released_model():
    config = KimiLinearConfig.from_dict(RELEASED)
    assert [i for i, t in enumerate(config.layer_types) if t == MLA] == [3, 7, 11, 15, 19, 23, 26]
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 26
    assert (config.num_experts, config.qk_head_dim, config.dtype) == (256, 192, torch.bfloat16)
    assert config.q_lora_rank is None and config.rope_scaling is None


# The class


def test_defaults_are_the_released_model_with_128_experts():
    file = KimiLinearConfig.from_json_file(CONFIGS / "kimi_linear_128e.json").to_dict()
    assert KimiLinearConfig().to_dict() == file | {"architectures": None, "dtype": None}
    assert KimiLinearConfig(num_experts=256) == KimiLinearConfig.from_dict(
        {name: RELEASED[name] for name in RELEASED.keys() - {"architectures", "auto_map", "dtype"}}
    )


@pytest.mark.parametrize(
    "layers, full", [(4, [4]), (5, [4, 5]), (8, [4, 8]), (27, [4, 8, 12, 16, 20, 24, 27])]
)
def test_default_layer_pattern(layers, full):
    config = KimiLinearConfig(num_hidden_layers=layers, num_attention_heads=6)
    kda = [i for i in range(1, layers + 1) if i not in full]
    assert config.linear_attn_config == pattern(kda, full, num_heads=6)
    assert config.layer_types == [MLA if i in full else KDA for i in range(1, layers + 1)]
    assert config.num_key_value_heads == 6


@pytest.mark.parametrize(
    "experts, first, freq, sparse",
    [
        (8, 1, 1, [1, 2, 3, 4]),
        (8, 0, 2, [0, 2, 4]),
        (8, 3, 2, [4]),
        (8, 5, 1, []),
    ],
)
def test_mlp_layer_types(experts, first, freq, sparse, tmp_path):
    fields = {"num_experts": experts, "first_k_dense_replace": first, "moe_layer_freq": freq}
    config = KimiLinearConfig(num_hidden_layers=5, **fields)
    assert [i for i, t in enumerate(config.mlp_layer_types) if t == "sparse"] == sparse
    save(config, tmp_path)
    assert meaning(NativeKimiLinearConfig.from_pretrained(tmp_path)) == meaning(config)
    assert KimiLinearConfig.from_pretrained(tmp_path) == config


def test_standard_names():
    names = {
        "max_position_embeddings": ("model_max_length", 4096),
        "norm_topk_prob": ("moe_renormalize", False),
        "n_group": ("num_expert_group", 2),
        "num_local_experts": ("num_experts", 64),
        "n_routed_experts": ("num_experts", 64),
        "num_experts_per_tok": ("num_experts_per_token", 4),
        "n_shared_experts": ("num_shared_experts", 3),
    }
    for standard, (name, value) in names.items():
        config = KimiLinearConfig(**{standard: value})
        assert getattr(config, name) == getattr(config, standard) == value
        saved = config.to_diff_dict()
        assert saved[name] == value and standard not in saved
        setattr(config, standard, 1)
        assert getattr(config, name) == 1


def test_router_groups():
    config = KimiLinearConfig(num_expert_group=8, topk_group=2)
    assert config.router_groups == (8, 2)
    config.use_grouped_topk = False
    assert config.router_groups == (1, 1)
    config.num_expert_group = 7  # divides nothing, but is not used
    config.validate()


def test_all_mla(tmp_path):
    config = KimiLinearConfig(foo=1)
    before = config.to_dict()
    everywhere = config.all_mla()
    everywhere.validate()
    assert everywhere.layer_types == [MLA] * 27 and everywhere.foo == 1
    assert config.to_dict() == before and config != everywhere
    assert everywhere == KimiLinearConfig(layer_types=[MLA] * 27, foo=1)
    save(everywhere, tmp_path)
    assert meaning(NativeKimiLinearConfig.from_pretrained(tmp_path)) == meaning(everywhere)


def test_all_kda():
    config = KimiLinearConfig(num_hidden_layers=3, linear_attn_config=pattern([3, 1, 2], []))
    assert config.layer_types == [KDA] * 3


def test_copies_are_equal(tmp_path):
    config = KimiLinearConfig.from_dict(RELEASED)
    config.save_pretrained(tmp_path)
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        KimiLinearConfig.from_dict(config.to_dict()),
        KimiLinearConfig.from_dict(config.to_diff_dict()),
        KimiLinearConfig.from_pretrained(tmp_path),
    ):
        assert other == config and meaning(other) == meaning(config)
        other.linear_attn_config["kda_layers"].pop()
        assert other != config
    assert config != NativeKimiLinearConfig()
    assert config != KimiLinearConfig.from_dict(config.to_dict() | {"foo": 1})


def test_the_given_dict_is_not_shared():
    given = pattern([1, 2], [3])
    KimiLinearConfig(num_hidden_layers=3, linear_attn_config=given).linear_attn_config.clear()
    assert given == pattern([1, 2], [3])


def test_plans_are_those_of_the_installed_transformers():
    for plan in ("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"):
        assert getattr(KimiLinearConfig(), plan) == getattr(NativeKimiLinearConfig, plan)
    assert KimiLinearConfig.keys_to_ignore_at_inference == ["past_key_values"]


# Validation

# fmt: off
POSITIVE_INTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts", "num_experts_per_token",
    "num_expert_group", "topk_group", "moe_layer_freq", "model_max_length",
)
BOOLS = (
    "mla_use_nope", "moe_renormalize", "use_grouped_topk", "tie_word_embeddings", "use_cache",
    "output_router_logits",
)
# fmt: on
THREE = [1, 2, 3]
BAD: list[dict[str, Any]] = [
    *[{name: value} for name in POSITIVE_INTS for value in (0, -1, 2.0, "4", True, [1])],
    *[{name: value} for name in BOOLS for value in (None, "yes", 2)],
    *[
        {name: value}
        for name in ("rms_norm_eps", "routed_scaling_factor", "initializer_range")
        for value in (-1.0, "1e-5", None, float("nan"), float("inf"), True)
    ],
    {"rms_norm_eps": 0.0},
    {"hidden_act": "gelu"},
    {"hidden_act": None},
    {"output_attentions": True},
    {"moe_router_activation_func": "softmax"},
    {"mla_use_nope": False},
    {"num_nextn_predict_layers": 1},
    {"attention_bias": True},
    {"attention_dropout": 0.1},
    {"num_shared_experts": -1},
    {"num_shared_experts": None},
    {"num_key_value_heads": 8},
    {"pad_token_id": 163840},
    {"pad_token_id": -1},
    {"pad_token_id": "0"},
    {"first_k_dense_replace": -1},
    {"first_k_dense_replace": 28},
    {"first_k_dense_replace": 1.0},
    # The experts. The first field is the one to be named.
    {"num_experts_per_token": 129},
    {"num_expert_group": 3},
    {"num_expert_group": 128},
    {"num_expert_group": 256},
    {"topk_group": 2},
    {"topk_group": 5, "num_expert_group": 4},
    {"topk_group": 1, "num_expert_group": 32},
    # The layers.
    *[
        {"linear_attn_config": value, "num_hidden_layers": 3}
        for value in (
            {},
            "kda",
            [1],
            {"kda_layers": THREE, "full_attn_layers": []},
            PATTERN,
            PATTERN | {"kda_layers": THREE},
            pattern(THREE, [], head_dim=0),
            pattern(THREE, [], head_dim=257),
            pattern(THREE, [], head_dim=64.0),
            pattern(THREE, [], num_heads=0),
            pattern(THREE, [], num_heads=None),
            pattern(THREE, [], short_conv_kernel_size=1),
            pattern(THREE, [], short_conv_kernel_size="4"),
            pattern("123", []),
            pattern(THREE, None),
            pattern([1, 2], ["3"]),
            pattern([1, 2], [True]),
            pattern([0, 1], [2]),
            pattern([1, 2], [3, 4]),
            pattern([1, 2, -1], [3]),
            pattern([1, 2, 2], [3]),
            pattern([1, 2, 3], [3]),
            pattern([1, 2], []),
        )
    ],
    {"layer_types": [KDA, MLA]},
    {"layer_types": [KDA] * 26 + ["sliding_attention"]},
    {"layer_types": [[KDA]] * 27},
    {"layer_types": KDA},
    {
        "layer_types": [KDA, MLA, KDA],
        "linear_attn_config": pattern(THREE, []),
        "num_hidden_layers": 3,
    },
    {"linear_head_dim": 64, "linear_attn_config": pattern(THREE, []), "num_hidden_layers": 3},
    {"linear_num_heads": 8, "linear_attn_config": pattern(THREE, []), "num_hidden_layers": 3},
    {"linear_conv_kernel_dim": 3, "linear_attn_config": pattern(THREE, []), "num_hidden_layers": 3},
    {"qk_head_dim": 128},
    {"mlp_layer_types": ["dense", "sparse"]},
    {"mlp_layer_types": ["dense"] * 26 + ["moe"]},
    {"mlp_layer_types": 5},
    {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"], "num_hidden_layers": 4},
    {"mlp_layer_types": ["dense"] * 27, "first_k_dense_replace": 1},
    {"mlp_layer_types": ["dense"] + ["sparse"] * 26, "moe_layer_freq": 2},
]


def label(fields: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in fields.items())[:60]


@pytest.mark.parametrize("fields", BAD, ids=label)
def test_a_bad_value_is_named(fields):
    field = next(iter(fields))
    with pytest.raises(ValueError, match=rf"^{field}\b.*: got .*, expected ") as error:
        KimiLinearConfig(**fields)
    assert type(error.value) is ValueError


def test_layers_counted_from_zero_get_a_hint():
    with pytest.raises(ValueError, match="counted from 1"):
        KimiLinearConfig(num_hidden_layers=3, linear_attn_config=pattern([0, 1], [2]))


def test_a_bad_edit_is_caught_when_saved(tmp_path):
    for field, value in (("num_hidden_layers", 28), ("kv_lora_rank", 0), ("n_group", 3)):
        config = KimiLinearConfig()
        setattr(config, field, value)
        with pytest.raises(ValueError, match="expected"):
            config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    config = KimiLinearConfig()
    config.linear_attn_config["kda_layers"].append(4)
    with pytest.raises(ValueError, match=r"^linear_attn_config: .*\[4\] are repeated"):
        config.save_pretrained(tmp_path)


# Exchange with transformers' own class

SMALL = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "vocab_size": 99,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": [3, 4],
    "num_experts": 16,
    "num_expert_group": 4,
    "topk_group": 2,
    "num_experts_per_token": 3,
    "moe_renormalize": False,
    "model_max_length": 512,
}
NATIVE = {
    "defaults": {},
    "released": RELEASED,
    "small released": SMALL
    | {"linear_attn_config": pattern([1, 3, 4], [2, 5, 6], head_dim=16, num_heads=3)}
    | {"first_k_dense_replace": 2},
    "layer_types": SMALL
    | {"layer_types": [MLA, KDA, KDA, MLA, KDA, KDA], "linear_head_dim": 32, "linear_num_heads": 5}
    | {"linear_conv_kernel_dim": 3},
    "mlp_layer_types": SMALL | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3},
    "every other": SMALL | {"mlp_layer_types": ["dense"] + ["dense", "sparse"] * 2 + ["dense"]},
    "all dense": SMALL | {"mlp_layer_types": ["dense"] * 6},
    "all sparse": SMALL | {"mlp_layer_types": ["sparse"] * 6},
}


@pytest.mark.parametrize("fields", NATIVE.values(), ids=NATIVE)
def test_what_the_native_class_saves_comes_back_in_the_released_form(fields, tmp_path):
    native = NativeKimiLinearConfig(**copy.deepcopy(fields))
    given = save(native, tmp_path / "native")
    assert "layer_types" in given and "mlp_layer_types" in given
    config = KimiLinearConfig.from_pretrained(tmp_path / "native")
    assert meaning(config) == meaning(native)
    assert KimiLinearConfig.from_dict(native.to_dict()) == config

    saved = save(config, tmp_path / "ours")
    assert RELEASED.keys() - {"architectures", "auto_map", "dtype"} <= saved.keys()
    derived = {"layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"}
    assert not (derived | {"qk_head_dim"}) & set(saved)
    assert ("mlp_layer_types" in saved) == (config.moe_layer_freq != 1)
    assert meaning(NativeKimiLinearConfig.from_pretrained(tmp_path / "ours")) == meaning(native)
    assert KimiLinearConfig.from_pretrained(tmp_path / "ours") == config


@pytest.mark.parametrize("file", FILES)
def test_the_native_class_reads_what_we_save(file, tmp_path):
    config = KimiLinearConfig.from_json_file(CONFIGS / file)
    config.save_pretrained(tmp_path)
    assert meaning(NativeKimiLinearConfig.from_pretrained(tmp_path)) == meaning(config)
