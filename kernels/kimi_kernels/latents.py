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

from kimi_kernels.checks import accumulation_dtype, check_like, check_shape
from kimi_kernels.dispatch import use_triton

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 2.0**-40  # scale: of a token whose c is zero or next to that


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
        latent: `[B, S, R + P]`, c and then k_r; any float dtype.
        R: channels of c.
    """
    c, k_r = latent.detach().split((R, latent.shape[-1] - R), -1)
    c = c.float()
    scale = (c.abs().amax(-1) / LARGEST).clamp_min(LEAST)
    return QuantizedLatents((c / scale[..., None]).to(FP8), k_r, scale)


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


def store_latents(latent: Tensor, into: QuantizedLatents, rows: Tensor, columns: Tensor) -> None:
    """Quantize N tokens and write each to its place, in place: one launch on a GPU.

    Args:
        latent: `[N, R + P]`, in the dtype of `into.k_r`.
        into: contiguous, `[B, S, ...]`.
        rows, columns: `[N]` int64, below B and S; their values are not checked.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    (N, L), (B, S, R) = latent.shape, into.c.shape
    check_quantized(into, B, S, R, L - R, latent)
    for name, x in (("rows", rows), ("columns", columns)):
        check_shape(name, x, N)
        if x.dtype != torch.int64 or x.device != latent.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, want torch.int64 on {latent.device}"
            )
    if not all(x.is_contiguous() for x in into):
        raise ValueError("into has tensors that are not contiguous, want a whole buffer")
    if use_triton(latent):
        from kimi_kernels.latents_triton import store_latents_triton

        return store_latents_triton(latent, into, rows, columns)
    new = quantize_latents(latent, R)
    into.c.view(torch.uint8)[rows, columns] = new.c.view(torch.uint8)
    into.k_r[rows, columns], into.scale[rows, columns] = new.k_r, new.scale
    return None
