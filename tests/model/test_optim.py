"""Muon and AdamW: which parameter gets what, the updates, and Trainer with its schedule."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM, freeze_router, lora_config
from kimi_linear.optim import BATCH, MuonAdamW, StackedMuon, muon, muon_groups, orthogonalize
from kimi_linear.train import _Trainer
from tests.helpers import assert_as_good_as
from tests.model.helpers import build, random_ids, run_two_processes, small_config
from tests.model.tokenizer_helpers import write_released

ROOT = Path(__file__).parents[2]
LR, DECAY, MOMENTUM = 0.02, 0.1, 0.95


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(small_config())


def rules(model: nn.Module, **options) -> dict[str, tuple[str, float, int]]:
    """name -> rule, decay, rows; every trainable parameter is in exactly one group."""
    names = {p: name for name, p in model.named_parameters()}
    groups = muon_groups(model, lr=LR, weight_decay=DECAY, **options)
    found = [
        (names[p], (g["rule"], g["weight_decay"], g.get("rows", 0)))
        for g in groups
        for p in g["params"]
    ]
    assert len(found) == len(dict(found)) and all(g["lr"] == LR for g in groups)
    assert {name for name, _ in found} == {n for p, n in names.items() if p.requires_grad}
    return dict(found)


# Groups


@pytest.mark.parametrize(
    "options",
    [{}, {"q_lora_rank": 14}, {"tie_word_embeddings": True}, {"first_k_dense_replace": 4}],
)
def test_every_parameter_has_one_rule(options):
    for name, (rule, decay, rows) in rules(build(small_config(**options))).items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf in ("A_log", "dt_bias") or leaf.endswith("norm"):
            assert (rule, decay) == ("adamw", 0), name
        elif leaf in ("embed_tokens", "lm_head", "conv1d"):
            assert (rule, decay) == ("adamw", DECAY), name
        elif ".experts." in name:
            want = 2 if leaf == "gate_up_proj" else 1
            assert (rule, decay, rows) == ("muon_stack", DECAY, want), name
        else:
            assert "proj" in leaf or leaf == "gate", name
            assert (rule, decay) == ("muon", DECAY), name


def test_frozen_parameters_and_lora_factors(model):
    freeze_router(model)
    assert not any(".gate." in name for name in rules(model))
    tuned = get_peft_model(model, lora_config(4, experts=True))
    assert {rule for rule, _, _ in rules(tuned).values()} == {"adamw"}


def test_flattened_parameters_are_refused(model):
    layer = model.model.layers[1]
    layer.self_attn.q_proj.weight = nn.Parameter(torch.zeros(9))
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \[9\], want \[m, n\] or"):
        muon_groups(model, lr=LR)
    flat = nn.Module()
    flat._flat_param = nn.Parameter(torch.zeros(9))
    with pytest.raises(ValueError, match=r"_flat_param has shape \[9\]"):
        muon_groups(flat, lr=LR)


# Updates


def plain_muon(x: Tensor) -> torch.optim.Muon:
    options = {"weight_decay": DECAY, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    return torch.optim.Muon([x], lr=LR, **options)


@pytest.mark.parametrize("m, n", [(24, 48), (48, 24), (32, 32), (1, 16)])
def test_the_factor_is_as_near_as_that_of_torch(m, n):
    """Against the same iteration in float64."""
    x = torch.randn(3, m, n)
    y = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    y = y.mT if m > n else y
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    gold = y.mT if m > n else y
    singular = torch.linalg.svdvals(gold)
    assert singular.min() > 0.3 and singular.max() < 1.3
    ref = []
    for matrix in x:
        p = nn.Parameter(torch.zeros(m, n))
        p.grad = matrix
        torch.optim.Muon([p], lr=1.0, weight_decay=0, momentum=0).step()
        ref.append(-p.detach() / max(1, m / n) ** 0.5)
    assert_as_good_as("factor", orthogonalize(x), torch.stack(ref).bfloat16(), gold)


def test_matrices_are_updated_by_torch(model):
    """Bit for bit as by torch.optim.Muon and AdamW with each parameter on its own."""
    ids, found = random_ids(model.config, 2, 33), rules(model)
    optimizer = MuonAdamW(muon_groups(model, lr=LR, weight_decay=DECAY))
    twins, steps = {}, {}
    for name, p in model.named_parameters():
        rule, decay, _ = found[name]
        twins[name] = nn.Parameter(p.detach().clone())
        if rule == "muon":
            steps[name] = plain_muon(twins[name])
        elif rule == "adamw":
            options = {"weight_decay": decay, "betas": (0.9, 0.95), "eps": 1e-8}
            steps[name] = torch.optim.AdamW([twins[name]], lr=LR, **options)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            twins[name].grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        for name, step in steps.items():
            step.step()
            assert torch.equal(twins[name], model.get_parameter(name)), name


@pytest.mark.parametrize(
    "E, m, n, rows", [(8, 24, 48, 2), (8, 48, 24, 1), (3, 32, 16, 2), (BATCH + 3, 6, 10, 1)]
)
def test_stacks_are_updated_matrix_by_matrix(E, m, n, rows, monkeypatch):
    """Bit for bit as by torch.optim.Muon, given equal factors: products may differ in rounding."""
    monkeypatch.setattr("kimi_linear.optim.orthogonalize", lambda x: x.sign().bfloat16())
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz", lambda x, *args: x.sign().bfloat16()
    )
    p = nn.Parameter(torch.randn(E, rows * m, n))
    group = {"params": [p], "rule": "muon_stack", "rows": rows, "momentum": MOMENTUM}
    optimizer = StackedMuon([group | {"lr": LR, "weight_decay": DECAY}])
    parts = [nn.Parameter(x.clone()) for x in p.detach().view(-1, m, n)]
    torchs = [plain_muon(x) for x in parts]
    for _ in range(3):
        p.grad = torch.randn(n, E, rows * m).movedim(0, 2)  # not contiguous
        for x, g in zip(parts, p.grad.reshape(-1, m, n), strict=True):
            x.grad = g
        for each in (optimizer, *torchs):
            each.step()
    assert torch.equal(p.view(-1, m, n), torch.stack(parts))
    buffers = [each.state[x]["momentum_buffer"] for each, x in zip(torchs, parts, strict=True)]
    assert torch.equal(optimizer.state[p]["momentum_buffer"].view(-1, m, n), torch.stack(buffers))


def test_without_gradients_nothing_moves(model):
    """No step, no decay and no state."""
    optimizer = MuonAdamW(muon_groups(model, lr=LR))
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_state_dict_holds_everything(model):
    ids = random_ids(model.config, 2, 33)

    def step(model, optimizer) -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = MuonAdamW(muon_groups(model, lr=LR))
    step(model, optimizer)
    twin = copy.deepcopy(model)
    again = MuonAdamW(muon_groups(twin, lr=1.0))  # overwritten by what is loaded
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer), step(twin, again)
    fresh = copy.deepcopy(optimizer)  # by way of pickle's methods, as torch.save has it
    assert len(fresh.state) == len(optimizer.state) == len(list(model.parameters()))
    for (name, x), y in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert optimizer.step(lambda: 3) == 3


# Trainer


def train(model, folder: Path, steps: int = 8, **options) -> Trainer:
    resume = options.pop("resume", None)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta2=0.9,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2},
        warmup_steps=2,
        save_steps=5,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[
            {"input_ids": random_ids(model.config, 20, seed=i).tolist()} for i in range(4)
        ],
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        optimizer_cls_and_kwargs=muon(arguments),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_with_wsd(tmp_path, model):
    trainer = train(model, tmp_path)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] / LR for entry in logs]
    assert rates == [0, 0.5, 1, 1, 1, 1, 1, pytest.approx(0.5)]
    assert float(logs[-1]["loss"]) < 0.8 * float(logs[0]["loss"])
    groups = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, MuonAdamW) and len(groups) == 5
    for group in groups:
        assert group.get("betas", (0.9, 0.9)) == (0.9, 0.9)
        assert group["weight_decay"] == (DECAY if group["params"][0].ndim > 1 else 0)


def test_trainer_resumes_bit_for_bit(tmp_path, model):
    twin = copy.deepcopy(model)
    straight = train(model, tmp_path / "a")
    resumed = train(twin, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-5"))
    for (name, x), y in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(x, y[1]), name
    a, b = (trainer.optimizer.state_dict()["state"] for trainer in (straight, resumed))
    assert a.keys() == b.keys()
    for i, state in a.items():
        assert all(torch.equal(x, b[i][name]) for name, x in state.items())


# Two processes

SHARDED = """
import copy, os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from kimi_linear.optim import MuonAdamW, StackedMuon, muon_groups
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, random_ids, run_two_processes, small_config

