"""transformers' Trainer and TRL's SFTTrainer: batches, precision, resuming, what is saved."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM as NativeForCausalLM,
)

from kimi_linear import KimiLinearForCausalLM, LoadBalancingCallback, kda
from kimi_linear.optim import muon
from kimi_linear.text import BYTES, byte_tokenizer
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, native_twin, random_ids, small_config
from tests.model.tokenizer_helpers import write_released

ROOT = Path(__file__).parents[2]
LIMIT = FLOOR[torch.float32]
TOKENIZER = byte_tokenizer()
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
CONFIG = small_config(
    vocab_size=len(TOKENIZER), **{name: getattr(TOKENIZER, name) for name in NAMES}
)
COLLATORS = {
    "packed": DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    "padded": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
}
TURNS = [("user", "Hello"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    return build(CONFIG)


@pytest.fixture
def ids() -> Tensor:
    return random_ids(CONFIG, 2, 33)


def texts(rows: int = 8) -> list[dict[str, list[int]]]:
    """Bytes alone: the collator for padding takes every [PAD] for padding."""
    rng = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(BYTES, (9 + i,), generator=rng).tolist()} for i in range(rows)
    ]


def train(
    model, folder: Path, steps: int, *, collator: str = "packed", resume: Path | None = None,
    with_muon: bool = False, callbacks=(), **options,
) -> Trainer:  # fmt: skip
    """A few optimizer steps on documents of different lengths, in the same order always."""
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        **defaults | {"lr_scheduler_type": "constant"} | options,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=texts(),
        eval_dataset=texts(2),
        data_collator=COLLATORS[collator],
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=muon(arguments) if with_muon else None,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def assert_same(model, other) -> None:
    """Bit for bit, buffers as well."""
    want = other.state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(x, want[name]), name


# Batches and precision


def test_packed_and_padded_train_as_separate_documents(tmp_path, model):
    """Four documents per step: in one row, in four, or one after another."""
    ways = {
        "separate": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "packed": {"per_device_train_batch_size": 4},
        "padded": {"per_device_train_batch_size": 4, "collator": "padded"},
        "both": {"collator": "padded", "gradient_accumulation_steps": 2},
    }
    options = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
    trained, losses = {}, {}
    for name, way in ways.items():
        trained[name] = copy.deepcopy(model)
        trainer = train(trained[name], tmp_path, 2, **options | way)
        losses[name] = [*logged(trainer), trainer.evaluate()["eval_loss"]]
        assert losses[name] == pytest.approx(losses["separate"], rel=LIMIT)
        for (key, x), y in zip(
            trained[name].named_parameters(), trained["separate"].parameters(), strict=True
        ):
            assert rel_err(x, y) < LIMIT, (name, key)
    assert len(losses["packed"]) == 3 and losses["packed"][1] < losses["packed"][0]


@pytest.mark.parametrize("collator", COLLATORS)
def test_gradient_checkpointing_changes_no_bit(collator, tmp_path, model):
    options = {"collator": collator, "save_strategy": "no"}
    twin = copy.deepcopy(model)
    train(model, tmp_path, 2, **options)
    train(twin, tmp_path, 2, gradient_checkpointing=True, **options)
    assert twin.is_gradient_checkpointing and not model.is_gradient_checkpointing
    assert_same(twin, model)


@pytest.mark.parametrize("collator", COLLATORS)
def test_bf16(collator, tmp_path):
    """Autocast, with weights, gradients and what is saved in fp32."""
    options = {"collator": collator, "optim": "sgd", "learning_rate": 0.1}
    for dense in (0, 4):  # with experts rounding may choose others
        model = build(small_config(vocab_size=CONFIG.vocab_size, first_k_dense_replace=dense))
        twin = copy.deepcopy(model)
        straight = train(model, tmp_path / "a", 2, **options)
        half = train(twin, tmp_path / "b", 2, bf16=True, gradient_checkpointing=True, **options)
        assert logged(half) == pytest.approx(logged(straight), rel=0.02 if dense else 0.2)
        assert logged(half) != logged(straight)
        assert all(x.dtype == torch.float32 for x in twin.state_dict().values())
        saved = load_file(tmp_path / "b" / "checkpoint-2" / "model.safetensors")
        assert all(x.dtype == torch.float32 for x in saved.values())


def test_a_bf16_model_stays_one(tmp_path, model, monkeypatch):
    """Also what from_pretrained would have kept in fp32, with a warning."""
    model.to(torch.bfloat16)
    warnings = []
    monkeypatch.setattr(kda.logger, "warning_once", warnings.append)
    train(model, tmp_path, 2, bf16=True)
    assert "A_log is torch.bfloat16" in warnings[0]
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert again.dtype == torch.bfloat16
    assert_same(again, model)


# Resuming

SETUPS = {
    "packed": {},
    "padded": {"collator": "padded", "gradient_accumulation_steps": 2, "bf16": True},
    "everything": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "with_muon": True,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    },
}


@pytest.mark.parametrize("setup", SETUPS)
def test_trainer_resumes_bit_for_bit(setup, tmp_path, model):
    """Into a model with other weights, in the middle of an epoch or in the next one."""
    options = SETUPS[setup] | {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}

    def run(model, folder, **more) -> Trainer:
        callbacks = [LoadBalancingCallback(rate=1e-2)] if setup == "everything" else []
        return train(model, tmp_path / folder, 5, callbacks=callbacks, **options, **more)

    straight = run(model, "a")
    for step in (1, 4):
        other = build(CONFIG, seed=step)
        resumed = run(other, f"b{step}", resume=tmp_path / "a" / f"checkpoint-{step}")
        assert_same(other, model)
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert logged(resumed, key) == logged(straight, key) and len(logged(resumed, key)) == 5
        a, b = (trainer.optimizer.state_dict()["state"] for trainer in (straight, resumed))
        assert a.keys() == b.keys() and len(a) == len(list(model.parameters()))
        for i, state in a.items():
            assert all(torch.equal(torch.as_tensor(x), b[i][name]) for name, x in state.items())


def test_trainer_resumes_from_shards(tmp_path, model):
    twin = copy.deepcopy(model)
    train(model, tmp_path / "a", 4)
    middle = tmp_path / "a" / "checkpoint-2"
    half = KimiLinearForCausalLM.from_pretrained(middle)
    (middle / "model.safetensors").unlink()
    half.save_pretrained(middle, max_shard_size="150KB")  # experts of a layer in several files
    assert len(list(middle.glob("model-*.safetensors"))) > 2
    train(twin, tmp_path / "b", 4, resume=middle)
    assert_same(twin, model)


# What is saved


class Logits(TrainerCallback):
    """Notes the model's logits at every save."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.seen = ids, {}

    def on_save(self, args, state, control, model, **kwargs) -> None:
        training = model.training
        with torch.no_grad():
            self.seen[state.global_step] = model.eval()(self.ids).logits
        model.train(training)


