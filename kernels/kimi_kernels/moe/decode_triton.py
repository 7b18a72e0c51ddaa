"""Triton forward of the experts, routed and shared, for a few slots (token, j): decoding.

Two launches of dot products in fp32, which stream the chosen experts' weights; no sort, no tiles. A
small batch seldom chooses an expert twice, and then finds it in L2. A program is one or two warps:
vectors and rows of weights have one layout then, so that nothing goes through shared memory, no
barrier stops the loads, and ptxas keeps about twenty of 16 bytes per thread under way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.overlap import overlap, wait_for_inputs
from kimi_kernels.triton_math import sigmoid

DECODE_SLOTS = 64
# rows and columns of weights per step of a program, 16 bytes per thread and row
HIDDEN_TILE, SUM_TILE = (1, 256), (2, 512)
# steps that a program of the shared expert reads before the choice is there: 80 registers
SHARED_AHEAD = tl.constexpr(10)
SUM_AHEAD = 6  # steps of whole experts read before the features are there: all programs still fit


@triton.jit
def load_weights(gate, up, at, d, m_f, o_d, D: tl.constexpr):
    m = m_f & (o_d < D - d)[None, :]
    b_g = tl.load(gate + at + d, mask=m, other=0.0, eviction_policy="evict_first")
    b_u = tl.load(up + at + d, mask=m, other=0.0, eviction_policy="evict_first")
    return b_g, b_u


@triton.jit
def hidden_features(
    x, norm, eps, gate, up, h, i_f,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BF features of h [F] = SiLU(gate x) up x; with a norm [D], of x / RMS(x) norm.

    AHEAD steps of the weights are read before x is there.
    """
    o_f, o_d = i_f * BF + tl.arange(0, BF), tl.arange(0, BD)
    m_f, at = (o_f < F)[:, None], o_f.to(tl.int64)[:, None] * D + o_d[None, :]
    b_gate, b_up = tl.zeros([BF, BD], tl.float32), tl.zeros([BF, BD], tl.float32)
    squares, early = tl.zeros([BD], tl.float32), ()
    for d in tl.static_range(0, min(D, AHEAD * BD), BD):
        early += (load_weights(gate, up, at, d, m_f, o_d, D),)
    wait_for_inputs(OVERLAP)
    for d in tl.static_range(0, D, BD):
        m_d = o_d < D - d
        b_x = tl.load(x + d + o_d, mask=m_d, other=0.0).to(tl.float32)
        if norm is not None:
            squares += b_x * b_x
            b_x *= tl.load(norm + d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = b_x[None, :]
        if d < AHEAD * BD:
            b_g, b_u = early[d // BD]
        else:
            b_g, b_u = load_weights(gate, up, at, d, m_f, o_d, D)
        b_gate += b_g.to(tl.float32) * b_x
        b_up += b_u.to(tl.float32) * b_x
    g, u = tl.sum(b_gate, 1), tl.sum(b_up, 1)
    if norm is not None:
        r = tl.rsqrt(tl.sum(squares, 0) / D + eps)
        g, u = g * r, u * r
    tl.store(h + o_f, (g * sigmoid(g) * u).to(h.dtype.element_ty), mask=o_f < F)


@triton.jit
def decode_hidden_kernel(
    x, norm, w, gate, up, index, h, eps,
    E: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BF features of a slot of h [T, TOP_K + SHARED, F], the last by gate, up [SHARED F, D].

    Those come first: their weights are known while the choice is made.
    """
    NF: tl.constexpr = (F + BF - 1) // BF
    slot, i_f = tl.program_id(0) // NF, tl.program_id(0) % NF
    shared = tl.num_programs(0) // (NF * (TOP_K + SHARED)) * SHARED  # slots of all tokens
    if SHARED > 0:
        if slot < shared:
            i_t, j = slot // SHARED, slot % SHARED
            x += i_t * D
            h += (i_t * (TOP_K + SHARED) + TOP_K + j) * F
            gate += j * (F * D)
            up += j * (F * D)
            hidden_features(x, norm, eps, gate, up, h, i_f, D, F, BF, BD, SHARED_AHEAD, OVERLAP)
    if slot >= shared:
        wait_for_inputs(OVERLAP)
        slot -= shared
        i_e = tl.load(index + slot)
        if (i_e >= 0) & (i_e < E):
            i_t, j = slot // max(TOP_K, 1), slot % max(TOP_K, 1)
            x += i_t * D
            h += (i_t * (TOP_K + SHARED) + j) * F
            w += i_e * (2 * F * D)
            hidden_features(x, norm, eps, w, w + F * D, h, i_f, D, F, BF, BD, 0, False)


@triton.jit
def load_outputs(w, f, o_f, here, m_d, F: tl.constexpr):
    m = m_d & (here & (o_f < F - f))[None, :]
    return tl.load(w + f, mask=m, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_outputs(acc, b_w, h, f, o_f, here, weight, F: tl.constexpr):
    """acc [BD, BF] + weight h [F] times rows b_w, to be summed over the second."""
    b_h = tl.load(h + f + o_f, mask=here & (o_f < F - f), other=0.0).to(tl.float32)
    return acc + b_w.to(tl.float32) * (b_h * weight)[None, :]


@triton.jit
def add_expert(acc, w, h, o_f, here, m_d, weight, F: tl.constexpr, BF: tl.constexpr):
    for f0 in range(0, F, 4 * BF):
        for f in tl.static_range(0, 4 * BF, BF):
            b_w = load_outputs(w, f0 + f, o_f, here, m_d, F)
            acc = add_outputs(acc, b_w, h, f0 + f, o_f, here, weight, F)
    return acc


@triton.jit
def decode_sum_kernel(
    h, w, down, index, weights, residual, out,
    E: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BD channels of out [T, D] = sum_j weights[t, j] h[t, j] w^T + h[t, TOP_K:] down^T.

    Plus `residual` [T, D] if it is given. The choice was there before h was begun: of AHEAD experts
    the weights are read before h is there.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    NF: tl.constexpr = (F + BF - 1) // BF
    i_t, i_d = tl.program_id(0) // ND, tl.program_id(0) % ND
    o_d, o_f = (i_d * BD + tl.arange(0, BD)).to(tl.int64)[:, None], tl.arange(0, BF)
    m_d = o_d < D
    index += i_t * TOP_K
    weights += i_t * TOP_K
    h += i_t * ((TOP_K + SHARED) * F)
    w += o_d * F + o_f[None, :]
    acc, early = tl.zeros([BD, BF], tl.float32), ()
    for j in tl.static_range(AHEAD):
        i_e = tl.load(index + j)
        here = (i_e >= 0) & (i_e < E)
        for f in tl.static_range(0, F, BF):
            early += ((load_outputs(w + i_e * (D * F), f, o_f, here, m_d, F), here),)
    wait_for_inputs(OVERLAP)
    for i in tl.static_range(len(early)):
        j, f, weight = i // NF, i % NF * BF, tl.load(weights + i // NF).to(tl.float32)
        acc = add_outputs(acc, early[i][0], h + j * F, f, o_f, early[i][1], weight, F)
    for j in tl.static_range(AHEAD, TOP_K):
        i_e, weight = tl.load(index + j), tl.load(weights + j).to(tl.float32)
        here, p_w = (i_e >= 0) & (i_e < E), w + i_e * (D * F)
        acc = add_expert(acc, p_w, h + j * F, o_f, here, m_d, weight, F, BF)
    for j in tl.static_range(SHARED):
        p_w = down + o_d * (SHARED * F) + j * F + o_f[None, :]
        acc = add_expert(acc, p_w, h + (TOP_K + j) * F, o_f, True, m_d, 1.0, F, BF)
    o_d = i_d * BD + tl.arange(0, BD)
    b_y = tl.sum(acc, 1)
    if residual is not None:
        b_y += tl.load(residual + i_t * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(out + i_t * D + o_d, b_y.to(out.dtype.element_ty), mask=o_d < D)


def decode_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, ...] | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """y [T, D]; arguments as `expert_mlp`, contiguous, not empty; F features divide the shared."""
    norm_weight, eps, residual = (None, 0.0, None) if norm is None else (*norm, x)
    (T, D), (E, F2, _), top_k = x.shape, gate_up.shape, index.shape[1]
    F, gate, up, own = F2 // 2, *((None,) * 3 if shared is None else shared)
    S = 0 if gate is None else gate.shape[0] // F
    h = torch.empty(T * (top_k + S), F, dtype=x.dtype, device=x.device)
    out = torch.empty(T, D, dtype=x.dtype, device=x.device)
    meta = {"E": E, "TOP_K": top_k, "SHARED": S, "D": D, "F": F}
    BF, BD = HIDDEN_TILE
    decode_hidden_kernel[(len(h) * triton.cdiv(F, BF),)](
        x, norm_weight, gate_up, gate, up, index, h, eps,
        BF=BF, BD=min(BD, triton.next_power_of_2(D)), num_warps=1, **meta, **overlap(x.device),
    )  # fmt: skip
    BD, BF = SUM_TILE[0], min(SUM_TILE[1], triton.next_power_of_2(F))
    decode_sum_kernel[(T * triton.cdiv(D, BD),)](
        h, down, own, index, weights, residual, out,
        BD=BD, BF=BF, AHEAD=min(top_k, SUM_AHEAD // triton.cdiv(F, BF)), num_warps=2,
        **meta, **overlap(x.device),
    )  # fmt: skip
    return out
