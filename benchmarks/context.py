"""Context parallelism: a training step of one document on all GPUs of a launch, and on one.

    torchrun --nproc-per-node 2 -m benchmarks.context

Random weights in bf16 at released widths, gradient checkpointing; forward, loss without logits
(Liger-Kernel) and backward. Averaging the gradients over the GPUs is DDP's or FSDP's part and not
timed. On one GPU, the others wait. A row is written as soon as it is there.
"""

import argparse
import datetime
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.inputs import DTYPE, Shape
from benchmarks.model_ops import MODEL
from benchmarks.model_step import config, model_of
from benchmarks.recorder import Recorder
from benchmarks.results import ROOT, read, slug, update
from benchmarks.timing import synchronize

FOLDER = Path("benchmarks/results/context")  # from the root of the repository
LENGTHS = (16384, 65536, 131072)
SIZES = MODEL | {"L": 4, "E": 64}
KEY = ("L", "E", "gpus", "tokens", "gpu")
WARM_UP, STEPS = 2, 5


def step(model: nn.Module, ids: Tensor, gpus: int) -> None:
    """Leaves no gradients behind."""
    batch = {"input_ids": ids, "labels": ids}
    if gpus > 1:
        batch = import_module("kimi_linear.context").shard_sequence(batch)
    skip_logits = ids.is_cuda or None  # on a GPU it says why if it cannot
    model(**batch, use_cache=False, skip_logits=skip_logits).loss.backward()
    model.zero_grad()


def measure(model: nn.Module, ids: Tensor, gpus: int) -> tuple[float, float | None]:
    """Milliseconds until the slowest GPU is done, and GB (1e9 bytes) at its peak, None on a CPU."""
    device, works = ids.device, dist.get_rank() < gpus
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(WARM_UP + STEPS):
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        if works:
            step(model, ids, gpus)
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if ids.is_cuda else 0
    slowest = torch.tensor([*times[WARM_UP:], float(peak)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    *seconds, most = slowest.tolist()
    return 1e3 * statistics.median(seconds), most / 1e9 or None


def tables(root: Path) -> str:
    """Markdown, for each GPU and model: a row per length and number of GPUs."""
    text = ""
    rows = [row for file in sorted((root / FOLDER).glob("*.jsonl")) for row in read(file)]
    rows = sorted(rows, key=lambda r: [r[name] for name in ("gpu", "L", "E", "tokens", "gpus")])
    by_model = itertools.groupby(rows, lambda r: (r["gpu"], r["L"], r["E"]))
    for (gpu, L, E), found in by_model:
        mine = list(found)
        alone = {row["tokens"]: row["ms"] for row in mine if row["gpus"] == 1}
        text += f"\nOn {gpu}, {L} layers of {E} experts, bfloat16, one document:\n\n"
        text += "| tokens | GPUs | ms | one GPU / this | GB per GPU |\n"
        text += "| ---: | ---: | ---: | ---: | ---: |\n"
        for row in mine:
            cells = f"{row['tokens']:,}", str(row["gpus"]), f"{row['ms']:,.0f}"
            ratio = alone.get(row["tokens"], float("nan")) / row["ms"]
            text += f"| {' | '.join(cells)} | {ratio:.2f} | {row['peak_gb'] or 0:.1f} |\n"
        at = ", ".join(sorted({f"{r['date']} at {r['git']}" for r in mine}))
        text += f"\ntorch {mine[0]['torch']}; measured {at}.\n"
    return text


def main(
    argv: Sequence[str] | None = None, sizes: Shape = SIZES, lengths: Sequence[int] = LENGTHS
) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(lengths))
    parser.add_argument("--out", type=Path, help=f"default: {FOLDER}/<gpu>.jsonl")
    parser.add_argument("--git", help="the commit, where there is no repository to ask")
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("want several processes, as torchrun starts them")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    facts = Recorder(device, args.out, args.git).facts
    path = args.out or ROOT / FOLDER / f"{slug(facts['gpu'])}.jsonl"
    facts |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    torch.manual_seed(0)
    model: Any = model_of(config(sizes), device, dtype=DTYPE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for tokens, gpus in itertools.product(args.tokens, (1, dist.get_world_size())):
        ids = torch.randint(sizes["vocab"], (1, tokens), device=device)
        ms, peak = measure(model, ids, gpus)
        case = {"L": sizes["L"], "E": sizes["E"], "gpus": gpus, "tokens": tokens}
        if dist.get_rank() == 0:
            update(path, case | {"ms": ms, "peak_gb": peak} | facts, KEY)
            print(f"{tokens} tokens, {gpus} GPUs: {ms:.1f} ms, {peak or 0:.1f} GB", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
