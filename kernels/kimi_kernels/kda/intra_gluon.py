"""`kda_intra_kernel` of chunk_kernels.py in Gluon, for Hopper, raw inputs in 16 bits and K = 128.

A chunk is four blocks of 16 rows, and a warp has one of them. Levels 1, 2, 4 and 8 of the tree stay
inside a block. Rows i and j of different blocks b > c meet at the ends of the blocks instead of at
levels 16 and 32. With P = exp(sum of the gates of the block up to a row), Q = exp(sum after it) and
F = exp(sum over the block), every factor in [0, 1] and made of no other gates than the pair's,

    A[i, j] = sum_d (q P)[i] F_{c+1} .. F_{b-1} (k Q)[j]
    exp(G) = P F_0 .. F_{b-1},      exp(G_last - G) = Q F_{b+1} .. F_3

and M = (I + A_kk diag(beta))^-1 follows block by block, with T_b the inverse of diagonal block b:

    M[b, b] = T_b,      M[b, b-n] = - sum_{m = 1..n} T_b A_kk[b, b-m] diag(beta) M[b-m, b-n]

The products are `mma.sync`: 16 rows of an accumulator are, register for register, a left operand of
the next product, and transposed a right one. So tiles are transposed on paper (A_kk of a level is
symmetric before it is masked, both T and T^T are kept, A[b, b-n] is computed transposed), and only
k Q, F, k exp(G) and M go through shared memory. A thread loads 8 neighbouring channels of 32, which
the fragments take for channels 2 l, 2 l + 1, 2 l + 8, ..: an order that no sum over d sees.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kimi_kernels.dispatch import capability
from kimi_kernels.kda.chunk_kernels import level_pairs, locate_chunk
from kimi_kernels.triton_math import RCP_LN2, ex2

_MMA = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])  # [4, 16, n], a warp per block
ACC = gl.constexpr(_MMA)
LHS, RHS = (gl.constexpr(gl.DotOperandLayout(i, _MMA, 2)) for i in (0, 1))
_SUM = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])  # [16, 32], a warp per 8 channels
SUM_ACC = gl.constexpr(_SUM)
SUM_LHS, SUM_RHS = (gl.constexpr(gl.DotOperandLayout(i, _SUM, 2)) for i in (0, 1))
LOAD = gl.constexpr(
    gl.DistributedLinearLayout(  # [64, 32]: 8 channels and 2 rows per thread
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
TILE2, TILE3 = (  # rows of 32 in shared memory
    gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, order)) for order in ([1, 0], [2, 1, 0])
)
PAIR2, PAIR3 = (  # rows of 16
    gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, order)) for order in ([1, 0], [2, 1, 0])
)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
MAX_REGISTERS = 168  # three programs per multiprocessor
UNIT = gl.constexpr(256.0)  # decays in fp16 times 256: from 2^-22, to 250, where 2^-250 is 0


@gluon.jit
def softplus2(x):
    """log2(1 + 2^x) in fp32, by a series where 2^x is lost beside 1."""
    y = gl.inline_asm_elementwise(
        "{ .reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    lg2 = gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + y], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.maximum(x, 0.0) + gl.where(y < 1e-3, y * (RCP_LN2 - 0.5 * RCP_LN2 * y), lg2)


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + ex2(x * (0.0 - RCP_LN2)))


@gluon.jit
def clamp_decay(x):
    """max(x, -64000) in fp16, two at a time."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.b32 t, 0xfbd0fbd0; max.f16x2 $0, $1, t; }",
        "=r,r", [x], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def fragment(x):
    """[64, 32] as loaded -> [4, 16, 32] as accumulated, the channels permuted: no instruction."""
    x = x.reshape([4, 16, 4, 4, 2]).permute(0, 1, 3, 2, 4).reshape([4, 16, 32])
    return gl.convert_layout(x, ACC, assert_trivial=True)


@gluon.jit
def rows(x):
    """The inverse of `fragment`."""
    x = x.reshape([4, 16, 4, 4, 2]).permute(0, 1, 3, 2, 4).reshape([64, 32])
    return gl.convert_layout(x, LOAD, assert_trivial=True)


@gluon.jit
def lhs(x):
    return gl.convert_layout(x, LHS, assert_trivial=True)


@gluon.jit
def rhs_t(x):
    """x^T as a right operand."""
    return gl.convert_layout(x.permute(0, 2, 1), RHS, assert_trivial=True)


