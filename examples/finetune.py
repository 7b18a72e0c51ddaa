"""Fine-tunes every weight on chats: trains on what the assistant says, in packed rows.

    python examples/finetune.py MODEL chats.jsonl OUTPUT [--resume]

Each line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]},
tools if any. OUTPUT and each OUTPUT/checkpoint-* have the layout of the released checkpoint.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM


def labelled(tokenizer, chat: dict) -> dict[str, list[int]]:
    encoded = tokenizer.apply_chat_template(
        chat["messages"], tools=chat.get("tools"), return_assistant_tokens_mask=True
    )
    ids, own = encoded["input_ids"], encoded["assistant_masks"]
    return {"input_ids": ids, "labels": [i if o else -100 for i, o in zip(ids, own, strict=True)]}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("model", "chats", "output"):
    parser.add_argument(name, type=Path)
for name, default in {"--epochs": 1, "--learning-rate": 1e-5, "--held-out": 0.05}.items():
    parser.add_argument(name, type=float, default=default)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
lines = options.chats.open(encoding="utf-8")
rows = [labelled(tokenizer, json.loads(line)) for line in lines if line.strip()]
split = max(1, round(len(rows) * options.held_out))  # the last chats are only evaluated on
if split >= len(rows):
    parser.error(f"{options.chats} has {len(rows)} chats, of which {split} are held out")
arguments = TrainingArguments(
    output_dir=str(options.output),
    num_train_epochs=options.epochs,
    per_device_train_batch_size=4,  # chats, packed into one row
    gradient_checkpointing=True,
    learning_rate=options.learning_rate,
    lr_scheduler_type="cosine",
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
)
trainer = Trainer(
    KimiLinearForCausalLM.from_pretrained(options.model, dtype=torch.float32),  # master weights
    arguments,
    train_dataset=rows[:-split],
    eval_dataset=rows[-split:],
    data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