dist.init_process_group("gloo")
whole = build(small_config(vocab_size=98))
ids, split = random_ids(whole.config, 2, 33), copy.deepcopy(whole)
for layer in split.model.layers:
    fully_shard(layer)
fully_shard(split)
whole(ids, labels=ids).loss.backward()
for name, p in split.named_parameters():
    grad = whole.get_parameter(name).grad
    p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
before = copy.deepcopy(whole.state_dict())
for model in (whole, split):
    MuonAdamW(muon_groups(model, lr=1e-2)).step()
for name, p in split.named_parameters():
    got, want = (x.detach() - before[name] for x in (p.full_tensor(), whole.get_parameter(name)))
    assert got.isfinite().all() and got.any()
    if got.ndim != 2:  # torch.optim.Muon sums a matrix's parts in bf16, in an order of its own
        assert rel_err(got, want) < FLOOR[torch.float32], name
stack = distribute_tensor(torch.randn(2, 6, 8), p.device_mesh, [Shard(2)])
stack.grad = stack.clone()
group = {"params": [stack], "rows": 1, "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1}
try:
    StackedMuon([group]).step()
    raise AssertionError("a part of each matrix was taken for a whole one")
except ValueError as error:
    assert "want whole ones: Shard(0)" in str(error)
dist.barrier()
os._exit(0)  # see "DDP on gloo may hang at exit" in CONTRIBUTING.md
"""


def test_two_processes_with_sharded_parameters(tmp_path):
    """FSDP 2: a rank has whole experts, and updates them without communication."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    run_two_processes(tmp_path / "sharded.py")


# The example


def test_example(tmp_path, monkeypatch):
    released, folder, output = (tmp_path / x for x in ("released", "texts", "output"))
    released.mkdir(), folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(write_released(released))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    build(small_config(vocab_size=len(tokenizer), **special)).save_pretrained(released)
    for i in range(3):
        (folder / f"{i}.txt").write_text("All the same words again. " * (i + 1))
    for steps, *more in ((5,), (10, "--resume")):
        options = ["--steps", steps, "--length", 16, "--pieces-per-batch", 8, *more]
        argv = ["continue_pretrain.py", released, folder, output, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        runpy.run_path(str(ROOT / "examples" / "continue_pretrain.py"), run_name="__main__")
    state = json.loads((output / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["global_step"] == 10 and "moe/max_vio" in state["log_history"][-1]
    ids = tokenizer("All the same words again.", return_tensors="pt").input_ids
    with torch.no_grad():
        base, model = (KimiLinearForCausalLM.from_pretrained(x) for x in (released, output))
        assert model(ids, labels=ids).loss < base(ids, labels=ids).loss
    assert AutoTokenizer.from_pretrained(output).vocab_size == tokenizer.vocab_size


def test_what_the_command_decays(tmp_path):
    """`kimi-linear train` with AdamW: everything that `muon_groups` lets decay, and no more."""
    model = build(small_config())
    trainer = _Trainer(model, TrainingArguments(str(tmp_path), report_to=[]))
    decays = {name for name, (_, decay, _) in rules(model).items() if decay}
    assert set(trainer.get_decay_parameter_names(model)) == decays
