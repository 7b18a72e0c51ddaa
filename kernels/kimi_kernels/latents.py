"""MLA latents in fp8: what a cache keeps of a token's [c | k_r] in 8 bits per channel of c.

    scale = max |c| / 448            one fp32 number per token; 448 is the largest of e4m3
    c8    = c / scale                rounded to e4m3, to nearest, ties to even
    k_r                              as it is

c is normalised, so e4m3's 4 significant bits are what its channels lose. More scales would not
help: e4m3 keeps those bits over a factor of 2^15, more than what lies between channels. A power of
two as the scale would: it rounds the largest channel too, which an outlier makes the one that
counts (1.7 times the error with channels 30 times the others). k_r has no norm and goes into the
scores alone: in fp8 the error of the output grows by a quarter where it is as large as c, and by
four where it has outliers, for 64 of 644 bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_kernels.checks import (
    accumulation_dtype,
    check_float,
    check_like,
    check_norm,
    check_shape,
)
from kimi_kernels.dispatch import use_triton
from kimi_kernels.rms_norm import rms_norm

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
RECIPROCAL = 1 / LARGEST
LEAST = 2.0**-40  # scale: of a token whose c is zero or next to that

# Bytes of c in a program of the kernel, 16 for each of 128 threads. Then as many threads share a
# token as in rms_norm's kernel, and the order of its sum is the same.
TILE = 2048


class QuantizedLatents(NamedTuple):
    """S latents in each of B rows."""

    c: Tensor  # [B, S, R] e4m3
    k_r: Tensor  # [B, S, P] bf16, fp16, fp32 or fp64
    scale: Tensor  # [B, S] fp32

    def dequantize(self) -> Tensor:
        """`[B, S, R + P]` in the dtype of k_r."""
        wide = accumulation_dtype(self.k_r.dtype)
        c = self.c.to(wide) * self.scale[..., None].to(wide)
        return torch.cat((c.to(self.k_r.dtype), self.k_r), -1)


def quantize_latents(latent: Tensor, R: int) -> QuantizedLatents:
    """The definition. Each token by itself; one that is not finite stays so, all of it.

    Args:
        latent: `[..., R + P]`, c and then k_r; bf16, fp16, fp32 or fp64, finite in fp32.
        R: channels of c, at least 1.

    Returns:
        c `[..., R]`, k_r `[..., P]` and the scales `[...]`.

    Raises:
        ValueError: not a float, or R outside of the channels.
    """
    check_float("latent", latent, latent)
    if latent.ndim < 1 or not 0 < R <= latent.shape[-1]:
        raise ValueError(f"latent has shape {list(latent.shape)}, want [..., {R} + P] with R > 0")
    c, k_r = latent.detach().split((R, latent.shape[-1] - R), -1)
    c = c.float()
    # a product: on a GPU torch divides by a number by its reciprocal, on a CPU it does not
    scale = (c.abs().amax(-1) * RECIPROCAL).clamp_min(LEAST)
    return QuantizedLatents((c / scale[..., None]).to(FP8), k_r, scale)


def check_latents(name: str, x: object) -> None:
    """Raise a `ValueError` unless `x` is a tensor or `QuantizedLatents`."""
    if not isinstance(x, (Tensor, QuantizedLatents)):
        raise ValueError(f"{name} is a {type(x).__name__}, want a tensor or QuantizedLatents")


def check_quantized(latents: QuantizedLatents, B: int, S: int, R: int, P: int, q: Tensor) -> None:
    """Raise a `ValueError` unless their shapes, dtypes and device fit queries q."""
    c, k_r, scale = latents
    check_shape("latent.c", c, B, S, R)
    check_shape("latent.k_r", k_r, B, S, P)
    check_shape("latent.scale", scale, B, S)
    check_like("latent.k_r", k_r, "q", q)
    for name, x, dtype in (("c", c, FP8), ("scale", scale, torch.float32)):
        if x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"latent.{name} is {x.dtype} on {x.device}, want {dtype} on {q.device}"
            )


def store_latents(
    latent: Tensor,
    into: Tensor | QuantizedLatents,
    rows: Tensor | None,
    columns: Tensor,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """Write each of N tokens to its place, in place: one launch on a GPU, but for a compiler.

    A norm of more than 2 KB is another launch.

    Args:
        latent: `[N, R + P]`, in the dtype of `into` or `into.k_r`.
        into: `[B, S, R + P]`, or fp8, into which they are quantized, `[B, S, ...]`; contiguous.
        rows: `[N]` int64, below B; None: as many tokens of each row, one row after the other.
        columns: `[N]` int64, below S. Neither's values are checked.
        norm: weight `[R]` and eps of an RMSNorm of c that comes first; same dtype. As `rms_norm`,
            and to the bit where R and P are multiples of 8.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if latent.ndim != 2:
        raise ValueError(f"latent has shape {list(latent.shape)}, want [N, R + P]")
    check_float("latent", latent, latent)
    (N, L), fp8 = latent.shape, isinstance(into, QuantizedLatents)
    check_latents("into", into)
    held = into if fp8 else (into,)
    if held[0].ndim != 3:
        raise ValueError(f"into has shapes {[list(x.shape) for x in held]}, want [B, S, ...]")
    B, S = held[0].shape[:2]
    if norm is not None:
        check_norm(norm, "latent", latent, into.c.shape[2] if fp8 else None)
    R = into.c.shape[2] if fp8 else L if norm is None else norm[0].numel()
    if not 0 < R <= L:
        name, x = ("latent", latent) if fp8 or norm is None else ("norm[0]", norm[0])
        raise ValueError(f"{name} has shape {list(x.shape)}, want 0 < R <= {L} channels, not {R}")
    if fp8:
        check_quantized(into, B, S, R, L - R, latent)
    else:
        check_shape("into", into, B, S, L)
        check_like("into", into, "latent", latent)
    for name, x in (("rows", rows), ("columns", columns)):
        if x is None and name == "rows":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is {x!r}, want a tensor")
        check_shape(name, x, N)
        if x.dtype != torch.int64 or x.device != latent.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, want torch.int64 on {latent.device}"
            )
    if rows is None and B * (N // max(B, 1)) != N:
        raise ValueError(f"latent has {N} tokens, want as many for each of {B} rows")
    if not all(x.is_contiguous() for x in held):
        raise ValueError("into has tensors that are not contiguous, want a whole buffer")
    if N == 0:
        return
    by_kernel = use_triton(latent) and not torch.compiler.is_compiling()
    if norm is not None and not (by_kernel and R * latent.element_size() <= TILE):
        latent, norm = torch.cat((rms_norm(latent[:, :R], *norm), latent[:, R:]), -1), None
    if by_kernel:
        from kimi_kernels.latents_triton import store_latents_triton

        store_latents_triton(latent, into, rows, columns, norm, R)
        return
    if rows is None:
        rows = torch.arange(B, device=latent.device).repeat_interleave(N // B)
    new = quantize_latents(latent, R) if fp8 else (latent,)
    for x, y in zip(held, new, strict=True):
        bits = torch.uint8 if x.dtype == FP8 else x.dtype
        x.view(bits)[rows, columns] = y.view(bits)
