"""Triton forward of the routed experts for a few slots (token, j): decoding.

Two launches of dot products in fp32, which stream the chosen experts' weights; no sort, no tiles. A
small batch seldom chooses an expert twice, and then finds it in L2. A program is one warp: vectors
and rows of weights have one layout then, so that nothing goes through shared memory, no barrier
stops the loads, and ptxas keeps about twenty of 16 bytes per thread under way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.triton_math import sigmoid

DECODE_SLOTS = 64
ROWS, COLUMNS = 2, 256  # of weights, per step of a program: 16 bytes per thread and row


@triton.jit
def decode_hidden_kernel(
    x, w, index, h,
    E: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """h [S, F] = SiLU(x gate^T) * (x up^T), BF features of one slot."""
    NF: tl.constexpr = (F + BF - 1) // BF
    slot, i_f = tl.program_id(0) // NF, tl.program_id(0) % NF
    i_e = tl.load(index + slot)
    if (i_e < 0) | (i_e >= E):
        return
    o_f, o_d = i_f * BF + tl.arange(0, BF), tl.arange(0, BD)
    m_f = (o_f < F)[:, None]
    p_x = x + (slot // TOP_K) * D + o_d
    p_w = w + i_e * (2 * F * D) + o_f.to(tl.int64)[:, None] * D + o_d[None, :]
    gate, up = tl.zeros([BF, BD], tl.float32), tl.zeros([BF, BD], tl.float32)
    for d in tl.static_range(0, D, BD):
        m_d = o_d < D - d
        b_x = tl.load(p_x + d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        m = m_f & m_d[None, :]
        gate += tl.load(p_w + d, mask=m, other=0.0).to(tl.float32) * b_x
        up += tl.load(p_w + F * D + d, mask=m, other=0.0).to(tl.float32) * b_x
    b_gate, b_up = tl.sum(gate, 1), tl.sum(up, 1)
    b_h = (b_gate * sigmoid(b_gate) * b_up).to(h.dtype.element_ty)
    tl.store(h + slot * F + o_f, b_h, mask=o_f < F)


@triton.jit
def decode_sum_kernel(
    h, w, index, weights, out,
    E: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [T, D] = sum_j weights[t, j] h[t, j] down^T, BD channels of one token."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_t, i_d = tl.program_id(0) // ND, tl.program_id(0) % ND
    o_d, o_f = i_d * BD + tl.arange(0, BD), tl.arange(0, BF)
    m_d = (o_d < D)[:, None]
    acc = tl.zeros([BD, BF], tl.float32)
    for j in tl.static_range(TOP_K):
        slot = i_t * TOP_K + j
        i_e = tl.load(index + slot)
        here = (i_e >= 0) & (i_e < E)
        weight = tl.load(weights + slot).to(tl.float32)
        p_w = w + i_e * (D * F) + o_d.to(tl.int64)[:, None] * F + o_f[None, :]
        for f0 in range(0, F, 4 * BF):
            for f in tl.static_range(0, 4 * BF, BF):
                m_f = here & (o_f < F - f0 - f)
                b_h = tl.load(h + slot * F + f0 + f + o_f, mask=m_f, other=0.0).to(tl.float32)
                b_w = tl.load(p_w + f0 + f, mask=m_d & m_f[None, :], other=0.0).to(tl.float32)
                acc += b_w * (b_h * weight)[None, :]
    tl.store(out + i_t * D + o_d, tl.sum(acc, 1).to(out.dtype.element_ty), mask=o_d < D)


def decode_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """y [T, D]; arguments as `expert_mlp`, contiguous and not empty."""
    (T, D), (E, F2, _), (S, top_k) = x.shape, gate_up.shape, (index.numel(), index.shape[1])
    F = F2 // 2
    h = torch.empty(S, F, dtype=x.dtype, device=x.device)
    out = torch.empty(T, D, dtype=x.dtype, device=x.device)
    meta = {"E": E, "TOP_K": top_k, "D": D, "F": F}
    BF, BD = ROWS, min(COLUMNS, triton.next_power_of_2(D))
    decode_hidden_kernel[(S * triton.cdiv(F, BF),)](
        x, gate_up, index, h, BF=BF, BD=BD, num_warps=1, **meta
    )
    BD, BF = ROWS, min(COLUMNS, triton.next_power_of_2(F))
    decode_sum_kernel[(T * triton.cdiv(D, BD),)](
        h, down, index, weights, out, BF=BF, BD=BD, num_warps=1, **meta
    )
    return out
