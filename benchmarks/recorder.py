"""Turns measurements into rows of a results file, with what was measured where."""

import contextlib
import datetime
import importlib.metadata
import subprocess
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.inputs import DTYPE, Shape
from benchmarks.results import RESULTS, ROOT, label, replace, slug
from benchmarks.timing import quantiles


def version(package: str | None) -> str | None:
    """Of an installed distribution; None where there is none of that name."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package) if package else None


def _git(*args: str) -> str | None:
    done = None
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else None


def commit() -> str | None:
    """The commit, with `-dirty` if the library differs from it; None without a repository."""
    head = _git("rev-parse", "--short=7", "HEAD")
    changed = _git("status", "--porcelain", "--", "kernels", "kimi_linear")
    return head and head + ("-dirty" if changed else "")


class Recorder:
    """Writes to one results file; by default the one of this device."""

    def __init__(self, device: torch.device, out: Path | None = None, git: str | None = None):
        cuda = device.type == "cuda"
        gpu = torch.cuda.get_device_name(device) if cuda else "cpu"
        self.path = out or RESULTS / f"{slug(gpu)}.jsonl"
        self.facts = {
            "dtype": str(DTYPE).removeprefix("torch."),
            "gpu": gpu,
            "torch": torch.__version__,
            "triton": version("triton"),
            "git": git or commit(),
        }

    def write(
        self,
        op: str,
        mode: str,
        provider: str,
        shape: Shape,
        samples: list[float],
        *,
        flops: float | None = None,
        bytes: float | None = None,
        peak_mb: float | None = None,
        error: float | None = None,
        batch: int | None = None,
        cache: float | None = None,
        package: str | None = None,
    ) -> None:
        """One row, from milliseconds per call; a single sample has no p20 and p80, none no time.

        Args:
            flops, bytes: of one call, for the rates.
            error: what an op of the timer `error` has in place of a time.
            batch, cache: what the timer `largest` has found, and bytes of one sequence's cache.
            package: distribution of the provider, None for our own code.
        """
        p20, p50, p80 = quantiles(samples) if samples else (None, None, None)
        single = len(samples) == 1
        row = {
            "op": op,
            "mode": mode,
            "provider": provider,
            "shape": shape,
            "ms_p50": p50,
            "ms_p20": None if single else p20,
            "ms_p80": None if single else p80,
            "tflops": p50 and flops and flops / p50 / 1e9,
            "gbps": p50 and bytes and bytes / p50 / 1e6,
            "peak_mb": peak_mb,
            "error": error,
            "batch": batch,
            "cache_mb": cache and cache / 1e6,
            "provider_version": package and f"{package} {version(package)}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        replace(self.path, rounded | self.facts)
        figure = f"{p50:.4g} ms" if error is None else f"error {error:.2g}"
        at = f", batch {batch}" if batch else ""
        tqdm.write(f"{op} {mode} {label(shape)} {provider}: {figure}{at}")
