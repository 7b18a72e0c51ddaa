"""Fine-tuning: PEFT, and one model on two processes."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from kimi_linear import KimiLinearForCausalLM
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, native_twin, random_ids, run_two_processes, small_config

ROOT = Path(__file__).parents[2]
LIMIT = FLOOR[torch.float32]


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(small_config())


@pytest.fixture
def ids(model) -> Tensor:
    return random_ids(model.config, 2, 33)


def gradients(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# PEFT


@pytest.mark.parametrize("target", ["q_proj", "kv_b_proj", "o_proj", "f_b_proj", "all-linear"])
def test_lora(target, model, ids):
    base = model(ids).logits.detach()
    lora = LoraConfig(target_modules=target if target == "all-linear" else [target], r=4)
    lora.init_lora_weights = False  # else it starts as a no-op
    tuned = get_peft_model(model, lora)
    for name, grad in gradients(tuned, ids).items():
        assert "lora" in name and grad.abs().max() > 0, name
    logits = tuned(ids).logits.detach()
    assert rel_err(logits, base) > 1e-2
    prompt, options = ids[:, :20], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = tuned.generate(input_ids=prompt, **options)
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, base)
    merged = tuned.merge_and_unload()
    assert type(merged) is KimiLinearForCausalLM
    assert rel_err(merged(ids).logits, logits) < LIMIT
    assert torch.equal(merged.generate(prompt, **options), tokens)


def test_lora_on_a_checkpointed_bf16_model(tmp_path, model, ids):
    model.save_pretrained(tmp_path)
    model = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    lora = LoraConfig(target_modules=["q_proj", "kv_b_proj", "gate_proj"], r=4)
    lora.init_lora_weights = False
    tuned = get_peft_model(model, lora).train()
    tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    for name, grad in gradients(tuned, ids).items():
        assert grad.dtype == torch.float32 and grad.any() and grad.isfinite().all(), name


def test_adapters_on_experts(model, ids):
    """peft adapts stacked experts as parameters: they are no linear layers."""
    base = model(ids).logits.detach()
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=stacked, r=2)
    lora.init_lora_weights = False
    tuned = get_peft_model(model, lora)
    assert all(grad.any() for grad in gradients(tuned, ids).values())
    logits = tuned(ids).logits.detach()
    assert rel_err(logits, base) > 1e-2
    assert rel_err(tuned.merge_and_unload()(ids).logits, logits) < LIMIT


def test_adapters_are_exchanged_with_native(tmp_path, model, ids):
    lora = LoraConfig(target_modules=["q_proj", "kv_b_proj", "f_a_proj", "down_proj"], r=4)
    lora.init_lora_weights = False
    native = native_twin(model)
    tuned = get_peft_model(copy.deepcopy(model), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    want = tuned(ids).logits.detach()
    there = PeftModel.from_pretrained(native, tmp_path / "adapter")
    assert rel_err(there(ids).logits, want) < LIMIT
    model.load_adapter(tmp_path / "adapter")  # transformers' own way
    assert rel_err(model(ids).logits, want) < LIMIT


def test_adapters_by_transformers_own_methods(tmp_path, model, ids):
    model.save_pretrained(tmp_path / "base")
    base = model(ids).logits
    lora = LoraConfig(target_modules=["q_proj", "kv_b_proj"], r=4)
    lora.init_lora_weights = False
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "base")
    loaded.add_adapter(lora)
    want = loaded(ids).logits
    assert rel_err(want, base) > 1e-2
    loaded.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    loaded.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    again = KimiLinearForCausalLM.from_pretrained(
        tmp_path / "adapter"
    )  # the base, then the adapter
    assert torch.equal(again(ids).logits, want)
    again.disable_adapters()
    assert torch.equal(again(ids).logits, base)


# Two processes

PARALLEL = """
import sys
import torch, torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig
from kimi_linear import KimiLinearForCausalLM
from tests.helpers import rel_err
from tests.model.helpers import build, random_ids, small_config

dist.init_process_group("gloo")
config = small_config(vocab_size=98)
model, ids = build(config), random_ids(config, 2, 33)
expert_parallel = {"tp_size": 2, "ep_size": 2}
if "ep_size" not in DistributedConfig.__dataclass_fields__:  # 5.17
    expert_parallel = {"tp_size": 2, "enable_expert_parallel": True}
if dist.get_rank() == 0:
    model.save_pretrained(sys.argv[1])
dist.barrier()
want = model(ids, labels=ids)
want.loss.backward()
for plan in ({"tp_size": 2}, expert_parallel):
    split = KimiLinearForCausalLM.from_pretrained(
        sys.argv[1], distributed_config=DistributedConfig(**plan)
    )
    part, whole = (x.model.layers[1].mlp.experts.down_proj for x in (split, model))
    assert 2 * part.to_local().numel() == whole.numel()
    got = split(ids, labels=ids)
    got.loss.backward()
    assert rel_err(got.logits, want.logits) < 1e-5
    for (name, x), y in zip(split.named_parameters(), model.parameters(), strict=True):
        grad = x.grad.full_tensor() if hasattr(x.grad, "full_tensor") else x.grad
        assert rel_err(grad, y.grad) < 1e-4, name
    split.save_pretrained(sys.argv[1] + "/again")
    dist.barrier()
    again = KimiLinearForCausalLM.from_pretrained(sys.argv[1] + "/again").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
for refused in ({"fsdp_size": 2}, {"pp_size": 2}):
    try:
        KimiLinearForCausalLM.from_pretrained(
            sys.argv[1], distributed_config=DistributedConfig(**refused)
        )
        raise AssertionError(refused)
    except ValueError as error:
        assert next(iter(refused)) in str(error), error
dist.destroy_process_group()
"""


def test_two_processes_share_the_model(tmp_path):
    """Tensor and expert parallelism by transformers' own plans, with two CPU processes."""
    (tmp_path / "parallel.py").write_text(PARALLEL)
    run_two_processes(tmp_path / "parallel.py", str(tmp_path / "model"))
