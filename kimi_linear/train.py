"""`kimi-linear train`: train or fine-tune on plain text with Hugging Face Trainer."""

import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from kimi_linear.cli import Limits, check_limits, check_tokenizer, from_files, load_tokenizer
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.text import TokenBlocks, byte_tokenizer, unigram_entropy

RESULTS_FILE = "results.json"
LIMITS: Limits = {
    "steps": (lambda x: x >= 0, "at least 0"),
    "batch_size": (lambda x: x >= 1, "at least 1"),
    "length": (lambda x: x >= 2, "at least 2, as the first token of a block has no loss"),
    "held_out": (lambda x: 0 < x < 1, "a share between 0 and 1"),
}


def load_for_training(source: Path):
    """Model and tokenizer: from a model directory, or fresh, on bytes, from a config file."""
    if source.is_dir():
        tokenizer = load_tokenizer(source)
        check_tokenizer(source, tokenizer)
        with from_files(source):  # to be updated, so in fp32
            return KimiLinearForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer
    config, tokenizer = KimiLinearConfig.from_json_file(source), byte_tokenizer()
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size: got {config.vocab_size}, want {len(tokenizer)} for bytes")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return KimiLinearForCausalLM(config), tokenizer


def read(path: Path) -> str:
    with from_files(path):
        return path.read_text(encoding="utf-8")


class _Trainer(Trainer):
    def get_decay_parameter_names(self, model) -> list[str]:
        """Trainer's, which leaves out biases and norms by their names, without A_log."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("A_log")]


def train(
    source: Path,
    texts: list[Path],
    output: Path,
    *,
    steps: int,
    batch_size: int,
    length: int,
    learning_rate: float | None = None,
    held_out: float,
    seed: int,
) -> dict[str, float]:
    """Train, evaluate before and after on the last part of the text, save in the released layout.

    Args:
        source: a model directory, or a config file to start from scratch.
        texts: UTF-8 files, joined in this order.
        output: directory for the model, its tokenizer and results.json.
        steps, batch_size, length: optimizer steps, blocks per step, tokens per block.
        learning_rate: at its peak; default 1e-5 for a model, 3e-3 from scratch.
        held_out: share of the text, taken from its end, that is only evaluated on.

    Returns:
        Held-out loss before and after and the unigram entropy, nats per token, and the seconds
        taken.

    Raises:
        ValueError: a number out of range, too little text, or files that cannot be read.
    """
    options = {"steps": steps, "batch_size": batch_size, "length": length, "held_out": held_out}
    check_limits(options, LIMITS)
    with from_files(output):
        output.mkdir(parents=True, exist_ok=True)
    if learning_rate is None:
        learning_rate = 1e-5 if source.is_dir() else 3e-3
    set_seed(seed)
    text = "\n".join(map(read, texts))
    model, tokenizer = load_for_training(source)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    split = int(len(tokens) * (1 - held_out))
    trainer = _Trainer(
        model,
        TrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,  # the first step of a warm-up has a rate of 0
            weight_decay=0.1,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            seed=seed,
        ),
        train_dataset=TokenBlocks(tokens[:split], length),
        eval_dataset=TokenBlocks(tokens[split:], length),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    seconds = trainer.train().metrics["train_runtime"]
    results = {
        "held_out_loss_before": before,
        "held_out_loss_after": trainer.evaluate()["eval_loss"],
        "unigram_entropy": unigram_entropy(tokens),
        "train_seconds": seconds,
    }
    trainer.save_model(str(output))
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
    return results
