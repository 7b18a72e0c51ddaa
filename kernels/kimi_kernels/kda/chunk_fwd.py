"""Triton forward of chunkwise KDA in two kernels; README.md derives them.

    intra   one program per chunk and value head: activations, A_qk, M = (I + A)^-1 diag(beta), w =
            M k exp(G), q exp(G) and k exp(G_last - G), everything that depends neither on the state
            nor on v
    inter   sequential over the chunks of a sequence, one program per sequence, head and tile of V:
            v_new = M v - w S,  o = (q exp G) S + A_qk v_new,  S <- exp(G_last) S + k_out^T v_new

Decays are in log2 and sums of them are products with 0/1 matrices, so nothing cancels and every
exponent is <= 0. 16-bit inputs are multiplied as fp16 inside `intra`, where l2-normalised q and k
bound everything by 1; fp32 inputs as three tf32 products.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.kda.reference import tree_matrices
from kimi_kernels.sequences import CHUNK, chunk_table, sequence, token_rows
from kimi_kernels.triton_math import RCP_LN2, ex2, softplus2

SCRATCH_TOKENS = 1 << 20  # tokens x heads per segment: 1.1 GB of scratch for K = V = 128
MIN_KV, MAX_K = 16, 128
MIN_LOG2_DECAY = tl.constexpr(-500.0)  # 2^-500 is 0 in fp32
GATE_GIVEN, GATE_SOFTPLUS, GATE_BOUNDED = 0, 1, 2


@triton.jit
def log2_decay(x, m, A_log, dt_bias, lower_bound, i_h, K: tl.constexpr, d, GATE: tl.constexpr):
    """log2 of the decay of a head, 0 past the end: x [BT, BK] is the log-decay or the raw gate."""
    if GATE == 0:
        a = x * RCP_LN2
    else:
        A = tl.exp(tl.load(A_log + i_h).to(tl.float32))
        x += tl.load(dt_bias + i_h * K + d, mask=d < K, other=0.0).to(tl.float32)[None, :]
        if GATE == 1:
            a = tl.where(m, -A, 0.0)[:, None] * softplus2(x)
        else:
            a = tl.where(m, lower_bound * RCP_LN2, 0.0)[:, None] * tl.sigmoid(A * x)
    return tl.maximum(a, MIN_LOG2_DECAY)


@triton.jit
def load_rows(p, stride, r, d, m, D: tl.constexpr, BD: tl.constexpr):
    """Rows r of [*, D] as [BT, BD], zeros where not `m` and past D. p: the first element."""
    if D == BD:
        return tl.load(p + (r[:, None] * stride + d[None, :]), mask=m[:, None], other=0.0)
    mask = m[:, None] & (d < D)[None, :]
    return tl.load(p + (r[:, None] * stride + d[None, :]), mask=mask, other=0.0)


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
    level, masks, q, k, a, row, col, A_qk, Ti, RAW: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """One level on the whole tile: A_qk and the inverse with its pairs added."""
    BT: tl.constexpr = 64
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    between = tl.load(masks + level * BT * BT + i * BT + j)
    aq, ak = tree_level(q, k, a, between, PREC)
    pair = level_pairs(i, j, level)
    if not RAW:
        ak = ak * col[None, :]
    Ti = extend_inverse(Ti, tl.where(pair, ak * row[:, None], 0.0), PREC)
    return tl.where(pair, aq, A_qk), Ti


@triton.jit(do_not_specialize=["T", "NT", "c0"])
def kda_intra_kernel(
    q, k, g, beta, A_log, dt_bias, masks,
    qg, kg, w, M, A_qk, decay,
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
    if VARLEN:
        i_n = tl.load(owner + c0 + i_c)
        if i_n < 0:
            return
        begin, length = sequence(cu_seqlens, i_n, T)
        t0 = (c0 + i_c - tl.load(offsets + i_n)) * BT
    else:
        i_n = (c0 + i_c) // NT
        begin = i_n.to(tl.int64) * T
        t0 = (c0 + i_c) % NT * BT
        length = T
    r, d = tl.arange(0, BT), tl.arange(0, BK)
    m = t0 + r < length
    tok = begin + t0  # int64
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
    row = b_beta  # factor of row i of A
    if not RAW:
        sk, sq = 1.0 / rk, scale / rq
        row = b_beta * sk

    i, j = r[:, None], r[None, :]
    if tl.float32 == DT:
        aqk = tl.where(i == j, diag[:, None], 0.0)
        Ti = tl.where(i == j, 1.0, tl.zeros([BT, BT], tl.float32))
        for level in range(6):
            aqk, Ti = wide_level(level, masks, qn, kn, a, row, sk, aqk, Ti, RAW, PREC)
    else:  # levels 1, 2, 4, 8 inside the four diagonal 16 x 16 blocks, one warp each
        r16 = tl.arange(0, 16)
        i3, j3 = r16[None, :, None], r16[None, None, :]
        zero3 = tl.zeros([4, 16, 16], tl.float32)
        q3, k3, a3 = (
            tl.reshape(qn, [4, 16, BK]), tl.reshape(kn, [4, 16, BK]), tl.reshape(a, [4, 16, BK])
        )  # fmt: skip
        row3 = tl.reshape(row, [4, 16])[:, :, None]
        col3 = tl.reshape(sk, [4, 16])[:, None, :]
        aqk3 = tl.where(i3 == j3, tl.reshape(diag, [4, 16])[:, :, None], zero3)
        T3 = tl.where(i3 == j3, 1.0, zero3).to(DT)
        for level in tl.range(4, num_stages=1):
            anchor = ((i3 >> (level + 1)) << (level + 1)) + (1 << level)
            between = (j3 > tl.minimum(i3, anchor)) & (j3 <= tl.maximum(i3, anchor))
            M3 = tl.where(between, 1.0, 0.0).to(DT) + tl.zeros([4, 16, 16], DT)
            aq, ak = tree_level(q3, k3, a3, M3, PREC)
            pair = level_pairs(i3, j3, level)
            aqk3 = tl.where(pair, aq, aqk3)
            if not RAW:
                ak = ak * col3
            T3 = extend_inverse(T3, tl.where(pair, ak * row3, 0.0), PREC)
        block = tl.arange(0, 4)
        same = block[:, None, None, None] == block[None, None, :, None]
        aqk = tl.reshape(tl.where(same, tl.expand_dims(aqk3, 2), 0.0), [BT, BT])
        Ti = tl.reshape(tl.where(same, tl.expand_dims(T3, 2), 0.0), [BT, BT])
        for level in tl.static_range(4, 6):
            aqk, Ti = wide_level(level, masks, qn, kn, a, row, sk, aqk, Ti, RAW, PREC)
    if not RAW:
        aqk = aqk * (sq[:, None] * sk[None, :])

    out = (i_c * HV + i_h).to(tl.int64)
    tl.store(decay + out * BK + d, ex2(a_sum))
    tl.store(A_qk + out * BT * BT + (i * BT + j), aqk.to(ST))
    p = r[:, None] * BK + d[None, :]
    qg, kg, w = qg + out * BT * BK, kg + out * BT * BK, w + out * BT * BK
    before = tl.load(masks + 6 * BT * BT + i * BT + j)
    E = ex2(tl.dot(before, a, input_precision=PREC))  # exp(G)
    b_qg, b_kb = qn * E.to(DT), kn * E.to(DT) * row.to(DT)[:, None]
    after = tl.load(masks + 7 * BT * BT + i * BT + j)
    b_kg = kn * ex2(tl.dot(after, a, input_precision=PREC)).to(DT)  # times exp(G_last - G)
    if RAW:
        tl.store(qg + p, b_qg.to(ST))
        tl.store(kg + p, b_kg.to(ST))
    else:
        tl.store(qg + p, (b_qg.to(tl.float32) * sq[:, None]).to(ST))
        tl.store(kg + p, (b_kg.to(tl.float32) * sk[:, None]).to(ST))
    tl.store(w + p, tl.dot(Ti, b_kb, input_precision=PREC).to(ST))
    b_M = Ti * b_beta.to(DT)[None, :]
    tl.store(M + out * BT * BT + (i * BT + j), b_M.to(ST))


@triton.jit(do_not_specialize=["T", "NT", "c0", "c1"])
def kda_inter_kernel(
    v, w, M, qg, kg, A_qk, decay, o, S_in, S_out,
    cu_seqlens, offsets,
    T, NT, c0, c1, s_v: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = 64
    NV: tl.constexpr = (V + BV - 1) // BV  # one grid axis: the others end at 65535
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // HV, i_nh % HV
    if VARLEN:
        first, last = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
        begin, length = sequence(cu_seqlens, i_n, T)
    else:
        first, last = i_n * NT, i_n * NT + NT
        begin = i_n.to(tl.int64) * T
        length = T
    lo, hi = tl.maximum(first, c0), tl.minimum(last, c1)
    if (lo >= hi) & ((first < last) | (c0 > 0)):
        return  # nothing of this sequence lies in the segment; empty ones pass S on in the first
    r, d = tl.arange(0, BT), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mv, m_s = o_v < V, (d < K)[:, None] & (o_v < V)[None, :]
    p_s = (i_n * HV + i_h).to(tl.int64) * K * V + d[:, None] * V + o_v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if lo > first:
        S += tl.load(S_out + p_s, mask=m_s, other=0.0)
    elif HAS_S:
        S += tl.load(S_in + p_s, mask=m_s, other=0.0)
    ST: tl.constexpr = A_qk.dtype.element_ty
    pk, pv = r[:, None] * BK + d[None, :], r[:, None] * s_v + o_v[None, :]
    pa = r[:, None] * BT + r[None, :]
    v += begin * s_v + i_h * V
    p_o = o + begin * HV * V + i_h * V
    for c in tl.range(lo, hi, num_stages=STAGES):
        at = ((c - c0) * HV + i_h).to(tl.int64)
        b_w, b_q = tl.load(w + at * BT * BK + pk), tl.load(qg + at * BT * BK + pk)
        b_k, b_A = tl.load(kg + at * BT * BK + pk), tl.load(A_qk + at * BT * BT + pa)
        b_M = tl.load(M + at * BT * BT + pa)
        t = (c - first) * BT
        m = (t + r < length)[:, None] & mv[None, :]
        b_v = tl.load(v + t.to(tl.int64) * s_v + pv, mask=m, other=0.0)
        b_d = tl.load(decay + at * BK + d)
        b_S = S.to(ST)
        v_new = tl.dot(b_M, b_v, input_precision=PREC) - tl.dot(b_w, b_S, input_precision=PREC)
        v_new = v_new.to(ST)
        b_o = tl.dot(b_q, b_S, input_precision=PREC)
        b_o = tl.dot(b_A, v_new, b_o, input_precision=PREC)
        S = tl.dot(tl.trans(b_k), v_new, S * b_d[:, None], input_precision=PREC)
        p = p_o + t.to(tl.int64) * (HV * V) + (r[:, None] * (HV * V) + o_v[None, :])
        tl.store(p, b_o.to(o.dtype.element_ty), mask=m)
    tl.store(S_out + p_s, S, mask=m_s)


def _make_masks(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[8, C, C] of 0 and 1: levels 0-5 of the tree, 6 the inclusive cumsum, 7 what follows."""
    levels, LOW, UP = tree_matrices(device, dtype)
    return torch.stack([M for M, _ in levels] + [LOW, UP])


