"""The loss without logits: what full logits give, in their place, and only where it can be used."""

import copy
import functools
import time

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from kimi_linear import KimiLinearForCausalLM
from kimi_linear import loss as loss_module
from kimi_linear.loss import fused_loss, why_not_fused
from tests.helpers import DEVICE, FLOOR, KERNEL_DTYPES, assert_as_good_as, rel_err
from tests.model.helpers import build, random_ids, small_config

LIMIT = FLOOR[torch.float32]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Liger's kernels run, also in the interpreter, on a few tokens at a time."""
    monkeypatch.setattr(loss_module, "CHUNK", 16)
    if DEVICE == "cpu":
        monkeypatch.setattr(loss_module, "use_triton", lambda x: True)


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return trained(full_attn_layers=(2,), num_hidden_layers=2)


def trained(**changes) -> KimiLinearForCausalLM:
    return build(small_config(**changes)).to(DEVICE).train()


@pytest.fixture
def ids(model) -> Tensor:
    return random_ids(model.config, 2, 33).to(DEVICE)


# The function


def full_loss(x: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    return ForCausalLMLoss(nn.functional.linear(x, weight), labels, weight.shape[0], **options)


def exact_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The definition, in float64."""
    logits = x.double() @ weight.double().T
    if shift_labels is None:
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    rows, targets = logits.flatten(0, 1), shift_labels.flatten()
    each = nn.functional.cross_entropy(rows, targets, reduction="none", ignore_index=ignore_index)
    items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return each.sum() / items


def gradients(loss_function, x: Tensor, weight: Tensor, *args, **options) -> tuple[Tensor, ...]:
    """The loss, and its gradients for x and weight as if three times as much were asked for."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_function(x, weight, *args, **options)
    (3 * loss).backward()
    assert x.grad is not None and weight.grad is not None
    return loss.detach(), x.grad, weight.grad


def inputs(B: int = 2, T: int = 33, D: int = 48, V: int = 97, dtype=torch.float32):
    x, labels = torch.randn(B, T, D, device=DEVICE), torch.randint(V, (B, T), device=DEVICE)
    labels[0, 5:9] = labels[-1, -3:] = -100
    return x.to(dtype), (torch.randn(V, D, device=DEVICE) / D**0.5).to(dtype), labels


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("options", ["", "items", "items tensor", "shifted", "ignore_index"])
def test_equals_full_logits(options, dtype):
    x, weight, labels = inputs(dtype=dtype)
    kwargs = {
        "": {},
        "items": {"num_items_in_batch": 130},
        "items tensor": {"num_items_in_batch": torch.tensor(130)},
        "shifted": {"shift_labels": labels.roll(-1, 1)},
        "ignore_index": {"ignore_index": 11},
    }[options]
    if options == "ignore_index":
        labels = labels.masked_fill(labels < 0, 11)
    got = gradients(fused_loss, x, weight, labels, **kwargs)
    ref = gradients(full_loss, x, weight, labels, **kwargs)
    gold = gradients(exact_loss, x.double(), weight.double(), labels, **kwargs)
    for name, *three in zip(("loss", "dx", "dweight"), got, ref, gold, strict=True):
        assert_as_good_as(name, *three, dtype=dtype)


@pytest.mark.parametrize("items", [None, 7, 0])
def test_all_labels_ignored(items):
    x, weight, labels = inputs()
    labels[:] = -100
    got = gradients(fused_loss, x, weight, labels, items)
    want = gradients(full_loss, x, weight, labels, num_items_in_batch=items)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_autocast():
    x, weight, labels = inputs()
    dtype = KERNEL_DTYPES[-1]
    gold = gradients(exact_loss, x.double(), weight.double(), labels)
    with torch.autocast(DEVICE, dtype):
        got = gradients(fused_loss, x, weight, labels)
        ref = gradients(full_loss, x, weight, labels)
    for name, *three in zip(("loss", "dx", "dweight"), got, ref, gold, strict=True):
        assert three[0].dtype == torch.float32
        assert_as_good_as(name, *three, dtype=dtype)


@pytest.mark.parametrize("frozen", ["x", "weight", "both", "no_grad"])
def test_frozen(frozen):
    x, weight, labels = inputs()
    loss, *grads = gradients(full_loss, x, weight, labels)
    x.requires_grad_(frozen not in ("x", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        got = fused_loss(x, weight, labels)
    assert rel_err(got, loss) < LIMIT
    assert got.requires_grad == (frozen in ("x", "weight"))
    if not got.requires_grad:
        return
    (3 * got).backward()
    for tensor, want in zip((x, weight), grads, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        assert tensor.grad is None or rel_err(tensor.grad, want) < LIMIT


def test_refuses_what_it_would_get_wrong():
    x, weight, labels = inputs()
    for wrong in (97, -1):
        labels[1, 7] = wrong
        with pytest.raises(ValueError, match="labels must be from 0 to 96, or -100"):
            fused_loss(x, weight, labels)
    labels[1, 7] = 96
    with pytest.raises(ValueError, match="shift_labels has 64 elements, want 66"):
        fused_loss(x, weight, labels, shift_labels=labels[:, 1:])
    loss = fused_loss(x.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only one backward pass"):
        loss.backward()


# In the model


def step(model: nn.Module, ids: Tensor, **options):
    """The output of a training step, and every gradient."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **options)
    out.loss.backward()
    return out, {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"router_aux_loss_coef": 0.5}, {"checkpointing": True}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_a_training_step(changes):
    changes = changes | {"full_attn_layers": (2,), "num_hidden_layers": 2}
    checkpointing = changes.pop("checkpointing", False)
    model = trained(**changes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = random_ids(model.config, 2, 33).to(DEVICE), torch.ones(2, 33, device=DEVICE).int()
    mask[0, :4] = 0
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == changes.get("tie_word_embeddings", False)
    for options in ({}, {"num_items_in_batch": torch.tensor(200)}):
        got, grads = step(model, ids, attention_mask=mask, **options)
        want, expected = step(model, ids, attention_mask=mask, skip_logits=False, **options)
        assert got.logits is None and want.logits.shape == (2, 33, 97)
        assert rel_err(got.loss, want.loss) < LIMIT
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None), name
            assert grad is None or rel_err(grad, expected[name]) < LIMIT, name


def test_skip_logits(model, ids):
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    model.eval()
    want = model(ids, labels=ids)
    assert want.logits is not None
    with torch.no_grad():
        got = model(ids, labels=ids, skip_logits=True)
    assert got.logits is None and rel_err(got.loss, want.loss) < LIMIT
    loss, *rest = model(ids, labels=ids, skip_logits=True, return_dict=False, use_cache=False)
    assert loss == got.loss and not rest


class Watch(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_no_tensor_of_all_logits():
    model = trained(vocab_size=997, full_attn_layers=(1,), num_hidden_layers=1)
    ids = random_ids(model.config, 2, 101).to(DEVICE)
    largest = []
    for skip in (True, False):
        with Watch() as watch:
            model(ids, labels=ids, skip_logits=skip).loss.backward()
        largest.append(watch.largest)
    all_logits = 4 * 202 * 997
    assert largest[0] < all_logits / 2 and largest[1] >= all_logits


# Where it cannot be used


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def offloaded(model):  # as accelerate does it
    model.lm_head.forward = functools.partial(nn.Linear.forward, model.lm_head)


def adapted(model):
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
    assert tuned.base_model.model is model


def biased(model):
    model.lm_head = nn.Linear(48, 97, device=DEVICE)


def own_loss(model):
    model.loss_function = lambda *args, **kwargs: ForCausalLMLoss(*args, **kwargs)


@pytest.mark.parametrize(
    "change, reason",
    [
        (hooked, "lm_head has hooks"),
        (offloaded, "lm_head has hooks or a forward"),
        (adapted, "lm_head is a Linear, want a torch.nn.Linear without bias"),
        (biased, "lm_head is a Linear, want a torch.nn.Linear without bias"),
        (own_loss, "loss_function is not"),
        ("HAS_LIGER", "liger-kernel >= 0.8.5 is not installed"),
        ("use_triton", "no Triton kernel runs: lm_head.weight is torch.float32 on"),
    ],
)
def test_full_logits_instead(change, reason, model, ids, monkeypatch):
    if isinstance(change, str):
        monkeypatch.setattr(loss_module, change, (lambda x: False) if "use" in change else False)
    else:
        change(model)
    model.train()
    with pytest.raises(ValueError, match=f"skip_logits is True, but {reason}"):
        model(ids, labels=ids, skip_logits=True)
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 33, 97)
    assert out.loss == ForCausalLMLoss(out.logits, ids, 97)


def test_arguments_that_need_logits(model, ids):
    for options in ({"labels": None}, {"logits_to_keep": 5}, {"logits_to_keep": torch.arange(5)}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"skip_logits is True, but {name} is"):
            model(ids, **({"labels": ids} | options), skip_logits=True)
    shifted = {"labels": ids, "shift_labels": ids[:, -5:].contiguous()}
    assert model(ids, **shifted, logits_to_keep=5).logits.shape == (2, 5, 97)


def test_weights_that_are_not_whole(model, ids):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:0])
    assert why_not_fused(model, ids, 0) == "lm_head.weight has shape [0, 48], want [97, 48]"


def test_compiling(model, ids):
    def reason(x):
        return x + 1, why_not_fused(model, x, 0)

    assert reason(ids)[1] is None
    compiled = torch.compile(reason, backend="eager", fullgraph=True)
    assert compiled(ids)[1] == "torch.compile cannot trace the fused loss"


def test_sharded_models(model, ids):
    """FSDP: the head in the unit of the model, in one of its own, and in one with the last norm."""
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        want, expected = step(model, ids, skip_logits=False)
        for unit in (None, ["lm_head"], ["model.norm", "lm_head"]):
            sharded = copy.deepcopy(model)
            if unit:
                fully_shard([sharded.get_submodule(name) for name in unit], mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            got, grads = step(sharded, ids)
            assert got.logits is None
            assert rel_err(got.loss, want.loss) < LIMIT
            for name, grad in grads.items():
                assert grad is None or rel_err(grad.full_tensor(), expected[name]) < LIMIT, name
            assert step(sharded, ids, skip_logits=False)[0].logits.shape == (2, 33, 97)
            if unit:
                hooked(sharded)
                assert why_not_fused(sharded, ids, 0).startswith("lm_head is a FSDPLinear")
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
        assert why_not_fused(model, ids, 0) == "lm_head.weight is a DTensor, want a plain tensor"
    finally:
        dist.destroy_process_group()


# Trainer


def test_trainer(tmp_path, model, monkeypatch):
    """Accumulated batches of packed documents, then an evaluation, with and without logits."""
    config, twin, seen = model.config, copy.deepcopy(model), []
    texts = [{"input_ids": random_ids(config, 9 + i, seed=i).tolist()} for i in range(4)]
    forward = KimiLinearForCausalLM.forward

    @functools.wraps(forward)
    def spy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append((self.training, out.logits is None))
        return out

    monkeypatch.setattr(KimiLinearForCausalLM, "forward", spy)

    def losses(model, name, **options) -> list[float]:
        arguments = TrainingArguments(
            str(tmp_path / name),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
            **options,
        )
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        trainer = Trainer(
            model, arguments, train_dataset=texts, eval_dataset=texts[:2], data_collator=collator
        )
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*logged, trainer.evaluate()["eval_loss"]]

    got = losses(model, "fused")
    assert seen == [(True, True), (True, True), (False, False)]
    with monkeypatch.context() as without:
        without.setattr(loss_module, "HAS_LIGER", False)
        want = losses(twin, "full")
    assert not any(skipped for _, skipped in seen[3:])
    assert got == pytest.approx(want, rel=LIMIT)
    for (name, x), y in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert rel_err(x, y) < LIMIT, name
    seen.clear()
    losses(model, "liger", use_liger_kernel=True, prediction_loss_only=True)
    assert seen == [(True, True), (True, True), (False, True)]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_released_sizes(autocast, monkeypatch):
    """Several chunks at the released width and vocabulary, in bf16."""
    monkeypatch.setattr(loss_module, "CHUNK", 128)
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight, labels = inputs(1, 1000, 2304, 163840, dtype=dtype)
    gold = gradients(exact_loss, x.double(), weight.double(), labels)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = gradients(fused_loss, x, weight, labels)
        ref = gradients(full_loss, x, weight, labels)
    for name, *three in zip(("loss", "dx", "dweight"), got, ref, gold, strict=True):
        assert_as_good_as(name, *three, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [512, 1024, 2048, 4096])
def test_memory(chunk, monkeypatch):
    """Peak above the inputs, forward and backward; `-s` shows it, and the time."""
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    x, weight, labels = inputs(1, 8192, 2304, 163840, dtype=torch.bfloat16)
    results, peaks = [], []
    for loss_function in (fused_loss, full_loss):
        gradients(loss_function, x, weight, labels)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, before = time.perf_counter(), torch.cuda.memory_allocated()
        result = gradients(loss_function, x, weight, labels)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([y.cpu() for y in result])
        del result
        print(f"{chunk} {loss_function.__name__}: {peaks[-1] / 1e9:.2f} GB, {1e3 * seconds:.1f} ms")
    for name, got, want in zip(("loss", "dx", "dweight"), *results, strict=True):
        assert rel_err(got, want) < FLOOR[torch.bfloat16], name
    assert 4 * peaks[0] < peaks[1]
