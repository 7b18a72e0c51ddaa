"""Processes with a span of the tokens each give what one process with all of them gives.

The tests run this file as a script: gloo on CPUs, NCCL on two GPUs.
"""

import copy
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_kernels import causal_conv, fused_kda, latent_attention
from kimi_linear import KimiLinearCache, KimiLinearForCausalLM, LoadBalancingCallback
from kimi_linear.balance import count_tokens, take_counts
from kimi_linear.context import ContextSpan, shard_sequence
from kimi_linear.context_trainer import ContextParallelTrainer
from tests.helpers import FLOOR, assert_as_good_as, rel_err
from tests.model.helpers import build, random_ids, run_processes, small_config

CONFIG = small_config((2, 5), num_hidden_layers=5, router_aux_loss_coef=0.1)
LOSS = torch.float32  # transformers takes it, so gradients are no better, of logits in any dtype
Model = KimiLinearForCausalLM


def one_row(*ends: int, **more: Any) -> dict[str, Any]:
    """A row of documents that end there, and what else a batch has."""
    ids = random_ids(CONFIG, 1, ends[-1])
    return {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, *ends])} | more


def one_document(tokens: int) -> dict[str, Any]:
    ids = random_ids(CONFIG, 1, tokens)
    return {"input_ids": ids, "labels": ids}


def padded() -> dict[str, Tensor]:
    """Three rows of 40, 17 and 33 tokens."""
    ids, mask = random_ids(CONFIG, 3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[1, 17:] = mask[2, :7] = 0
    labels = ids.where(mask.bool(), -100)
    labels[2, 7] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def flattened(*lengths: int) -> dict[str, Tensor]:
    """As transformers' collator packs documents."""
    rows = [{"input_ids": x.tolist()} for x in random_ids(CONFIG, sum(lengths)).split(lengths)]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)


def answer_only(tokens: int) -> dict[str, Tensor]:
    """Only one rank has labels."""
    batch = one_document(tokens)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :-9] = -100
    return batch


def ignoring(index: int) -> dict[str, Any]:
    batch = one_row(60, 130, ignore_index=index)
    return batch | {"labels": batch["labels"].where(batch["labels"] % 3 > 0, index)}


# of 130 tokens two ranks have 65 each, three 43, 43 and 44
BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "one document": lambda: one_document(130),
    "fewer tokens than the convolution sees": lambda: one_document(5),
    "a document over a border": lambda: one_row(60, 130),
    "ends on a border": lambda: one_row(10, 43, 65, 86, 130),
    "ends beside a border": lambda: one_row(1, 42, 64, 66, 87, 130),
    "empty documents": lambda: one_row(0, 20, 20, 100, 130, 130),
    "the collator's": lambda: flattened(3, 97, 30),
    "padded rows": padded,
    "labels on the last rank": lambda: answer_only(130),
    "another label is ignored": lambda: ignoring(-1),
    "counted labels": lambda: one_row(100, 130, num_items_in_batch=200),
}


def on(device: str | torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}


