"""Small models whose every weight matters, and their twins of transformers' own class."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainingArguments
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM


def small_config(full_attn_layers: tuple[int, ...] | None = None, **changes) -> KimiLinearConfig:
    """A tiny config, KDA KDA KDA MLA unless told otherwise; no two sizes in it are the same.

    `full_attn_layers` says which layers (from 1) are MLA; all others are KDA.
    """
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_attention_heads": 3,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "model_max_length": 4096,
    } | changes
    layers = range(1, fields["num_hidden_layers"] + 1)
    full = [i for i in layers if i % 4 == 0] if full_attn_layers is None else list(full_attn_layers)
    fields.setdefault(
        "linear_attn_config",
        {
            "full_attn_layers": full,
            "head_dim": 16,
            "kda_layers": [i for i in layers if i not in full],
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    )
    return KimiLinearConfig(**fields)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values for every tensor of a model, of a size that makes each one show in the logits.

    Fresh weights have a standard deviation of 0.02, norms of 1 and correction biases of 0, so that
    mixing up two of them would move a small model's logits by less than rounding does.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            new = torch.empty(x.shape).uniform_(0.02, 1.0, generator=rng).log()
        elif name.endswith("norm.weight"):  # also those of the latents
            new = torch.empty(x.shape).uniform_(0.5, 1.5, generator=rng)
        else:
            std = x.shape[-1] ** -0.5  # of a linear or convolution: outputs as large as inputs
            std = {"dt_bias": 1.0, "e_score_correction_bias": 0.2}.get(name.split(".")[-1], std)
            std = 0.5 if "embed_tokens" in name else std
            new = torch.randn(x.shape, generator=rng) * std
        x.copy_(new)


def build(config: KimiLinearConfig, seed: int = 0) -> KimiLinearForCausalLM:
    """A model of `config` in eval mode, with weights that depend on `seed` alone."""
    model = KimiLinearForCausalLM(config)
    randomize(model, seed)
    return model.eval()


def native_twin(model: KimiLinearForCausalLM, **kwargs) -> NativeForCausalLM:
    """transformers' own model with the same weights, by way of a checkpoint on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return NativeForCausalLM.from_pretrained(folder, **kwargs).eval()


def run_two_processes(script: Path, *args: str) -> None:
    run_processes(2, script, *args)


def run_processes(count: int, script: Path, *args: str) -> None:
    """Run a script in that many; fails with what they wrote last."""
    root = Path(__file__).parents[2]
    launch = ["tests.model.forked", str(count)]
    if torch.cuda.is_available():  # which does not survive a fork
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    run = subprocess.run(
        [sys.executable, "-m", *launch, str(script), *args],
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-6000:]


def treat_as_gpus(arguments: TrainingArguments) -> None:
    """Before a Trainer is made: accelerate ignores FSDP on CPUs, and refuses split models there."""
    if arguments.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def random_ids(config: KimiLinearConfig, *shape: int, seed: int = 1) -> Tensor:
    """Token ids that are neither padding nor begin or end of a text."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, shape, generator=rng)
