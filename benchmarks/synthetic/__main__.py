"""Train the mixers on the synthetic tasks, and show the results.

python -m benchmarks.synthetic run --length 1024 --budget 480
python -m benchmarks.synthetic report
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from benchmarks.recorder import commit
from benchmarks.results import slug
from benchmarks.synthetic.models import MIXERS
from benchmarks.synthetic.report import FOLDER, LENGTHS, replace, write
from benchmarks.synthetic.tasks import TASKS
from benchmarks.synthetic.train import Outcome, Setting, attempt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic", description=__doc__, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write the README's table and the plot from results/")
    run = commands.add_parser("run", help="train every mixer on every task at every length")
    defaults = {field.name: field.default for field in dataclasses.fields(Setting)}
    run.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    run.add_argument("--mixer", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    run.add_argument("--length", nargs="+", type=int, default=list(LENGTHS))
    run.add_argument("--lr", nargs="+", type=float, default=[defaults["lr"]])
    helps = {
        "seed": "of weights and data",
        "steps": "at most; fewer where the answers are right before",
        "tokens": "per step, whatever the length",
        "every": "steps between evaluations",
    }
    for name, text in helps.items():
        text = f"{text}; default: {defaults[name]:,}"
        run.add_argument(f"--{name}", type=int, default=defaults[name], help=text)
    run.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS",
        help="of all runs together; each gets an equal share of what is left",
    )  # fmt: skip
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, on the one device")
    run.add_argument("--eager", action="store_true", help="on a GPU too, no CUDA graph")
    run.add_argument("--out", type=Path, help="default: benchmarks/synthetic/results/<gpu>.jsonl")
    run.add_argument("--git", help="the commit, where there is no repository to ask")
    args = parser.parse_args(argv)
    if args.command == "run":
        for name in ("steps", "tokens", "every", "budget", "jobs"):
            if getattr(args, name) < 1:
                parser.error(f"--{name} is {getattr(args, name)}, want at least 1")
        if not min(args.lr) > 0:
            parser.error(f"--lr is {min(args.lr):g}, want more than 0")
        chosen = itertools.product(args.length, args.task, args.mixer, args.lr)
        options = {name: getattr(args, name) for name in helps}
        try:
            args.settings = [Setting(t, m, n, lr, **options) for n, t, m, lr in chosen]
        except ValueError as error:
            parser.error(str(error))
    return args


def row_of(setting: Setting, outcome: Outcome, gpu: str, git: str | None) -> dict:
    """A line of the results file."""
    names = ("task", "mixer", "length", "lr", "seed", "tokens")
    row = {name: getattr(setting, name) for name in names} | dataclasses.asdict(outcome)
    row |= {name: round(row[name], 5) for name in ("accuracy", "exact")}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    row |= {"max_steps": setting.steps, "gpu": gpu, "torch": torch.__version__}
    return row | {"git": git, "date": today}


def outcomes(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    """Every setting with what became of it, as they end: `args.jobs` at a time, by `args.budget`.

    Several are trained by processes of their own. A deadline is by a clock that they share.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.jobs, spawn) if args.jobs > 1 else None
    end, waiting = time.monotonic() + args.budget, deque(args.settings)
    running: dict[Future, Setting] = {}
    with pool or contextlib.nullcontext():
        while waiting or running:
            now = time.monotonic()
            if waiting and now >= end:
                log(f"the budget of {args.budget:g} s is spent; {len(waiting)} runs are left out")
                waiting.clear()
            if waiting and len(running) < args.jobs:
                rounds = -(-len(waiting) // args.jobs)
                deadline = now + (end - now) / rounds
                setting = waiting.popleft()
                what = setting, device, deadline, args.eager
                if pool is None:
                    yield setting, attempt(*what)
                else:
                    running[pool.submit(attempt, *what)] = setting
            elif running:
                for done in wait(running, return_when=FIRST_COMPLETED)[0]:
                    yield running.pop(done), done.result()


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a run raised, 0 otherwise."""
    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if cuda else "cpu"
    path = args.out or FOLDER / "results" / f"{slug(gpu)}.jsonl"
    git, ok = args.git or commit(), True
    for setting, outcome in outcomes(args, torch.device("cuda" if cuda else "cpu")):
        what = f"{setting.task} {setting.mixer} {setting.length} lr {setting.lr:g}"
        if isinstance(outcome, str):
            log(f"{what}: NOT TRAINED\n{outcome}")
            ok = False
            continue
        log(f"{what}: {outcome.stop} after {outcome.steps} steps, {outcome.seconds:g} s")
        if not replace(path, row_of(setting, outcome, gpu, git)):
            log(f"{what}: not written, a run in {path.name} went on to its end")
    log(f"results: {path}")
    return 0 if ok else 1


def log(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "run":
        return run(args)
    for path in write():
        log(f"{path.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