_cached_masks = functools.lru_cache(_make_masks)


def anchor_masks(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The masks of `device`, kept, except under CUDA-graph capture, whose memory is the graph's."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _make_masks(device, dtype)
    return _cached_masks(device, dtype)


def chunk_kda_fwd(
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
    """o [B, T, HV, V] in `v.dtype` and the final states [N, HV, K, V] fp32; arguments are checked.

    K is at most MAX_K: three tiles of 64 x 256 do not fit in shared memory twice. K and V are at
    least MIN_KV: with both 1, Triton 3.6 compiled wrong results.
    With `A_log` and `dt_bias`, `g` and `beta` are raw and q and k are normalised (`fused_kda`).
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dev, varlen, raw = q.device, cu_seqlens is not None, A_log is not None
    ST = q.dtype
    DT = torch.float32 if torch.float32 == ST else torch.float16
    prec = "tf32x3" if torch.float32 == DT else "ieee"
    BK = max(64, triton.next_power_of_2(K))  # tiles under 64 x 32: illegal accesses (Triton 3.6)
    offsets = owner = None
    N, NT = B, triton.cdiv(T, CHUNK)
    total = N * NT
    if cu_seqlens is not None:
        N = cu_seqlens.numel() - 1
        offsets, owner = chunk_table(cu_seqlens, T)
        total = owner.numel()
    rows = [token_rows(x) for x in (q, k, g, beta)]
    (q, k, g, beta), strides = [x for x, _ in rows], [s for _, s in rows]
    v, s_v = token_rows(v)
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=dev)
    S = torch.empty(N, HV, K, V, dtype=torch.float32, device=dev)
    segment = max(1, min(total, SCRATCH_TOKENS // (CHUNK * HV)))
    rows_n = segment * HV * CHUNK
    qg, kg, w = (torch.empty(rows_n, BK, dtype=ST, device=dev) for _ in range(3))
    M, A_qk = (torch.empty(rows_n, CHUNK, dtype=ST, device=dev) for _ in range(2))
    decay = torch.empty(segment * HV, BK, dtype=torch.float32, device=dev)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    masks = anchor_masks(dev, DT)
    BV, stages = inter_config(BK, ST)
    for c0 in range(0, max(total, 1), segment):
        c1 = min(c0 + segment, total)
        if c1 > c0:
            kda_intra_kernel[((c1 - c0) * HV,)](
                q, k, g, beta, A_log, dt_bias, masks,
                qg, kg, w, M, A_qk, decay, cu_seqlens, offsets, owner,
                T, NT, c0, scale, 0.0 if lower_bound is None else lower_bound, *strides,
                H=H, HV=HV, K=K, BK=BK, GATE=gate_mode(A_log, lower_bound), RAW=raw,
                DT=tl.float32 if torch.float32 == DT else tl.float16, PREC=prec, VARLEN=varlen,
                num_warps=4, num_stages=1,
            )  # fmt: skip
        kda_inter_kernel[(triton.cdiv(V, BV) * N * HV,)](
            v, w, M, qg, kg, A_qk, decay, o, initial_state, S, cu_seqlens, offsets,
            T, NT, c0, c1, s_v,
            HV=HV, K=K, V=V, BK=BK, BV=BV, PREC=prec, STAGES=stages,
            VARLEN=varlen, HAS_S=initial_state is not None, num_warps=4,
        )  # fmt: skip
    return o, S


def gate_mode(A_log: Tensor | None, lower_bound: float | None) -> int:
    """What `g` is: the log-decay itself, or the input of one of the two gates."""
    if A_log is None:
        return GATE_GIVEN
    return GATE_SOFTPLUS if lower_bound is None else GATE_BOUNDED


def inter_config(BK: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tile of V and pipeline stages of `inter`.

    Three stages of the chunk's tiles must fit in 227 KB of shared memory: 222 KB for K = 128 and
    tiles of 32. Two stages take 1.8 times as long (1 x 8192 x 32 on an H200: .306 against .170 ms).
    """
    return 32, 3 if BK * dtype.itemsize <= 256 else 2