@gluon.jit
def transpose(x):
    """x^T of 16-bit [4, 16, 16]."""
    x = gl.inline_asm_elementwise(  # of its 8 x 8 parts
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2,
    )  # fmt: skip
    x = x.reshape([4, 2, 8, 2, 8]).permute(0, 3, 2, 1, 4).reshape([4, 16, 16])
    return gl.convert_layout(x, ACC, assert_trivial=True)


@gluon.jit
def block_index(layout: gl.constexpr):
    return gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]


@gluon.jit
def row_index(layout: gl.constexpr):
    return gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]


@gluon.jit
def col_index(layout: gl.constexpr):
    return gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon.jit
def zeros():
    return gl.zeros([4, 16, 16], gl.float32, layout=ACC)


@gluon.jit
def sums(where):
    """Left operand that adds up the gates of the columns `where` [1, 16, 16]."""
    x = gl.where(where, 1.0 / UNIT, 0.0).to(gl.float16)
    return x + gl.zeros([4, 16, 16], gl.float16, layout=LHS)


@gluon.jit
def tile(s, i: gl.constexpr):
    """Blocks i .. i + 3 of s, [4, 16, 32]."""
    return s.index(i)._reinterpret(gl.float16, [4, 16, 32], TILE3)


@gluon.jit
def pair_tile(s, i: gl.constexpr):
    return s.index(i)._reinterpret(gl.float16, [4, 16, 16], PAIR3)


@gluon.jit
def decays(M, s):
    """exp(M a) of 32 channels, fp16."""
    D = mma_v2(M, tile(s, 4).load(RHS), gl.zeros([4, 16, 32], gl.float32, layout=ACC))
    return ex2(D).to(gl.float16)


@gluon.jit
def block_factor(f_s, t: gl.constexpr, layout: gl.constexpr):
    return f_s.index(t).load(gl.SliceLayout(1, layout))[:, None, :]


@gluon.jit
def row_products(x, y):
    """sum_d x[i, d] y[i, d] as [4, 16, 1]: the diagonals of products of fragments."""
    acc = zeros()
    for c in gl.static_range(len(x)):
        acc = mma_v2(lhs(x[c]), rhs_t(y[c]), acc)
    return gl.sum(gl.where(row_index(ACC) == col_index(ACC), acc, 0.0), 2)[:, :, None]


