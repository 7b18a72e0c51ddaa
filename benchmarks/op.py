"""What an op of the benchmarks is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.inputs import Inputs, Shape
from benchmarks.providers import Build, Provider, flash_attn

FLOOR = "floor"  # a provider of every op: nobody computes it
# whose work it bounds: where another does other work, that has a floor of its own
FLOORS = {FLOOR: "ours", "floor_all_mla": "all_mla", "floor_fp8": "fp8"}


@dataclass(frozen=True)
class Op:
    """One op in one mode.

    Attributes:
        tests: glob of the test files that guard it, from the root of the repository.
        inputs: draws the inputs for a shape, in a dtype, on a device.
        providers: by name; those of one op get the same inputs.
        check: letters that change for the check against the provider `reference`, to make a small
            shape; None: no check.
        timer: `events`: single calls; `graph`: calls in a CUDA graph, on different memory;
            `process`: the first call of a fresh process; `error`: no time, but how far the outputs
            are from those of the provider `reference` in fp64, as RMS(x - gold) / RMS(gold);
            `largest`: single calls of each provider alone, at the largest batch that it fits: its
            shapes leave B open.
        rotate: the inputs of the i-th call in a CUDA graph from those of the first, i = 0: differs
            where their values choose the memory that is read.
        memory: bytes that its inputs take, where that decides what a device can run.
    """

    name: str
    mode: str
    tests: str
    shapes: tuple[Shape, ...]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape], float]
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    providers: dict[str, Provider]
    check: Shape | None = None
    timer: Literal["events", "graph", "process", "error", "largest"] = "events"
    rotate: Callable[[Inputs, int], Inputs] = lambda x, i: x
    memory: Callable[[Shape], float] | None = None


def few(limit: int) -> Callable[[Shape], bool]:
    """Up to `limit` tokens."""
    return lambda s: s["B"] * s["T"] <= limit


def fla(build: Build, expected: Build | None = None) -> Provider:
    return Provider(build, module="fla", package="fla-core", expected=expected)


def with_or_without_flash(build: Build) -> dict[str, Provider]:
    """Ours where attention within a prompt is torch's, and where it is flash-attn-4's."""
    there = Provider(flash_attn(build), module="flash_attn", package="flash-attn-4")
    return {"ours": Provider(flash_attn(build, wanted=False)), "flash_attn": there}
