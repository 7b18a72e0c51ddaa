"""Triton decode step: all that a KDA layer does with new tokens between its projections.

One program per sequence and head: convolution, SiLU, l2norm, gate and sigmoid, the recurrence on S
in place, the gated norm. S, its only large thing, is read first, and stored as soon as it is known.

From Hopper on a program begins while the kernel before it runs (overlap.py). Of a KDA layer that is
the product which ends in `f` and `gate`; all else is there, so that before it waits the program has
S and the q, k, v and beta of its first token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.kda.gate_triton import GATE_SOFTPLUS, gate_parameters, log2_gate
from kimi_kernels.kda.recurrent import delta_rule, l2_normalised
from kimi_kernels.overlap import overlap, wait_for_inputs
from kimi_kernels.sequences import token_rows
from kimi_kernels.triton_math import ex2, sigmoid


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


@triton.jit
def read_token(
    xq, xk, xv, b, tok, i_h, d, e, taps_q, taps_k, taps_v, q, k, v,
    scale, s_q, s_k, s_v, s_b, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """q scaled, k, v and beta of a token and head, and the windows q, k, v moved on to it."""
    m_d, m_e = d < K, e < V
    b_q, q = conv_silu(taps_q, q, tl.load(xq + tok * s_q + i_h * K + d, mask=m_d, other=0.0))
    b_k, k = conv_silu(taps_k, k, tl.load(xk + tok * s_k + i_h * K + d, mask=m_d, other=0.0))
    b_v, v = conv_silu(taps_v, v, tl.load(xv + tok * s_v + i_h * V + e, mask=m_e, other=0.0))
    beta = sigmoid(tl.load(b + tok * s_b + i_h).to(tl.float32))
    return l2_normalised(b_q) * scale, l2_normalised(b_k), b_v, beta, q, k, v


@triton.jit(do_not_specialize=["T"])
def kda_step_kernel(
    xq, xk, xv, weight, conv_state, f, b, A_log, dt_bias, S, gate, norm, o,
    T, scale, eps, s_q, s_k, s_v, s_f, s_b, s_g,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    D: tl.constexpr = H * (2 * K + V)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    m_d, m_e = d < K, e < V
    p_s = S + (i_n * H + i_h) * K * V + (d[:, None] * V + e[None, :])
    m_s = m_d[:, None] & m_e[None, :]
    b_S = tl.load(p_s, mask=m_s, other=0.0)
    s_q0 = conv_state + i_n * (W - 1) * D + i_h * K
    s_k0 = s_q0 + H * K
    s_v0 = conv_state + i_n * (W - 1) * D + 2 * H * K + i_h * V
    w_q, w_k = weight + i_h * K * W, weight + (H * K + i_h * K) * W
    taps_q, q = load_window(w_q, s_q0, D, d, m_d, W)
    taps_k, k = load_window(w_k, s_k0, D, d, m_d, W)
    taps_v, v = load_window(weight + (2 * H * K + i_h * V) * W, s_v0, D, e, m_e, W)
    b_w = tl.load(norm + e, mask=m_e, other=0.0).to(tl.float32)
    A, bias = gate_parameters(A_log, dt_bias, i_h, K, d, GATE)
    tok = i_n * T
    b_q, b_k, b_v, beta, q, k, v = read_token(
        xq, xk, xv, b, tok, i_h, d, e, taps_q, taps_k, taps_v, q, k, v,
        scale, s_q, s_k, s_v, s_b, K, V,
    )  # fmt: skip
    wait_for_inputs(OVERLAP, EARLY=True)
    for t in range(0, T):
        b_f = tl.load(f + tok * s_f + i_h * K + d, mask=m_d, other=0.0).to(tl.float32)
        b_g = tl.load(gate + tok * s_g + i_h * V + e, mask=m_e, other=0.0).to(tl.float32)
        decay = ex2(log2_gate(b_f + bias, A, 0.0, GATE))
        b_S, b_o = delta_rule(b_S, b_q, b_k, b_v, decay, beta)
        if t + 1 == T:
            tl.store(p_s, b_S, mask=m_s)
        r = tl.rsqrt(tl.sum(b_o * b_o, 0) / V + eps)
        b_o = b_o * r * b_w * tl.sigmoid(b_g)
        tl.store(o + (tok * H + i_h) * V + e, b_o.to(o.dtype.element_ty), mask=m_e)
        tok += 1
        if t + 1 < T:
            b_q, b_k, b_v, beta, q, k, v = read_token(
                xq, xk, xv, b, tok, i_h, d, e, taps_q, taps_k, taps_v, q, k, v,
                scale, s_q, s_k, s_v, s_b, K, V,
            )  # fmt: skip
    store_window(q, s_q0, D, d, m_d)
    store_window(k, s_k0, D, d, m_d)
    store_window(v, s_v0, D, e, m_e)


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
    o = torch.empty(B, T, H, V, dtype=gate.dtype, device=f.device)
    if o.numel():
        kda_step_kernel[(B * H,)](
            xq, xk, xv, weight.contiguous(), conv_state, f, b,
            A_log.contiguous(), dt_bias.contiguous(), state, gate, norm.contiguous(), o,
            T, K**-0.5, eps, *strides, H=H, K=K, V=V, BK=triton.next_power_of_2(K),
            BV=triton.next_power_of_2(V), W=W, GATE=GATE_SOFTPLUS, num_warps=4, **overlap(f.device),
        )  # fmt: skip
    return o
