"""`latent_decode_gluon` of mla_decode_gluon.py for latents in fp8 (latents.py), for Hopper too.

A multiprocessor has two programs of four warps, or one of eight: while one waits or makes weights,
products of the other run. A tile of bytes is copied and stays as it is.

    scores [BN, 2 BM] = c8 q_c^T        of e4m3 in shared memory; q_c is a sum of two of them
    output [R, BM] += c8^T (a p)        takes c8 from registers, as fp16, in which it is exact

Queries are first multiplied by a power of two, each by its own: the largest number of q_c is about
2^7, or that of q_r 2^15 if that is less. The parts of q_c are the first four bits and the four
behind them, times 16. In the columns of the product they lie 8 apart, so that one thread has both
and adds them. Eight bits are all of bf16, three less than fp16.

For the copy engine and for the loads into registers two neighbouring bytes are one number of 16
bits. In the output the pairs are of one channel pair and two latents: even and odd channels are two
sums, and while the product of one runs, the other's operand is converted.

Weights are in fp16, of bf16 queries too. What is multiplied by a is 2^(s - x), which the sum of
weights has without it; x follows the maximum of s + log2 a.

At large batches the GPU is at its limit of power, so every instruction counts, also where another
would have waited for memory.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_kernels.dispatch import capability
from kimi_kernels.mla_decode_gluon import (
    can_be_copied,
    cols,
    describe_tiles,
    greatest_of_warps,
    later,
    opaque,
    outgrown,
    rows,
)
from kimi_kernels.mla_decode_triton import (
    LOW,
    Rows,
    count_visible,
    find_run,
    load_scales,
    wait_for_new_latents,
)
from kimi_kernels.overlap import wait_for_inputs
from kimi_kernels.triton_math import RCP_LN2, ex2, lg2


@gluon.jit
def sort_pairs(x):
    """Two numbers of 16 bits, each two e4m3 -> one of both first ones, one of both second ones."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [x], dtype=gl.int16, is_pure=True, pack=2
    )


