"""The LoRA preset: what it trains, what the kernels see, and what is saved."""

import copy
import json
import runpy
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, lora_config
from kimi_linear import moe as moe_module
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, native_twin, random_ids, small_config
from tests.model.tokenizer_helpers import write_released

ROOT = Path(__file__).parents[2]
LIMIT = FLOOR[torch.float32]
# Inputs and outputs of all adapted linear layers of `small_config`, and of its routed experts
KDA = 3 * (48 + 32) + (32 + 48) + 2 * (48 + 16) + 2 * (16 + 32) + (48 + 2)
MLA = (48 + 48) + (48 + 24) + (20 + 66) + (30 + 48)
DENSE, SHARED = 3 * (48 + 56), 3 * (48 + 24)
EXPERTS = 8 * ((48 + 48) + (24 + 48))


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(small_config())


@pytest.fixture
def ids(model) -> Tensor:
    return random_ids(model.config, 2, 33)


def adapted(model, r: int = 4, **options) -> PeftModel:
    """`model` with an adapter that is no no-op, as a fresh one would be."""
    config = lora_config(r, **options)
    config.init_lora_weights = False
    return get_peft_model(model, config)


def gradients(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options, per_rank",
    [
        ({"shared_experts": False}, 3 * KDA + MLA),
        ({}, 3 * KDA + MLA + DENSE + 3 * SHARED),
        ({"experts": True}, 3 * KDA + MLA + DENSE + 3 * SHARED + 3 * EXPERTS),
    ],
)
def test_trainable_parameters(options, per_rank, model, capsys):
    total = model.num_parameters()
    tuned = get_peft_model(model, lora_config(5, **options))
    tuned.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {5 * per_rank:,} || all params: {total + 5 * per_rank:,}" in printed
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 5 * per_rank


def test_trainable_parameters_of_the_released_model():
    """The numbers in the docstring."""
    config = KimiLinearConfig.from_json_file(ROOT / "configs" / "kimi_linear_48b_a3b.json")
    for experts, per_rank in ((False, 1_304_128), (True, 1_304_128 + 51_118_080)):
        with torch.device("meta"):
            model = get_peft_model(KimiLinearForCausalLM(config), lora_config(2, experts=experts))
        assert model.get_nb_trainable_parameters()[0] == 2 * per_rank
        for number in ("1,304,128 r", "51,118,080 r"):
            assert number in lora_config.__doc__


