"""Which implementation runs, the Triton kernel or the PyTorch reference. Decided only here."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be auto, triton or reference, got {name!r}")
    return name


_backend = _checked(os.environ.get("KIMI_KERNELS_BACKEND", "auto"), "KIMI_KERNELS_BACKEND")


def use_triton(x: Tensor) -> bool:
    """Whether `x` goes through the Triton kernel: on `auto`, when it is on a CUDA GPU and not fp64.

    Raises:
        ValueError: `triton` is forced where it cannot run.
    """
    if _backend != "triton":
        return _backend == "auto" and x.is_cuda and HAS_TRITON and x.dtype != torch.float64
    if x.dtype == torch.float64:
        raise ValueError("backend is triton, but the input is float64: the kernels stop at float32")
    if not HAS_TRITON:
        raise ValueError("backend is triton, but the triton package is not installed")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend is triton, but the input is on {x.device}: want a CUDA tensor, "
            "or TRITON_INTERPRET=1 set before the first import"
        )
    return True


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, (9, 0) on Hopper; (0, 0) where there is no CUDA."""
    if device.type != "cuda" or torch.version.cuda is None:  # ROCm has numbers of its own
        return 0, 0
    return torch.cuda.get_device_capability(device)


class Limits(NamedTuple):
    processors: int  # multiprocessors
    shared: int  # bytes of shared memory for one program


@functools.cache
def device_limits(device: torch.device) -> Limits:
    """Those of a GPU; of Hopper for what has none, the interpreter and a compilation."""
    if device.type != "cuda":
        return Limits(132, 227 * 1024)
    import triton

    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Limits(found["multiprocessor_count"], found["max_shared_mem"])


_overlapping = ContextVar("overlapping", default=False)


@contextlib.contextmanager
def overlapping() -> Iterator[None]:
    """Inside a `with` block kernels may read ahead what was there before the last one (overlap.py).

    No kernel writes a weight there. The one just before `kda_step` has made f or the gate, not its
    states, q, k, v or b, and those before `latent_attention` have written no latents but those at
    its positions.
    """
    token = _overlapping.set(True)
    try:
        yield
    finally:
        _overlapping.reset(token)


def may_overlap() -> bool:
    """Whether this thread is inside of `overlapping`."""
    return _overlapping.get()


def reference_only(op: str) -> None:
    """For an op that has no Triton kernel.

    Raises:
        ValueError: `triton` is forced.
    """
    if _backend == "triton":
        raise ValueError(f"backend is triton, but {op} has no Triton kernel: use auto or reference")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation inside a `with` block: `auto`, `triton` or `reference`.

    In all threads of the process: a backward pass has its own.
    """
    global _backend
    previous, _backend = _backend, _checked(name, "backend")
    try:
        yield
    finally:
        _backend = previous