def mean(x: Tensor) -> Tensor:
    """Over the ranks, as DDP and FSDP do with gradients."""
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def run(model: Model, batch: dict[str, Any]):
    """Outputs, gradients by name, and tokens per expert, of one training step."""
    model.train().zero_grad()
    count_tokens(model)
    outputs = model(**batch, skip_logits=False)
    outputs.loss.backward()
    counts = torch.stack(
        [m.counts for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    )
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs, grads, counts


def check_step(model: Model, gold: Model, batch: dict[str, Any], what: str) -> None:
    """Loss, auxiliary loss, logits, every gradient, and the loads of the experts."""
    want, grads, counts = run(model, batch)
    exact, gold_grads, _ = (want, grads, counts) if gold is model else run(gold, batch)
    span = shard_sequence(batch)
    got, own, _ = run(model, span)
    assert torch.equal(take_counts(model), counts), what
    for name in ("loss", "aux_loss"):
        x, y, z = (getattr(outputs, name).detach() for outputs in (got, want, exact))
        assert_as_good_as(f"{what}: {name}", x, y, z, LOSS)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    whole = [span["context"].cut(outputs.logits[real][None]) for outputs in (want, exact)]
    assert_as_good_as(f"{what}: logits", got.logits, *whole)
    assert own.keys() == grads.keys() == gold_grads.keys()
    parts = [{k: mean(x) for k, x in own.items()}, grads, gold_grads]
    if got.logits.dtype == torch.float32:
        parts = [by_kind(x) for x in parts]
    for name in parts[0]:
        assert_as_good_as(f"{what}: {name}", *(x[name] for x in parts), LOSS)


def by_kind(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all layers together: one layer's A_log has two numbers, each a sum that cancels."""
    kinds: dict[str, list[Tensor]] = {}
    for name, x in grads.items():
        kinds.setdefault(re.sub(r"\d+", "", name), []).append(x.flatten())
    return {name: torch.cat(x) for name, x in kinds.items()}


def check_steps(device: torch.device) -> None:
    """All batches in float64, where only the loss has a rounding that shows; some in float32."""
    model = build(CONFIG).to(device)
    gold = copy.deepcopy(model).double()
    for what, batch in BATCHES.items():
        check_step(gold, gold, on(device, batch()), what)
    for what in ("one document", "a document over a border", "padded rows"):
        check_step(model, gold, on(device, BATCHES[what]()), what)
    gold.gradient_checkpointing_enable()
    for ends in ((20, 130), (130,)):
        check_step(gold, gold, on(device, one_row(*ends)), "checkpointing")
    gold.gradient_checkpointing_disable()
    for name, p in gold.named_parameters():  # a graph that reaches no further than one projection
        p.requires_grad_(name.endswith("layers.0.self_attn.k_proj.weight"))
    check_step(gold, gold, on(device, one_row(60, 130)), "one weight")


@torch.no_grad()
def check_inference(device: torch.device) -> None:
    model = build(CONFIG).to(device)
    gold = copy.deepcopy(model).double()
    for tokens in (130, 5):
        batch = on(device, one_document(tokens))
        span = shard_sequence(batch)
        assert (span["context"].middles is None) == (tokens < 2 * dist.get_world_size())
        want, exact = (span["context"].cut(m(**batch).logits) for m in (model, gold))
        outputs = model(**span)
        assert_as_good_as("logits", outputs.logits, want, exact)
        assert outputs.past_key_values is None
    embeds = model.get_input_embeddings()(batch["input_ids"])
    again = model(**shard_sequence({"inputs_embeds": embeds}))
    assert torch.equal(again.logits, outputs.logits) and again.loss is None


def check_op(
    op: Callable[[dict[str, Tensor], ContextSpan | None], Tensor],
    x: dict[str, Tensor],
    do: Tensor,
    context: ContextSpan,
    weights: tuple[str, ...],
) -> None:
    """Of inputs x and the span's part of them; all ranks have the `weights`."""
    dtype = do.dtype

    def run(span: ContextSpan | None, to: torch.dtype):
        given = {k: v.to(torch.promote_types(v.dtype, to)) for k, v in x.items()}
        leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
        local = {k: v if span is None or k in weights else span.cut(v) for k, v in leaves.items()}
        o = op(local, span)
        o.backward((do if span is None else span.cut(do)).to(o.dtype))
        return o.detach(), {k: leaf.grad for k, leaf in leaves.items()}

    (got, own), (want, grads) = run(context, dtype), run(None, dtype)
    exact, gold = run(None, torch.float64)
    assert_as_good_as("o", got, *(context.cut(o) for o in (want, exact)))
    for name, g in own.items():
        total = g.float() if dtype != torch.float64 else g
        dist.all_reduce(total)  # of the inputs each rank has its own span, zero elsewhere
        assert_as_good_as(name, total.to(g.dtype), grads[name], gold[name], dtype)


def row_of(device: torch.device, *ends: int) -> ContextSpan:
    ids = torch.zeros(1, ends[-1], dtype=torch.int64, device=device)
    return ContextSpan(ids, torch.tensor([0, *ends], device=device))


def check_mixer(device: torch.device, dtype: torch.dtype, T: int, H: int, K: int) -> None:
    """Convolution and delta rule alone, where no router makes a jump of a rounding."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (1, T, H * K), "k": (1, T, H * K), "v": (1, T, H * K), "f": (1, T, H, K)}
    shapes |= {"b": (1, T, H), "weight": (3 * H * K, 4), "A_log": (H,), "dt_bias": (H * K,)}
    weights = ("weight", "A_log", "dt_bias")
    x = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    x = {k: v.to(device, torch.float32 if k in weights else dtype) for k, v in x.items()}
    do = torch.randn(1, T, H, K, generator=rng).to(device, dtype)
    context = row_of(device, T // 7, T)

    def mixer(local: dict[str, Tensor], span: ContextSpan | None) -> Tensor:
        q, k, v, f, b, weight, A_log, dt_bias = local.values()
        xs, state, cu = [q, k, v], None, context.cu_seqlens
        if span is not None:
            (xs, state), cu = span.conv_state(xs, 4), span.documents
        xs, _ = causal_conv(xs, weight, initial_state=state, cu_seqlens=cu)
        q, k, v = (y.unflatten(-1, (H, K)) for y in xs)
        if span is None:
            return fused_kda(q, k, v, f, b, A_log, dt_bias, cu_seqlens=cu)[0]
        return span.delta_rule(q, k, v, f, b, A_log, dt_bias)

    check_op(mixer, x, do, context, weights)


def check_attention(device: torch.device, dtype: torch.dtype, T: int) -> None:
    """Of one document and of two; long enough for cuDNN, where there is one."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (1, T, 4, 192), "latent": (1, T, 576), "w_kv": (4 * 256, 512)}
    x = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    x["w_kv"] /= 512**0.5
    x = {name: t.to(device, dtype) for name, t in x.items()}
    do = torch.randn(1, T, 4, 128, generator=rng).to(device, dtype)
    for ends in ((T,), (T // 7, T)):
        context = row_of(device, *ends)

        def attention(local, span, cu=context.cu_seqlens):
            if span is None:
                return latent_attention(**local, scale=192**-0.5, cu_seqlens=cu)
            return span.attention(**local, scale=192**-0.5)

        check_op(attention, x, do, context, ("w_kv",))


def check_training(device: torch.device) -> None:
    """A few steps with the parameters sharded by FSDP, a group of their own for the context."""
    whole, group = build(CONFIG).to(device).train(), dist.new_group()
    split = copy.deepcopy(whole)
    for layer in split.model.layers:
        fully_shard(layer)
    fully_shard(split)
    losses = []
    for model in (whole, split):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            batch = on(device, flattened(30 + step, 99, 1))
            loss = model(**(shard_sequence(batch, group) if model is split else batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[4:] == pytest.approx(losses[:4], rel=FLOOR[torch.float32])
    assert losses[3] < losses[0]
    for (name, x), y in zip(split.named_parameters(), whole.parameters(), strict=True):
        assert rel_err(x.full_tensor(), y) < 10 * FLOOR[torch.float32], name  # steps add to it


def check_refusals(device: torch.device) -> None:
    model, n = build(CONFIG).to(device), dist.get_world_size()
    batch = on(device, one_document(20))
    span = shard_sequence(batch)
    ids = batch["input_ids"]
    cache = KimiLinearCache(CONFIG)
    other = torch.full_like(ids, dist.get_rank())
    left = torch.ones_like(ids)
    left[:, :3] = 0
    for wrong, match in (
        ({"input_ids": ids, "use_cache": True}, "use_cache is given"),
        ({"input_ids": ids, "past_key_values": cache}, "past_key_values is given"),
        ({"labels": ids}, "input_ids or inputs_embeds"),
        ({"input_ids": ids[:, : n - 1]}, f"{n - 1} tokens, want at least one for each of {n}"),
        ({"input_ids": ids, "inputs_embeds": ids[..., None].float()}, "want one of them, got"),
        ({"inputs_embeds": ids.float()}, "inputs_embeds has shape"),
        ({"input_ids": ids[:, :0]}, "not empty"),
        ({"input_ids": ids, "labels": ids[0]}, "labels has shape"),
        ({"input_ids": ids, "logits_to_keep": 1}, "logits_to_keep is given"),
        ({"input_ids": other}, "differs between the ranks"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, "labels has shape"),
        ({"input_ids": ids, "attention_mask": left, "labels": ids}, "padding is to predict"),
        ({"input_ids": ids, "cu_seqlens": torch.tensor([0, 19], device=device)}, "ends at 19"),
    ):
        with pytest.raises(ValueError, match=match):
            shard_sequence(wrong)
    group = dist.new_group([0])  # every process takes part in making it
    if dist.get_rank():
        with pytest.raises(ValueError, match="group has other processes"):
            shard_sequence(batch, group)
    for wrong, match in (
        (span | {"use_cache": True}, "a span of a sequence cannot fill a cache"),
        (span | {"past_key_values": cache}, "a span of a sequence cannot fill a cache"),
        (span | {"attention_mask": torch.ones_like(span["input_ids"])}, "want none"),
        ({"input_ids": ids, "context": span["context"]}, "context is of"),
        (span | {"shift_labels": None}, "want shift_labels"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**wrong)
    model.model.layers[1].mlp.experts.num_experts = 4
    with pytest.raises(ValueError, match="ranks that share the experts"):
        model(**span)


def main(kind: str) -> None:
    """One of the ranks."""
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(dist.get_rank())
    check_refusals(device)
    check_steps(device)
    check_inference(device)
    check_mixer(device, torch.float32, 200, 8, 16)
    check_attention(device, torch.float32, 500)
    if kind == "cuda":
        check_attention(device, torch.bfloat16, 2000)
        check_mixer(device, torch.bfloat16, 2000, 32, 128)
    check_training(device)
    dist.destroy_process_group()


GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize(
    ("count", "kind"), [(3, "cpu"), pytest.param(2, "cuda", marks=[pytest.mark.gpu, GPUS])]
)
def test_processes_are_as_one(count, kind, monkeypatch):
    if kind == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # torch takes one per process, of any mesh
    run_processes(count, Path(__file__), kind)


# Trainer


def train(make_trainer: Any, folder: Path, **options: Any):
    """Losses of three steps and of an evaluation, and what was trained."""
    rows = [{"input_ids": x.tolist()} for x in random_ids(CONFIG, 12, 21)]
    rows = [{"input_ids": row["input_ids"][: 9 + i]} for i, row in enumerate(rows)]
    model = build(CONFIG)
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        optim="sgd",  # Adam makes a step of the noise in a gradient near 0
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = make_trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        callbacks=[LoadBalancingCallback(0.1)],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "moe/max_vio", "moe/aux_loss")
    values = [float(entry[name]) for entry in logs for name in names]
    return trainer, [*values, trainer.evaluate()["eval_loss"]], model.state_dict()


def trainer_main(folder: Path) -> None:
    """One of four ranks: two and two share their batches."""
    options = {"ddp_backend": "gloo", "per_device_eval_batch_size": 2}
    make_trainer = partial(ContextParallelTrainer, context_ranks=2)
    trainer, values, weights = train(make_trainer, folder, **options)
    with pytest.raises(ValueError, match="prediction_loss_only is False"):
        trainer.predict(trainer.eval_dataset)
    for options, match in (
        ({"context_ranks": 3}, "context_ranks is 3, want a divisor of the 4 processes"),
        ({"compute_loss_func": print}, "want the model's loss"),
    ):
        with pytest.raises(ValueError, match=match):
            ContextParallelTrainer(trainer.model, trainer.args, **options)
    torch.save((values, weights), folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # see "DDP on gloo may hang at exit" in CONTRIBUTING.md


def test_trainer(tmp_path):
    """Two batches a step, each on two processes, are as two batches on one process."""
    run_processes(4, Path(__file__), str(tmp_path))
    options = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    _, want, weights = train(Trainer, tmp_path, **options)
    for rank in range(4):
        values, trained = torch.load(tmp_path / f"{rank}.pt")
        assert values == pytest.approx(want, rel=FLOOR[torch.float32])
        for name, x in weights.items():
            assert rel_err(trained[name], x) < FLOOR[torch.float32], name


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1] in ("cpu", "cuda") else trainer_main(Path(sys.argv[1]))
