"""What has to hold before an op or a provider is timed."""

import glob
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.inputs import DTYPE
from benchmarks.op import Op
from benchmarks.providers import Build
from benchmarks.results import ROOT

AGREEMENT = 0.05  # largest RMS(x - reference) / RMS(reference): bf16 kernels have about 5e-3


class Refused(Exception):
    """Why something is not timed."""


def environment() -> dict[str, str]:
    """For a subprocess: this one's, with the sources on the path."""
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_tests(pattern: str, timeout: float | None = None) -> None:
    """Run the test files of a glob in a new process, all but the slow tests.

    Raises:
        Refused: there is no such file, or a test fails.
        subprocess.TimeoutExpired: they take longer than `timeout` seconds.
    """
    files = sorted(glob.glob(str(ROOT / pattern)))
    if not files:
        raise Refused(f"no test file {pattern}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise Refused(f"{pattern} is red\n{done.stdout[-4000:]}{done.stderr[-1000:]}")


def disagreement(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest RMS(x - y) / RMS(y) over the pairs; infinite where x is not finite."""
    worst = 0.0
    for x, y in zip(outputs, expected, strict=True):
        if x.shape != y.shape:
            raise Refused(f"an output is {list(x.shape)}, the reference has {list(y.shape)}")
        if not x.isfinite().all():
            return float("inf")
        x, y = x.double(), y.double()
        error = (x - y).square().mean().sqrt() / y.square().mean().sqrt().clamp_min(1e-30)
        worst = max(worst, error.item())
    return worst


def check_agreement(op: Op, build: Build, expected: Build, device: torch.device, **shape: int):
    """Compare one call with the reference.

    Raises:
        Refused: they differ by more than `AGREEMENT`.
    """
    x = op.inputs(shape, DTYPE, device)
    error = disagreement(build(x)(), expected(x)())
    if error > AGREEMENT:
        raise Refused(f"differs from the reference by {error:.2g} at {shape}, allowed {AGREEMENT}")