@gluon.jit(do_not_specialize=["T", "NT", "c0"])
def kda_intra_gluon(
    q, k, g, beta, A_log, dt_bias,
    qg, kg, w, M, A_qk, decay, beta32, norms,
    cu_seqlens, offsets, owner,
    T, NT, c0, scale, lower_bound,
    s_q: gl.constexpr, s_k: gl.constexpr, s_g: gl.constexpr, s_b: gl.constexpr,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    BOUNDED: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    NC: gl.constexpr = K // 32
    ST: gl.constexpr = A_qk.dtype.element_ty
    f16: gl.constexpr = gl.float16
    f32: gl.constexpr = gl.float32
    pid = gl.program_id(0)
    i_h, i_c = pid % HV, pid // HV
    tok, left = locate_chunk(cu_seqlens, offsets, owner, c0 + i_c, T, NT, VARLEN)
    if left <= 0:
        return
    i_hq = i_h // (HV // H)
    out = (i_c * HV + i_h).to(gl.int64)

    # all loads before the first use
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, LOAD))[:, None]
    d = gl.arange(0, 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    m = r < left
    b, i, j = block_index(ACC), row_index(ACC), col_index(ACC)
    t_i, t_j = b * 16 + i, b * 16 + j  # the tokens of rows and of columns of a diagonal block
    p_b = beta + tok * s_b + i_h
    beta_i = gl.load(p_b + t_i * s_b, mask=t_i < left, other=0.0).to(f32)
    beta_j = gl.load(p_b + t_j * s_b, mask=t_j < left, other=0.0).to(f32)
    p_g = g + tok * s_g + i_h * K + r * s_g + d
    p_k, p_q = k + tok * s_k + i_hq * K + r * s_k + d, q + tok * s_q + i_hq * K + r * s_q + d
    b_g, b_k, b_q = (), (), ()
    for c in gl.static_range(NC):
        b_g += (gl.load(p_g + c * 32, mask=m, other=0.0),)
    for c in gl.static_range(NC):
        b_k += (fragment(gl.load(p_k + c * 32, mask=m, other=0.0)),)
    for c in gl.static_range(NC):
        b_q += (fragment(gl.load(p_q + c * 32, mask=m, other=0.0)),)

    # per 32 channels: blocks 0-3 of q, 4-7 of the decays a, 8-11 of k; later the tables of M, k Q
    # and k exp(G). What is read for blocks before the first is finite, and dropped or times 0.
    s, f_s = (), ()
    for _ in gl.static_range(NC):
        s += (gl.allocate_shared_memory(f16, [12, 16, 32], TILE2),)
        f_s += (gl.allocate_shared_memory(f16, [4, 4, 32], PLAIN),)
    A = gl.exp(gl.load(A_log + i_h).to(f32))
    if BOUNDED:
        factor = gl.where(m, UNIT * RCP_LN2 * lower_bound, 0.0)
    else:
        factor = gl.where(m, -UNIT * A, 0.0)
    for c in gl.static_range(NC):
        x = b_g[c].to(f32)
        bias = gl.load(dt_bias + i_h * K + c * 32 + d).to(f32)
        if BOUNDED:
            x = sigmoid(A * (x + bias))
        else:
            x = softplus2(x * RCP_LN2 + bias * RCP_LN2)
        tile(s[c], 4).store(fragment(clamp_decay((factor * x).to(f16))))
    rq = gl.rsqrt(row_products(b_q, b_q) + 1e-6) * scale
    rk = gl.rsqrt(row_products(b_k, b_k) + 1e-6)
    diag = row_products(b_q, b_k) * (rq * rk)  # the diagonal of A_qk has no gate
    for c in gl.static_range(NC):
        tile(s[c], 0).store((b_q[c].to(f32) * rq).to(f16))
        tile(s[c], 8).store((b_k[c].to(f32) * rk).to(f16))
    beta_i = gl.where(t_i < left, sigmoid(beta_i), 0.0)
    beta_j = gl.where(t_j < left, sigmoid(beta_j), 0.0)
    gl.store(beta32 + out * 64 + t_i, beta_i)
    if norms is not None:
        gl.store(norms + out * 128 + t_i, rq)
        gl.store(norms + out * 128 + 64 + t_i, rk)

    # factors of whole blocks, row 4 t + b. t = 0: the blocks before b; 1: after b; 2: block b - 1;
    # 3: blocks b - 1 and b - 2. No pair needs the last for b = 0: row 12 is the sum of all
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM_LHS))[:, None]
    of = gl.arange(0, 64, layout=gl.SliceLayout(0, SUM_LHS))[None, :] >> 4
    t, to = row >> 2, row & 3
    which = ((t == 0) & (of < to)) | ((t == 1) & (of > to)) | ((t == 2) & (of == to - 1))
    which = which | ((t == 3) & (of < to) & (of >= to - 2)) | (row == 12)
    which = gl.where(which, 1.0 / UNIT, 0.0).to(f16)
    last = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM_ACC))[:, None] == 12
    col = gl.arange(0, 32, layout=gl.SliceLayout(0, SUM_ACC))[None, :]
    channel = (col & 1) | ((col & 6) << 2) | ((col & 24) >> 2)
    channel, last = gl.broadcast(channel, last)
    for c in gl.static_range(NC):
        a = s[c].index(4)._reinterpret(f16, [64, 32], TILE2).load(SUM_RHS)
        F = ex2(mma_v2(which, a, gl.zeros([16, 32], f32, layout=SUM_ACC)))
        f_s[c].index(0)._reinterpret(f16, [16, 32], PLAIN).store(F.to(f16))
        gl.store(decay + out * K + c * 32 + channel, F, mask=last)

    # levels 1, 2, 4, 8
    i_l, j_l = row_index(LHS), col_index(LHS)
    a_qk, a_kk = gl.where(i == j, diag, zeros()), zeros()
    for level in range(4):
        anchor = ((i_l >> (level + 1)) << (level + 1)) + (1 << level)
        between = sums((j_l > gl.minimum(i_l, anchor)) & (j_l <= gl.maximum(i_l, anchor)))
        aq, ak = zeros(), zeros()
        for c in gl.static_range(NC):
            E = decays(between, s[c])
            kE = tile(s[c], 8).load(ACC) * E
            aq = mma_v2(lhs(tile(s[c], 0).load(ACC) * E), rhs_t(kE), aq)
            ak = mma_v2(lhs(kE), rhs_t(kE), ak)
        pair = level_pairs(i, j, level)
        a_qk, a_kk = gl.where(pair, aq, a_qk), gl.where(pair, ak, a_kk)

    p_A = A_qk + out * 4096 + b * 1024 + i * 64 + j
    gl.store(p_A + b * 16, a_qk.to(ST))

    # T, the inverses of the diagonal blocks, and U = T^T: T <- T - T A T for each level
    X = a_kk * beta_j
    A = gl.where(level_pairs(i, j, 0), X, 0.0).to(f16)
    eye = gl.where(i == j, 1.0, zeros()).to(f16)
    T_b, U = eye - A, eye - mma_v2(lhs(eye), rhs_t(A), zeros()).to(f16)
    for level in gl.static_range(1, 4):
        A = gl.where(level_pairs(i, j, level), X, 0.0).to(f16)
        UAt = mma_v2(lhs(U), rhs_t(A), zeros()).to(f16)
        dU = mma_v2(lhs(UAt), rhs_t(T_b), zeros()).to(f16)
        T_b -= mma_v2(lhs(T_b), rhs_t(UAt), zeros()).to(f16)
        U -= dU

    # q exp(G), k exp(G_last - G), k exp(G) and, transposed, the blocks b, b - n of A
    p = out * (64 * K) + r * K + d
    upto, after = sums(j_l <= i_l), sums(j_l > i_l)
    aq, ak = (zeros(), zeros(), zeros()), (zeros(), zeros(), zeros())
    kG = ()
    for c in gl.static_range(NC):
        qn, kn = tile(s[c], 0).load(ACC), tile(s[c], 8).load(ACC)
        P = decays(upto, s[c])
        qP, kP, kQ = qn * P, kn * P, kn * decays(after, s[c])
        tile(s[c], 4).store(kQ)
        gl.store(kg + p + c * 32, rows(kQ * block_factor(f_s[c], 1, ACC)).to(ST))
        before = block_factor(f_s[c], 0, ACC)
        gl.store(qg + p + c * 32, rows(qP * before).to(ST))
        kG += (kP * before,)
        if c > 0:
            tile(s[c - 1], 8).store(kG[c - 1])
        aq_c, ak_c = (), ()
        for n in gl.static_range(1, 4):
            kQ = tile(s[c], 4 - n).load(LHS)
            if n > 1:
                kQ = kQ * block_factor(f_s[c], n, LHS)
            aq_c += (mma_v2(kQ, rhs_t(qP), aq[n - 1]),)
            ak_c += (mma_v2(kQ, rhs_t(kP), ak[n - 1]),)
        aq, ak = aq_c, ak_c
    tile(s[NC - 1], 8).store(kG[NC - 1])

    # M, and tables of diag(beta) M behind three blocks of zeros; [b, b - n] for b < n lies in the
    # upper triangle, where the zeros go
    TA = ()
    for n in gl.static_range(1, 4):
        x = gl.where(b >= n, aq[n - 1], 0.0).to(ST)
        gl.store(p_A + ((b - n) & 3) * 16, transpose(x))
        x = gl.where(b >= n, ak[n - 1], 0.0).to(f16)
        TA += (lhs((0.0 - mma_v2(lhs(T_b), rhs_t(x), zeros())).to(f16)),)
    p_M = M + out * 4096 + b * 1024 + i * 64 + j
    m_s = ()
    for n in gl.static_range(3):
        m_s += (s[n].index(0)._reinterpret(f16, [8, 16, 16], PAIR2),)
        pair_tile(m_s[n], 0).store(gl.zeros([4, 16, 16], f16, layout=ACC))
    Ms = ()
    for n in gl.static_range(4):
        x = T_b.to(f32)
        if n > 0:
            x = zeros()
            for l in gl.static_range(1, n + 1):
                x = mma_v2(TA[l - 1], pair_tile(m_s[n - l], 3 - l).load(RHS), x)
        gl.store(p_M + ((b - n) & 3) * 16, x.to(ST))
        if n < 3:
            pair_tile(m_s[n], 3).store((x * beta_i).to(f16))
        Ms += (lhs(x.to(f16)),)
    p = out * (64 * K) + r * K + d
    for c in gl.static_range(NC):
        x = gl.zeros([4, 16, 32], f32, layout=ACC)
        for n in gl.static_range(4):
            x = mma_v2(Ms[n], tile(s[c], 8 - n).load(RHS), x)
        gl.store(w + p + c * 32, rows(x).to(ST))


def takes(device: torch.device, dtype: torch.dtype, K: int, raw: bool) -> bool:
    """Whether the kernel serves such inputs; `raw` as in chunk_fwd.py: q, k, g and beta are."""
    half = dtype in (torch.bfloat16, torch.float16)
    return raw and K == 128 and half and capability(device) == (9, 0)
