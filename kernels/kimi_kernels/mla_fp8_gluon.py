"""`latent_decode_gluon` of mla_decode_gluon.py for latents in fp8 (latents.py), for Hopper too.

A tile of bytes is copied and stays as it is. Both products take it as their left operand from
registers, as fp16, in which every e4m3 is exact: two of them in one instruction.

    scores [BN, BM] = a c8 q_c^T + k_r q_r^T    a group of four warps has 64 latents
    output [R, BM] += c8^T (a p)                on top of each other, each with all BM queries

For the copy engine and for the loads into registers two neighbouring bytes are one number of 16
bits. Of a pair of pairs, which is what a thread has in a register, the scores take first one pair
and then the other: q_c lies in shared memory in that order of channels (`channel`). In the output
the pairs are of one channel pair and two latents: even and odd channels are two sums.

q_c is in fp16 as well, each query times a power of two so that its largest number is about 2^13.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_kernels.dispatch import capability
from kimi_kernels.mla_decode_gluon import (
    can_be_copied,
    cols,
    copy_tile,
    describe_tiles,
    later,
    rows,
)
from kimi_kernels.mla_decode_triton import LOW, Rows, count_visible, find_run, load_scales
from kimi_kernels.overlap import wait_for_inputs
from kimi_kernels.triton_math import RCP_LN2, ex2, lg2


@gluon.jit
def pair_by_pair(x):
    """Two numbers of 16 bits, each two e4m3 -> the fp16 of the first, and those of the second."""
    return gl.inline_asm_elementwise(
        """{ .reg .b16 a, b;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b; }""",
        "=r,=r,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def even_and_odd(x):
    """Two numbers of 16 bits, each two e4m3 -> the fp16 of both first ones, and of the second."""
    return gl.inline_asm_elementwise(
        """{ .reg .b16 a, b; .reg .b32 x;
        prmt.b32 x, $2, 0, 0x3120;
        mov.b32 {a, b}, x;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b; }""",
        "=r,=r,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


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
    G: gl.constexpr = BN // 64  # groups of four warps, one below the other
    N: gl.constexpr = BM // (W // 4 // G)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * G, W // 4 // G], [16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BM, 16])
    S_A: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    O_A: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    S_N: gl.constexpr = gl.SliceLayout(1, SCORES)
    S_M: gl.constexpr = gl.SliceLayout(0, SCORES)
    O_M: gl.constexpr = gl.SliceLayout(0, OUTPUT)
    LOAD_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [W, 1], [1, 0])
    LOAD_R: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    C_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, R // 2], gl.int16)
    R_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, L - R], DT)
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, R], gl.float16)
    P_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], gl.float16)
    c_s = gl.allocate_shared_memory(gl.int16, [2, BN, R // 2], C_TILE)
    r_s = gl.allocate_shared_memory(DT, [2, BN, L - R], R_TILE)
    qc_s = gl.allocate_shared_memory(gl.float16, [1, BM, R], Q_TILE)
    qr_s = gl.allocate_shared_memory(DT, [BM, L - R], R_TILE)
    p_s = gl.allocate_shared_memory(gl.float16, [BN, BM], P_TILE)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(bars.index(k), count=1)
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
        for k in gl.static_range(2):
            i, wanted = lo - start + k, lo + k < stop
            copy_tile(c_tiles, r_tiles, i_b, i, c_s, r_s, bars, count + k, wanted)
        wait_for_inputs(OVERLAP)  # as in mla_decode_gluon.py
        token, o_q = i_b.to(gl.int64) * T, later(i_m) * BM
        s_m = o_q + cols(BM, SCORES)
        if positions is None:
            last = S - T + s_m // H
        else:
            last = gl.load(positions + token + s_m // H, mask=s_m < T * H, other=-1)
            last = gl.maximum(gl.minimum(last, S - 1), -1).to(gl.int32)
        last = gl.where(s_m < T * H, last, -1)
        i_q = o_q + rows(BM, LOAD_R)
        p_q = q + ((token + i_q // H) * H + i_q % H) * D + (D - (L - R))
        qr_s.store(gl.load(p_q + cols(L - R, LOAD_R), mask=i_q < T * H, other=0.0))
        i_q = o_q + rows(BM, LOAD_C)
        p_q = q_c + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R
        b_q = gl.load(p_q + cols(R, LOAD_C), mask=i_q < T * H, other=0.0).to(gl.float32)
        b_e = gl.max(gl.abs(b_q), 1).to(gl.int32, bitcast=True) >> 23  # [BM], with its bias of 127
        b_e = gl.maximum(b_e, 14)
        b_g = ((267 - b_e) << 23).to(gl.float32, bitcast=True)
        b_q = (b_q * b_g[:, None]).to(gl.float16).reshape((BM, R // 128, 32, 2, 2))
        qc_s.index(0).store(b_q.permute((0, 1, 3, 2, 4)).reshape((BM, R)))
        b_g = ((b_e - 13) << 23).to(gl.float32, bitcast=True) * (scale * RCP_LN2)
        b_g = gl.convert_layout(b_g, S_M)
        fence_async_shared()
        b_0 = gl.zeros([R // 2, BM], gl.float32, OUTPUT)  # even channels
        b_1 = b_0  # odd channels
        b_m, b_w = gl.full([BM], LOW, gl.float32, S_M), gl.zeros([BN, BM], gl.float32, SCORES)
        p_f, i_n = factors + i_b.to(gl.int64) * rows_f, (lo - start) * BN + o_n
        b_f = load_scales(p_f + i_n, i_n < n)
        for i in range(lo - start, stop - start):
            i_n = (i + 1) * BN + o_n
            b_next = load_scales(p_f + i_n, i_n < n)
            c, r = c_s.index(count % 2), r_s.index(count % 2)
            mbarrier.wait(bars.index(count % 2), (count // 2) & 1)
            b_s = gl.zeros([BN, BM], gl.float32, SCORES)
            b_r = warpgroup_mma(r, qr_s.permute((1, 0)), b_s, use_acc=False, is_async=True)
            q_s = qc_s.index(later(0))
            for j in gl.static_range(R // 128):
                x_0, x_1 = pair_by_pair(c.slice(64 * j, 64, dim=1).load(S_A))
                q_0 = q_s.slice(128 * j, 64, dim=1).permute((1, 0))
                q_1 = q_s.slice(128 * j + 64, 64, dim=1).permute((1, 0))
                b_s = warpgroup_mma(x_0, q_0, b_s, use_acc=j > 0, is_async=True)
                b_s = warpgroup_mma(x_1, q_1, b_s, is_async=True)
                b_s = warpgroup_mma_wait(2, deps=[b_s])
            b_s, b_r = warpgroup_mma_wait(0, deps=[b_s, b_r])
            b_s = b_s * b_f[:, None] * b_g[None, :] + b_r * (scale * RCP_LN2) + lg2(b_f)[:, None]
            b_s = gl.where(i * BN + rows(BN, SCORES) <= last, b_s, -float("inf"))
            b_x = gl.maximum(b_m, gl.max(b_s, 0))
            b_p, b_d = ex2(b_s - b_x[None, :]), ex2(b_m - b_x)
            b_w = b_w * b_d[None, :] + b_p * (1 / b_f)[:, None]  # summed at the end
            p_s.store(b_p.to(gl.float16))
            fence_async_shared()
            b_d = gl.convert_layout(b_d, O_M)[None, :]
            b_0, b_1 = b_0 * b_d, b_1 * b_d
            for j in gl.static_range(BN // 32):
                x_0, x_1 = even_and_odd(c.slice(32 * j, 32).permute((1, 0)).load(O_A))
                p = p_s.slice(32 * j, 32)
                b_0 = warpgroup_mma(x_0, p, b_0, is_async=True)
                b_1 = warpgroup_mma(x_1, p, b_1, is_async=True)
                b_0, b_1 = warpgroup_mma_wait(2, deps=[b_0, b_1])
            b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
            wanted = i + 2 < stop - start
            copy_tile(c_tiles, r_tiles, i_b, i + 2, c_s, r_s, bars, count, wanted)
            b_m, b_f, count = b_x, b_next, count + 1
        b_z = gl.sum(b_w, 0)
        o_q = later(i_m) * BM
        s_m, i_q, o_r = o_q + cols(BM, SCORES), o_q + cols(BM, OUTPUT), 2 * rows(R // 2, OUTPUT)
        if (lo == start) & (stop == end):
            b_d = gl.convert_layout(1 / gl.where(b_z > 0, b_z, 1.0), O_M)[None, :]
            p_o = o + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R + o_r
            gl.store(p_o, (b_0 * b_d).to(DT), mask=i_q < T * H)
            gl.store(p_o + 1, (b_1 * b_d).to(DT), mask=i_q < T * H)
        else:
            slot = (i_p + i_b).to(gl.int64) * T * H
            gl.store(part + (slot + i_q) * R + o_r, b_0, mask=i_q < T * H)
            gl.store(part + (slot + i_q) * R + o_r + 1, b_1, mask=i_q < T * H)
            gl.store(weight + (slot + s_m) * 2, b_m[None, :], mask=s_m < T * H)
            gl.store(weight + (slot + s_m) * 2 + 1, b_z[None, :], mask=s_m < T * H)
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


def pick_tiles(queries: int, R: int, P: int) -> dict[str, int]:
    """Tiles for so many queries per sequence: two of 128 latents, where they fit with them."""
    BM = 16 if queries <= 16 else 32 if queries <= 32 or P > 64 else 64
    return {"BM": BM, "BN": 128 if BM < 64 and P <= 64 else 64, "num_warps": 8}


def launch(
    grid: tuple[int], q_c: Tensor, q: Tensor, c: Rows, k_r: Rows, factors: Tensor,
    args: tuple, constants: dict[str, Any],
) -> None:  # fmt: skip
    BN, pairs = constants["BN"], Rows(c.x.view(torch.int16), c.stride // 2, c.rows)
    tiles = describe_tiles(pairs, BN), describe_tiles(k_r, BN)
    latent_fp8_gluon[grid](q_c, q, *tiles, factors, *args, factors.stride(0), **constants)
