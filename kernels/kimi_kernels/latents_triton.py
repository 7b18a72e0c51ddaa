"""Triton kernels for latents on their way into a cache: the definitions are in latents.py.

e4m3 is made of and read as bytes, so that they run on every GPU and in the interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.latents import LEAST, RECIPROCAL, TILE, QuantizedLatents
from kimi_kernels.overlap import overlap, prefer_shared, wait_for_inputs
from kimi_kernels.rms_norm_triton import normalise, tiles


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


@triton.jit(do_not_specialize=["N", "T", "S"])
def store_latents_kernel(
    latent, norm, c, k_r, scale, rows, columns,
    N, T, S, eps, RECIPROCAL: tl.constexpr, LEAST: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, s_c: tl.constexpr, s_r: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN of the tokens latent [N, L] to their places in c and k_r, whose B S tokens lie s_c and
    s_r apart, and with a `scale` [B, S] as fp8. With a norm [R], c / RMS(c) norm for c.

    rows, columns: [N]; without rows T tokens of each. They and the norm are there when the kernel
    before this one begins.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_r, o_p = tl.arange(0, BR), tl.arange(0, BP)
    m_n, m_r = o_n < N, o_r < R
    m_c, m_p = m_n[:, None] & m_r[None, :], m_n[:, None] & (o_p < L - R)[None, :]
    if rows is None:
        to = o_n // T * S
    else:
        to = tl.load(rows + o_n, mask=m_n, other=0) * S
    to += tl.load(columns + o_n, mask=m_n, other=0)
    if norm is not None:
        b_w = tl.load(norm + o_r, mask=m_r, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP, EARLY=True)
    latent += o_n[:, None] * L
    b_c = tl.load(latent + o_r[None, :], mask=m_c, other=0.0)  # [BN, BR]
    b_k = tl.load(latent + R + o_p[None, :], mask=m_p, other=0.0)  # [BN, BP]
    if norm is not None:
        b_c = normalise(b_c, b_w, eps, R)[0].to(b_c.dtype)
    if scale is not None:
        b_c = b_c.to(tl.float32)
        # as integers, of which those of nan are the largest
        most = tl.max(b_c.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        b_s = most.to(tl.float32, bitcast=True) * RECIPROCAL
        b_s = tl.where(b_s < LEAST, LEAST, b_s)
        tl.store(scale + to, b_s, mask=m_n)
        b_c = to_e4m3(tl.div_rn(b_c, b_s[:, None] + tl.zeros_like(b_c)))
    tl.store(c + to[:, None] * s_c + o_r[None, :], b_c, mask=m_c)
    tl.store(k_r + to[:, None] * s_r + o_p[None, :], b_k, mask=m_p)


def store_latents_triton(
    latent: Tensor,
    into: Tensor | QuantizedLatents,
    rows: Tensor | None,
    columns: Tensor,
    norm: tuple[Tensor, float] | None,
    R: int,
) -> None:
    """Arguments of `store_latents`, at least one token; R channels of c."""
    N, L = latent.shape
    if isinstance(into, QuantizedLatents):
        c, k_r, scale = into.c.view(torch.uint8), into.k_r, into.scale
    else:
        c, k_r, scale = into, into[..., R:], None
    weight, eps = (None, 0.0) if norm is None else norm
    BR, BP = (triton.next_power_of_2(max(1, x)) for x in (R, L - R))
    BN = max(1, TILE // (BR * latent.element_size()))
    kernel = store_latents_kernel[(triton.cdiv(N, BN),)](
        latent.contiguous(), None if weight is None else weight.contiguous(), c, k_r, scale,
        None if rows is None else rows.contiguous(), columns.contiguous(),
        N, N // c.shape[0], c.shape[1], eps, RECIPROCAL, LEAST,
        R=R, L=L, s_c=c.stride(1), s_r=k_r.stride(1), BN=BN, BR=BR, BP=BP,
        num_warps=tiles(R)["num_warps"], **overlap(latent.device),
    )  # fmt: skip
    prefer_shared(kernel)
