"""What fits into the memory of a device: whole models, and the largest batch of a decode step.

Counted, not tried. An op that has a `memory` says what its inputs take, a provider that has a
`cache` what one sequence of S tokens does.
"""

import gc
import os
from collections.abc import Iterable

import torch

from benchmarks.costs import SIZE
from benchmarks.inputs import Shape
from benchmarks.model_decode import ROOM
from benchmarks.providers import Provider

MARGIN = 3e9  # for activations, kernels, their scratch, and what the allocator cannot use
# of logits per row: those of the CUDA graph and of the call before it, and the copy that each gives
LOGITS = 4
# at most: weights, not caches, are what time and memory go into where more fit
MOST_ROWS = 1024


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float:
    """Bytes that can be had now."""
    release(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row_bytes(provider: Provider, shape: Shape) -> float:
    """A row's cache, with room for the tokens that a measurement adds, and its logits."""
    assert provider.cache is not None
    grown = provider.cache(shape | {"S": shape["S"] + ROOM})
    return grown + LOGITS * SIZE * shape["vocab"]


def needed(memory: float, providers: Iterable[Provider], shape: Shape) -> float:
    """Bytes for inputs of `memory` and the caches of the providers, which are timed together."""
    caches = (shape["B"] * row_bytes(p, shape) for p in providers if p.cache is not None)
    return memory + sum(caches) + MARGIN


def largest_batch(memory: float, provider: Provider, shape: Shape, free: float) -> int:
    """Rows of a shape without B that fit into `free` bytes beside inputs of `memory`; maybe 0."""
    left = free - memory - MARGIN
    return max(0, min(MOST_ROWS, int(left // row_bytes(provider, shape))))
