"""Checks that every op shares. Each raises a `ValueError` that names the argument."""

import itertools

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What references compute in and states are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_list(name: str, xs: object) -> None:
    """`xs` must be several tensors, not one, whose rows would pass for them."""
    if isinstance(xs, Tensor):
        raise ValueError(f"{name} is a tensor, want a list of tensors")


def check_shape(name: str, x: Tensor, *shape: int) -> None:
    """`x` must have exactly `shape`."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, want {list(shape)}")


def is_wide_float(dtype: torch.dtype) -> bool:
    """bf16, fp16, fp32 or fp64."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_float(name: str, x: Tensor, like: Tensor) -> None:
    """`x` must be of 16 bits or more, floating-point, and lie on the device of `like`."""
    if not is_wide_float(x.dtype) or x.device != like.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, want floats of 16 bits or more on {like.device}"
        )


def check_number(name: str, x: object) -> None:
    """`x` must be a Python number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise ValueError(f"{name} is {x!r}, want a number")


def check_rms_norm(x: Tensor, w: Tensor, eps: object) -> None:
    """`x` must be floats `[..., D]`, `w` floats `[D]` and `eps` a number."""
    check_float("x", x, x)
    check_shape("w", w, channels("x", x))
    check_float("w", w, x)
    check_number("eps", eps)


def check_norm(norm: object, other: str, like: Tensor, R: int | None = None) -> None:
    """`norm` must be a weight `[R]` in the dtype of `like`, and eps."""
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise ValueError("norm has other parts, want a weight and eps")
    weight, eps = norm
    check_shape("norm[0]", weight, weight.numel() if R is None else R)
    check_like("norm[0]", weight, other, like)
    check_number("norm[1]", eps)


def channels(name: str, x: Tensor) -> int:
    """The last dim of `x`, which must have one."""
    if x.ndim == 0:
        raise ValueError(f"{name} has no dimensions, want [..., channels]")
    return x.shape[-1]


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


def count_sequences(cu_seqlens: Tensor | None, x: Tensor, on_host: bool = False) -> int:
    """Sequences in `x` [B, T, ...]: B, or N where `cu_seqlens` [N+1] packs N into one row.

    Where its values are read `on_host`, `cu_seqlens` may be on the CPU and `x` on a GPU.

    The values of a `cu_seqlens` on a GPU are not looked at: that would make the host wait for it.
    The kernels read nothing outside the T tokens whatever they are.
    """
    if cu_seqlens is None:
        return x.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}, want a tensor")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, want [N+1] with N >= 1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}, want int32 or int64")
    if x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs one packed row, [1, T, ...], but the batch size is {x.shape[0]}"
        )
    on_cpu = cu_seqlens.device.type == "cpu"
    strict = cu_seqlens.is_meta or (x.is_cuda and not (on_host and on_cpu))
    if strict and cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, want {x.device}")
    if on_cpu:
        sequence_bounds(cu_seqlens, x)
    return cu_seqlens.numel() - 1


def sequence_bounds(cu_seqlens: Tensor, x: Tensor) -> list[tuple[int, int]]:
    """First and last+1 token of every sequence packed in `x` [1, T, ...], checked. Waits for a GPU.

    `cu_seqlens` [N+1] goes 0 = c[0] <= c[1] <= ... <= c[N] = T.
    """
    c, T = cu_seqlens.tolist(), x.shape[1]
    if c[0] != 0:
        raise ValueError(f"cu_seqlens starts at {c[0]}, want 0")
    if c[-1] != T:
        raise ValueError(f"cu_seqlens ends at {c[-1]}, want the number of tokens, {T}")
    bounds = list(itertools.pairwise(c))
    for i, (start, end) in enumerate(bounds):
        if end < start:
            raise ValueError(f"cu_seqlens decreases from {start} to {end} at index {i + 1}")
    return bounds
