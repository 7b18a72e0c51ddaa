"""Load balancing in training: counts, bias updates, the auxiliary loss, and what Trainer logs."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kimi_kernels import route
from kimi_linear import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    LoadBalancingCallback,
    freeze_router,
)
from kimi_linear.balance import (
    bias_step,
    count_tokens,
    expert_routers,
    max_violation,
    take_counts,
    update_biases,
)
from kimi_linear.moe import sequence_balance_loss, with_auxiliary_loss
from kimi_linear.text import byte_tokenizer
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, random_ids, run_two_processes, small_config

ROOT = Path(__file__).parents[2]
LIMIT = FLOOR[torch.float32]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small run no faster on two threads, and far slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(small_config()).train()


@pytest.fixture
def ids(model) -> Tensor:
    return random_ids(model.config, 2, 9)


def biases(model) -> Tensor:
    return torch.stack([r.e_score_correction_bias for r in expert_routers(model).values()]).clone()


# By hand


def test_bias_steps_by_hand():
    counts = torch.tensor([[4, 2, 0, 2], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert max_violation(counts).tolist() == [1.0, 0.0, 3.0]
    sign = bias_step(counts, 0.5)
    assert sign.tolist() == [[-0.5, 0, 0.5, 0], [0] * 4, [-0.5, 0.5, 0.5, 0.5]]
    proportional = bias_step(counts, 0.5, "proportional")
    assert proportional.tolist() == [[-0.5, 0, 0.5, 0], [0] * 4, [-1.5, 0.5, 0.5, 0.5]]
    assert sign.dtype == proportional.dtype == torch.float32
    large = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])  # exact where fp32 counts would not be
    assert bias_step(large, 1.0).tolist() == [0, -1, 1]


def test_sequence_loss_by_hand():
    """Two experts, top 1: s = (3/4, 1/4) twice, then (1/5, 4/5) in a sequence of its own."""
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.2, 0.8]], dtype=torch.float64)
    x = torch.logit(p * 0.5)  # scores need not sum to 1
    both = sequence_balance_loss([x], torch.tensor([0, 2, 3], dtype=torch.int32), 1)
    torch.testing.assert_close(both.item(), (2 * 0.75 + 2 * 0.8) / 2)
    one = sequence_balance_loss([x], torch.tensor([0, 3]), 1)  # f = (4/3, 2/3), P = (1.7, 1.3) / 3
    torch.testing.assert_close(one.item(), (4 * 1.7 + 2 * 1.3) / 9)
    empty = sequence_balance_loss([x, x], torch.tensor([0, 0, 2, 2, 3, 3]), 1)
    torch.testing.assert_close(empty, 2 * both)
    even = torch.zeros(8, 8).fill_diagonal_(1.0)
    assert abs(sequence_balance_loss([even], torch.tensor([0, 8]), 1).item() - 1) < LIMIT
    worst = torch.tensor([9.0, 9, -99, -99]).expand(5, 4)
    assert abs(sequence_balance_loss([worst], torch.tensor([0, 5]), 2).item() - 2) < LIMIT
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sequence_balance_loss([x], torch.tensor([0, 3]), 1), x
    )


@pytest.mark.parametrize("mode", ["sign", "proportional"])
@pytest.mark.parametrize(
    "E, top_k, n_group, topk_group",
    [(8, 2, 1, 1), (64, 8, 1, 1), (256, 8, 1, 1), (64, 6, 8, 4), (16, 2, 4, 2)],
)
def test_loads_move_together(E, top_k, n_group, topk_group, mode):
    """A router that prefers the last experts, on the same 512 tokens in each of 130 steps."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(512, E, generator=rng) + torch.linspace(-1, 1, E)
    bias, violations = torch.zeros(E), []
    for _ in range(130):
        _, index = route(logits, bias, top_k, n_group=n_group, topk_group=topk_group)
        counts = torch.bincount(index.flatten(), minlength=E)
        violations.append(max_violation(counts).item())
        bias += bias_step(counts, 3e-3, mode)
    assert violations[0] > 1
    assert max(violations[-20:]) < violations[0] / 4
    assert bias[0] > bias[-1]


# Counting


