"""Triton KDA token by token, with S in registers.

    recurrent   any number of tokens, packed or not; one program per sequence, head and tile of V
    step        what a KDA layer does with 1-8 new tokens between its projections, in one launch:
                convolution, SiLU, l2norm, gate, sigmoid, recurrence, gated norm; states in place
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.kda.chunk_fwd import gate_mode
from kimi_kernels.sequences import sequence, token_rows
from kimi_kernels.triton_math import RCP_LN2, ex2, softplus2


@triton.jit
def decay_factor(x, A_log, dt_bias, lower_bound, i_h, d, K: tl.constexpr, GATE: tl.constexpr):
    """exp of the log-decay of one token and head; x [BK] is the log-decay or the raw gate."""
    if GATE == 0:
        a = x * RCP_LN2
    else:
        A = tl.exp(tl.load(A_log + i_h).to(tl.float32))
        x += tl.load(dt_bias + i_h * K + d, mask=d < K, other=0.0).to(tl.float32)
        if GATE == 1:
            a = -A * softplus2(x)
        else:
            a = lower_bound * RCP_LN2 * tl.sigmoid(A * x)
    return ex2(a)


@triton.jit
def l2_normalised(x):
    """x / sqrt(sum x^2 + 1e-6), x [BK] fp32."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def delta_rule(S, q, k, v, decay, beta):
    """One token: S [BK, BV] -> new S and o [BV]."""
    S = S * decay[:, None]
    e = v - tl.sum(S * k[:, None], 0)
    S += (beta * k)[:, None] * e[None, :]
    return S, tl.sum(S * q[:, None], 0)


