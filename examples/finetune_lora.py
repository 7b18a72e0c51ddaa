"""LoRA on chats: trains on what the assistant says, saves the adapter and the merged model.

    python examples/finetune_lora.py MODEL chats.jsonl OUTPUT

Each line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]},
tools if any. OUTPUT/adapter is for PEFT; OUTPUT/merged has the layout of the released checkpoint.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM, lora_config


def labelled(tokenizer, chat: dict) -> dict[str, list[int]]:
    encoded = tokenizer.apply_chat_template(
        chat["messages"], tools=chat.get("tools"), return_assistant_tokens_mask=True
    )
    ids, own = encoded["input_ids"], encoded["assistant_masks"]
    return {"input_ids": ids, "labels": [i if o else -100 for i, o in zip(ids, own, strict=True)]}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("model", "chats", "output"):
    parser.add_argument(name, type=Path)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--experts", action="store_true", help="also adapt the routed experts")
parser.add_argument("--epochs", type=float, default=1)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = KimiLinearForCausalLM.from_pretrained(options.model)
model.enable_input_require_grads()  # for gradient checkpointing of a frozen model
model = get_peft_model(model, lora_config(options.rank, experts=options.experts))
model.print_trainable_parameters()
arguments = TrainingArguments(
    output_dir=str(options.output / "checkpoints"),
    num_train_epochs=options.epochs,
    per_device_train_batch_size=4,  # chats, packed into one row
    gradient_checkpointing=True,
    learning_rate=2e-4,
    warmup_steps=0.03,  # of all steps
    lr_scheduler_type="cosine",
    bf16=torch.cuda.is_available(),
    logging_steps=10,
)
lines = options.chats.open(encoding="utf-8")
rows = [labelled(tokenizer, json.loads(line)) for line in lines if line.strip()]
collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
model.save_pretrained(options.output / "adapter")
for part in (model.merge_and_unload(), tokenizer):
    part.save_pretrained(options.output / "merged")