def chosen(model, *args, **kwargs) -> Tensor:
    """Tokens per expert of one forward, `[layers, E]`, from what the routers return."""
    found = []
    hooks = [
        r.register_forward_hook(
            lambda _m, _a, out: found.append(out[2].flatten().bincount(minlength=8))
        )
        for r in expert_routers(model).values()
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def test_counts_are_those_of_the_real_tokens(model, ids):
    want = chosen(model, ids)
    assert list(expert_routers(model)) == [1, 2, 3] and want.sum(1).tolist() == [2 * 9 * 2] * 3
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = chosen(model, ids, attention_mask=mask)
    assert padded.sum(1).tolist() == [(9 + 5) * 2] * 3
    count_tokens(model)
    model(ids)
    model(ids, attention_mask=mask)
    model.eval()(ids)  # evaluation does not count
    assert torch.equal(take_counts(model), want + padded)
    assert not take_counts(model).any()
    count_tokens(model.train(), enabled=False)
    model(ids)
    with pytest.raises(ValueError, match=r"count_tokens"):
        take_counts(model)
    callback = LoadBalancingCallback()
    callback.on_train_begin(None, None, None, model=model)
    model(ids)
    callback.on_step_begin(None, None, None, model=model)  # what ran before it does not count
    assert not take_counts(model).any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_once(use_reentrant, ids):
    model = build(small_config(router_aux_loss_coef=0.5)).train()
    want, loss = chosen(model, ids), model(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # which a reentrant checkpoint needs
    count_tokens(model)
    again = model(ids, labels=ids)
    assert again.loss == loss
    again.loss.backward()
    assert torch.equal(take_counts(model), want)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert rel_err(p.grad, grad) < LIMIT


def test_nothing_waits_for_the_device(model):
    """No operation whose result or shape the host has to read."""
    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket._qualified_op_name.split("::")[1])
            return func(*args, **(kwargs or {}))

    count_tokens(model)
    router = expert_routers(model)[1]
    x, ends = torch.randn(7, 48), torch.tensor([0, 3, 7])
    with Record():
        logits, _, _ = router(x)
        loss = sequence_balance_loss([logits], ends, 2)
        with_auxiliary_loss(loss, loss, 0.1, torch.ones(1, 7), torch.tensor(6)).backward()
        counts = take_counts(model)
        max_violation(counts)
        update_biases(model, counts, 1e-3)
        update_biases(model, counts, 1e-3, "proportional")
    assert "scatter_add_" in seen and counts[0].sum() == 14
    synchronous = {"_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "equal", "item"}
    assert not seen & (synchronous | {"masked_select", "_unique2", "repeat_interleave"})


# Freezing


def test_a_frozen_router_does_not_move(model, ids):
    freeze_router(model)
    before = biases(model)
    model(ids, labels=ids).loss.backward()
    for router in expert_routers(model).values():
        assert router.weight.grad is None and not router.weight.requires_grad
    assert all(p.grad is not None for n, p in model.named_parameters() if ".mlp.gate." not in n)
    update_biases(model, torch.arange(24).view(3, 8), 0.1)
    assert torch.equal(biases(model), before)
    freeze_router(model, frozen=False)
    model(ids, labels=ids).loss.backward()
    assert all(router.weight.grad.any() for router in expert_routers(model).values())
    update_biases(model, torch.arange(24).view(3, 8), 0.1)
    assert ((biases(model) - before).abs() > 0.09).all()


# The auxiliary loss in the model


def test_the_loss_is_that_of_each_document(model, ids):
    """The mean over documents, whether they are rows, padded rows or packed into one row."""
    want = model(ids, labels=ids)
    assert want.aux_loss is None
    model.config.router_aux_loss_coef = 0.5
    out = model(ids, labels=ids, output_router_logits=True)
    assert out.loss == want.loss + 0.5 * out.aux_loss and len(out.router_logits) == 3
    rows = [sequence_balance_loss([x], torch.tensor([0, 9, 18]), 2) for x in out.router_logits]
    assert rel_err(out.aux_loss, sum(rows)) < LIMIT
    assert torch.equal(model.eval()(ids, labels=ids).loss, want.loss)  # not in evaluation

    model.train()
    short = ids[1:, :6]
    each = [model(x).aux_loss for x in (ids[:1], short)]
    mean = sum(each) / 2
    for left in (True, False):
        pad, real = torch.zeros_like(ids[:1, :3]), torch.ones_like(ids)
        row = torch.cat((pad, short) if left else (short, pad), 1)
        real[1, slice(None, 3) if left else slice(6, None)] = 0
        got = model(torch.cat((ids[:1], row)), attention_mask=real).aux_loss
        assert rel_err(got, mean) < LIMIT
    packed = torch.cat((ids[:1], short), 1)
    ends = torch.tensor([0, 9, 15], dtype=torch.int32)
    positions = torch.cat((torch.arange(9), torch.arange(6)))[None]
    assert rel_err(model(packed, cu_seqlens=ends).aux_loss, mean) < LIMIT
    assert rel_err(model(packed, position_ids=positions).aux_loss, mean) < LIMIT


def test_the_share_of_a_batch():
    loss, aux, labels = torch.tensor(3.0), torch.tensor(2.0), torch.tensor([[1, -100, 3, 4]])
    assert with_auxiliary_loss(loss, None, 0.5, labels, 8) is loss
    assert with_auxiliary_loss(loss, aux, 0.5, labels) == 4
    assert with_auxiliary_loss(loss, aux, 0.5, labels, 8) == 3.25  # 2 of 8 labels are here
    assert with_auxiliary_loss(loss, aux, 0.5, labels, torch.tensor(8)) == 3.25
    assert with_auxiliary_loss(loss, aux, 0.5, labels, 8, labels, ignore_index=1) == 3.375


def test_the_coefficient_in_a_config(tmp_path):
    off, on = small_config(), small_config(router_aux_loss_coef=1e-4)
    assert off != on and "router_aux_loss_coef" not in off.to_dict() | off.to_diff_dict()
    for config in (off, on):
        config.save_pretrained(tmp_path)
        assert KimiLinearConfig.from_pretrained(tmp_path) == config
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved.get("router_aux_loss_coef", 0) == config.router_aux_loss_coef
    for wrong in (-1e-4, None, "0", True, float("nan")):
        with pytest.raises(ValueError, match=r"^router_aux_loss_coef: got "):
            small_config(router_aux_loss_coef=wrong)


# Trainer


def train(model, folder: Path, callback=None, *, in_front=None, packed=False, **options) -> Trainer:
    """Two optimizer steps of four rows each, of equal lengths unless `packed`."""
    config = model.config
    rows = [random_ids(config, 8 + packed * (i % 3), seed=i).tolist() for i in range(8)]
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    if not packed:
        collator = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **defaults | options),
        train_dataset=[{"input_ids": row} for row in rows],
        eval_dataset=[{"input_ids": row} for row in rows[:2]],
        data_collator=collator,
        callbacks=callback and [callback],
    )
    if in_front is not None:
        assert in_front.attach(trainer) is in_front
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_end_to_end(tmp_path):
    """The tiny config: what is logged, that biases move by the rule, and that they are saved."""
    config = KimiLinearConfig.from_json_file(ROOT / "configs" / "tiny.json")
    config.router_aux_loss_coef = 1e-3
    model = KimiLinearForCausalLM(config)
    callback = LoadBalancingCallback(0.01, per_layer=True)
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train(model, tmp_path, callback, packed=True, **options)
    first, last = logged(trainer)
    names = {"max_vio", "max_vio_worst", "min_load", "idle_experts", "bias_range", "aux_loss"}
    names |= {f"max_vio/layer_{i}" for i in (1, 2, 3)}
    for entry in (first, last):
        assert {f"moe/{name}" for name in names} == {n for n in entry if n.startswith("moe/")}
        assert all(type(entry[f"moe/{name}"]) is float for name in names)
        layers = [entry[f"moe/max_vio/layer_{i}"] for i in (1, 2, 3)]
        assert abs(entry["moe/max_vio"] - sum(layers) / 3) < 1e-9
        assert entry["moe/max_vio_worst"] == max(layers)
        assert 0 <= entry["moe/min_load"] <= 1 and 0 <= entry["moe/idle_experts"] < 1
        assert 2.9 < entry["moe/aux_loss"] < 12  # three layers of 1 to E / top_k
    assert not any("moe/max_vio" in e for e in trainer.state.log_history if "eval_loss" in e)
    tokens = 2 * sum(8 + i % 3 for i in range(8)) // 2 * config.num_experts_per_token
    sums = [counts.sum().item() for counts in callback.tokens_per_expert.values()]
    assert sums == [tokens] * 3 and list(callback.tokens_per_expert) == [1, 2, 3]  # two steps

    steps = biases(model) / 0.01  # four steps of -1, 0 or 1
    assert (steps - steps.round()).abs().max() < 1e-3
    assert steps.abs().max() <= 4.01 and (steps.abs() > 0.5).any(1).all()
    assert abs(last["moe/bias_range"] - 0.01 * (steps.amax(1) - steps.amin(1)).max()) < 1e-6
    json.dumps(trainer.state.log_history)
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final" / "model.safetensors")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "final")
    for i, router in expert_routers(model).items():
        bias = router.e_score_correction_bias
        name = f"model.layers.{i}.block_sparse_moe.gate.e_score_correction_bias"
        assert torch.equal(saved[name], bias) and saved[name].dtype == torch.float32
        assert router.counts is None  # training is over
    assert not [name for name in saved if "counts" in name]
    assert torch.equal(biases(loaded), biases(model))