@gluon.jit
def pair_to_fp16(x, which: gl.constexpr):
    """Of two numbers of 16 bits, a and b, the one asked for: two e4m3, as two fp16."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, " + which + "; }",
        "=r,r", [x], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def copy_part(tiles, i_b, i, x, bar, wanted):
    """Where `wanted`, start to copy tile i of sequence i_b to x."""
    x = x._reinterpret(x.dtype, tiles.block_shape, tiles.layout)
    mbarrier.expect(bar, tiles.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(tiles, [i_b, i * tiles.block_shape[1], 0], bar, x, pred=wanted)


@gluon.jit
def high_and_low(x):
    """[N, 2 M] -> of every 16 columns the first 8 and the last 8, each [N, M]."""
    N: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1] // 2
    a, b = gl.split(x.reshape((N, M // 8, 2, 8)).permute((0, 1, 3, 2)))
    return a.reshape((N, M)), b.reshape((N, M))


@gluon.jit
def greatest_exponent(x):
    """[M, N] in fp32 -> [M], with its bias of 127."""
    return gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23


@gluon.jit
def both_halves(a, b):
    """Two of [M, N] -> [2 M, N], 8 rows of the one, then 8 of the other."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = a.shape[1]
    return gl.join(a, b).reshape((M // 8, 8, N, 2)).permute((0, 3, 1, 2)).reshape((2 * M, N))


@gluon.jit(do_not_specialize=["B", "T", "S", "P", "rows_f"])
def latent_fp8_gluon(
    q_c, q, c_tiles, r_tiles, factors, positions, o, part, weight, runs,
    B, T, S, P, scale, rows_f,
    H: gl.constexpr, R: gl.constexpr, L: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BB: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As `latent_decode_kernel`; c_tiles, in pairs of channels, and r_tiles describe the parts."""
    W: gl.constexpr = gl.num_warps()
    DT: gl.constexpr = q_c.dtype.element_ty
    F8: gl.constexpr = gl.float8e4nv
    G: gl.constexpr = W // 4  # groups of warps, each with its queries
    J: gl.constexpr = 4 * W  # latents per step of the output: 16 registers
    PRODUCT8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, G], [16, 2 * BM // G, 32])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, G], [16, BM // G, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BM, 16])
    O_A: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    S_N: gl.constexpr = gl.SliceLayout(1, SCORES)
    S_M: gl.constexpr = gl.SliceLayout(0, SCORES)
    O_M: gl.constexpr = gl.SliceLayout(0, OUTPUT)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [W, 1], [1, 0])
    LOAD_R: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    C_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, R // 2], gl.int16)
    C8_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, R], F8)
    R_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, L - R], DT)
    QR_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, L - R], DT)
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * BM, R], F8)
    P_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], gl.float16)
    c_s = gl.allocate_shared_memory(gl.int16, [2, BN, R // 2], C_TILE)
    r_s = gl.allocate_shared_memory(DT, [1, BN, L - R], R_TILE)
    q_s = gl.allocate_shared_memory(F8, [1, 2 * BM, R], Q_TILE)
    qr_s = gl.allocate_shared_memory(DT, [1, BM, L - R], QR_TILE)
    p_s = gl.allocate_shared_memory(gl.float16, [BN, BM], P_TILE)
    flags = gl.allocate_shared_memory(gl.int32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    r_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(bars.index(k), count=1)
    mbarrier.init(r_bar, count=1)
    fence_async_shared()

    blocks = (T * H + BM - 1) // BM
    i_m, i_p = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    # every warp has all of the sequences: no exchange through shared memory
    o_b = gl.arange(0, BB, gl.BlockedLayout([(BB + 31) // 32], [32], [W], [0]))
    lo, hi, i_b, start, share = find_run(positions, o_b, i_p, i_m, B, T, S, P, H, BM, BN)
    o_n = gl.arange(0, BN, S_N)
    count = 0  # tiles used so far
    while lo < hi:
        n = count_visible(positions, i_b, i_b < B, i_m, T, S, H, BM)
        end = start + (n + BN - 1) // BN
        stop = gl.minimum(end, hi)
        two_tiles = (gl.minimum(lo + 2, stop) - start) * BN
        wait_for_new_latents(positions, i_b, two_tiles, T, S, OVERLAP)
        copy_part(r_tiles, i_b, lo - start, r_s.index(0), r_bar, lo < stop)
        for k in gl.static_range(2):
            at = (count + k) % 2
            copy_part(c_tiles, i_b, lo - start + k, c_s.index(at), bars.index(at), lo + k < stop)
        wait_for_inputs(OVERLAP)  # as in mla_decode_gluon.py
        token, o_q = i_b.to(gl.int64) * T, later(i_m) * BM
        s_m = o_q + gl.arange(0, BM, S_M)
        if positions is None:
            last = S - T + s_m // H
        else:
            last = gl.load(positions + token + s_m // H, mask=s_m < T * H, other=-1)
            last = gl.maximum(gl.minimum(last, S - 1), -1).to(gl.int32)
        last = gl.where(s_m < T * H, last, -1)
        seen = gl.min(gl.where(s_m < T * H, last, S), 0)  # by all queries
        i_q = o_q + rows(BM, LOAD)
        p_q = q_c + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R
        b_q = gl.load(p_q + cols(R, LOAD), mask=i_q < T * H, other=0.0).to(gl.float32)
        i_q = o_q + rows(BM, LOAD_R)
        p_q = q + ((token + i_q // H) * H + i_q % H) * D + (D - (L - R))
        b_u = gl.load(p_q + cols(L - R, LOAD_R), mask=i_q < T * H, other=0.0).to(gl.float32)
        b_k = gl.convert_layout(greatest_exponent(b_u), gl.SliceLayout(1, LOAD)) - 7
        b_k = gl.maximum(gl.maximum(greatest_exponent(b_q), b_k), 14)
        b_i = ((261 - b_k) << 23).to(gl.float32, bitcast=True)[:, None]
        b_q = b_q * b_i  # below 2^8
        qr_s.index(0).store((b_u * gl.convert_layout(b_i, LOAD_R)).to(DT))
        # rounded to four bits here: read back from e4m3, it is compiled wrong (CONTRIBUTING.md)
        b_h = (b_q.to(gl.int32, bitcast=True) + 0x80000) & -0x100000
        b_h = b_h.to(gl.float32, bitcast=True)
        q_s.index(0).store(both_halves(b_h.to(F8), ((b_q - b_h) * 16).to(F8)))
        b_g = ((b_k - 7) << 23).to(gl.float32, bitcast=True) * (scale * RCP_LN2)
        b_g = gl.convert_layout(b_g, S_M)
        p_f, i_n = factors + i_b.to(gl.int64) * rows_f, (lo - start) * BN + o_n
        b_a = load_scales(p_f + i_n, i_n < n)
        fence_async_shared()
        b_0 = gl.zeros([R // 2, BM], gl.float32, OUTPUT)  # even channels
        b_1 = b_0  # odd channels
        b_m, b_w = gl.full([BM], LOW, gl.float32, S_M), gl.zeros([BN, BM], gl.float32, SCORES)
        for i in range(lo - start, stop - start):
            i_n = (i + 1) * BN + o_n
            b_f = load_scales(p_f + i_n, i_n < n)  # of the next tile
            c = c_s.index(count % 2)
            mbarrier.wait(bars.index(count % 2), (count // 2) & 1)
            c8, b_q8 = c._reinterpret(F8, [BN, R], C8_TILE), opaque(q_s).permute((1, 0))
            b_c = gl.zeros([BN, 2 * BM], gl.float32, PRODUCT8)
            b_c = warpgroup_mma(c8, b_q8, b_c, use_acc=False, is_async=True)
            mbarrier.wait(r_bar, count & 1)
            b_r = gl.zeros([BN, BM], gl.float32, SCORES)
            b_qr = opaque(qr_s).permute((1, 0))
            b_r = warpgroup_mma(r_s.index(0), b_qr, b_r, use_acc=False, is_async=True)
            b_c, b_r = warpgroup_mma_wait(0, deps=[b_c, b_r])
            b_y, b_l = high_and_low(b_c)
            b_y = gl.convert_layout(b_y + b_l * 0.0625, SCORES, assert_trivial=True)
            b_y = b_y * b_a[:, None] + b_r
            b_s = b_y * b_g[None, :] - b_m[None, :]
            if (i + 1) * BN - 1 > seen:
                b_s = gl.where(i * BN + o_n[:, None] <= last[None, :], b_s, -float("inf"))
            b_e = ex2(b_s)
            b_p = b_e * b_a[:, None]
            p_s.store(b_p.to(gl.float16))
            flags.store(greatest_of_warps(b_p))
            fence_async_shared()
            if outgrown(flags):
                b_s = gl.where(b_e == 0, -float("inf"), b_y * b_g[None, :])
                b_x = gl.max(b_s + lg2(b_a)[:, None], 0)
                b_x = gl.where(b_x > b_m + 15, b_x - 7, b_m)
                b_d, b_m = ex2(b_m - b_x), b_x
                b_e = ex2(b_s - b_m[None, :])
                p_s.store((b_e * b_a[:, None]).to(gl.float16))
                fence_async_shared()
                b_w *= b_d[None, :]
                b_d = gl.convert_layout(b_d, O_M)[None, :]
                b_0, b_1 = b_0 * b_d, b_1 * b_d
            b_w += b_e  # summed over the latents at the end
            copy_part(r_tiles, i_b, i + 1, r_s.index(0), r_bar, i + 1 < stop - start)
            x = sort_pairs(c.slice(0, J).permute((1, 0)).load(O_A))
            for j in gl.static_range(BN // J):
                p = p_s.slice(J * j, J)
                x_0 = pair_to_fp16(x, "a")
                b_0 = warpgroup_mma(x_0, p, b_0, is_async=True)
                b_0, b_1 = warpgroup_mma_wait(1, deps=[b_0, b_1])
                x_1 = pair_to_fp16(x, "b")
                b_1 = warpgroup_mma(x_1, p, b_1, is_async=True)
                if j + 1 < BN // J:
                    x = sort_pairs(c.slice(J * (j + 1), J).permute((1, 0)).load(O_A))
                b_0, b_1 = warpgroup_mma_wait(1, deps=[b_0, b_1])
            b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
            copy_part(c_tiles, i_b, i + 2, c, bars.index(count % 2), i + 2 < stop - start)
            b_a, count = b_f, count + 1
        b_z = gl.sum(b_w, 0)
        s_m, o_r = later(i_m) * BM + gl.arange(0, BM, S_M), 2 * rows(R // 2, OUTPUT)
        i_q = later(i_m) * BM + cols(BM, OUTPUT)
        if (lo == start) & (stop == end):
            b_d = gl.convert_layout(1 / gl.where(b_z > 0, b_z, 1.0), O_M)
            p_o = o + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R + o_r
            gl.store(p_o, (b_0 * b_d[None, :]).to(DT), mask=i_q < T * H)
            gl.store(p_o + 1, (b_1 * b_d[None, :]).to(DT), mask=i_q < T * H)
        else:
            slot = (i_p + i_b).to(gl.int64) * T * H
            gl.store(part + (slot + i_q) * R + o_r, b_0, mask=i_q < T * H)
            gl.store(part + (slot + i_q) * R + o_r + 1, b_1, mask=i_q < T * H)
            gl.store(weight + (slot + s_m) * 2, b_m, mask=s_m < T * H)
            gl.store(weight + (slot + s_m) * 2 + 1, b_z, mask=s_m < T * H)
        if lo == start:
            p_runs = runs + (i_b.to(gl.int64) * blocks + i_m) * 2
            gl.store(p_runs, i_p + i_b)
            gl.store(p_runs + 1, (end - 1) // share - i_p + 1)
        i_b, start, lo = i_b + 1, end, stop
    wait_for_inputs(OVERLAP)


def takes(c: Rows, k_r: Rows) -> bool:
    """Whether the kernel serves latents of these parts."""
    return (
        capability(c.x.device) == (9, 0)
        and k_r.x.dtype in (torch.bfloat16, torch.float16)
        and c.x.shape[2] in (256, 512)
        and k_r.x.shape[2] in (16, 32, 64, 128)
        and can_be_copied(c)
        and can_be_copied(k_r)
    )


def pick_tiles(queries: int, R: int, P: int) -> tuple[dict[str, int], int]:
    """For so many queries per sequence: tiles, and programs that a multiprocessor has room for."""
    BM = 32 if queries <= 32 else 64
    return {"BM": BM, "BN": 64, "num_warps": BM // 8}, 2 if BM == 32 and R + P <= 576 else 1


def launch(
    grid: tuple[int], q_c: Tensor, q: Tensor, c: Rows, k_r: Rows, factors: Tensor,
    args: tuple, constants: dict[str, Any],
) -> None:  # fmt: skip
    BN, pairs = constants["BN"], Rows(c.x.view(torch.int16), c.stride // 2, c.rows)
    tiles = describe_tiles(pairs, BN), describe_tiles(k_r, BN)
    latent_fp8_gluon[grid](q_c, q, *tiles, factors, *args, factors.stride(0), **constants)
