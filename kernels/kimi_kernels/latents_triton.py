"""Triton kernels for latents in fp8: the definition is in latents.py.

e4m3 is made of and read as bytes, so that they run on every GPU and in the interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.latents import LARGEST, LEAST, QuantizedLatents


@triton.jit
def to_e4m3(x):
    """fp32, |x| at most 448, rounded to nearest even -> the byte.

    From 2^-6 on the upper bits of x, with the exponent's bias moved from 127 to 7; below it the
    multiple of 2^-9, which an addition leaves in the lowest bits of 2^14 + |x|.
    """
    b = x.to(tl.uint32, bitcast=True)
    b_a = b & 0x7FFFFFFF
    normal = ((b_a + 0x7FFFF + ((b_a >> 20) & 1)) >> 20) - (120 << 3)
    small = (b_a.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (((b >> 24) & 0x80) | tl.where(b_a >= 0x3C800000, normal, small)).to(tl.uint8)


@triton.jit
def from_e4m3(x, dtype: tl.constexpr):
    """The byte -> its value, exactly, but nan is 480: a fp16 with an exponent 8 too small."""
    b = x.to(tl.uint16)
    b = ((b & 0x80) << 8) | ((b & 0x7F) << 7)
    return (b.to(tl.float16, bitcast=True) * 256.0).to(dtype)


@triton.jit
def store_latents_kernel(
    latent, c, k_r, scale, rows, columns,
    S, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One token: latent [N, L] to its place in c [B, S, R], k_r [B, S, L-R] and scale [B, S]."""
    i_n = tl.program_id(0).to(tl.int64)
    to = tl.load(rows + i_n) * S + tl.load(columns + i_n)
    o_r, o_p = tl.arange(0, BR), tl.arange(0, BP)
    b_c = tl.load(latent + i_n * L + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    # as integers, of which those of nan are the largest
    most = tl.max(b_c.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    b_s = tl.div_rn(most, LARGEST)
    b_s = tl.where(b_s < LEAST, LEAST, b_s)
    tl.store(c + to * R + o_r, to_e4m3(tl.div_rn(b_c, b_s + tl.zeros_like(b_c))), mask=o_r < R)
    tl.store(scale + to, b_s)
    b_r = tl.load(latent + i_n * L + R + o_p, mask=o_p < L - R, other=0.0)
    tl.store(k_r + to * (L - R) + o_p, b_r, mask=o_p < L - R)


def store_latents_triton(
    latent: Tensor, into: QuantizedLatents, rows: Tensor, columns: Tensor
) -> None:
    """Arguments of `store_latents`."""
    (N, L), (_, S, R) = latent.shape, into.c.shape
    if N:
        BR, BP = (triton.next_power_of_2(max(1, x)) for x in (R, L - R))
        store_latents_kernel[(N,)](
            latent.contiguous(), into.c.view(torch.uint8), into.k_r, into.scale,
            rows.contiguous(), columns.contiguous(), S, LARGEST, LEAST,
            R=R, L=L, BR=BR, BP=BP, num_warps=4 if BR > 128 else 1,
        )  # fmt: skip
