"""What fits: peak memory and time of a training step at released widths, by what is trained.

Random weights in bf16, one sequence, forward, loss without logits (Liger-Kernel), backward and
optimizer, whose states have the dtype of what it trains. A row is written as soon as it is there.
What is longer than what does not fit is not tried, and does not fit either.
"""

import argparse
import datetime
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.capacity import release
from benchmarks.inputs import DTYPE, Shape
from benchmarks.model_ops import MODEL
from benchmarks.model_step import config, model_of
from benchmarks.recorder import Recorder
from benchmarks.results import ROOT, Row, read, slug, update
from benchmarks.timing import synchronize

FOLDER = Path("benchmarks/results/memory")  # from the root of the repository
LENGTHS = (4096, 8192, 16384, 32768, 65536)
LORA = {"lora": False, "lora_experts": True}  # whether the routed experts are adapted too
TRAINED = {"full": "all", "lora": "LoRA, not routed experts", "lora_experts": "LoRA, all experts"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
RANK = 16


@dataclass(frozen=True)
class Setting:
    trained: str
    L: int
    optimizer: str


GRID = (
    Setting("full", 4, "adamw"),
    Setting("full", 4, "muon"),
    Setting("full", 8, "sgd"),
    Setting("lora_experts", 8, "adamw"),
    Setting("lora", 16, "adamw"),
    Setting("lora", 27, "adamw"),
)
KEY = ("trained", "L", "optimizer", "checkpointing", "tokens", "gpu", "limit_gb")


def build(setting: Setting, sizes: Shape, device: torch.device) -> nn.Module:
    """The model, with an adapter if one is trained."""
    model = model_of(config(sizes | {"L": setting.L}), device, dtype=DTYPE).train()
    if setting.trained in LORA:
        adapter = import_module("kimi_linear").lora_config(RANK, experts=LORA[setting.trained])
        model = import_module("peft").get_peft_model(model, adapter)
        model.enable_input_require_grads()
    return model


def optimizer_of(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    if setting.optimizer == "muon":
        optim = import_module("kimi_linear.optim")
        return optim.MuonAdamW(optim.muon_groups(model, lr=1e-5))
    trained = [p for p in model.parameters() if p.requires_grad]
    if setting.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def measure(setting: Setting, model: nn.Module, ids: torch.Tensor) -> tuple[float | None, float]:
    """GB (1e9 bytes) at the peak of two steps, None on a CPU, and the seconds of the second."""
    device, optimizer = ids.device, optimizer_of(setting, model)
    lora = setting.trained in LORA  # PEFT keeps an adapter in fp32
    skip_logits = device.type == "cuda" or None  # on a GPU it says why if it cannot
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, DTYPE) if lora else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return peak, seconds


def free(model: nn.Module | None, device: torch.device) -> None:
    """After a step that did or did not fit."""
    if model is not None:
        model.zero_grad()
    release(device)


def rows_of(
    setting: Setting, sizes: Shape, lengths: Sequence[int], device: torch.device
) -> Iterator[Row]:
    """One for each length, without and with gradient checkpointing."""
    model: Any = None
    try:
        model = build(setting, sizes, device)
    except torch.OutOfMemoryError:
        free(None, device)
    count = None if model is None else sum(p.numel() for p in model.parameters()) / 1e9
    for checkpointing in (False, True):
        fits = model is not None
        if checkpointing and model is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for tokens in lengths:
            peak, seconds = None, None
            if fits and model is not None:
                try:
                    ids = torch.randint(sizes["vocab"], (1, tokens), device=device)
                    peak, seconds = measure(setting, model, ids)
                except torch.OutOfMemoryError:
                    fits = False
                free(model, device)
            case = {"checkpointing": checkpointing, "tokens": tokens, "parameters": count}
            yield asdict(setting) | case | {"fits": fits, "peak_gb": peak, "seconds": seconds}


def cell(row: Row) -> str:
    """GB and seconds: `41.3, 1.27 s`."""
    if not row["fits"]:
        return "-"
    return f"{row['peak_gb'] or 0:.1f}, {row['seconds']:.2f} s"


def tables(root: Path) -> str:
    """Markdown, for each GPU: a row per setting, a column per length; empty without results."""
    text = ""
    files = sorted((root / FOLDER).glob("*.jsonl"))
    rows = [row for file in files for row in read(file)]
    for (gpu, limit), found in itertools.groupby(rows, lambda r: (r["gpu"], r["limit_gb"])):
        lines: dict[tuple, dict[int, Row]] = {}
        for row in found:
            key = tuple(row[name] for name in ("L", "trained", "optimizer", "checkpointing"))
            lines.setdefault(key, {})[row["tokens"]] = row
        lengths = sorted({tokens for line in lines.values() for tokens in line})
        head = ["L", "trained", "optimizer", "checkpointing", *(f"{n:,}" for n in lengths)]
        table = [head, [*["---"] * 4, *["---:"] * len(lengths)]]
        for (L, trained, optimizer, checkpointing), line in lines.items():
            start = [
                str(L),
                TRAINED[trained],
                OPTIMIZERS[optimizer],
                "yes" if checkpointing else "",
            ]
            table.append([*start, *(cell(line[n]) if n in line else "" for n in lengths)])
        row = next(iter(next(iter(lines.values())).values()))
        text += f"\nOn {gpu}, {limit:.0f} GB, peak GB and seconds of a step, by tokens:\n\n"
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in table)
        text += (
            f"\n`-` does not fit, empty is not measured. torch {row['torch']}; measured "
            f"{row['date']} at {row['git']}.\n"
        )
    return text


def main(
    argv: Sequence[str] | None = None,
    grid: Sequence[Setting] = GRID,
    sizes: Shape = MODEL,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--limit", type=float, metavar="GB", help="use no more than so many 1e9 B")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="then stop, cleanly"
    )
    parser.add_argument("--out", type=Path, help=f"default: {FOLDER}/<gpu>.jsonl")
    parser.add_argument("--git", help="the commit, where there is no repository to ask")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else 0.0
    limit = total if args.limit is None else min(total, args.limit)
    if cuda:
        torch.cuda.set_per_process_memory_fraction(limit / total)
    facts = Recorder(device, args.out, args.git).facts
    path = args.out or ROOT / FOLDER / f"{slug(facts['gpu'])}.jsonl"
    facts |= {"limit_gb": limit, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    end = time.monotonic() + args.budget
    for setting in grid:
        if setting.trained not in args.trained:
            continue
        for row in rows_of(setting, sizes, lengths, device):
            update(path, row | facts, KEY)
            checkpointing = "checkpointing" if row["checkpointing"] else ""
            print(*asdict(setting).values(), checkpointing, row["tokens"], cell(row), flush=True)
            if time.monotonic() > end:
                print(f"the budget of {args.budget:g} s is spent; the rest is not measured")
                return
        free(None, device)


if __name__ == "__main__":
    main()
