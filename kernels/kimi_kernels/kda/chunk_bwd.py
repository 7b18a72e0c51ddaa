"""Triton backward of chunkwise KDA; README.md derives it. Nothing is kept of the forward pass.

Per segment of chunks, the last one first, `intra` runs again and then

    inter    forward again over the chunks: S before each, and e
    reverse  backward over the chunks: dS after each, and dv_new = A_qk^T do + k_out dS
    values   per chunk: dv, dbeta, the gradients of A_qk and A_kk, the products with S and dS
    wide     per chunk: q, k and the decay from pairs of tokens in different blocks of 8, and from
             those products (chunk_bwd_keys.py)
    pairs    per block of 8: the same from pairs inside of it; the activations
    keys     instead of `wide` and `pairs` on Hopper (keys_gluon.py)

`inter` and `reverse` do not need each other's results. Products take bf16 for bf16 inputs, and
otherwise fp32 as three tf32 products: a gradient may not fit in fp16, and one product truncates.
So do small bf16 inputs: dA_log is a sum that cancels, by more than most over few tokens and heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.kda import keys_gluon
from kimi_kernels.kda.chunk_bwd_keys import PAIR_BLOCK, kda_pairs_kernel, kda_wide_kernel
from kimi_kernels.kda.chunk_fwd import (
    BACKWARD_TOKENS,
    Chunks,
    anchor_masks,
    chunk_kda_fwd,
    inter_config,
)
from kimi_kernels.kda.chunk_kernels import locate_chunk, locate_span
from kimi_kernels.kda.gate_triton import GATE_BOUNDED
from kimi_kernels.sequences import CHUNK, token_rows

EXACT_BELOW = 1 << 14  # tokens x heads
KEY_TILE = 32  # channels of `wide`
PAIR_BLOCKS = CHUNK // PAIR_BLOCK.value


@triton.jit(do_not_specialize=["T", "NT", "c0", "c1"])
def kda_reverse_kernel(
    w, qg, kg, A_qk, decay, beta32, do, dS_all, de, dv_new, dS,
    cu_seqlens, offsets,
    T, NT, c0, c1, s_do: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """de = beta dv_new and, if wanted, dv_new. dS: gradient of S after, then before the segment."""
    BT: tl.constexpr = 64
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // HV, i_nh % HV
    begin, length, first, _, lo, hi = locate_span(i_n, cu_seqlens, offsets, T, NT, c0, c1, VARLEN)
    if lo >= hi:
        return
    r, d = tl.arange(0, BT), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mv, m_s = o_v < V, (d < K)[:, None] & (o_v < V)[None, :]
    p = d[:, None] * V + o_v[None, :]
    p_s = (i_n * HV + i_h).to(tl.int64) * K * V + p
    b_dS = tl.load(dS + p_s, mask=m_s, other=0.0)
    GT: tl.constexpr = dS_all.dtype.element_ty
    pk, pv = r[:, None] * BK + d[None, :], r[:, None] * s_do + o_v[None, :]
    pa = r[:, None] * BT + r[None, :]
    do += begin * s_do + i_h * V
    for i in tl.range(0, hi - lo, num_stages=STAGES):
        c = hi - 1 - i
        at = ((c - c0) * HV + i_h).to(tl.int64)
        t = (c - first) * BT
        m = (t + r < length)[:, None] & mv[None, :]
        b_do = tl.load(do + t.to(tl.int64) * s_do + pv, mask=m, other=0.0).to(GT)
        b_w = tl.load(w + at * BT * BK + pk).to(GT)
        b_k = tl.load(kg + at * BT * BK + pk).to(GT)
        b_q = tl.load(qg + at * BT * BK + pk).to(GT)
        b_A = tl.load(A_qk + at * BT * BT + pa).to(GT)
        b_d, b_b = tl.load(decay + at * BK + d), tl.load(beta32 + at * BT + r)
        tl.store(dS_all + (at * BK * V + p), b_dS.to(GT), mask=mv[None, :])
        x = tl.dot(tl.trans(b_A), b_do, input_precision=PREC)
        x = tl.dot(b_k, b_dS.to(GT), x, input_precision=PREC)
        pe = at * BT * V + (r[:, None] * V + o_v[None, :])
        b_de = (x * b_b[:, None]).to(GT)
        tl.store(de + pe, b_de, mask=mv[None, :])
        if dv_new is not None:
            tl.store(dv_new + pe, x.to(GT), mask=mv[None, :])
        b_dS = tl.dot(tl.trans(b_q), b_do, b_dS * b_d[:, None], input_precision=PREC)
        b_dS = tl.dot(tl.trans(b_w), -b_de, b_dS, input_precision=PREC)
    tl.store(dS + p_s, b_dS, mask=m_s)


@triton.jit
def symmetric_product(xs, ys, PREC: tl.constexpr):
    """Sum of x y^T over pairs of tiles [64, BV]: the lower triangle, and the same above it."""
    BT: tl.constexpr = 64
    low, up = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for n in tl.static_range(len(xs)):
        low = tl.dot(xs[n], tl.trans(ys[n]), low, input_precision=PREC)
        up = tl.dot(ys[n], tl.trans(xs[n]), up, input_precision=PREC)
    r = tl.arange(0, BT)
    return tl.where(r[:, None] >= r[None, :], low, up)


@triton.jit(do_not_specialize=["T", "NT", "c0"])
def kda_values_kernel(
    v, o, do, M, A_kk, beta32, e_all, de, dv_new, S_all, dS_all,
    dv, dbeta, A_grad, P_grad, sums, dqs, dkr, dkw, SdS,
    cu_seqlens, offsets, owner,
    T, NT, c0, s_v: tl.constexpr, s_do: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, KT: tl.constexpr,
    RAW: tl.constexpr, PREC: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One chunk and head. Pair gradients come out symmetric; tiles of V stay in registers."""
    BT: tl.constexpr = 64
    GT: tl.constexpr = S_all.dtype.element_ty
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_h, i_c = pid % HV, pid // HV
    tok, left = locate_chunk(cu_seqlens, offsets, owner, c0 + i_c, T, NT, VARLEN)
    if left <= 0:
        return
    r, o_v = tl.arange(0, BT), tl.arange(0, BV)
    m = r < left
    i, j = r[:, None], r[None, :]
    at = (i_c * HV + i_h).to(tl.int64)
    p = i * BT + j
    b_b = tl.load(beta32 + at * BT + r)
    b_M = tl.load(M + at * BT * BT + p).to(GT)
    q_dq, k_dk = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    db = tl.zeros([BT], tl.float32)
    dos, dvs, vns = (), (), ()
    for x in tl.static_range(NV):
        o_x = x * BV + o_v
        mx = (o_x < V)[None, :]
        pe = at * BT * V + (i * V + o_x[None, :])
        b_e = tl.load(e_all + pe, mask=mx, other=0.0).to(tl.float32)
        b_de = tl.load(de + pe, mask=mx, other=0.0)
        b_dv = tl.dot(tl.trans(b_M), b_de, input_precision=PREC)
        px, mo = i * (HV * V) + o_x[None, :], m[:, None] & mx
        base = tok * (HV * V) + i_h * V
        tl.store(dv + base + px, b_dv.to(dv.dtype.element_ty), mask=mo)
        b_o = tl.load(o + base + px, mask=mo, other=0.0).to(tl.float32)
        b_do = tl.load(do + tok * s_do + i_h * V + (i * s_do + o_x[None, :]), mask=mo, other=0.0)
        b_v = tl.load(v + tok * s_v + i_h * V + (i * s_v + o_x[None, :]), mask=mo, other=0.0)
        dv_e = tl.sum(b_dv * b_e, 1)
        q_dq += tl.sum(b_o * b_do.to(tl.float32), 1)
        k_dk += 2.0 * dv_e - tl.sum(b_v.to(tl.float32) * b_dv, 1)
        b_do, g_dv, b_vn = b_do.to(GT), b_dv.to(GT), (b_e * b_b[:, None]).to(GT)
        if RAW:
            db += dv_e
        else:  # dv = beta (dv_new - A_kk^T dv), and beta may be 0
            P = tl.load(A_kk + at * BT * BT + p).to(GT)
            y = tl.load(dv_new + pe, mask=mx, other=0.0).to(tl.float32)
            y -= tl.dot(tl.trans(P), g_dv, input_precision=PREC)
            db += tl.sum(y * b_e, 1)
        dos, dvs, vns = dos + (b_do,), dvs + (g_dv,), vns + (b_vn,)
    if RAW:
        db = db * (1.0 - b_b)
    tl.store(dbeta + tok * HV + i_h + r * HV, db.to(dbeta.dtype.element_ty), mask=m)
    tl.store(sums + at * 2 * BT + r, q_dq)
    tl.store(sums + at * 2 * BT + BT + r, k_dk)
    tl.store(A_grad + at * BT * BT + p, symmetric_product(dos, vns, PREC).to(GT))
    tl.store(P_grad + at * BT * BT + p, -symmetric_product(dvs, vns, PREC).to(GT))
    for y in tl.static_range(BK // KT):
        d = y * KT + tl.arange(0, KT)
        xq, xr = tl.zeros([BT, KT], tl.float32), tl.zeros([BT, KT], tl.float32)
        xw, xs = tl.zeros([BT, KT], tl.float32), tl.zeros([KT], tl.float32)
        for x in tl.static_range(NV):
            o_x = x * BV + o_v
            pS, mx = at * BK * V + (d[:, None] * V + o_x[None, :]), (o_x < V)[None, :]
            b_S = tl.load(S_all + pS, mask=mx, other=0.0)
            b_dS = tl.load(dS_all + pS, mask=mx, other=0.0)
            xs += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
            xq = tl.dot(dos[x], tl.trans(b_S), xq, input_precision=PREC)
            xr = tl.dot(dvs[x], tl.trans(b_S), xr, input_precision=PREC)
            xw = tl.dot(vns[x], tl.trans(b_dS), xw, input_precision=PREC)
        pk = at * BT * BK + (i * BK + d[None, :])
        tl.store(SdS + at * BK + d, xs)
        tl.store(dqs + pk, xq.to(dqs.dtype.element_ty))
        tl.store(dkr + pk, xr.to(dkr.dtype.element_ty))
        tl.store(dkw + pk, xw.to(dkw.dtype.element_ty))


def chunk_kda_bwd(
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
    o: Tensor,
    borders: Tensor,
    do: Tensor,
    dS: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and the initial state; None for a missing one.

    Arguments as `chunk_kda_fwd`, then what it returned and the gradients of o and of the state.
    """
    args = (q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens)
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    exact = q.dtype != torch.bfloat16 or B * T * HV < EXACT_BELOW
    GT = torch.float32 if exact else torch.bfloat16
    prec = "tf32x3" if exact else "ieee"
    x = Chunks(*args, segment=BACKWARD_TOKENS, backward=True, exact=exact)
    BK = x.sizes["BK"]
    rows, at = [token_rows(t) for t in (v, do)], (x.cu_seqlens, x.offsets, x.owner)
    (v, do), (s_v, s_do) = [t for t, _ in rows], [s for _, s in rows]
    dq, dk, dg = (torch.empty(B, T, HV, K, dtype=t.dtype, device=q.device) for t in (q, k, g))
    dv, dbeta = torch.empty_like(o), torch.empty(B, T, HV, dtype=beta.dtype, device=q.device)
    dS = dS.clone(memory_format=torch.contiguous_format)
    dA, ddt = q.new_zeros(HV, dtype=torch.float32), q.new_zeros(HV, K, dtype=torch.float32)
    gluon = not exact and keys_gluon.takes(q.device, q.dtype, K, x.raw)
    blocks = keys_gluon.BLOCKS if gluon else PAIR_BLOCKS
    sums_T = None if gluon else anchor_masks(q.device, GT, True)
    segments = x.segments()
    if len(borders) < len(segments) - 1:  # the forward pass went token by token
        borders = chunk_kda_fwd(*args, for_backward=True)[2]
    for i, (c0, c1) in reversed(list(enumerate(segments))):
        if c1 == c0:
            continue
        x.intra(c0, c1)
        grid, place = ((c1 - c0) * HV,), (*at, T, x.NT, c0)
        S_all, dS_all = (x.scratch(BK, V, dtype=GT) for _ in range(2))
        e_all, de = (x.scratch(CHUNK, V, dtype=GT) for _ in range(2))
        dv_new = None if x.raw else x.scratch(CHUNK, V, dtype=GT)
        x.inter(c0, c1, border=borders[i - 1] if i else dS, S_all=S_all, e_all=e_all)
        BV, stages = inter_config(BK, GT)  # as many tiles of the same sizes
        kda_reverse_kernel[(triton.cdiv(V, BV) * x.N * HV,)](
            x.w, x.qg, x.kg, x.A_qk, x.decay, x.beta, do, dS_all, de, dv_new, dS,
            x.cu_seqlens, x.offsets, T, x.NT, c0, c1, s_do,
            V=V, **x.sizes, BV=BV, PREC=prec, STAGES=stages, num_warps=4,
        )  # fmt: skip
        A_grad, P_grad = (x.scratch(CHUNK, CHUNK, dtype=GT) for _ in range(2))
        sums, SdS = (x.scratch(*n, dtype=torch.float32) for n in ((2, CHUNK), (BK,)))
        dqs, dkr, dkw = (
            t if t.dtype == GT else torch.empty_like(t, dtype=GT) for t in (x.qg, x.kg, x.w)
        )  # over what `reverse` was the last to read
        BV, KT = values_config(V, BK, GT)
        kda_values_kernel[grid](
            v, o, do, x.M, x.A_kk, x.beta, e_all, de, dv_new, S_all, dS_all,
            dv, dbeta, A_grad, P_grad, sums, dqs, dkr, dkw, SdS, *place, s_v, s_do,
            V=V, **x.sizes, BV=BV, KT=KT, RAW=x.raw, PREC=prec, num_warps=4, num_stages=1,
        )  # fmt: skip
        del S_all, dS_all, e_all, de, dv_new  # the next scratch takes their memory
        inputs = *x.inputs[:3], *x.inputs[4:]  # all but beta
        parts = [x.scratch(blocks, *n, dtype=torch.float32) for n in ((BK,), ())]
        after = (*place, x.scale, x.lower_bound, *x.strides[:3])
        if gluon:
            keys_gluon.kda_keys_gluon[grid](
                *inputs, x.norms, A_grad, P_grad, sums, dqs, dkr, dkw, SdS, x.decay,
                dq, dk, dg, *parts, *after, H=H, HV=HV, K=K,
                BOUNDED=x.gate == GATE_BOUNDED, VARLEN=x.sizes["VARLEN"], num_warps=4,
            )  # fmt: skip
        else:
            keys = {"H": H, **x.sizes, "GATE": x.gate, "RAW": x.raw}
            gq, gk, da = (x.scratch(CHUNK, BK, dtype=GT) for _ in range(3))
            kda_wide_kernel[(grid[0] * BK // KEY_TILE,)](
                *inputs, x.masks, sums_T, x.norms, A_grad, P_grad, dqs, dkr, dkw, SdS, x.decay,
                gq, gk, da, *after,
                **keys, KT=KEY_TILE, DT=tl.float32 if torch.float32 == x.DT else tl.float16,
                PREC=prec, FPREC=x.prec, num_warps=4, num_stages=1,
            )  # fmt: skip
            kda_pairs_kernel[(grid[0] * PAIR_BLOCKS,)](
                *inputs, x.norms, A_grad, P_grad, sums, gq, gk, da, dq, dk, dg, *parts, *after,
                **keys, num_warps=4,
            )  # fmt: skip
        if x.raw:
            ddt += parts[0][: c1 - c0, ..., :K].sum((0, 2))
            dA += parts[1][: c1 - c0].sum((0, 2))
    if HV > H:
        dq, dk = (t.view(B, T, H, HV // H, K).sum(3) for t in (dq, dk))
    dS = None if initial_state is None else dS
    if A_log is None or dt_bias is None:
        return dq, dk, dv, dg, dbeta, None, None, dS
    return dq, dk, dv, dg, dbeta, dA.to(A_log.dtype), ddt.view(-1).to(dt_bias.dtype), dS


def values_config(V: int, BK: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tiles of V and K of `values`: wider ones do not fit in registers."""
    width = 64 if dtype.itemsize == 2 else 32
    return min(width, max(32, triton.next_power_of_2(V))), min(BK, width)
