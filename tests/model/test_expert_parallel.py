"""Two processes with half of the experts each give what one process with all of them gives.

The test runs this file as a script in both: gloo on CPUs, NCCL on two GPUs.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.balance import count_tokens, expert_routers, take_counts, update_biases
from kimi_linear.parallel import expert_parallel
from tests.helpers import assert_as_good_as
from tests.model.helpers import build, random_ids, run_two_processes, small_config

CONFIG = small_config(vocab_size=98, num_experts_per_token=3, router_aux_loss_coef=0.1)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
Model = KimiLinearForCausalLM


def full(x: Tensor) -> Tensor:
    """Of a sharded tensor the whole, which every rank must ask for."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check_shards(split: Model, whole: Model, rank: int) -> None:
    """A rank has its half of the experts, as the checkpoint has them, and all of the rest."""
    n = CONFIG.num_experts // 2
    for (name, x), want in zip(split.named_parameters(), whole.parameters(), strict=True):
        if name.endswith(EXPERTS):
            x, want = x.to_local(), want[n * rank : n * (rank + 1)]
        assert torch.equal(x, want), name


def check_training(split: Model, whole: Model, ids: Tensor) -> None:
    """Loss, auxiliary loss included, every gradient, loads, and biases after an update."""
    losses, counts, models = [], [], (split, whole, copy.deepcopy(whole).double())
    for model in models:
        count_tokens(model)
        model.zero_grad()
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        counts.append(torch.stack([router.counts for router in expert_routers(model).values()]))
    assert_as_good_as("loss", *losses)
    for (name, x), *others in zip(*(m.named_parameters() for m in models), strict=True):
        assert_as_good_as(name, full(x.grad), *(y.grad for _, y in others))
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(take_counts(split), counts[1])
    for model in models[:2]:
        update_biases(model, counts[0], 0.01)
    for a, b in zip(*(expert_routers(m).values() for m in models[:2]), strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)


def check_generation(split: Model, whole: Model, ids: Tensor) -> None:
    got, want = (m.eval().generate(ids, max_new_tokens=12, do_sample=False) for m in (split, whole))
    assert torch.equal(got, want)


def check_saving(split: Model, folder: Path, rank: int) -> None:
    """What was loaded is written again, in the released layout, by rank 0."""
    split.save_pretrained(folder / "again")
    if rank == 0:
        old, new = (load_file(f / "model.safetensors") for f in (folder, folder / "again"))
        assert old.keys() == new.keys()
        for name, x in old.items():
            assert torch.equal(new[name], x), name
        config = [(f / "config.json").read_text() for f in (folder, folder / "again")]
        assert config[0] == config[1]


def check_refusal(folder: Path) -> None:
    with pytest.raises(ValueError, match="evenly shard 7 experts across 2"):
        Model.from_pretrained(folder, num_experts=7, distributed_config=expert_parallel())


def main(folder: Path) -> None:
    """One of two ranks."""
    split = Model.from_pretrained(folder, distributed_config=expert_parallel())
    whole = Model.from_pretrained(folder).to(split.device)
    rank, ids = dist.get_rank(), random_ids(CONFIG, 2, 33).to(split.device)
    check_shards(split, whole, rank)
    check_saving(split, folder, rank)
    check_generation(split, whole, ids)
    check_training(split, whole, ids)
    for model in (split, whole):
        model.gradient_checkpointing_enable()
    check_training(split, whole, ids)
    check_refusal(folder)
    dist.destroy_process_group()


HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None
CPU = pytest.mark.skipif(HAS_ACCELERATOR, reason="transformers uses the accelerator torch has")
GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])]
)
def test_two_processes_are_as_one(device, tmp_path):
    build(CONFIG).save_pretrained(tmp_path)
    run_two_processes(Path(__file__), str(tmp_path))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
