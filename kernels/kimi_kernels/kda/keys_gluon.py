"""The key side of the backward pass in Gluon, for Hopper, raw gates, bf16 and K = 128.

One kernel for `kda_wide_kernel` and `kda_pairs_kernel` of chunk_bwd_keys.py, whose equations it
uses for levels 1, 2, 4 and 8, inside blocks of 16 rows. A warp has a block. Pairs of rows i, j of
different blocks b > c meet at the ends of the blocks, as in intra_gluon.py, with P = exp(sum of the
gates of the block up to a row), Q = exp(sum after it) and F = exp(sum over the block). With
dqs, dkr, dkw the products with S and dS, which act as blocks before the first and after the last,

    Y_q[b] = sum_{c<b} F_{c+1} .. F_{b-1} dA_qk[b, c] (k Q)[c] + F_0 .. F_{b-1} dqs[b]
    Y_k[b] = sum_{c<b} F_{c+1} .. F_{b-1} dA_kk[b, c] (k Q)[c] - F_0 .. F_{b-1} dkr[b]
    Z[c] = sum_{b>c} F_{c+1} .. F_{b-1} (dA_qk[c, b] (q P)[b] + dA_kk[c, b] (k P)[b])
           + F_{c+1} .. F_3 dkw[c]
    dq += P Y_q,   dk += P Y_k + Q Z

each by Horner's rule from the farthest block. A gate of block l takes part in the rows of its block
on the far side of it, and in all that reaches over the block:

    da_t += sum_{i>=t} (q P Y_q + k P Y_k)_i + sum_{j<t} (k Q Z)_j        i, j in the block of t
          + sum_{b>l} sum_i (q P Y_q + k P Y_k)_i, the part of Y from before l: Horner's inner sums
          + sum_{c<l} sum_j (k Q)_j F_{c+1} .. F_3 dkw_j  +  exp(G_last) sum_v S dS

Every term has the exponential of its whole span as a factor. Tiles lie transposed, [channels,
rows]: all products contract over rows, so that an accumulator is, register for register, the left
operand of the next one; the right ones are 16 x 16, symmetric or 0/1. A thread loads 4 neighbouring
channels of 32, which lie 8 apart in the fragments.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kimi_kernels.dispatch import capability
from kimi_kernels.kda.chunk_kernels import locate_chunk
from kimi_kernels.kda.intra_gluon import UNIT, clamp_decay, softplus2
from kimi_kernels.triton_math import RCP_LN2, ex2, sigmoid

BLOCKS = 4  # per chunk, of 16 tokens: sums over the tokens of each are returned
_MMA = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])  # [4, m, n], a warp per block
ACC = gl.constexpr(_MMA)
LHS, RHS = (gl.constexpr(gl.DotOperandLayout(i, _MMA, 2)) for i in (0, 1))
RHS2 = gl.constexpr(gl.SliceLayout(0, gl.DotOperandLayout(1, _MMA, 2)))
CHANNELS = gl.constexpr(gl.SliceLayout(2, _MMA))
LOAD = gl.constexpr(
    gl.DistributedLinearLayout(  # [64, 32]: 4 channels and 4 rows per thread
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
SMALL = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 4, 8], [4, 1, 1], [2, 1, 0]))  # [4, 16, 16]
TILE2, TILE3 = (  # rows of 16 in shared memory
    gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, order)) for order in ([1, 0], [2, 1, 0])
)
PLAIN1, PLAIN2 = (gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order)) for order in ([0], [1, 0]))


@gluon.jit
def fragment(x):
    """[64, 32] as loaded -> [4, 32, 16] as accumulated, the channels permuted: no instruction."""
    x = x.reshape([4, 16, 8, 4]).permute(0, 3, 2, 1).reshape([4, 32, 16])
    return gl.convert_layout(x, ACC, assert_trivial=True)


@gluon.jit
def rows(x):
    """The inverse of `fragment`."""
    x = x.reshape([4, 4, 8, 16]).permute(0, 3, 2, 1).reshape([64, 32])
    return gl.convert_layout(x, LOAD, assert_trivial=True)


@gluon.jit
def load(p, m):
    return fragment(gl.load(p, mask=m, other=0.0)).to(gl.float32)


@gluon.jit
def lhs(x):
    """x as a left operand in bf16."""
    return gl.convert_layout(x.to(gl.bfloat16), LHS, assert_trivial=True)


@gluon.jit
def tiles(x_s, i: gl.constexpr):
    """Tiles i .. i + 3 of x_s, [4, 32, 16]."""
    return x_s.index(i)._reinterpret(gl.bfloat16, [4, 32, 16], TILE3)


@gluon.jit
def blocks(g_s, n: gl.constexpr):
    """Blocks [b, (b - n) % 4] of a pair gradient, transposed, as a right operand."""
    x = g_s.index(4 * n)._reinterpret(gl.bfloat16, [4, 16, 16], TILE3)
    return x.permute((0, 2, 1)).load(RHS)


@gluon.jit
def vectors(v_s, i: gl.constexpr):
    """Rows i .. i + 3 of v_s, [4, 32]."""
    return v_s.index(i)._reinterpret(gl.float32, [4, 32], PLAIN2)


@gluon.jit
def put(m_s, i: gl.constexpr, x):
    """Store x [4, 16, 16] as matrices i .. i + 3."""
    m_s.index(i)._reinterpret(x.dtype, [4, 16, 16], TILE3).store(x)


@gluon.jit
def factor_of(f_s, i: gl.constexpr):
    return vectors(f_s, i).load(CHANNELS)


@gluon.jit
def matrix(m_s, i):
    """A 16 x 16 matrix as a right operand."""
    x = m_s.index(i).load(RHS2)[None, :, :]
    x, _ = gl.broadcast(x, gl.zeros([4, 16, 16], x.dtype, layout=RHS))
    return x


@gluon.jit
def between(i, j, level):
    """Whether gate j lies between row i and the anchor of its pairs."""
    anchor = ((i >> (level + 1)) << (level + 1)) + (1 << level)
    return (j > gl.minimum(i, anchor)) & (j <= gl.maximum(i, anchor))


@gluon.jit
def stored(n_s, i: gl.constexpr):
    """q (0) or k (4), normalised, as stored in fp16."""
    x = n_s.index(i)._reinterpret(gl.float16, [4, 32, 16], TILE3)
    return x.load(ACC).to(gl.float32)


@gluon.jit
def tile_zeros():
    return gl.zeros([4, 32, 16], gl.float32, layout=ACC)


@gluon.jit(do_not_specialize=["T", "NT", "c0"])
def kda_keys_gluon(
    q, k, g, A_log, dt_bias, norms, A_grad, P_grad, sums, dqs, dkr, dkw, SdS, decay,
    dq, dk, dg, ddt, dA_log,
    cu_seqlens, offsets, owner,
    T, NT, c0, scale, lower_bound,
    s_q: gl.constexpr, s_k: gl.constexpr, s_g: gl.constexpr,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    BOUNDED: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    f16: gl.constexpr = gl.float16
    f32: gl.constexpr = gl.float32
    bf16: gl.constexpr = gl.bfloat16
    GT: gl.constexpr = dq.dtype.element_ty
    pid = gl.program_id(0)
    i_h, i_c = pid % HV, pid // HV
    tok, left = locate_chunk(cu_seqlens, offsets, owner, c0 + i_c, T, NT, VARLEN)
    at = (i_c * HV + i_h).to(gl.int64)
    b = gl.arange(0, 4, layout=gl.SliceLayout(1, CHANNELS))[:, None]
    channel = gl.arange(0, 32, layout=gl.SliceLayout(0, CHANNELS))[None, :]
    channel = ((channel & 7) << 2) | (channel >> 3)
    if left <= 0:  # the sums are still wanted
        for e in gl.static_range(K // 32):
            p = ddt + (at * 4 + b) * K + e * 32 + channel
            gl.store(p, gl.zeros([4, 32], f32, layout=CHANNELS))
        b1 = gl.arange(0, 4, layout=gl.SliceLayout(1, CHANNELS))
        gl.store(dA_log + at * 4 + b1, gl.zeros([4], f32, layout=gl.SliceLayout(1, CHANNELS)))
        return
    i_hq = i_h // (HV // H)

    # 0/1 matrices [row, column] as right operands, four at a time
    l = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, SMALL)))[:, None, None]
    i = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, SMALL)))[None, :, None]
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, SMALL)))[None, None, :]
    sum_s = gl.allocate_shared_memory(f16, [8, 16, 16], TILE2)  # D = a^T (.): levels, P, Q
    grad_s = gl.allocate_shared_memory(bf16, [20, 16, 16], TILE2)  # da += (.), and the pairs
    low, pair = i <= j + l * 0, ((i >> l) ^ (j >> l)) == 1
    later = pair & (((j >> l) & 1) == 1)
    upto, after = low & (l == 0), (low == 0) & (l == 1)
    put(sum_s, 0, gl.where(between(j, i, l), 1.0 / UNIT, 0.0).to(f16))
    put(sum_s, 4, gl.where(upto | after, 1.0 / UNIT, 0.0).to(f16))
    put(grad_s, 0, gl.where(between(i, j, l), 1.0, 0.0).to(bf16))
    put(grad_s, 4, gl.where((i >= j) & (l == 0) | (i < j) & (l == 1), 1.0, 0.0).to(bf16))
    put(grad_s, 8, gl.where(pair, 1.0, 0.0).to(bf16))
    put(grad_s, 12, gl.where(later, 1.0, 0.0).to(bf16))
    put(grad_s, 16, gl.where(pair & (later == 0), 1.0, 0.0).to(bf16))

    # pair gradients: blocks [b, (b - n) % 4] at 4 n + b
    i3 = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, ACC)))[:, None, None]
    r3 = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, ACC)))[None, :, None]
    t3 = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, ACC)))[None, None, :]
    A_s = gl.allocate_shared_memory(bf16, [16, 16, 16], TILE2)
    P_s = gl.allocate_shared_memory(bf16, [16, 16, 16], TILE2)
    b_A, b_P = (), ()
    for e in gl.static_range(4):
        p_e = at * 4096 + (i3 * 16 + r3) * 64 + ((i3 - e) & 3) * 16 + t3
        b_A, b_P = b_A + (gl.load(A_grad + p_e),), b_P + (gl.load(P_grad + p_e),)
    for e in gl.static_range(4):
        put(A_s, 4 * e, b_A[e])
        put(P_s, 4 * e, b_P[e])

    # q P, zeros, k Q, k P, zeros; F between ones; the sums of a block for others, between zeros
    x_s = gl.allocate_shared_memory(bf16, [18, 32, 16], TILE2)
    tiles(x_s, 4).store(tile_zeros().to(bf16))
    tiles(x_s, 14).store(tile_zeros().to(bf16))
    n_s = gl.allocate_shared_memory(f16, [8, 32, 16], TILE2)  # q and k, normalised
    f_s = gl.allocate_shared_memory(f32, [10, 32], PLAIN1)
    v_s = gl.allocate_shared_memory(f32, [28, 32], PLAIN1)
    zero = gl.zeros([4, 32], f32, layout=CHANNELS)
    vectors(f_s, 0).store(zero + 1.0)
    vectors(f_s, 6).store(zero + 1.0)
    for e in gl.static_range(7):
        vectors(v_s, 4 * e).store(zero)

    r = gl.arange(0, 64, layout=gl.SliceLayout(1, LOAD))[:, None]
    d = gl.arange(0, 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    m = r < left
    t = i3 * 16 + t3  # [4, 1, 16]: tokens
    m3 = t < left
    norms, sums, A_grad = norms + at * 128, sums + at * 128, A_grad + at * 4096
    q, k, g = q + (tok * s_q + i_hq * K), k + (tok * s_k + i_hq * K), g + (tok * s_g + i_h * K)
    dqs, dkr, dkw = dqs + at * (64 * K), dkr + at * (64 * K), dkw + at * (64 * K)
    out = (tok * HV + i_h) * K
    dq, dk, dg = dq + out, dk + out, dg + out
    o_q, o_k, o_g, o_s, o_out = r * s_q + d, r * s_k + d, r * s_g + d, r * K + d, r * (HV * K) + d
    A = gl.exp(gl.load(A_log + i_h).to(f32))
    if BOUNDED:
        factor = gl.where(m3, UNIT * RCP_LN2 * lower_bound, 0.0)
    else:
        factor = gl.where(m3, -UNIT * A, 0.0)
    sum_A = zero
    for c in range(K // 32):
        o = c * 32
        bias = gl.load(dt_bias + i_h * K + o + channel + b * 0).to(f32)[:, :, None]
        x = load((g + o) + o_g, m) + bias
        if BOUNDED:
            x = factor * sigmoid(A * x)
        else:
            x = factor * softplus2(x * RCP_LN2)
        vectors(f_s, 3).store(ex2(gl.sum(x, 2) * (1.0 / UNIT)))
        a = gl.convert_layout(clamp_decay(x.to(f16)), LHS, assert_trivial=True)
        rq, rk = gl.load(norms + t), gl.load(norms + 64 + t)
        h = (load((q + o) + o_q, m) * rq).to(f16)
        n_s.index(0)._reinterpret(f16, [4, 32, 16], TILE3).store(h)
        h = (load((k + o) + o_k, m) * rk).to(f16)
        n_s.index(4)._reinterpret(f16, [4, 32, 16], TILE3).store(h)

        b_y, b_z = gl.load((dqs + o) + o_s), gl.load((dkr + o) + o_s)

        # levels 1, 2, 4, 8
        g_q, g_k, da = tile_zeros(), tile_zeros(), tile_zeros()
        for level in range(4):
            E = ex2(mma_v2(a, matrix(sum_s, level), tile_zeros()))
            qE, kE = stored(n_s, 0) * E, stored(n_s, 4) * E
            dA, dP = blocks(A_s, 0), blocks(P_s, 0) * matrix(grad_s, 8 + level)
            y = mma_v2(lhs(kE), dA * matrix(grad_s, 12 + level), tile_zeros())
            z = mma_v2(lhs(qE), dA * matrix(grad_s, 16 + level), tile_zeros())
            z = mma_v2(lhs(kE), dP, z)
            da = mma_v2(lhs(qE * y + kE * z), matrix(grad_s, level), da)
            g_q, g_k = gl.fma(E, y, g_q), gl.fma(E, z, g_k)

        # q P, k P and k Q for the other warps
        P = ex2(mma_v2(a, matrix(sum_s, 4), tile_zeros()))
        Q = ex2(mma_v2(a, matrix(sum_s, 5), tile_zeros()))
        qE, kE, kQ = stored(n_s, 0) * P, stored(n_s, 4) * P, stored(n_s, 4) * Q
        tiles(x_s, 0).store(qE.to(bf16))
        tiles(x_s, 11).store(kE.to(bf16))
        tiles(x_s, 7).store(kQ.to(bf16))

        # rows as the later ones of their pairs
        b_z1 = gl.load((dkw + o) + o_s)
        f1, f2, f3 = factor_of(f_s, 2), factor_of(f_s, 1), factor_of(f_s, 0)
        y = fragment(b_y).to(f32) * f3[:, :, None]
        z = fragment(b_z).to(f32) * (0.0 - f3)[:, :, None]
        vectors(v_s, 18).store(gl.sum(qE * y + kE * z, 2) * (f2 * f1))
        for n in gl.static_range(3, 0, -1):
            x_l = tiles(x_s, 7 - n).load(LHS)
            y = mma_v2(x_l, blocks(A_s, n), y)
            z = mma_v2(x_l, blocks(P_s, n), z)
            if n == 3:
                y, z = y * f2[:, :, None], z * f2[:, :, None]
                vectors(v_s, 12).store(gl.sum(qE * y + kE * z, 2) * f1)
            if n == 2:
                y, z = y * f1[:, :, None], z * f1[:, :, None]
                vectors(v_s, 7).store(gl.sum(qE * y + kE * z, 2))
        da = mma_v2(lhs(qE * y + kE * z), matrix(grad_s, 4), da)
        g_q, g_k = gl.fma(P, y, g_q), gl.fma(P, z, g_k)

        # rows as the earlier ones
        f1, f2, f3 = factor_of(f_s, 4), factor_of(f_s, 5), factor_of(f_s, 6)
        z = fragment(b_z1).to(f32) * f3[:, :, None]
        vectors(v_s, 3).store(gl.sum(kQ * z, 2) * (f2 * f1))
        for n in gl.static_range(3, 0, -1):
            z = mma_v2(tiles(x_s, n).load(LHS), blocks(A_s, 4 - n), z)
            z = mma_v2(tiles(x_s, 11 + n).load(LHS), blocks(P_s, 4 - n), z)
            if n == 3:
                z = z * f2[:, :, None]
            if n == 2:
                z = z * f1[:, :, None]
        da = mma_v2(lhs(kQ * z), matrix(grad_s, 5), da)
        g_k = gl.fma(Q, z, g_k)

        over = gl.load(decay + at * K + o + channel + b * 0)
        over = over * gl.load(SdS + at * K + o + channel + b * 0)
        for n in gl.static_range(1, 4):
            over += vectors(v_s, 3 - n).load(CHANNELS)
        over += vectors(v_s, 7 + 1).load(CHANNELS)
        over += vectors(v_s, 12 + 2).load(CHANNELS) + vectors(v_s, 18 + 3).load(CHANNELS)
        da += over[:, :, None]

        # the diagonal, and back through the activations
        rq, rk = gl.load(norms + t), gl.load(norms + 64 + t)
        q_dq = gl.load(sums + t) * (1.0 / (scale * scale))  # rq includes the scale
        k_dk = gl.load(sums + 64 + t)
        diag = gl.load(A_grad + t * 65).to(f32)  # it has no gate
        b_q, b_k = load((q + o) + o_q, m) * rq, load((k + o) + o_k, m) * rk
        g_q = rq * (g_q + diag * b_k - b_q * q_dq)
        g_k = rk * (g_k + diag * b_q - b_k * k_dk)
        gl.store((dq + o) + o_out, rows(g_q.to(GT)), mask=m)
        gl.store((dk + o) + o_out, rows(g_k.to(GT)), mask=m)
        x = load((g + o) + o_g, m) + bias
        if BOUNDED:
            s = sigmoid(A * x)
            y = gl.where(m3, lower_bound * A * s * (1.0 - s) * da, 0.0)
            sum_A += gl.sum(x * y, 2)
        else:
            y = gl.where(m3, -A * sigmoid(x) * da, 0.0)
            x = gl.where(m3, -A * softplus2(x * RCP_LN2) * da, 0.0)
            sum_A += gl.sum(x, 2) * (1.0 / RCP_LN2)
        gl.store(ddt + (at * 4 + b) * K + o + channel, gl.sum(y, 2))
        gl.store((dg + o) + o_out, rows(y.to(dg.dtype.element_ty)), mask=m)
    b1 = gl.arange(0, 4, layout=gl.SliceLayout(1, CHANNELS))
    gl.store(dA_log + at * 4 + b1, gl.sum(sum_A, 1))


def takes(device: torch.device, dtype: torch.dtype, K: int, raw: bool) -> bool:
    """Whether the kernel serves such inputs; `raw` as in chunk_fwd.py: q, k, g and beta are."""
    return raw and K == 128 and dtype == torch.bfloat16 and capability(device) == (9, 0)
