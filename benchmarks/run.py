"""Time ops and write the results.

An op is timed only after the tests that guard it have passed on this device, a provider only after
it has agreed with the PyTorch reference. Every measurement is written as soon as it is there.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import capacity, guard, timing
from benchmarks.guard import Refused
from benchmarks.inputs import DTYPE, Inputs, Shape
from benchmarks.op import FLOOR, FLOORS, Op
from benchmarks.ops import OPS
from benchmarks.providers import Provider
from benchmarks.recorder import Recorder
from benchmarks.results import ROOT, label
from benchmarks.timing import Timed


class OutOfBudget(Exception):
    """The time is spent before the measurement."""


class DoesNotFit(Exception):
    """The device has too little memory."""


class Bench:
    """One invocation: the device, what it may spend, and whether our own code did well."""

    def __init__(
        self, recorder: Recorder, device: torch.device, wanted: list[str] | None, budget: float
    ):
        self.recorder, self.device, self.wanted = recorder, device, wanted
        self.deadline = time.monotonic() + budget
        self.verdicts: dict[str, bool] = {}  # tests -> green
        self.installed: dict[str, bool] = {}  # module -> importable
        self.agreed: set[tuple] = set()  # op, mode, provider, small shape
        self.ok = True

    def timeout(self) -> float | None:
        """Seconds left, for a subprocess; None without a budget."""
        left = self.deadline - time.monotonic()
        return None if left == float("inf") else max(left, 0.0)

    @contextlib.contextmanager
    def reporting(self, what: str, own: bool) -> Iterator[None]:
        """Print an exception and go on; from our `own` code it fails the invocation."""
        try:
            yield
        except (subprocess.TimeoutExpired, OutOfBudget):
            tqdm.write(f"{what}: NOT MEASURED, cut off by the budget")
        except DoesNotFit as error:
            tqdm.write(f"{what}: left out, {error}")
        except Exception as error:
            name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
            tqdm.write(f"{what}: NOT MEASURED, {name}{error}")
            self.ok = self.ok and not own

    def green(self, tests: str) -> bool:
        """Whether the tests of an op pass on this device; they run once per invocation."""
        if tests not in self.verdicts:
            tqdm.write(f"running {tests}")
            self.verdicts[tests] = False
            with self.reporting(tests, own=True):
                guard.run_tests(tests, self.timeout())
                self.verdicts[tests] = True
        return self.verdicts[tests]

    def has(self, module: str | None) -> bool:
        """Whether an optional library is there; prints once if it is not."""
        if module is not None and module not in self.installed:
            self.installed[module] = importlib.util.find_spec(module) is not None
            if not self.installed[module]:
                tqdm.write(f"{module}: missing, its providers are left out")
        return module is None or self.installed[module]

    def chosen(self, op: Op, shape: Shape) -> dict[str, Provider]:
        """The providers that were asked for, take this shape and are installed."""
        return {
            name: provider
            for name, provider in op.providers.items()
            if (self.wanted is None or name in self.wanted)
            and provider.fits(shape)
            and self.has(provider.module)
        }

    def check(self, op: Op, shape: Shape, name: str) -> None:
        """Agreement with the reference at a small shape, once per invocation."""
        if op.check is None or name == "reference":
            return
        small = shape | op.check
        key = (op.name, op.mode, name, tuple(small.items()))
        if key not in self.agreed:
            provider = op.providers[name]
            expected = provider.expected or op.providers["reference"].build
            guard.check_agreement(op, provider.build, expected, self.device, **small)
            self.agreed.add(key)

    def prepare(self, op: Op, shape: Shape, name: str, x: Inputs) -> tuple[Timed, float | None]:
        """What to time, warm, and the MB that one call allocates."""
        if self.timeout() == 0:
            raise OutOfBudget
        self.check(op, shape, name)
        build = op.providers[name].build
        copies = timing.graph_copies(op.bytes(shape), self.device) if op.timer == "graph" else 1
        calls = [build(op.rotate(x, i)) for i in range(copies)]
        seconds, peak_mb = timing.warm_up(calls[0], self.device)
        if op.timer == "graph":
            return timing.graph(calls, self.device), peak_mb
        return timing.one_call(calls[0], seconds), peak_mb

    def time_together(self, op: Op, shape: Shape, chosen: dict[str, Provider]) -> None:
        """All providers in turn, on the same inputs."""
        x = op.inputs(shape, DTYPE, self.device)
        contestants: dict[str, Timed] = {}
        peaks: dict[str, float | None] = {}
        for name, provider in chosen.items():
            with self.reporting(title(op, shape, name), own=provider.module is None):
                contestants[name], peaks[name] = self.prepare(op, shape, name, x)
        for name, samples in timing.sample(contestants, self.device).items():
            self.write(op, shape, name, samples, peaks[name])

    def time_first_call(self, op: Op, shape: Shape, name: str) -> None:
        """One call in a fresh process with nothing compiled."""
        what = [op.name, op.mode, name, json.dumps(shape)]
        command = [sys.executable, "-m", "benchmarks.cold", *what]
        with tempfile.TemporaryDirectory() as cache:
            env = guard.environment() | {"TRITON_CACHE_DIR": cache}
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=self.timeout()
            )
        if done.returncode:
            raise Refused(done.stderr.strip()[-1000:])
        self.write(op, shape, name, [float(done.stdout.split()[-1])])

    def measure_error(self, op: Op, shape: Shape, name: str) -> None:
        """Of the outputs, against those of the reference in fp64."""
        x = op.inputs(shape, DTYPE, self.device)
        exact = {key: t.double() if t.is_floating_point() else t for key, t in x.items()}
        gold = op.providers["reference"].build(exact)()
        error = guard.disagreement(op.providers[name].build(x)(), gold)
        if error == float("inf"):
            raise Refused("an output is not finite")
        self.write(op, shape, name, [], error=error)

    def time_largest_batch(self, op: Op, shape: Shape, name: str) -> None:
        """One provider, which has the memory of the device to itself."""
        full = self.filled(op, shape, op.providers[name])
        capacity.release(self.device)
        x = op.inputs(full, DTYPE, self.device)
        timed, peak_mb = self.prepare(op, full, name, x)
        self.write(op, shape, name, timing.sample({name: timed}, self.device)[name], peak_mb)

    @functools.cached_property
    def free(self) -> float:
        """Bytes of the device that nothing had when the first case asked."""
        return capacity.free_bytes(self.device)

    def filled(self, op: Op, shape: Shape, provider: Provider | None) -> Shape:
        """The shape, with the largest B that the provider fits where it is open."""
        if op.timer != "largest":
            return shape
        assert provider is not None and op.memory is not None
        B = capacity.largest_batch(op.memory(shape), provider, shape, self.free)
        if B == 0:
            raise DoesNotFit(f"no sequence fits into {self.free / 1e9:.0f} GB")
        return shape | {"B": B}

    def check_memory(self, op: Op, shape: Shape, chosen: dict[str, Provider]) -> None:
        if op.memory is not None and chosen:
            size = capacity.needed(op.memory(shape), chosen.values(), shape)
            if size > self.free:
                raise DoesNotFit(f"{size / 1e9:.0f} GB do not fit into {self.free / 1e9:.0f} GB")

    def write(
        self, op: Op, shape: Shape, name: str, samples: list[float], peak_mb=None, error=None
    ) -> None:
        """A row of a provider, or of a floor."""
        provider = op.providers.get(FLOORS.get(name, name))
        full = self.filled(op, shape, provider)
        flops, size = cost(op, provider, full)
        extra = {"peak_mb": peak_mb, "error": error, "flops": flops, "bytes": size}
        extra |= {"package": provider and provider.package}
        if full is not shape and provider is not None and provider.cache is not None:
            extra |= {"batch": full["B"], "cache": provider.cache(full)}
        self.recorder.write(op.name, op.mode, name, shape, samples, **extra)

    def write_floor(self, op: Op, shape: Shape, name: str) -> None:
        provider = op.providers.get(FLOORS[name])
        per_ms = self.ceilings
        costs = cost(op, provider, self.filled(op, shape, provider))
        self.write(op, shape, name, [max(c / rate for c, rate in zip(costs, per_ms, strict=True))])

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """FLOPs and bytes per millisecond of a large matrix product and copy; measured once."""
        copied, shape, size = timing.copy(self.device, DTYPE)
        self.recorder.write("copy", "forward", "torch", shape, copied, bytes=size)
        multiplied, shape, flops = timing.matmul(self.device, DTYPE)
        self.recorder.write("matmul", "forward", "torch", shape, multiplied, flops=flops)
        return flops / timing.quantiles(multiplied)[1], size / timing.quantiles(copied)[1]

    def measure(self, op: Op, shape: Shape) -> None:
        """One op at one shape: the providers, and the floor."""
        chosen = self.chosen(op, shape)
        one_by_one = {"process": self.time_first_call, "error": self.measure_error}
        one_by_one |= {"largest": self.time_largest_batch}
        if op.timer in one_by_one:
            for name, provider in chosen.items():
                with self.reporting(title(op, shape, name), own=provider.module is None):
                    one_by_one[op.timer](op, shape, name)
        elif chosen:
            self.check_memory(op, shape, chosen)
            self.time_together(op, shape, chosen)
        if op.timer not in ("process", "error"):
            for name, whose in FLOORS.items():
                there = name == FLOOR or whose in op.providers
                if there and (self.wanted is None or name in self.wanted):
                    with self.reporting(title(op, shape, name), own=True):
                        self.write_floor(op, shape, name)
        capacity.release(self.device)


def cost(op: Op, provider: Provider | None, shape: Shape) -> tuple[float, float]:
    """FLOPs and bytes of one call."""
    flops, size = (provider.flops, provider.bytes) if provider else (None, None)
    return (flops or op.flops)(shape), (size or op.bytes)(shape)


def title(op: Op, shape: Shape, name: str) -> str:
    return f"{op.name} {op.mode} {label(shape)} {name}"


def letters(text: str) -> Shape:
    """`B=1,T=8192` -> {"B": 1, "T": 8192}."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {letter: int(size) for letter, _, size in pairs}


