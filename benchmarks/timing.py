"""How long a call takes, how much memory it needs, and how fast this device copies and multiplies.

On a GPU: CUDA events around every call, with a cold L2; on a CPU: the wall clock.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.providers import Call

SECONDS = 0.5  # of sampling per provider
LONG = 2.0  # seconds of a warm call from which on it is not called again to be timed
MAX_ROUNDS = 40
BURST = 5  # calls in a row: the host runs ahead of the GPU again after another provider's turn
WARM_UP = 3  # calls
COLD_BYTES = 256 * 2**20  # several times the L2 of any GPU


@dataclass(frozen=True)
class Timed:
    """Something to time: `run` does what `calls` do, each once; `seconds` is what a call took."""

    calls: list[Call]
    run: Callable[[], object]
    seconds: float = 0.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _l2_filler(device: torch.device) -> torch.Tensor:
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)


def one_call(call: Call, seconds: float = 0.0) -> Timed:
    return Timed([call], call, seconds)


def graph_copies(bytes_per_call: float, device: torch.device) -> int:
    """Calls of one graph: together they touch more than the L2 holds, so each finds it cold."""
    return max(4, math.ceil(COLD_BYTES / bytes_per_call)) if device.type == "cuda" else 1


def graph(calls: list[Call], device: torch.device) -> Timed:
    """The calls, warm, one after the other in a CUDA graph; on a CPU, called."""
    if device.type != "cuda":
        return Timed(calls, lambda: [call() for call in calls])
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        # the outputs are alive together, so none is written where another one has warmed the L2
        outputs = [call() for call in calls]
    del outputs
    return Timed(calls, captured.replay)


def _burst(timed: Timed, device: torch.device) -> list[float]:
    """Milliseconds per call, `BURST` samples."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(BURST):
            timed.run()
            times.append(time.perf_counter())
        spans = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    else:
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(BURST)]
        for start, end in events:
            _l2_filler(device).zero_()
            start.record()
            timed.run()
            end.record()
        torch.cuda.synchronize(device)
        spans = [start.elapsed_time(end) for start, end in events]
    return [ms / len(timed.calls) for ms in spans]


def sample(contestants: dict[str, Timed], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds per call, of all of them in turn, in the same rounds; the first is a warm-up.

    Of a long call what its last warm-up took is the one sample.
    """
    long = {name: timed for name, timed in contestants.items() if timed.seconds >= LONG}
    samples = {n: [1e3 * t.seconds] if n in long else [] for n, t in contestants.items()}
    short = {name: timed for name, timed in contestants.items() if name not in long}
    for timed in short.values():
        _burst(timed, device)
    end = time.perf_counter() + SECONDS * len(short)
    for i in range(MAX_ROUNDS):
        if i > 1 and time.perf_counter() > end:
            break
        for name, timed in short.items():
            samples[name] += _burst(timed, device)
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, by linear interpolation."""
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return p20.item(), p50.item(), p80.item()


def warm_up(call: Call, device: torch.device) -> tuple[float, float | None]:
    """`WARM_UP` calls, or two if they are long: seconds of the last one, and its megabytes (1e6).

    The latter are what it allocates at once, above what was there before; None on a CPU.
    """
    cuda = device.type == "cuda"
    seconds, peak = 0.0, None
    for i in range(WARM_UP):
        if i > 1 and seconds >= LONG:
            break
        synchronize(device)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
        if cuda:
            peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return seconds, peak


def copy(device: torch.device, dtype: torch.dtype) -> tuple[list[float], dict[str, int], float]:
    """Milliseconds of a large copy, its shape (elements), and the bytes it moves."""
    n = 2**29 if device.type == "cuda" else 2**23
    source, target = (torch.randn(n, device=device, dtype=dtype) for _ in "ab")
    samples = sample({"copy": one_call(lambda: (target.copy_(source),))}, device)
    return samples["copy"], {"N": n}, 2 * n * dtype.itemsize


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[list[float], dict[str, int], float]:
    """Milliseconds of a large square matrix product, its shape, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    samples = sample({"matmul": one_call(lambda: (a @ b,))}, device)
    return samples["matmul"], {"M": n, "N": n, "K": n}, 2 * n**3