def test_accumulated_batches_are_one_step(tmp_path):
    """Four rows at once, or twice two: the same biases, weights and losses."""
    whole, parts = (build(small_config(vocab_size=260, router_aux_loss_coef=0.1)) for _ in "ab")
    a = train(whole, tmp_path, LoadBalancingCallback(0.1))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    b = train(parts, tmp_path, LoadBalancingCallback(0.1), **options)
    assert torch.equal(biases(whole), biases(parts))
    for (name, x), y in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert rel_err(x, y) < 1e-3, name  # Adam divides tiny gradients by themselves
    for x, y in zip(logged(a), logged(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert abs(x[name] - y[name]) <= 1e-4 * abs(x[name]), name


def test_without_the_callback_nothing_happens(tmp_path):
    model = build(small_config(vocab_size=260))
    before = biases(model)
    trainer = train(model, tmp_path)
    assert torch.equal(biases(model), before)
    assert not any(name.startswith("moe/") for entry in logged(trainer) for name in entry)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_measuring(frozen, tmp_path):
    model = build(small_config(vocab_size=260))
    before = {n: x.clone() for n, x in model.state_dict().items() if ".mlp.gate." in n}
    if frozen:
        freeze_router(model)
    trainer = train(model, tmp_path, LoadBalancingCallback(1e-3 if frozen else 0), weight_decay=0.1)
    assert all("moe/max_vio" in entry for entry in logged(trainer))
    for name, x in model.state_dict().items():
        if name in before:
            still = frozen or name.endswith("bias")
            assert torch.equal(x, before[name]) == still, name


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.names |= set(logs or ())


def test_attached_in_front_of_the_reporters(tmp_path):
    reporter, balance = Reporter(), LoadBalancingCallback()
    trainer = train(build(small_config(vocab_size=260)), tmp_path, reporter, in_front=balance)
    assert "moe/max_vio" in reporter.names and trainer.callback_handler.callbacks[0] is balance
    assert all("moe/max_vio" in entry for entry in logged(trainer))


# Two processes


def rank_main(folder: str) -> None:
    """One of two ranks: two rows of the four per step."""
    model = build(small_config(vocab_size=260, router_aux_loss_coef=0.1))
    callback = LoadBalancingCallback(0.1)
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    trainer = train(model, Path(folder), callback, **options)
    rank = torch.distributed.get_rank()
    state = {"model": model.state_dict(), "logs": logged(trainer)}
    torch.save(state | {"loads": callback.tokens_per_expert}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # see "DDP on gloo may hang at exit" in CONTRIBUTING.md


def test_two_processes_count_as_one(tmp_path):
    """Two ranks with half of each batch, and one process with all of it."""
    code = f"from tests.model.test_balance import rank_main; rank_main({str(tmp_path)!r})"
    (tmp_path / "rank.py").write_text(code)
    run_two_processes(tmp_path / "rank.py")
    model = build(small_config(vocab_size=260, router_aux_loss_coef=0.1))
    callback = LoadBalancingCallback(0.1)
    want = logged(train(model, tmp_path, callback))
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, x in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                assert torch.equal(got["model"][name], x), name
            assert rel_err(got["model"][name], x) < 1e-3, name
        for i, counts in callback.tokens_per_expert.items():
            assert torch.equal(got["loads"][i], counts)
        for x, y in zip(got["logs"], want, strict=True):
            for name in y:
                if name.startswith("moe/"):
                    assert abs(x[name] - y[name]) <= 1e-4 * abs(y[name]), name


# Errors


def test_wrong_arguments(model):
    for rate in (-1e-3, float("nan"), float("inf"), True, None, "1e-3"):
        with pytest.raises(ValueError, match=r"^rate is "):
            LoadBalancingCallback(rate)
    with pytest.raises(ValueError, match=r"^mode is 'signed', want 'sign' or 'proportional'"):
        LoadBalancingCallback(mode="signed")
    with pytest.raises(ValueError, match=r"^per_layer is 1"):
        LoadBalancingCallback(per_layer=1)
    dense = KimiLinearForCausalLM(small_config(first_k_dense_replace=4))
    for function in (freeze_router, count_tokens, take_counts, expert_routers):
        with pytest.raises(ValueError, match=r"^model is a kimi_linear\..*, want one of"):
            function(dense)
    with pytest.raises(ValueError, match=r"^counts has shape \[8\], want \[3, 8\]"):
        update_biases(model, torch.ones(8), 0.1)
    with pytest.raises(ValueError, match=r"layer 1 is torch.bfloat16, want float32"):
        update_biases(model.bfloat16(), torch.ones(3, 8), 0.1)
    with pytest.raises(ValueError, match=r"layer 1 is torch.bfloat16, want float32"):
        LoadBalancingCallback().on_train_begin(None, None, None, model=model)
    x, ends = torch.zeros(3, 4), torch.tensor([0, 3])
    for args, name in (
        (([], ends, 2), "logits"),
        (([x, x[:2]], ends, 2), "logits"),
        (([x], ends[:1], 2), "cu_seqlens"),
        (([x], ends, 5), "top_k"),
        (([x], ends, 0), "top_k"),
    ):
        with pytest.raises(ValueError, match=f"^{name} (is|has)"):
            sequence_balance_loss(*args)
