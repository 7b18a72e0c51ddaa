"""The first call of a fresh process: what kernel compilation and autotuning cost.

    python -m benchmarks.cold OP MODE PROVIDER SHAPE     prints milliseconds

Imports and inputs come before the clock starts. `run` starts it with an empty TRITON_CACHE_DIR.
"""

import contextlib
import json
import sys
import time
from importlib import import_module

import torch

from benchmarks.inputs import DTYPE, Shape
from benchmarks.ops import OPS
from benchmarks.timing import synchronize


def first_call(name: str, mode: str, provider: str, shape: Shape) -> float:
    """Wall milliseconds until the device is done."""
    op = next(op for op in OPS if (op.name, op.mode) == (name, mode))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(ImportError):
        import_module("triton")
    call = op.providers[provider].build(op.inputs(shape, DTYPE, device))
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    name, mode, provider, shape = sys.argv[1:]
    print(first_call(name, mode, provider, json.loads(shape)))
