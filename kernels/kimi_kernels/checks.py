"""Checks that every op shares. Each raises a `ValueError` that names the argument."""

import itertools

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What references compute in and states are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_shape(name: str, x: Tensor, *shape: int) -> None:
    """`x` must have exactly `shape`."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, want {list(shape)}")


def check_float(name: str, x: Tensor, like: Tensor) -> None:
    """`x` must be floating-point and lie on the device of `like`."""
    if not x.is_floating_point() or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}, want floats on {like.device}")


def check_like(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """`x` must have the dtype and device of `like`."""
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, want {like.dtype} on {like.device} as {other}"
        )


def check_state(name: str, state: Tensor | None, x: Tensor, dtype: torch.dtype, *shape: int):
    """A carried state must have exactly `shape` and `dtype` and lie on the device of `x`."""
    if state is None:
        return
    check_shape(name, state, *shape)
    if state.dtype != dtype or state.device != x.device:
        raise ValueError(f"{name} is {state.dtype} on {state.device}, want {dtype} on {x.device}")


def sequence_bounds(cu_seqlens: Tensor | None, x: Tensor) -> list[tuple[int, int]] | None:
    """First and last+1 token of every packed sequence; None where `x` [B, T, ...] is not packed.

    `cu_seqlens` [N+1], int32 or int64, goes 0 = c[0] <= c[1] <= ... <= c[N] = T, with B = 1.
    """
    if cu_seqlens is None:
        return None
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, want [N+1] with N >= 1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}, want int32 or int64")
    B, T = x.shape[:2]
    if B != 1:
        raise ValueError(f"cu_seqlens needs one packed row, [1, T, ...], but the batch size is {B}")
    c = cu_seqlens.tolist()
    if c[0] != 0:
        raise ValueError(f"cu_seqlens starts at {c[0]}, want 0")
    if c[-1] != T:
        raise ValueError(f"cu_seqlens ends at {c[-1]}, want the number of tokens, {T}")
    bounds = list(itertools.pairwise(c))
    for i, (start, end) in enumerate(bounds):
        if end < start:
            raise ValueError(f"cu_seqlens decreases from {start} to {end} at index {i + 1}")
    return bounds
