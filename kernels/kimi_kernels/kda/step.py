"""Triton decode step: all that a KDA layer does with new tokens between its projections.

    activations   convolution, SiLU, l2norm, gate and sigmoid of one sequence and head; conv state
    in place update        the recurrence on S in place, then the gated norm of the head

Two launches, because S is the only large thing: `update` should do nothing but stream it through.
From Hopper on it starts while `activations` runs, loads S, and waits for the rest (overlap.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.kda.recurrent import decay_factor, delta_rule, l2_normalised
from kimi_kernels.overlap import overlap, wait_for_inputs
from kimi_kernels.sequences import token_rows
from kimi_kernels.triton_math import sigmoid


@triton.jit
def load_window(weight, state, s_s, c, m, W: tl.constexpr):
    """Of channels c the W weights, and the W-1 inputs of the convolution before the first token."""
    taps, window = (), ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + c * W + j, mask=m, other=0.0).to(tl.float32),)
    for r in tl.static_range(W - 1):
        window += (tl.load(state + r * s_s + c, mask=m, other=0.0),)
    return taps, window


@triton.jit
def conv_silu(taps, window, b_x):
    """SiLU of the convolution at input b_x, in fp32; the window moves on by one."""
    y, moved = taps[len(window)] * b_x.to(tl.float32), ()
    for j in tl.static_range(len(window)):
        y += taps[j] * window[j].to(tl.float32)
    for j in tl.static_range(1, len(window)):
        moved += (window[j],)
    if len(window) > 0:
        moved += (b_x,)
    return y * sigmoid(y), moved


@triton.jit
def store_window(window, state, s_s, c, m):
    for r in tl.static_range(len(window)):
        tl.store(state + r * s_s + c, window[r], mask=m)


@triton.jit(do_not_specialize=["T"])
def kda_step_activations_kernel(
    xq, xk, xv, weight, conv_state, f, b, A_log, dt_bias, out,
    T, scale, s_q, s_k, s_v, s_f, s_b,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, 3 K + V + 1]: q scaled, k, decay, v, beta."""
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    D: tl.constexpr = H * (2 * K + V)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    m_d, m_e = d < K, e < V
    s_q0 = conv_state + i_n * (W - 1) * D + i_h * K
    s_k0 = s_q0 + H * K
    s_v0 = conv_state + i_n * (W - 1) * D + 2 * H * K + i_h * V
    w_q, w_k = weight + i_h * K * W, weight + (H * K + i_h * K) * W
    taps_q, q = load_window(w_q, s_q0, D, d, m_d, W)
    taps_k, k = load_window(w_k, s_k0, D, d, m_d, W)
    taps_v, v = load_window(weight + (2 * H * K + i_h * V) * W, s_v0, D, e, m_e, W)
    wait_for_inputs(OVERLAP)
    for t in range(0, T):
        tok = i_n * T + t
        b_f = tl.load(f + tok * s_f + i_h * K + d, mask=m_d, other=0.0).to(tl.float32)
        b_b = sigmoid(tl.load(b + tok * s_b + i_h).to(tl.float32))
        b_q, q = conv_silu(taps_q, q, tl.load(xq + tok * s_q + i_h * K + d, mask=m_d, other=0.0))
        b_k, k = conv_silu(taps_k, k, tl.load(xk + tok * s_k + i_h * K + d, mask=m_d, other=0.0))
        b_v, v = conv_silu(taps_v, v, tl.load(xv + tok * s_v + i_h * V + e, mask=m_e, other=0.0))
        p = out + (tok * H + i_h) * (3 * K + V + 1)
        tl.store(p + 2 * K + d, decay_factor(b_f, A_log, dt_bias, 0.0, i_h, d, K, 1), mask=m_d)
        tl.store(p + 3 * K + e, b_v, mask=m_e)
        tl.store(p + 3 * K + V, b_b)
        tl.store(p + d, l2_normalised(b_q) * scale, mask=m_d)
        tl.store(p + K + d, l2_normalised(b_k), mask=m_d)
    store_window(q, s_q0, D, d, m_d)
    store_window(k, s_k0, D, d, m_d)
    store_window(v, s_v0, D, e, m_e)


@triton.jit(do_not_specialize=["T"])
def kda_step_update_kernel(
    x, S, gate, norm, o,
    T, eps, s_g,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    m_d, m_e = d < K, e < V
    p_s = S + (i_n * H + i_h) * K * V + (d[:, None] * V + e[None, :])
    m_s = m_d[:, None] & m_e[None, :]
    b_S = tl.load(p_s, mask=m_s, other=0.0)
    b_w = tl.load(norm + e, mask=m_e, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP, EARLY=True)
    for t in range(0, T):
        tok = i_n * T + t
        p = x + (tok * H + i_h) * (3 * K + V + 1)
        b_q = tl.load(p + d, mask=m_d, other=0.0)
        b_k = tl.load(p + K + d, mask=m_d, other=0.0)
        decay = tl.load(p + 2 * K + d, mask=m_d, other=0.0)
        b_v = tl.load(p + 3 * K + e, mask=m_e, other=0.0)
        beta = tl.load(p + 3 * K + V)
        b_g = tl.load(gate + tok * s_g + i_h * V + e, mask=m_e, other=0.0).to(tl.float32)
        b_S, b_o = delta_rule(b_S, b_q, b_k, b_v, decay, beta)
        r = tl.rsqrt(tl.sum(b_o * b_o, 0) / V + eps)
        b_o = b_o * r * b_w * tl.sigmoid(b_g)
        tl.store(o + (tok * H + i_h) * V + e, b_o.to(o.dtype.element_ty), mask=m_e)
    tl.store(p_s, b_S, mask=m_s)


def kda_step_fwd(
    xs: Sequence[Tensor],
    weight: Tensor,
    conv_state: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor,
    norm: Tensor,
    eps: float,
) -> Tensor:
    """o [B, T, H, V], normalised and gated; `conv_state` and `state` are advanced in place."""
    B, T, H, K = f.shape
    V, W = gate.shape[-1], weight.shape[1]
    rows = [token_rows(x) for x in (*xs, f, b, gate)]
    (xq, xk, xv, f, b, gate), strides = [x for x, _ in rows], [s for _, s in rows]
    x = torch.empty(B, T, H, 3 * K + V + 1, dtype=torch.float32, device=f.device)
    o = torch.empty(B, T, H, V, dtype=gate.dtype, device=f.device)
    meta = {"H": H, "K": K, "V": V}
    meta |= {"BK": triton.next_power_of_2(K), "BV": triton.next_power_of_2(V)}
    kda_step_activations_kernel[(B * H,)](
        xq, xk, xv, weight.contiguous(), conv_state, f, b,
        A_log.contiguous(), dt_bias.contiguous(), x,
        T, K**-0.5, *strides[:5], W=W, num_warps=4, **meta, **overlap(f.device),
    )  # fmt: skip
    # 4 warps: 44 us at batch 32 on an H200, 8 take 61, 16 take 79
    kda_step_update_kernel[(B * H,)](
        x, state, gate, norm.contiguous(), o, T, eps, strides[5],
        num_warps=4, **meta, **overlap(f.device, always=True),
    )  # fmt: skip
    return o
