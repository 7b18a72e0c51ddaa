"""The kernels of the chunk form's forward pass; README.md derives them.

    intra   one program per chunk and value head: activations, A_qk, M = (I + A_kk diag(beta))^-1,
            w = M k exp(G), q exp(G) and k exp(G_last - G), everything that depends neither on the
            state nor on v
    inter   sequential over the chunks of a sequence, one program per sequence, head and tile of V:
            e = M v - w S,  v_new = diag(beta) e,  o = (q exp G) S + A_qk v_new,
            S <- exp(G_last) S + k_out^T v_new

Decays are in log2 and sums of them are products with 0/1 matrices, so nothing cancels and every
exponent is <= 0. 16-bit inputs are multiplied as fp16 inside `intra`, where l2-normalised q and k
bound everything by 1; fp32 inputs as three tf32 products.
"""

import triton
import triton.language as tl

from kimi_kernels.kda.gate_triton import log2_decay
from kimi_kernels.sequences import sequence
from kimi_kernels.triton_math import ex2


@triton.jit
def load_rows(p, stride, r, d, m, D: tl.constexpr, BD: tl.constexpr):
    """Rows r of [*, D] as [BT, BD], zeros where not `m` and past D. p: the first element."""
    if D == BD:
        return tl.load(p + (r[:, None] * stride + d[None, :]), mask=m[:, None], other=0.0)
    mask = m[:, None] & (d < D)[None, :]
    return tl.load(p + (r[:, None] * stride + d[None, :]), mask=mask, other=0.0)


