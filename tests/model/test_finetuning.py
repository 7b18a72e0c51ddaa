"""Fine-tuning: Trainer, PEFT, and one model on two processes."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

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


# Trainer


def texts(config, rows: int = 8) -> list[dict[str, list[int]]]:
    return [{"input_ids": random_ids(config, 9 + i, seed=i).tolist()} for i in range(rows)]


def train(model, folder: Path, steps: int, resume: Path | None = None, **options) -> Trainer:
    """A few optimizer steps on packed documents, the way transformers packs them."""
    options = {"save_strategy": "steps", "save_steps": 2} | options
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=texts(model.config),
        eval_dataset=texts(model.config, 2),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_trainer_saves_the_released_layout(tmp_path, model):
    before = copy.deepcopy(model.state_dict())
    trainer = train(model, tmp_path, 2, gradient_checkpointing=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < float(loss) < 10 for loss in losses)
    trainer.save_model(str(tmp_path / "final"))
    names = load_file(tmp_path / "final" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys()
    for name in ("experts.7.w2.weight", "gate.e_score_correction_bias"):
        assert f"model.layers.1.block_sparse_moe.{name}" in names
    assert {"model.layers.0.self_attn.k_conv1d.weight", "model.layers.0.self_attn.A_log"} <= names
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(loaded[name], x), name
        frozen = name.endswith("e_score_correction_bias")  # a buffer: no optimizer moves it
        assert torch.equal(x, before[name]) == frozen, name


@pytest.mark.parametrize("shards", [False, True])
def test_trainer_resumes_where_it_was(shards, tmp_path, model):
    twin = copy.deepcopy(model)
    straight = train(model, tmp_path / "a", 4)
    middle = tmp_path / "a" / "checkpoint-2"
    if shards:
        half = KimiLinearForCausalLM.from_pretrained(middle)
        (middle / "model.safetensors").unlink()
        half.save_pretrained(middle, max_shard_size="150KB")  # experts of a layer in several files
        assert len(list(middle.glob("model-*.safetensors"))) > 2
    train(twin, tmp_path / "b", 4, resume=middle)
    for (name, x), y in zip(twin.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_trainer_goes_back_to_the_best_model(tmp_path, model):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = train(model, tmp_path, 4, greater_is_better=True, **options)  # the loss falls, so:
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = KimiLinearForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(x, best[name]) for name, x in model.state_dict().items())


def test_released_names_in_load_state_dict(tmp_path, model, ids):
    model.save_pretrained(tmp_path)
    state, want = load_file(tmp_path / "model.safetensors"), model(ids).logits
    fresh = KimiLinearForCausalLM(model.config).eval()
    result = fresh.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(fresh(ids).logits, want)
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    for wrong in (state[name][:5], state[name][:1]):  # one row would broadcast
        with pytest.raises(ValueError, match=rf"{name} has shape .* want \[24, 48\]"):
            fresh.load_state_dict(state | {name: wrong})
    native = native_twin(model)
    native.save_pretrained(tmp_path / "native")  # with its own name for the dense layer
    fresh = KimiLinearForCausalLM(model.config).eval()
    fresh.load_state_dict(load_file(tmp_path / "native" / "model.safetensors"))
    assert torch.equal(fresh(ids).logits, want)
    fresh.load_state_dict(native.state_dict())  # names in memory, as ever
    assert torch.equal(fresh(ids).logits, want)


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
