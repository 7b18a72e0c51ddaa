"""Trainer on two processes, with DDP and with FSDP 2: what one process gives.

The test runs this file as a script in both, and in one: gloo on CPUs, NCCL on GPUs.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearForCausalLM, LoadBalancingCallback, lora_config
from kimi_linear import kda as kda_module
from kimi_linear.fsdp import shard_gates
from kimi_linear.optim import muon
from tests.helpers import assert_as_good_as
from tests.model.helpers import build, run_processes, small_config, treat_as_gpus
from tests.model.test_trainer import COLLATORS, TOKENIZER, logged, texts

SIZES = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 2, "full_attn_layers": (2,)}
CONFIG, DENSE = small_config(**SIZES), small_config(**SIZES, first_k_dense_replace=2)
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["KimiLinearDecoderLayer"]}
GATES = ("A_log", "dt_bias")
CUDA = torch.cuda.is_available()
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def train(
    model: nn.Module, folder: Path, *, fsdp: dict | None = None, gates: bool = False,
    with_muon: bool = False, resume: Path | None = None, callbacks=(), **options,
) -> Trainer:  # fmt: skip
    """Four optimizer steps of four documents each, over all processes, unless told otherwise."""
    defaults = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no", "max_steps": 4}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4 // PROCESSES,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=not CUDA,
        ddp_backend="nccl" if CUDA else "gloo",
        disable_tqdm=True,
        fsdp=fsdp is not None,
        fsdp_config=fsdp and dict(fsdp),
        **defaults | options,
    )
    if fsdp is not None:
        treat_as_gpus(arguments)
    trainer = Trainer(
        shard_gates(model) if gates else model,
        arguments,
        train_dataset=texts(16),
        data_collator=COLLATORS["packed"],
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=muon(arguments) if with_muon else None,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert isinstance(model, FSDPModule) == (fsdp is not None)
    return trainer


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Of every tensor the whole, on the CPU, which every rank must ask for."""
    return {
        name: (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu().clone()
        for name, x in model.state_dict().items()
    }


def curve(trainer: Trainer) -> Tensor:
    return torch.tensor(logged(trainer), dtype=torch.float64)


def results(trainer: Trainer) -> dict:
    return {"losses": curve(trainer), "state": whole_state(trainer.model)}


def balanced(dtype: torch.dtype, folder: Path, **options) -> dict:
    """With what a fine-tuning has: checkpointing, accumulated batches, balanced experts."""
    callback = LoadBalancingCallback(0.1)
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 3}
    more = {"gradient_checkpointing": True, "callbacks": [callback]} | accumulated
    trainer = train(build(CONFIG).to(dtype), folder, **more | options)
    vio = torch.tensor(logged(trainer, "moe/max_vio"))
    return results(trainer) | {"vio": vio, "loads": callback.tokens_per_expert}


def check_gates(model: nn.Module, folder: Path) -> None:
    """KDA sees A_log and dt_bias in fp32, as they are stored, though all else of it is bf16."""
    seen = []
    fused_kda = kda_module.fused_kda

    def spy(q, k, v, f, b, A_log, dt_bias, **kwargs):
        assert {x.dtype for x in (q, k, v, f, b)} == {torch.bfloat16}
        seen.append((A_log.detach().cpu(), dt_bias.detach().cpu()))
        return fused_kda(q, k, v, f, b, A_log, dt_bias, **kwargs)

    stored = [whole_state(model)[f"model.layers.0.self_attn.forget_gate.{x}"] for x in GATES]
    with mock.patch.object(kda_module, "fused_kda", spy):
        options = {"bf16": True, "max_grad_norm": 0, "max_steps": 1}
        trainer = train(model, folder, fsdp=FSDP, gates=True, **options)
    for x, want in zip(seen[0], stored, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, want.flatten())
    assert all(x.dtype == torch.float32 for x in whole_state(trainer.model).values())


def check_bf16_weights(folder: Path) -> None:
    """A model in bf16 stays one, and what it keeps in fp32 is trained in fp32."""
    build(CONFIG).save_pretrained(folder / "half")
    dist.barrier()
    model = KimiLinearForCausalLM.from_pretrained(folder / "half", dtype=torch.bfloat16)
    before = {name: x.dtype for name, x in model.state_dict().items()}
    callbacks = [LoadBalancingCallback(1e-3)]
    trainer = train(model, folder / "pure", fsdp=FSDP, gates=True, callbacks=callbacks)
    trainer.save_model(str(folder / "pure"))
    after = whole_state(model)
    assert {name: x.dtype for name, x in after.items()} == before
    assert {x.dtype for name, x in after.items() if name.endswith(GATES)} == {torch.float32}
    assert torch.bfloat16 in before.values() and curve(trainer)[3] < curve(trainer)[0]
    if dist.get_rank() == 0:
        again = KimiLinearForCausalLM.from_pretrained(folder / "pure").state_dict()
        assert all(torch.equal(x, again[name]) for name, x in after.items())