def shapes(op: Op, wanted: Sequence[Shape]) -> list[Shape]:
    """The op's shapes that agree with one of `wanted`; if none does, its first one changed so."""
    if not wanted:
        return list(op.shapes)
    found = []
    for change in wanted:
        same = [shape for shape in op.shapes if change.items() <= shape.items()]
        found += same or [op.shapes[0] | change]
    return found


def parse(argv: Sequence[str] | None, ops: Sequence[Op]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = {
        "op": {op.name for op in ops},
        "mode": {op.mode for op in ops},
        "provider": {name for op in ops for name in op.providers} | set(FLOORS),
    }
    for name, choices in names.items():
        parser.add_argument(f"--{name}", nargs="+", choices=sorted(choices), help="default: all")
    parser.add_argument(
        "--shape", nargs="+", type=letters, default=[], metavar="B=1,T=8192",
        help="only shapes with these sizes; where an op has none, its first shape changed so",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="then stop, cleanly"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>.jsonl")
    parser.add_argument("--git", help="the commit, where there is no repository to ask")
    args = parser.parse_args(argv)
    args.ops = [
        op
        for op in ops
        if (not args.op or op.name in args.op) and (not args.mode or op.mode in args.mode)
    ]
    for op in args.ops:
        unknown = {letter for change in args.shape for letter in change} - set(op.shapes[0])
        if unknown:
            parser.error(f"--shape: {op.name} has the letters {list(op.shapes[0])}, not {unknown}")
    return args


def main(argv: Sequence[str] | None = None, ops: Sequence[Op] = OPS) -> int:
    """Returns 1 if a test or a measurement of our own code failed, 0 otherwise."""
    args = parse(argv, ops)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(Recorder(device, args.out, args.git), device, args.provider, args.budget)
    cases = [(op, shape) for op in args.ops for shape in shapes(op, args.shape)]
    for i, (op, shape) in enumerate(tqdm(cases, unit="case")):
        if bench.timeout() == 0:
            left = ", ".join(title(*case, "").strip() for case in cases[i:])
            tqdm.write(f"the budget of {args.budget:g} s is spent; not measured: {left}")
            break
        if bench.green(op.tests):
            with bench.reporting(title(op, shape, "case"), own=True):
                bench.measure(op, shape)
    tqdm.write(f"results: {bench.recorder.path}")
    return 0 if bench.ok else 1


if __name__ == "__main__":
    sys.exit(main())
