"""Continues pretraining on a folder of .txt files: Muon, warmup-stable-decay, balanced experts.

python examples/continue_pretrain.py MODEL FOLDER OUTPUT --steps 1000 [--resume]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM, LoadBalancingCallback
from kimi_linear.optim import muon


def pieces(tokenizer, folder: Path, length: int) -> Iterator[dict[str, list[int]]]:
    """Each file, ended by [EOS], in pieces of at most `length` tokens."""
    for file in sorted(folder.rglob("*.txt")):
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        for i in range(0, len(ids) - 1, length):  # one token alone has nothing to predict
            yield {"input_ids": ids[i : i + length]}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("model", "folder", "output"):
    parser.add_argument(name, type=Path)
for name, default in {"--steps": 1000, "--length": 4096, "--pieces-per-batch": 4}.items():
    parser.add_argument(name, type=int, default=default)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
arguments = TrainingArguments(
    output_dir=str(options.output),
    max_steps=options.steps,
    per_device_train_batch_size=options.pieces_per_batch,
    gradient_checkpointing=True,
    learning_rate=2e-4,  # of Muon and AdamW
    weight_decay=0.1,
    adam_beta2=0.95,
    lr_scheduler_type="warmup_stable_decay",
    lr_scheduler_kwargs={"num_decay_steps": options.steps // 5},
    warmup_steps=0.02,  # of all steps
    bf16=torch.cuda.is_available(),
    logging_steps=10,
)
trainer = Trainer(
    KimiLinearForCausalLM.from_pretrained(options.model, dtype=torch.float32),  # master weights
    arguments,
    train_dataset=list(pieces(tokenizer, options.folder, options.length)),
    data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    processing_class=tokenizer,
    callbacks=[LoadBalancingCallback(rate=1e-3)],
    optimizer_cls_and_kwargs=muon(arguments),
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