def test_every_checkpoint_has_the_released_layout(tmp_path, model, ids):
    """And loads in transformers' own class, with the logits of the model as it was then."""
    before, at_save = copy.deepcopy(model.state_dict()), Logits(ids)
    model.save_pretrained(tmp_path / "untrained")
    options = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(model, tmp_path, 3, save_steps=1, callbacks=[at_save], **options)
    losses = logged(trainer)
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    trainer.save_model(str(tmp_path / "final"))
    at_save.seen["final"] = model.eval()(ids).logits
    want = load_file(tmp_path / "untrained" / "model.safetensors")
    for name in ("experts.7.w2.weight", "gate.e_score_correction_bias"):
        assert f"model.layers.1.block_sparse_moe.{name}" in want
    assert {"model.layers.0.self_attn.k_conv1d.weight", "model.layers.0.self_attn.A_log"} <= {*want}
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)}
    for step, folder in (folders | {"final": tmp_path / "final"}).items():
        got = load_file(folder / "model.safetensors")
        assert {k: (x.shape, x.dtype) for k, x in got.items()} == {
            k: (x.shape, x.dtype) for k, x in want.items()
        }
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "kimi_linear"
        assert config["architectures"] == ["KimiLinearForCausalLM"]
        with torch.no_grad():
            ours = KimiLinearForCausalLM.from_pretrained(folder).eval()(ids).logits
            native = NativeForCausalLM.from_pretrained(folder).eval()(ids).logits
        assert torch.equal(ours, at_save.seen[step])
        assert rel_err(native, at_save.seen[step]) < LIMIT
    assert rel_err(at_save.seen[1], at_save.seen[3]) > 1e-2
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(loaded[name], x), name
        frozen = name.endswith("e_score_correction_bias")  # a buffer: no optimizer moves it
        assert torch.equal(x, before[name]) == frozen, name


