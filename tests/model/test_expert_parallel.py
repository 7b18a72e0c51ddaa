"""Two processes with half of the experts each give what one process with all of them gives.

The test runs this file as a script in both: gloo on CPUs, NCCL on two GPUs.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.balance import count_tokens, expert_routers, take_counts, update_biases
from kimi_linear.parallel import expert_parallel
from tests.helpers import assert_as_good_as
from tests.model.helpers import build, random_ids, run_two_processes, small_config, treat_as_gpus

CONFIG = small_config(vocab_size=98, num_experts_per_token=3, router_aux_loss_coef=0.1)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
COLLATOR = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
RATE = 0.1
TRAINS = Version(transformers.__version__) >= Version("5.18")
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


def check_an_idle_rank(split: Model, whole: Model, ids: Tensor) -> None:
    """All tokens choose the experts of rank 0; the other still has a part in every sum."""
    biases = [r.e_score_correction_bias for m in (split, whole) for r in expert_routers(m).values()]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias[: CONFIG.num_experts // 2] += 5
    check_training(split, whole, ids)
    for bias, old in zip(biases, before, strict=True):
        bias.copy_(old)


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


def check_trainer(split: Model, whole: Model, folder: Path) -> None:
    """Three steps of SGD by a Trainer are those of a loop over the whole model."""
    rows = [random_ids(CONFIG, 20 + i, seed=i).tolist() for i in range(4)]
    packed = COLLATOR([{"input_ids": row} for row in rows])
    batch = {k: x.to(split.device) if isinstance(x, Tensor) else x for k, x in packed.items()}
    arguments = TrainingArguments(
        str(folder / "trained"),
        max_steps=3,
        per_device_train_batch_size=len(rows),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        gradient_checkpointing=True,
        save_only_model=True,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=split.device.type == "cpu",
        disable_tqdm=True,
    )
    data = [{"input_ids": row} for row in rows]
    treat_as_gpus(arguments)
    trainer = Trainer(split, arguments, train_dataset=data, data_collator=COLLATOR)
    gold = copy.deepcopy(whole).double()
    trainer.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry]]
    for model in (whole, gold):
        losses.append([])
        optimizer = torch.optim.SGD(model.train().parameters(), lr=RATE)
        for _ in range(3):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert_as_good_as("losses", *map(torch.tensor, losses))
    trained = load_file(folder / "trained" / "checkpoint-3" / "model.safetensors")
    assert trained.keys() == load_file(folder / "model.safetensors").keys()
    saved = Model.from_pretrained(folder / "trained" / "checkpoint-3").to(split.device)
    for (name, x), *others in zip(
        saved.named_parameters(), whole.parameters(), gold.parameters(), strict=True
    ):
        assert_as_good_as(name, x, *others)


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
    check_an_idle_rank(split, whole, ids)
    for model in (split, whole):
        model.gradient_checkpointing_enable()
    check_training(split, whole, ids)
    if TRAINS:
        check_trainer(split, whole, folder)
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
