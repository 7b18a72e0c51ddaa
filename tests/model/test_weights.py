"""Checkpoints: the released names, shapes and dtypes, exact round trips, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, KimiLinearModel
from kimi_linear.weights import released_sources
from tests.model.helpers import build, random_ids, small_config

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASED = json.loads((CONFIGS / "kimi_linear_48b_a3b.json").read_text())
FP32 = ("A_log", "dt_bias", "e_score_correction_bias")
CASES = {
    "released": {},
    "all_mla": {"full_attn_layers": (1, 2), "num_hidden_layers": 2},
    "all_kda": {"full_attn_layers": (), "num_hidden_layers": 2},
    "q_lora": {"q_lora_rank": 14},
    "no_dense": {"first_k_dense_replace": 0},
    "all_dense": {"first_k_dense_replace": 4},
    "two_shared": {"num_shared_experts": 2},
    "no_shared": {"num_shared_experts": 0},
}


def expected_layout(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint whose config.json is `c`, as the release has them."""
    D, V, F = c["hidden_size"], c["vocab_size"], c["moe_intermediate_size"]
    linear = c["linear_attn_config"]
    H, K, W = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    n, R, P = c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    Q, M = n * (c["qk_nope_head_dim"] + P), c["q_lora_rank"]
    top = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}

    def swiglu(prefix: str, width: int, names=("gate_proj", "up_proj", "down_proj")) -> dict:
        shapes = ((width, D), (width, D), (D, width))
        return {f"{prefix}{k}.weight": s for k, s in zip(names, shapes, strict=True)}

    out = {}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        a = p + "self_attn."
        if i + 1 in linear["kda_layers"]:
            out |= {f"{a}{x}_proj.weight": (H * K, D) for x in "qkv"}
            out |= {f"{a}{x}_conv1d.weight": (H * K, 1, W) for x in "qkv"}
            out |= {a + "A_log": (1, 1, H, 1), a + "dt_bias": (H * K,)}
            out |= {f"{a}{x}_a_proj.weight": (K, D) for x in "fg"}
            out |= {f"{a}{x}_b_proj.weight": (H * K, K) for x in "fg"}
            out |= {a + "b_proj.weight": (H, D), a + "o_norm.weight": (K,)}
            out |= {a + "o_proj.weight": (D, H * K)}
        else:
            assert i + 1 in linear["full_attn_layers"]
            if M is None:
                out |= {a + "q_proj.weight": (Q, D)}
            else:
                out |= {a + "q_a_proj.weight": (M, D), a + "q_a_layernorm.weight": (M,)}
                out |= {a + "q_b_proj.weight": (Q, M)}
            out |= {a + "kv_a_proj_with_mqa.weight": (R + P, D), a + "kv_a_layernorm.weight": (R,)}
            out |= {a + "kv_b_proj.weight": (n * (c["qk_nope_head_dim"] + c["v_head_dim"]), R)}
            out |= {a + "o_proj.weight": (D, n * c["v_head_dim"])}
        if i < c["first_k_dense_replace"]:
            out |= swiglu(p + "mlp.", c["intermediate_size"])
            continue
        m = p + "block_sparse_moe."
        out |= {m + "gate.weight": (c["num_experts"], D)}
        out |= {m + "gate.e_score_correction_bias": (c["num_experts"],)}
        for e in range(c["num_experts"]):
            out |= swiglu(f"{m}experts.{e}.", F, ("w1", "w3", "w2"))
        if c["num_shared_experts"]:
            out |= swiglu(m + "shared_experts.", F * c["num_shared_experts"])
    return top | out


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, by the names in its files."""
    return {
        k: x for file in sorted(folder.glob("*.safetensors")) for k, x in load_file(file).items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    same = a.keys() == b.keys() and all(x.dtype == b[k].dtype for k, x in a.items())
    return same and all(torch.equal(x, b[k]) for k, x in a.items())


def write(folder: Path, tensors: dict[str, Tensor], config: KimiLinearConfig) -> Path:
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def saved(tmp_path) -> tuple[KimiLinearForCausalLM, Path]:
    """The standard small model and the folder that it is saved in."""
    model = build(small_config())
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


# The released layout


def released_layout(model) -> dict[str, tuple[int, ...]]:
    return {n: tuple(x) for part in released_sources(model).values() for n, x in part.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_has_the_released_names_and_shapes(case, tmp_path):
    model = build(small_config(**CASES[case]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    want = expected_layout(config)
    assert {k: tuple(x.shape) for k, x in read(tmp_path).items()} == want
    assert released_layout(model) == want


def test_the_released_model_has_20493_tensors_and_49_billion_parameters():
    with torch.device("meta"):
        model = KimiLinearForCausalLM(KimiLinearConfig(**RELEASED))
    layout = released_layout(model)
    assert layout == expected_layout(RELEASED)
    assert len(layout) == 20_493
    # the published count has the correction biases in it, which are buffers: they are not trained
    biases = 26 * 256
    assert sum(x.numel() for x in model.state_dict().values()) == 49_122_681_728
    assert sum(x.numel() for x in model.parameters()) == 49_122_681_728 - biases


def test_what_goes_where_in_memory(saved):
    """Order of q, k, v and of gate and up, one tensor at a time."""
    model, folder = saved
    file, state = read(folder), model.state_dict()
    a, m = "model.layers.1.self_attn.", "model.layers.1.block_sparse_moe."
    convs = [file[f"{a}{x}_conv1d.weight"] for x in "qkv"]
    assert torch.equal(torch.cat(convs), state[a + "conv1d.weight"])
    for e in range(8):
        gate_up = [file[f"{m}experts.{e}.{w}.weight"] for w in ("w1", "w3")]
        gate_up_proj = state["model.layers.1.mlp.experts.gate_up_proj"]
        assert torch.equal(torch.cat(gate_up), gate_up_proj[e])
        down = state["model.layers.1.mlp.experts.down_proj"][e]
        assert torch.equal(file[f"{m}experts.{e}.w2.weight"], down)
    for name in ("A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight"):
        assert torch.equal(file[a + name], state[f"{a}forget_gate.{name}"])


def test_the_config_beside_the_weights_has_every_released_field(tmp_path):
    small = small_config().to_dict()
    given = {key: small.get(key, value) for key, value in RELEASED.items()}
    config = KimiLinearConfig(**given)
    assert config.auto_map == RELEASED["auto_map"]
    model = build(config)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert RELEASED.keys() - found.keys() == {"auto_map"}  # its remote code is not saved along
    kept = given.keys() - {"transformers_version", "dtype", "architectures", "auto_map"}
    assert {k: found[k] for k in kept} == {k: given[k] for k in kept}
    assert found["dtype"] == "float32" and found["architectures"] == ["KimiLinearForCausalLM"]
    assert model.config.auto_map == RELEASED["auto_map"]
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


# Round trips


@pytest.mark.parametrize("case", CASES)
def test_round_trips_change_no_bit(case, tmp_path):
    ours = build(small_config(**CASES[case]))
    route = [tmp_path / x for x in ("a", "b", "c", "d")]
    ours.save_pretrained(route[0])
    KimiLinearForCausalLM.from_pretrained(route[0]).save_pretrained(route[1])
    assert equal(read(route[1]), read(route[0]))
    if case == "no_shared":  # native has shared experts there too, 0 wide
        return
    native = NativeForCausalLM.from_pretrained(route[0])
    assert equal(native.state_dict(), ours.state_dict())
    native.save_pretrained(route[2])
    back = KimiLinearForCausalLM.from_pretrained(route[2])
    assert equal(back.state_dict(), ours.state_dict())
    back.save_pretrained(route[3])
    assert equal(read(route[3]), read(route[0]))
    again = NativeForCausalLM.from_pretrained(route[3])
    assert equal(again.state_dict(), native.state_dict())


def test_the_dense_layer_that_native_calls_sparse(saved, tmp_path):
    _, folder = saved
    NativeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "native")
    dense = [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    ours, native = read(folder), read(tmp_path / "native")
    renamed = {k.replace(".mlp.", ".block_sparse_moe."): x for k, x in ours.items()}
    if dense[0] not in native:  # 5.17 to 5.23 rename it; a later version may not
        assert equal(native, renamed)
    for tensors in (ours, renamed):
        path = write(tmp_path / "copy", tensors, small_config())
        loaded, info = KimiLinearForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(loaded.state_dict()[name], ours[name]) for name in dense)


def test_sharded_files_with_an_index(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    tensors = read(tmp_path / "shards")
    assert len(files) > 3 and equal(tensors, read(folder))
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "shards" / file, "pt") as f:
            assert name in f.keys()  # noqa: SIM118
    assert index["weight_map"].keys() == tensors.keys()
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    assert index["metadata"]["total_size"] == size
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "shards")
    assert equal(loaded.state_dict(), model.state_dict())
    native = NativeForCausalLM.from_pretrained(tmp_path / "shards")
    assert equal(native.state_dict(), model.state_dict())


def test_names_in_memory_load_too(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path, save_original_format=False)
    assert read(tmp_path).keys() == model.state_dict().keys()
    loaded, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and equal(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "released")
    assert equal(read(tmp_path / "released"), read(folder))


def test_state_dict_argument(saved):
    model, folder = saved
    for state in (read(folder), model.state_dict()):
        loaded = KimiLinearForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
        assert equal(loaded.state_dict(), model.state_dict())
    state = read(folder)
    del state["model.layers.2.self_attn.v_conv1d.weight"]
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.v_conv1d\.weight"):
        KimiLinearForCausalLM.from_pretrained(None, config=model.config, state_dict=state)


def test_a_state_dict_to_save_instead_of_the_weights(saved, tmp_path):
    """What FSDP hands over: names in memory, written in the released layout."""
    model, _ = saved
    doubled = {k: 2 * x for k, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "doubled")
    assert equal(loaded.state_dict(), doubled)


def test_the_base_model(saved, tmp_path):
    model, folder = saved
    base, info = KimiLinearModel.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"} and not info["missing_keys"]
    assert equal(base.state_dict(), model.model.state_dict())
    base.save_pretrained(tmp_path / "base")
    whole = {k.removeprefix("model."): x for k, x in read(folder).items()}
    del whole["lm_head.weight"]
    assert equal(read(tmp_path / "base"), whole)
    again, info = KimiLinearModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()) and equal(again.state_dict(), base.state_dict())
    with pytest.raises(ValueError, match=r"lacks 1 tensor.*lm_head\.weight"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "base")


# What does not fit


ANY = {
    "plain": "model.layers.0.self_attn.q_proj.weight",
    "expert": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "conv": "model.layers.2.self_attn.k_conv1d.weight",
    "A_log": "model.layers.0.self_attn.A_log",
    "bias": "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@pytest.mark.parametrize("kind", ANY)
def test_a_missing_or_misshapen_tensor_is_named(kind, saved, tmp_path):
    model, folder = saved
    tensors, name = read(folder), ANY[kind]
    x = tensors.pop(name)
    write(tmp_path / "bad", tensors, model.config)
    with pytest.raises(ValueError, match="lacks 1 tensor") as error:
        KimiLinearForCausalLM.from_pretrained(tmp_path / "bad")
    assert name in str(error.value)
    write(tmp_path / "bad", tensors | {name: torch.cat((x, x))}, model.config)
    for cls in (KimiLinearForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="wrong shape in 1 tensor") as error:
            cls.from_pretrained(tmp_path / "bad")
        shapes = f"{name} {[2 * x.shape[0], *x.shape[1:]]}, want {list(x.shape)}"
        assert shapes in str(error.value)


def test_a_tensor_of_the_same_size_in_another_shape(saved, tmp_path):
    """A copy would broadcast or reshape these without a word."""
    model, folder = saved
    name = ANY["A_log"]
    tensors = read(folder)
    write(tmp_path / "bad", tensors | {name: tensors[name].flatten()}, model.config)
    with pytest.raises(ValueError, match=r"A_log \[2\], want \[1, 1, 2, 1\]"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "bad")


def test_errors_use_the_names_in_the_file(saved, tmp_path):
    model, folder = saved
    name, found = "model.layers.0.mlp.up_proj.weight", "model.layers.0.block_sparse_moe.up_proj"
    tensors = read(folder)
    tensors[f"{found}.weight"] = tensors.pop(name)[1:].clone()
    write(tmp_path / "bad", tensors, model.config)
    with pytest.raises(ValueError, match=found):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "bad")
    state = model.state_dict()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    write(tmp_path / "bad", state | {name: state[name][1:].clone()}, model.config)
    with pytest.raises(ValueError, match=rf"{name} \[7, 48, 48\], want \[8, 48, 48\]"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "bad")


def test_too_many_and_too_few_experts(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"no place for 18 tensor.*experts\.6\.w1.*; \.\.\.") as e:
        KimiLinearForCausalLM.from_pretrained(folder, num_experts=6)
    assert "experts.5." not in str(e.value)
    with pytest.raises(ValueError, match=r"lacks 18 tensor.*experts\.8\.w1.*; \.\.\."):
        KimiLinearForCausalLM.from_pretrained(folder, num_experts=10)


def test_another_plain_tensor_is_reported_and_ignored(saved, tmp_path):
    model, folder = saved
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "foo": torch.ones(1)}
    write(tmp_path / "extra", read(folder) | extra, model.config)
    loaded, info = KimiLinearForCausalLM.from_pretrained(
        tmp_path / "extra", output_loading_info=True
    )
    assert info["unexpected_keys"] == extra.keys() and not info["missing_keys"]
    assert equal(loaded.state_dict(), model.state_dict())


def test_ignore_mismatched_sizes(saved):
    """A vocabulary of another size: only the two matrices that depend on it are fresh."""
    model, folder = saved
    with pytest.raises(ValueError, match="wrong shape in 2 tensor"):
        KimiLinearForCausalLM.from_pretrained(folder, vocab_size=101)
    loaded, info = KimiLinearForCausalLM.from_pretrained(
        folder, vocab_size=101, ignore_mismatched_sizes=True, output_loading_info=True
    )
    fresh = {"lm_head.weight", "model.embed_tokens.weight"}
    assert {x[0] for x in info["mismatched_keys"]} == fresh
    state = loaded.state_dict()
    assert state["lm_head.weight"].shape == (101, 48)
    for name, x in model.state_dict().items():
        assert name in fresh or torch.equal(state[name], x), name


def test_a_folder_that_holds_no_model(saved, tmp_path):
    _, folder = saved
    with pytest.raises(OSError, match=r"config\.json|model\.safetensors"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    small_config().save_pretrained(tmp_path / "config")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "config")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(Exception, match=r"header|HeaderTooLarge|deserializ"):
        KimiLinearForCausalLM.from_pretrained(folder)


# Precision


def check_dtypes(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, x in state.items():
        assert x.dtype == (torch.float32 if name.endswith(FP32) else dtype), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_and_correction_bias_stay_fp32(dtype, saved, tmp_path):
    model, folder = saved
    loaded = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    check_dtypes(loaded.state_dict(), dtype)
    for name, x in model.state_dict().items():
        y = loaded.state_dict()[name]
        assert torch.equal(x.to(y.dtype), y), name
    loaded.save_pretrained(tmp_path / "half")
    check_dtypes(read(tmp_path / "half"), dtype)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    for kwargs in ({}, {"dtype": "auto"}):  # as config.json says
        again = KimiLinearForCausalLM.from_pretrained(tmp_path / "half", **kwargs)
        assert again.dtype == dtype and equal(again.state_dict(), loaded.state_dict())
    wide = KimiLinearForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    check_dtypes(wide.state_dict(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_model_in_half_precision(dtype):
    config = small_config()
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert fresh.dtype == dtype
    check_dtypes(fresh.state_dict(), dtype)
    base = KimiLinearModel._from_config(config, dtype=dtype)
    check_dtypes(base.state_dict(), dtype)
    torch.set_default_dtype(dtype)
    try:
        check_dtypes(KimiLinearForCausalLM(config).state_dict(), dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_file_that_rounded_them_loads_as_it_is(saved, tmp_path):
    """Native keeps nothing in fp32: what it saved in bf16 is widened again, not rounded twice."""
    _, folder = saved
    native = NativeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    native.save_pretrained(tmp_path / "native")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "native")
    check_dtypes(loaded.state_dict(), torch.bfloat16)
    for name, x in native.state_dict().items():
        y = loaded.state_dict()[name]
        assert torch.equal(x.to(y.dtype), y), name


def test_weights_on_disk_while_running(saved, tmp_path):
    """accelerate's offloading, which fetches a module's weights when the module is called."""
    model, folder = saved
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    loaded = KimiLinearForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[3].self_attn.kv_b_proj.weight.is_meta
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad():
        want, got = model(ids).logits, loaded(ids).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=4, do_sample=False),
        model.generate(ids, max_new_tokens=4, do_sample=False),
    )