def test_trainer_goes_back_to_the_best_model(tmp_path, model):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = train(model, tmp_path, 4, greater_is_better=True, **options)  # the loss falls, so:
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same(KimiLinearForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), model)


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
    for lacks in (name, "model.layers.0.self_attn.k_conv1d.weight"):
        rest = {n: x for n, x in state.items() if n != lacks}
        with pytest.raises(ValueError, match=f"the state dict lacks {lacks}"):
            fresh.load_state_dict(rest)
        assert lacks not in fresh.load_state_dict(rest, strict=False).missing_keys  # its own
    native = native_twin(model)
    native.save_pretrained(tmp_path / "native")  # with its own name for the dense layer
    fresh = KimiLinearForCausalLM(model.config).eval()
    fresh.load_state_dict(load_file(tmp_path / "native" / "model.safetensors"))
    assert torch.equal(fresh(ids).logits, want)
    fresh.load_state_dict(native.state_dict())  # names in memory, as ever
    assert torch.equal(fresh(ids).logits, want)


# Chats


@pytest.fixture
def released(tmp_path) -> Path:
    """A model with a tokenizer of the released kind."""
    folder = tmp_path / "released"
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(write_released(folder))
    special = {name: getattr(tokenizer, name) for name in NAMES}
    build(small_config(vocab_size=len(tokenizer), **special)).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps({'messages': MESSAGES})}\n" * 9)
    return file


@torch.no_grad()
def loss_of_the_answers(folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True)
    ids, said = torch.tensor([chat["input_ids"]]), torch.tensor([chat["assistant_masks"]])
    model = KimiLinearForCausalLM.from_pretrained(folder).eval()
    return model(ids, labels=ids.where(said.bool(), -100)).loss.item()


def test_example(released, chats, tmp_path, monkeypatch):
    output = tmp_path / "output"
    for epochs, *more in ((1,), (2, "--resume")):
        options = ["--epochs", epochs, "--learning-rate", 1e-2, *more]
        argv = ["finetune.py", released, chats, output, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["global_step"] == 4 and len(evaluated) == 2 and evaluated[1] < evaluated[0]
    folders = (output, output / "checkpoint-4", output / "checkpoint-2", released)
    final, *others = (loss_of_the_answers(folder) for folder in folders)
    assert final == others[0] < others[1] < others[2]
    assert final == pytest.approx(evaluated[1], rel=LIMIT)


SFT_SETUPS = {
    "padded": {},
    "padding free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 100, "eval_packing": False},
    "bf16": {"bf16": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("setup", SFT_SETUPS)
def test_sft_trainer(setup, released, chats, tmp_path):
    """Chats as a file has them: TRL applies the template and masks all but the answers."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    options = {"bf16": False, "gradient_checkpointing": False} | SFT_SETUPS[setup]
    arguments = trl.SFTConfig(
        str(tmp_path / "output"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        assistant_only_loss=True,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset("json", data_files=str(chats), split="train", cache_dir=cache)
    trainer = trl.SFTTrainer(
        KimiLinearForCausalLM.from_pretrained(released, dtype=torch.float32),
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=AutoTokenizer.from_pretrained(released),
        callbacks=[LoadBalancingCallback(rate=0)],
    )
    trainer.train()
    first, *_ = logged(trainer)
    limit = 0.05 if setup == "bf16" else LIMIT
    assert first == pytest.approx(loss_of_the_answers(released), rel=limit)
    assert len(logged(trainer, "moe/max_vio")) == 4
    folders = [tmp_path / "output" / f"checkpoint-{step}" for step in (2, 4)]
    half, final = map(loss_of_the_answers, folders)
    assert final < half < first
    assert logged(trainer, "eval_loss") == pytest.approx([final], rel=limit)
    NativeForCausalLM.from_pretrained(folders[1])