@triton.jit(do_not_specialize=["T"])
def kda_recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, o, S_in, S_out, cu_seqlens,
    T, scale, lower_bound, s_q, s_k, s_v, s_g, s_b,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, RAW: tl.constexpr,
    VARLEN: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    i_v, i_n, i_h = tl.program_id(0), tl.program_id(1) // HV, tl.program_id(1) % HV
    if VARLEN:
        begin, length = sequence(cu_seqlens, i_n, T)
    else:
        begin, length = i_n.to(tl.int64) * T, T
    d, e = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_d, m_e = d < K, e < V
    p_s = (i_n * HV + i_h).to(tl.int64) * K * V + d[:, None] * V + e[None, :]
    m_s = m_d[:, None] & m_e[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_S:
        S += tl.load(S_in + p_s, mask=m_s, other=0.0)
    i_hq = i_h // (HV // H)
    for t in range(0, length):
        tok = begin + t
        b_q = tl.load(q + tok * s_q + i_hq * K + d, mask=m_d, other=0.0).to(tl.float32)
        b_k = tl.load(k + tok * s_k + i_hq * K + d, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(v + tok * s_v + i_h * V + e, mask=m_e, other=0.0).to(tl.float32)
        b_g = tl.load(g + tok * s_g + i_h * K + d, mask=m_d, other=0.0).to(tl.float32)
        b_b = tl.load(beta + tok * s_b + i_h).to(tl.float32)
        if RAW:
            b_q, b_k, b_b = l2_normalised(b_q), l2_normalised(b_k), tl.sigmoid(b_b)
        decay = decay_factor(b_g, A_log, dt_bias, lower_bound, i_h, d, K, GATE)
        S, b_o = delta_rule(S, b_q * scale, b_k, b_v, decay, b_b)
        tl.store(o + (tok * HV + i_h) * V + e, b_o.to(o.dtype.element_ty), mask=m_e)
    tl.store(S_out + p_s, S, mask=m_s)


def recurrent_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `chunk_kda_fwd`, token by token."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    rows = [token_rows(x) for x in (q, k, v, g, beta)]
    (q, k, v, g, beta), strides = [x for x, _ in rows], [s for _, s in rows]
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=q.device)
    S = torch.empty(N, HV, K, V, dtype=torch.float32, device=q.device)
    BK, BV = triton.next_power_of_2(K), min(triton.next_power_of_2(V), 32)
    kda_recurrent_kernel[(triton.cdiv(V, BV), N * HV)](
        q, k, v, g, beta, A_log, dt_bias, o,
        None if initial_state is None else initial_state.contiguous(), S, cu_seqlens,
        T, scale, 0.0 if lower_bound is None else lower_bound, *strides,
        H=H, HV=HV, K=K, V=V, BK=BK, BV=BV, GATE=gate_mode(A_log, lower_bound),
        RAW=A_log is not None, VARLEN=cu_seqlens is not None, HAS_S=initial_state is not None,
        num_warps=4,
    )  # fmt: skip
    return o, S


@triton.jit
def window(x, state, t: tl.constexpr, s_x, s_s, c, m, W: tl.constexpr, BW: tl.constexpr):
    """The W inputs that new token t sees, [channels, BW], oldest first; x and state: this row's."""
    j = tl.arange(0, BW)
    i = t - (W - 1) + j  # source token; before 0 it lies in the state
    new = m[:, None] & ((i >= 0) & (j < W))[None, :]
    b_x = tl.load(x + i[None, :] * s_x + c[:, None], mask=new, other=0.0)
    if t < W - 1:
        old = m[:, None] & (i < 0)[None, :]
        b_x += tl.load(state + (i + W - 1)[None, :] * s_s + c[:, None], mask=old, other=0.0)
    return b_x


@triton.jit
def taps(weight, c, m, W: tl.constexpr, BW: tl.constexpr):
    """Convolution weights of the channels, [channels, BW] fp32."""
    j = tl.arange(0, BW)
    mask = m[:, None] & (j < W)[None, :]
    return tl.load(weight + c[:, None] * W + j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def conv_silu(x, w):
    """SiLU of the convolution at one token, [channels] fp32."""
    y = tl.sum(x.to(tl.float32) * w, 1)
    return y * tl.sigmoid(y)


@triton.jit
def store_state(x, state, s_s, c, m, W: tl.constexpr, BW: tl.constexpr):
    """Keep all but the oldest input of the last window."""
    j = tl.arange(0, BW)
    mask = m[:, None] & ((j > 0) & (j < W))[None, :]
    tl.store(state + (j - 1)[None, :] * s_s + c[:, None], x.to(state.dtype.element_ty), mask=mask)


@triton.jit
def kda_step_kernel(
    xq, xk, xv, weight, conv_state, f, b, A_log, dt_bias, S, gate, norm, o,
    scale, eps, s_q, s_k, s_v, s_f, s_b, s_g,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    D: tl.constexpr = H * (2 * K + V)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    m_d, m_e = d < K, e < V
    p_s = S + (i_n * H + i_h) * K * V + (d[:, None] * V + e[None, :])
    m_s = m_d[:, None] & m_e[None, :]
    b_S = tl.load(p_s, mask=m_s, other=0.0)
    # every load of a token is issued before the first use of one: their latencies overlap
    state = conv_state + i_n * (W - 1) * D
    c_q, c_k, c_v = i_h * K + d, H * K + i_h * K + d, 2 * H * K + i_h * V + e
    w_q, w_k = taps(weight, c_q, m_d, W, BW), taps(weight, c_k, m_d, W, BW)
    w_v = taps(weight, c_v, m_e, W, BW)
    xq, xk = xq + i_n * T * s_q, xk + i_n * T * s_k - H * K
    xv = xv + i_n * T * s_v - 2 * H * K
    A = tl.load(A_log + i_h)
    b_dt = tl.load(dt_bias + i_h * K + d, mask=m_d, other=0.0)
    b_w = tl.load(norm + e, mask=m_e, other=0.0).to(tl.float32)
    for t in tl.static_range(T):
        x_q = window(xq, state, t, s_q, D, c_q, m_d, W, BW)
        x_k = window(xk, state, t, s_k, D, c_k, m_d, W, BW)
        x_v = window(xv, state, t, s_v, D, c_v, m_e, W, BW)
        tok = i_n * T + t
        b_f = tl.load(f + tok * s_f + i_h * K + d, mask=m_d, other=0.0)
        b_b = tl.load(b + tok * s_b + i_h)
        b_g = tl.load(gate + tok * s_g + i_h * V + e, mask=m_e, other=0.0)
        b_q = l2_normalised(conv_silu(x_q, w_q)) * scale
        b_k, b_v = l2_normalised(conv_silu(x_k, w_k)), conv_silu(x_v, w_v)
        decay = ex2(-tl.exp(A.to(tl.float32)) * softplus2(b_f.to(tl.float32) + b_dt.to(tl.float32)))
        b_S, b_o = delta_rule(b_S, b_q, b_k, b_v, decay, tl.sigmoid(b_b.to(tl.float32)))
        r = tl.rsqrt(tl.sum(b_o * b_o, 0) / V + eps)
        b_o = b_o * r * b_w * tl.sigmoid(b_g.to(tl.float32))
        tl.store(o + (tok * H + i_h) * V + e, b_o.to(o.dtype.element_ty), mask=m_e)
    tl.store(p_s, b_S, mask=m_s)
    tl.debug_barrier()  # every thread has read the conv state before any overwrites it
    store_state(x_q, state, D, c_q, m_d, W, BW)
    store_state(x_k, state, D, c_k, m_d, W, BW)
    store_state(x_v, state, D, c_v, m_e, W, BW)


def kda_step_fwd(
    xs: tuple[Tensor, Tensor, Tensor],
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
    """o [B, T, H, V] normalised and gated; `conv_state` and `state` are advanced in place."""
    B, T, H, K = f.shape
    V = gate.shape[-1]
    rows = [token_rows(x) for x in (*xs, f, b, gate)]
    (xq, xk, xv, f, b, gate), strides = [x for x, _ in rows], [s for _, s in rows]
    o = torch.empty(B, T, H, V, dtype=gate.dtype, device=f.device)
    kda_step_kernel[(B * H,)](
        xq, xk, xv, weight.contiguous(), conv_state, f, b, A_log, dt_bias, state, gate, norm, o,
        K**-0.5, eps, *strides,
        T=T, H=H, K=K, V=V, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V),
        W=weight.shape[1], BW=triton.next_power_of_2(weight.shape[1]), num_warps=8,
    )  # fmt: skip
    return o