def train(tuned: PeftModel, folder: Path, **options) -> None:
    """Four optimizer steps by a Trainer, which saves the adapter after each second one."""
    tuned.enable_input_require_grads()
    config = tuned.get_base_model().config
    rows = [{"input_ids": random_ids(config, 20, seed=i).tolist()} for i in range(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        gradient_checkpointing=True,
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(tuned, arguments, train_dataset=rows, data_collator=collator)
    trainer.train(**options)


def test_training_changes_the_adapter_alone(tmp_path, model):
    tuned = get_peft_model(model, lora_config(4, experts=True))
    before = copy.deepcopy(tuned.state_dict())
    train(tuned, tmp_path)
    for name, x in tuned.state_dict().items():
        assert torch.equal(x, before[name]) == ("lora_" not in name), name
    assert {n.split(".")[-1] for n in before} >= {"A_log", "dt_bias", "e_score_correction_bias"}


def test_a_trained_adapter_is_resumed_and_merged(tmp_path, model, ids):
    """Bit for bit; the merged file gives the trained logits, in transformers' own class as well."""
    twin = copy.deepcopy(model)
    tuned, resumed = (get_peft_model(m, lora_config(4, experts=True)) for m in (model, twin))
    train(tuned, tmp_path / "a")
    train(resumed, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    want = tuned.state_dict()
    assert all(torch.equal(x, want[name]) for name, x in resumed.state_dict().items())
    logits = tuned.eval()(ids).logits.detach()
    resumed.merge_and_unload().save_pretrained(tmp_path / "merged")
    for cls in (KimiLinearForCausalLM, NativeForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "merged").eval()
        assert rel_err(loaded(ids).logits, logits) < LIMIT


def test_the_experts_see_the_sum(model, ids, monkeypatch):
    """expert_mlp gets W + alpha / r B A, and its gradient reaches A and B."""
    seen = []

    def spy(x, gate_up, down, *args):
        for weight in (gate_up, down):
            weight.retain_grad()
        seen.append((gate_up, down))
        return expert_mlp(x, gate_up, down, *args)

    expert_mlp = moe_module.expert_mlp
    monkeypatch.setattr(moe_module, "expert_mlp", spy)
    bases = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n}
    tuned = adapted(model, 3, alpha=5, experts=True)
    gradients(tuned, ids)
    factors = {n: p for n, p in tuned.named_parameters() if ".experts." in n}
    for i, weights in enumerate(seen, 1):
        path = f"base_model.model.model.layers.{i}.mlp.experts."
        for weight, name, wrapper in zip(
            weights, ("gate_up_proj", "down_proj"), ("base_layer.", ""), strict=True
        ):
            A, B = (factors[f"{path}{wrapper}lora_{x}.default.weight"] for x in "AB")
            a = A.detach().view(8, 3, -1)  # [E, r, in]
            b = B.detach().view(-1, 3, 8).permute(2, 0, 1)  # [E, out, r]
            base = bases[f"model.layers.{i}.mlp.experts.{name}"]
            assert rel_err(weight, base + 5 / 3 * b @ a) < LIMIT
            assert rel_err(weight, base) > 1e-2
            grad_a, grad_b = 5 / 3 * b.mT @ weight.grad, 5 / 3 * weight.grad @ a.mT
            assert grad_a.abs().max() > 0 and grad_b.abs().max() > 0
            assert rel_err(A.grad.view_as(a), grad_a) < LIMIT
            assert rel_err(B.grad.view(-1, 3, 8).permute(2, 0, 1), grad_b) < LIMIT
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, dtype, model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    model = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tuned = adapted(model, experts=True).train()
    want = gradients(tuned, ids)
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.enable_input_require_grads()
    for name, grad in gradients(tuned, ids).items():
        assert grad.any() and grad.isfinite().all() and torch.equal(grad, want[name]), name


@pytest.mark.parametrize("experts", [False, True])
def test_merged_in_the_released_layout(experts, tmp_path, model, ids):
    base = model(ids).logits.detach()
    tuned = adapted(model, experts=experts)
    want = tuned(ids).logits.detach()
    assert rel_err(want, base) > 1e-2
    tuned.save_pretrained(tmp_path / "adapter")
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, base)
    merged = tuned.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    merged.save_pretrained(tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.7.w3.weight" in names
    for cls in (KimiLinearForCausalLM, NativeForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "merged").eval()
        assert rel_err(loaded(ids).logits, want) < LIMIT


def test_adapters_are_exchanged_with_native(tmp_path, model, ids):
    base = copy.deepcopy(model)
    tuned = adapted(model, experts=True)
    want = tuned(ids).logits.detach()
    tuned.save_pretrained(tmp_path)
    for other in (copy.deepcopy(base), native_twin(base)):
        there = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
        assert rel_err(there(ids).logits, want) < LIMIT
        other.load_adapter(tmp_path)  # transformers' own way
        assert rel_err(other(ids).logits, want) < LIMIT


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ValueError, match=r"^r is 0, want at least 1"):
        lora_config(0)
    with pytest.raises(ValueError, match=r"^dropout is 0.1, want 0 with experts"):
        lora_config(experts=True, dropout=0.1)
    assert lora_config(8).lora_alpha == 16 and lora_config(8, alpha=3).lora_alpha == 3
    for installed, message in (("0.18.1", "found peft==0.18.1"), (None, "was not found")):

        def version(name: str, found: str | None = installed) -> str:
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr("importlib.metadata.version", version)
        with pytest.raises(ImportError, match=rf"{message}(.|\n)*pip install 'peft>=0.20'"):
            lora_config()


def test_a_whole_feed_forward_can_be_trained_beside(model, ids):
    want = model(ids).logits
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    peft = get_peft_model(model, config)
    assert torch.equal(peft(ids).logits, want)
    assert any(".mlp." in name for name in gradients(peft, ids))


def test_a_bias_has_no_place_in_kv_b_proj(model, ids):
    """It is multiplied out, not called: a bias would be lost or count many times."""
    config = LoraConfig(target_modules=["kv_b_proj"], lora_bias=True)
    peft = get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match=r"kv_b_proj has lora_B\.default\.bias, want no bias"):
        peft(ids)
    model.model.layers[3].self_attn.kv_b_proj.bias = torch.nn.Parameter(torch.ones(66))
    with pytest.raises(ValueError, match="kv_b_proj has bias, want no bias"):
        model(ids)


def test_example(tmp_path, monkeypatch, capsys):
    released = tmp_path / "released"
    released.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(write_released(released))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    build(small_config(vocab_size=len(tokenizer), **special)).save_pretrained(released)
    chats, output = tmp_path / "chats.jsonl", tmp_path / "output"
    turns = [("user", "Hello"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    chats.write_text(f"{json.dumps({'messages': messages})}\n" * 8 + "\n")
    argv = ["finetune_lora.py", released, chats, output, "--rank", 2, "--experts", "--epochs", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")
    assert "trainable params: " in capsys.readouterr().out
    model = KimiLinearForCausalLM.from_pretrained(output / "merged").eval()
    base = KimiLinearForCausalLM.from_pretrained(released).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "merged")
    chat = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    ids, said = torch.tensor([chat["input_ids"]]), torch.tensor([chat["assistant_masks"]])
    labels = ids.where(said.bool(), -100)
    with torch.no_grad():
        assert model(ids, labels=labels).loss < base(ids, labels=labels).loss
        tuned = PeftModel.from_pretrained(base, output / "adapter")
        assert rel_err(tuned(ids).logits, model(ids).logits) < LIMIT