@triton.jit
def locate_chunk(cu_seqlens, offsets, owner, c, T, NT, VARLEN: tl.constexpr):
    """Chunk c: its first token (int64), and the tokens of its sequence from there, <= 0 if none."""
    if VARLEN:
        i_n = tl.load(owner + c)
        first = tl.load(offsets + tl.maximum(i_n, 0))
        begin, length = sequence(cu_seqlens, tl.maximum(i_n, 0), T)
        t0 = (c - first) * 64
        left = tl.where(i_n < 0, 0, length - t0)
    else:
        begin = (c // NT).to(tl.int64) * T
        t0 = c % NT * 64
        left = T - t0
    return begin + t0, left


@triton.jit
def tree_level(q, k, a, M, PREC: tl.constexpr):
    """q k^T and k k^T of one level, rows and columns decayed to the anchor, unmasked."""
    E = ex2(tl.dot(M, a, input_precision=PREC)).to(k.dtype)
    kE = k * E
    if len(k.shape) == 3:
        kT = tl.trans(kE, 0, 2, 1)
    else:
        kT = tl.trans(kE)
    return tl.dot(q * E, kT, input_precision=PREC), tl.dot(kE, kT, input_precision=PREC)


@triton.jit
def extend_inverse(Ti, A, PREC: tl.constexpr):
    """Inverse of I + (levels so far) -> inverse with the level A added: T - T A T."""
    P = tl.dot(Ti, A.to(Ti.dtype), input_precision=PREC).to(Ti.dtype)
    return Ti - tl.dot(P, Ti, input_precision=PREC).to(Ti.dtype)


@triton.jit
def level_pairs(i, j, level):
    """Row i lies in an odd block of 2^level rows, column j in the even block before it."""
    return tl.where(((i >> level) & 1) == 1, (i >> level) - 1, -1) == (j >> level)


@triton.jit
def wide_level(
    level, masks, q, k, a, row, col, A_qk, A_kk, Ti,
    RAW: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One level on the whole tile: A_qk, the inverse and, if kept, A_kk with its pairs added."""
    BT: tl.constexpr = 64
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    between = tl.load(masks + level * BT * BT + i * BT + j)
    aq, ak = tree_level(q, k, a, between, PREC)
    pair = level_pairs(i, j, level)
    if not RAW:
        ak = ak * row[:, None]
    if KEEP:
        A_kk = tl.where(pair, ak, A_kk)
    Ti = extend_inverse(Ti, tl.where(pair, ak * col[None, :], 0.0), PREC)
    return tl.where(pair, aq, A_qk), A_kk, Ti


@triton.jit(do_not_specialize=["T", "NT", "c0"])
def kda_intra_kernel(
    q, k, g, beta, A_log, dt_bias, masks,
    qg, kg, w, M, A_qk, decay, beta32, norms, A_kk,
    cu_seqlens, offsets, owner,
    T, NT, c0, scale, lower_bound,
    s_q: tl.constexpr, s_k: tl.constexpr, s_g: tl.constexpr, s_b: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, RAW: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = 64
    ST: tl.constexpr = A_qk.dtype.element_ty
    pid = tl.program_id(0)
    i_h, i_c = pid % HV, pid // HV
    tok, left = locate_chunk(cu_seqlens, offsets, owner, c0 + i_c, T, NT, VARLEN)
    if left <= 0:
        return
    r, d = tl.arange(0, BT), tl.arange(0, BK)
    m = r < left
    i_hq = i_h // (HV // H)

    # activations; `sk` and `sq` carry the norms of q and k where they are not normalised for good
    b_beta = tl.load(beta + tok * s_b + i_h + r * s_b, mask=m, other=0.0).to(tl.float32)
    x = load_rows(g + tok * s_g + i_h * K, s_g, r, d, m, K, BK)  # all loads before the first use
    b_k = load_rows(k + tok * s_k + i_hq * K, s_k, r, d, m, K, BK)
    b_q = load_rows(q + tok * s_q + i_hq * K, s_q, r, d, m, K, BK)
    a = log2_decay(x.to(tl.float32), m, A_log, dt_bias, lower_bound, i_h, K, d, GATE)
    a_sum = tl.sum(a, 0)
    a = a.to(DT)  # in fp16 the error of 2^D is at most |D| 2^-12 2^D <= 1e-4
    b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32)
    rk = tl.rsqrt(tl.sum(b_k * b_k, 1) + 1e-6)
    rq = tl.rsqrt(tl.sum(b_q * b_q, 1) + 1e-6)
    if RAW:
        b_beta = tl.where(m, tl.sigmoid(b_beta), 0.0)
        rq = rq * scale
    diag = tl.sum(b_q * b_k, 1) * (rk * rq)  # the diagonal of A_qk has no gate
    kn, qn = (b_k * rk[:, None]).to(DT), (b_q * rq[:, None]).to(DT)  # [BT, BK]
    sk, sq = b_beta, b_beta  # unused where RAW
    col = b_beta  # factor of column j of A
    if not RAW:
        sk, sq = 1.0 / rk, scale / rq
        col = b_beta * sk

    i, j = r[:, None], r[None, :]
    KEEP: tl.constexpr = A_kk is not None
    akk = 0.0
    if KEEP:
        akk = tl.zeros([BT, BT], tl.float32)
    if tl.float32 == DT:
        aqk = tl.where(i == j, diag[:, None], 0.0)
        Ti = tl.where(i == j, 1.0, tl.zeros([BT, BT], tl.float32))
        for level in range(6):
            aqk, akk, Ti = wide_level(
                level, masks, qn, kn, a, sk, col, aqk, akk, Ti, RAW, KEEP, PREC
            )
    else:  # levels 1, 2, 4, 8 inside the four diagonal 16 x 16 blocks, one warp each
        r16 = tl.arange(0, 16)
        i3, j3 = r16[None, :, None], r16[None, None, :]
        zero3 = tl.zeros([4, 16, 16], tl.float32)
        q3, k3, a3 = (
            tl.reshape(qn, [4, 16, BK]), tl.reshape(kn, [4, 16, BK]), tl.reshape(a, [4, 16, BK])
        )  # fmt: skip
        row3 = tl.reshape(sk, [4, 16])[:, :, None]
        col3 = tl.reshape(col, [4, 16])[:, None, :]
        aqk3 = tl.where(i3 == j3, tl.reshape(diag, [4, 16])[:, :, None], zero3)
        T3 = tl.where(i3 == j3, 1.0, zero3).to(DT)
        akk3 = 0.0
        if KEEP:
            akk3 = zero3
        for level in tl.range(4, num_stages=1):
            anchor = ((i3 >> (level + 1)) << (level + 1)) + (1 << level)
            between = (j3 > tl.minimum(i3, anchor)) & (j3 <= tl.maximum(i3, anchor))
            M3 = tl.where(between, 1.0, 0.0).to(DT) + tl.zeros([4, 16, 16], DT)
            aq, ak = tree_level(q3, k3, a3, M3, PREC)
            pair = level_pairs(i3, j3, level)
            aqk3 = tl.where(pair, aq, aqk3)
            if not RAW:
                ak = ak * row3
            if KEEP:
                akk3 = tl.where(pair, ak, akk3)
            T3 = extend_inverse(T3, tl.where(pair, ak * col3, 0.0), PREC)
        block = tl.arange(0, 4)
        same = block[:, None, None, None] == block[None, None, :, None]
        aqk = tl.reshape(tl.where(same, tl.expand_dims(aqk3, 2), 0.0), [BT, BT])
        Ti = tl.reshape(tl.where(same, tl.expand_dims(T3, 2), 0.0), [BT, BT])
        if KEEP:
            akk = tl.reshape(tl.where(same, tl.expand_dims(akk3, 2), 0.0), [BT, BT])
        for level in tl.static_range(4, 6):
            aqk, akk, Ti = wide_level(
                level, masks, qn, kn, a, sk, col, aqk, akk, Ti, RAW, KEEP, PREC
            )
    if not RAW:
        aqk = aqk * (sq[:, None] * sk[None, :])

    out = (i_c * HV + i_h).to(tl.int64)
    tl.store(decay + out * BK + d, ex2(a_sum))
    tl.store(A_qk + out * BT * BT + (i * BT + j), aqk.to(ST))
    p = r[:, None] * BK + d[None, :]
    qg, kg, w = qg + out * BT * BK, kg + out * BT * BK, w + out * BT * BK
    before = tl.load(masks + 6 * BT * BT + i * BT + j)
    E = ex2(tl.dot(before, a, input_precision=PREC))  # exp(G)
    b_qg, b_kb = qn * E.to(DT), kn * E.to(DT)
    if not RAW:
        b_kb = b_kb * sk.to(DT)[:, None]
    after = tl.load(masks + 7 * BT * BT + i * BT + j)
    b_kg = kn * ex2(tl.dot(after, a, input_precision=PREC)).to(DT)  # times exp(G_last - G)
    if RAW:
        tl.store(qg + p, b_qg.to(ST))
        tl.store(kg + p, b_kg.to(ST))
    else:
        tl.store(qg + p, (b_qg.to(tl.float32) * sq[:, None]).to(ST))
        tl.store(kg + p, (b_kg.to(tl.float32) * sk[:, None]).to(ST))
    tl.store(w + p, tl.dot(Ti, b_kb, input_precision=PREC).to(ST))
    tl.store(M + out * BT * BT + (i * BT + j), Ti.to(ST))
    tl.store(beta32 + out * BT + r, b_beta)
    if norms is not None:
        tl.store(norms + out * 2 * BT + r, rq)
        tl.store(norms + out * 2 * BT + BT + r, rk)
    if KEEP:
        tl.store(A_kk + out * BT * BT + (i * BT + j), akk * sk[None, :])


@triton.jit
def locate_span(i_n, cu_seqlens, offsets, T, NT, c0, c1, VARLEN: tl.constexpr):
    """Sequence i_n: its first token (int64), length and chunks, and those in the segment c0..c1."""
    if VARLEN:
        first, last = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
        begin, length = sequence(cu_seqlens, i_n, T)
    else:
        first, last = i_n * NT, i_n * NT + NT
        begin = i_n.to(tl.int64) * T
        length = T
    return begin, length, first, last, tl.maximum(first, c0), tl.minimum(last, c1)


@triton.jit(do_not_specialize=["T", "NT", "c0", "c1"])
def kda_inter_kernel(
    v, w, M, qg, kg, A_qk, decay, beta32, o, S_in, S_out, border, S_all, e_all,
    cu_seqlens, offsets,
    T, NT, c0, c1, s_v: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    """o and S_out, and `border`, the S after chunk c1 of the sequence that crosses it.

    For the backward pass, S before every chunk and e; `border` is then what lies before c0.
    Without v, V is K and S_out what the span makes of the identity: S_out(S) = that S + S_out(0).
    """
    BT: tl.constexpr = 64
    NV: tl.constexpr = (V + BV - 1) // BV  # one grid axis: the others end at 65535
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // HV, i_nh % HV
    begin, length, first, last, lo, hi = locate_span(
        i_n, cu_seqlens, offsets, T, NT, c0, c1, VARLEN
    )
    if (lo >= hi) & ((first < last) | (c0 > 0)):
        return  # nothing of this sequence lies in the segment; empty ones pass S on in the first
    r, d = tl.arange(0, BT), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mv, m_s = o_v < V, (d < K)[:, None] & (o_v < V)[None, :]
    p = d[:, None] * V + o_v[None, :]
    p_h, p_s = i_h.to(tl.int64) * K * V + p, (i_n * HV + i_h).to(tl.int64) * K * V + p
    S = tl.zeros([BK, BV], tl.float32)
    if v is None:
        S += tl.where(d[:, None] == o_v[None, :], 1.0, 0.0)
    elif lo > first:
        if S_out is None:
            S += tl.load(border + p_h, mask=m_s, other=0.0)
        else:
            S += tl.load(S_out + p_s, mask=m_s, other=0.0)
    elif HAS_S:
        S += tl.load(S_in + p_s, mask=m_s, other=0.0)
    ST: tl.constexpr = w.dtype.element_ty
    pk, pv = r[:, None] * BK + d[None, :], r[:, None] * s_v + o_v[None, :]
    pa = r[:, None] * BT + r[None, :]
    if v is not None:
        v += begin * s_v + i_h * V
    for c in tl.range(lo, hi, num_stages=STAGES):
        at = ((c - c0) * HV + i_h).to(tl.int64)
        b_w, b_k = tl.load(w + at * BT * BK + pk), tl.load(kg + at * BT * BK + pk)
        t = (c - first) * BT
        m = (t + r < length)[:, None] & mv[None, :]
        b_d, b_b = tl.load(decay + at * BK + d), tl.load(beta32 + at * BT + r)
        b_S = S.to(ST)
        if v is None:
            e = -tl.dot(b_w, b_S, input_precision=PREC)
        else:
            b_M = tl.load(M + at * BT * BT + pa)
            b_v = tl.load(v + t.to(tl.int64) * s_v + pv, mask=m, other=0.0).to(ST)
            e = tl.dot(b_M, b_v, input_precision=PREC) - tl.dot(b_w, b_S, input_precision=PREC)
        v_new = (e * b_b[:, None]).to(ST)
        if S_all is not None:
            tl.store(S_all + (at * BK * V + p), S.to(S_all.dtype.element_ty), mask=mv[None, :])
            pe = at * BT * V + (r[:, None] * V + o_v[None, :])
            tl.store(e_all + pe, e.to(e_all.dtype.element_ty), mask=mv[None, :])
        if o is not None:
            b_q = tl.load(qg + at * BT * BK + pk)
            b_A = tl.load(A_qk + at * BT * BT + pa)
            b_o = tl.dot(b_q, b_S, input_precision=PREC)
            b_o = tl.dot(b_A, v_new, b_o, input_precision=PREC)
            p_o = (begin + t) * (HV * V) + i_h * V + (r[:, None] * (HV * V) + o_v[None, :])
            tl.store(o + p_o, b_o.to(o.dtype.element_ty), mask=m)
        S = tl.dot(tl.trans(b_k), v_new, S * b_d[:, None], input_precision=PREC)
    if S_out is not None:
        tl.store(S_out + p_s, S, mask=m_s)
        if border is not None:
            if (lo < hi) & (hi == c1) & (hi < last):
                tl.store(border + p_h, S, mask=m_s)