def check_lora(folder: Path) -> None:
    """Adapters of layers and experts are trained, nothing else is, and they are saved.

    Of two factors one begins as zeros, so the other is trained from the second step on.
    """
    tuned = get_peft_model(build(CONFIG), lora_config(4, experts=True))
    tuned.enable_input_require_grads()
    before = {name: x.clone() for name, x in tuned.state_dict().items()}
    options = {"fsdp": FSDP, "gates": True, "bf16": True, "gradient_checkpointing": True}
    options["max_steps"] = 2
    trainer = train(tuned, folder / "lora", **options)
    after = whole_state(tuned)
    for name, x in after.items():
        assert torch.equal(x, before[name]) == ("lora_" not in name), name
    trainer.save_model(str(folder / "adapter"))
    if dist.get_rank() == 0:
        loaded = PeftModel.from_pretrained(build(CONFIG), folder / "adapter").state_dict()
        assert all(torch.equal(x, after[name]) for name, x in loaded.items())


def check_resuming(kind: str, folder: Path) -> None:
    """Bit for bit, into a model with other weights; at the end the released layout is written."""
    options = {"fsdp": FSDP | {"state_dict_type": kind}, "gates": True, "with_muon": True}
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    straight = train(build(CONFIG), folder / kind, **options)
    middle = folder / kind / "checkpoint-2"
    resumed = train(build(CONFIG, seed=3), folder / f"{kind}-2", resume=middle, **options)
    want = whole_state(straight.model)
    for name, x in whole_state(resumed.model).items():
        assert torch.equal(x, want[name]), name
    assert logged(resumed) == logged(straight)
    final = folder / kind / "checkpoint-4"
    if kind == "SHARDED_STATE_DICT":
        assert not (final / "model.safetensors").exists()
        final = folder / kind / "final"
        resumed.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        resumed.save_model(str(final))
    if dist.get_rank() == 0:
        names = load_file(final / "model.safetensors").keys()
        assert "model.layers.1.block_sparse_moe.experts.7.w3.weight" in names
        loaded = KimiLinearForCausalLM.from_pretrained(final).state_dict()
        assert all(torch.equal(x, loaded[name]) for name, x in want.items())
        NativeForCausalLM.from_pretrained(final)


def refused(folder: Path) -> None:
    linear = small_config().linear_attn_config | {"num_heads": 1}
    with pytest.raises(ValueError, match="model has 1 heads of KDA, want one at least for each"):
        shard_gates(KimiLinearForCausalLM(small_config(linear_attn_config=linear)))
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    with pytest.raises(ValueError, match=r"^FSDP_CPU_RAM_EFFICIENT_LOADING is true"):
        KimiLinearForCausalLM.from_pretrained(folder / "half")


def main(folder: Path) -> None:
    """One of two ranks, or the only one."""
    alone = PROCESSES == 1
    steps = {"optim": "sgd", "max_grad_norm": 0}
    runs = {"fp32": {}} | ({} if alone else {"fsdp": {"fsdp": FSDP}})
    found = {name: balanced(torch.float32, folder / name, **how) for name, how in runs.items()}
    muons = {"with_muon": True, "learning_rate": 1e-2}
    found["muon"] = results(
        train(build(CONFIG), folder / "m", fsdp=None if alone else FSDP, **muons)
    )
    found["bf16"] = results(
        train(build(DENSE), folder / "b", bf16=True, fsdp=None if alone else FSDP, **steps)
    )
    if alone:
        for name, config, how in (("muon64", CONFIG, muons), ("bf64", DENSE, steps)):
            found[name] = results(train(build(config).double(), folder / name, **how))
        found["fp64"] = balanced(torch.float64, folder / "gold")
    else:
        check_gates(build(CONFIG), folder / "gates")
        check_bf16_weights(folder)
        check_lora(folder)
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            check_resuming(kind, folder)
        refused(folder)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / f"{PROCESSES}.pt")
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # see "DDP on gloo may hang at exit" in CONTRIBUTING.md


GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
CPU = pytest.mark.skipif(CUDA, reason="there is a GPU: Trainer's processes run there")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])]
)
def test_two_processes_train_as_one(device, tmp_path):
    for processes in (1, 2):
        run_processes(processes, Path(__file__), str(tmp_path))
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in (1, 2))
    gold = one["fp64"]
    for name in ("fp32", "fsdp"):
        got, want = two[name], one["fp32"]
        assert_as_good_as("loss", got["losses"], want["losses"], gold["losses"], torch.float32)
        for key, x in got["state"].items():
            assert_as_good_as(key, x, want["state"][key], gold["state"][key])
        assert torch.equal(got["vio"], want["vio"])
        assert all(torch.equal(x, want["loads"][i]) for i, x in got["loads"].items())
    for name, exact in (("muon", "muon64"), ("bf16", "bf64")):  # both have products in bf16
        losses = two[name]["losses"], one[name]["losses"], one[exact]["losses"]
        assert_as_good_as(name, *losses, torch.bfloat16)
        assert losses[0][3] < losses[0][0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
