"""`latent_decode_kernel` of mla_decode_triton.py in Gluon, for Hopper and 16-bit latents.

Two tiles of latents in shared memory, filled by the copy engine: the copy of tile i + 2 starts when
tile i has been used, so one is under way during all of the arithmetic on the other. Triton's own
pipeline starts a copy at the end of an iteration and waits for it at the start of the next, unless
there is room for three tiles.

    scores [BN, BM] = c q_c^T + k_r q_r^T       warpgroups side by side, each with all BN latents
    output [R, BM] += c^T p                     on top of each other, each with all BM queries

A tile is the left operand of both products where it lies. Queries and p go through shared memory,
with a fence between the threads' writes and the `wgmma` that reads them.

Weights are made before it is known whether x has to follow the maximum, 15 above it: each warp
leaves the greatest of its weights beside them. Where one is above 2^15, the maxima of all queries
are taken, over all warps, and the tile's weights made again.
"""

import functools
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kimi_kernels.dispatch import capability
from kimi_kernels.mla_decode_triton import (
    LOW,
    Rows,
    count_visible,
    find_run,
    wait_for_new_latents,
)
from kimi_kernels.overlap import wait_for_inputs
from kimi_kernels.triton_math import RCP_LN2, ex2


@gluon.jit
def rows(n: gl.constexpr, layout: gl.constexpr):
    return gl.arange(0, n, gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def cols(n: gl.constexpr, layout: gl.constexpr):
    return gl.arange(0, n, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def later(x):
    """x, and nothing made of it is computed before this point and kept in registers until then.

    The compiler would do that with addresses, and spill up to 600 bytes per thread.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def opaque(x):
    """The buffer of x [1, ..], at an address that is only known in the iteration of a loop.

    Otherwise the descriptors that products take it by are kept in registers over all of the loop,
    and moved to others before each product: with latents in fp8 a tenth of all instructions.
    """
    return x.index(later(gl.to_tensor(0)))


@gluon.jit
def greatest_of_warps(x):
    """[N, M], not negative, by four warps or two such groups side by side -> the bits of each's."""
    N: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    G: gl.constexpr = gl.num_warps() // 4
    x = x.to(gl.int32, bitcast=True).reshape((4, N // 4, G, M // G)).permute((0, 2, 1, 3))
    return gl.max(x.reshape((4 * G, N // 4 * (M // G))), 1)


@gluon.jit
def outgrown(flags):
    """Whether a warp has left a weight above 2^15 there."""
    W: gl.constexpr = gl.num_warps()
    ALL: gl.constexpr = gl.BlockedLayout([W], [32], [W], [0])
    return gl.max(flags.load(ALL), 0) > 0x47000000


@gluon.jit
def copy_tile(c_tiles, r_tiles, i_b, i, c_s, r_s, bars, count, wanted):
    """Where `wanted`, start to copy tile i of sequence i_b, the count-th of this program."""
    c, r, bar = c_s.index(count % 2), r_s.index(count % 2), bars.index(count % 2)
    c = c._reinterpret(c.dtype, c_tiles.block_shape, c_tiles.layout)
    r = r._reinterpret(r.dtype, r_tiles.block_shape, r_tiles.layout)
    i_n = i * c_tiles.block_shape[1]
    mbarrier.expect(bar, c_tiles.block_type.nbytes + r_tiles.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(c_tiles, [i_b, i_n, 0], bar, c, pred=wanted)
    tma.async_copy_global_to_shared(r_tiles, [i_b, i_n, 0], bar, r, pred=wanted)


@gluon.jit(do_not_specialize=["B", "T", "S", "P"])
def latent_decode_gluon(
    q_c, q, c_tiles, r_tiles, positions, o, part, weight, runs,
    B, T, S, P, scale,
    H: gl.constexpr, R: gl.constexpr, L: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BB: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As `latent_decode_kernel`; c_tiles and r_tiles describe the latents' parts [B, S, ..]."""
    W: gl.constexpr = gl.num_warps()
    DT: gl.constexpr = q_c.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, BM // (W // 4), 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BM, 16])
    S_M: gl.constexpr = gl.SliceLayout(0, SCORES)
    O_M: gl.constexpr = gl.SliceLayout(0, OUTPUT)
    LOAD_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [W, 1], [1, 0])
    LOAD_R: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    C_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, R], DT)
    R_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, L - R], DT)
    P_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], DT)
    c_s = gl.allocate_shared_memory(DT, [2, BN, R], C_TILE)
    r_s = gl.allocate_shared_memory(DT, [2, BN, L - R], R_TILE)
    qc_s = gl.allocate_shared_memory(DT, [1, BM, R], C_TILE)
    qr_s = gl.allocate_shared_memory(DT, [1, BM, L - R], R_TILE)
    p_s = gl.allocate_shared_memory(DT, [1, BN, BM], P_TILE)
    flags = gl.allocate_shared_memory(gl.int32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(bars.index(k), count=1)
    fence_async_shared()

    blocks = (T * H + BM - 1) // BM
    i_m, i_p = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    # every warp has all of the sequences: no exchange through shared memory
    o_b = gl.arange(0, BB, gl.BlockedLayout([(BB + 31) // 32], [32], [W], [0]))
    lo, hi, i_b, start, share = find_run(positions, o_b, i_p, i_m, B, T, S, P, H, BM, BN)
    count = 0  # tiles used so far
    while lo < hi:
        n = count_visible(positions, i_b, i_b < B, i_m, T, S, H, BM)
        end = start + (n + BN - 1) // BN
        stop = gl.minimum(end, hi)
        two_tiles = (gl.minimum(lo + 2, stop) - start) * BN
        wait_for_new_latents(positions, i_b, two_tiles, T, S, OVERLAP)
        for k in gl.static_range(2):
            i, wanted = lo - start + k, lo + k < stop
            copy_tile(c_tiles, r_tiles, i_b, i, c_s, r_s, bars, count + k, wanted)
        wait_for_inputs(OVERLAP)  # the queries and new latents; positions come from before them
        token, o_q = i_b.to(gl.int64) * T, later(i_m) * BM
        s_m = o_q + cols(BM, SCORES)
        if positions is None:
            last = S - T + s_m // H
        else:
            last = gl.load(positions + token + s_m // H, mask=s_m < T * H, other=-1)
            last = gl.maximum(gl.minimum(last, S - 1), -1).to(gl.int32)
        last = gl.where(s_m < T * H, last, -1)
        seen = gl.min(gl.min(gl.where(s_m < T * H, last, S), 1), 0)  # by all queries
        i_q = o_q + rows(BM, LOAD_C)
        p_q = q_c + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R
        qc_s.index(0).store(gl.load(p_q + cols(R, LOAD_C), mask=i_q < T * H, other=0.0))
        i_q = o_q + rows(BM, LOAD_R)
        p_q = q + ((token + i_q // H) * H + i_q % H) * D + (D - (L - R))
        qr_s.index(0).store(gl.load(p_q + cols(L - R, LOAD_R), mask=i_q < T * H, other=0.0))
        fence_async_shared()
        b_o = gl.zeros([R, BM], gl.float32, OUTPUT)
        b_m, b_w = gl.full([BM], LOW, gl.float32, S_M), gl.zeros([BN, BM], gl.float32, SCORES)
        for i in range(lo - start, stop - start):
            c, r = c_s.index(count % 2), r_s.index(count % 2)
            mbarrier.wait(bars.index(count % 2), (count // 2) & 1)
            b_s = gl.zeros([BN, BM], gl.float32, SCORES)
            b_qc, b_qr = opaque(qc_s).permute((1, 0)), opaque(qr_s).permute((1, 0))
            b_s = warpgroup_mma(c, b_qc, b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma(r, b_qr, b_s, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            b_t = b_s * (scale * RCP_LN2) - b_m[None, :]
            if (i + 1) * BN - 1 > seen:
                b_t = gl.where(i * BN + rows(BN, SCORES) <= last, b_t, -float("inf"))
            b_p = ex2(b_t)
            p_s.index(0).store(b_p.to(DT))
            flags.store(greatest_of_warps(b_p))
            fence_async_shared()
            if outgrown(flags):
                b_s = gl.where(b_p == 0, -float("inf"), b_s * (scale * RCP_LN2))
                b_x = gl.max(b_s, 0)
                b_x = gl.where(b_x > b_m + 15, b_x - 7, b_m)
                b_d, b_m = ex2(b_m - b_x), b_x
                b_p = ex2(b_s - b_m[None, :])
                p_s.index(0).store(b_p.to(DT))
                fence_async_shared()
                b_w *= b_d[None, :]
                b_o *= gl.convert_layout(b_d, O_M)[None, :]
            b_w += b_p  # summed over the latents at the end
            b_o = warpgroup_mma(c.permute((1, 0)), opaque(p_s), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, deps=[b_o])
            wanted = i + 2 < stop - start
            copy_tile(c_tiles, r_tiles, i_b, i + 2, c_s, r_s, bars, count, wanted)
            count += 1
        b_z = gl.sum(b_w, 0)
        o_q = later(i_m) * BM
        s_m, i_q, o_r = o_q + cols(BM, SCORES), o_q + cols(BM, OUTPUT), rows(R, OUTPUT)
        if (lo == start) & (stop == end):
            b_o *= gl.convert_layout(1 / gl.where(b_z > 0, b_z, 1.0), O_M)[None, :]
            p_o = o + ((i_q % H).to(gl.int64) * B * T + token + i_q // H) * R
            gl.store(p_o + o_r, b_o.to(DT), mask=i_q < T * H)
        else:
            slot = (i_p + i_b).to(gl.int64) * T * H
            gl.store(part + (slot + i_q) * R + o_r, b_o, mask=i_q < T * H)
            gl.store(weight + (slot + s_m) * 2, b_m[None, :], mask=s_m < T * H)
            gl.store(weight + (slot + s_m) * 2 + 1, b_z[None, :], mask=s_m < T * H)
        if lo == start:
            p_runs = runs + (i_b.to(gl.int64) * blocks + i_m) * 2
            gl.store(p_runs, i_p + i_b)
            gl.store(p_runs + 1, (end - 1) // share - i_p + 1)
        i_b, start, lo = i_b + 1, end, stop
    wait_for_inputs(OVERLAP)  # also where there is no run


def can_be_copied(part: Rows) -> bool:
    """Whether the copy engine reads it: 16-byte rows, and sequences that do not overlap."""
    x = part.x
    aligned = (x.data_ptr() | part.stride * x.element_size()) % 16 == 0
    return aligned and part.rows >= x.shape[1]


def takes(c: Rows, k_r: Rows) -> bool:
    """Whether the kernel serves latents of these parts."""
    return (
        capability(c.x.device) == (9, 0)
        and c.x.dtype in (torch.bfloat16, torch.float16)
        and c.x.shape[2] in (64, 128, 256, 512)
        and k_r.x.shape[2] in (16, 32, 64, 128)
        and can_be_copied(c)
        and can_be_copied(k_r)
    )


def pick_tiles(queries: int, R: int, P: int) -> tuple[dict[str, int], int]:
    """For so many queries per sequence: tiles, and programs that a multiprocessor has room for.

    Two tiles of 64 latents, and 64 queries where they fit with them.
    """
    BM = 16 if queries <= 16 else 32 if queries <= 32 or R + P > 576 else 64
    return {"BM": BM, "BN": 64, "num_warps": 8 if BM == 64 and R > 64 else 4}, 1


@functools.cache
def tile_layout(BN: int, channels: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, BN, channels], gl.float16)


def describe_tiles(part: Rows, BN: int) -> TensorDescriptor:
    """A part of the latents for the copy engine; past the end of a sequence there are zeros.

    Two dimensions would do, but then a sequence's last tile had the next one's latents in it, whose
    weights are 0, which does not help against inf and nan.
    """
    (B, S, channels), s_t = part.x.shape, part.stride
    strides, tile = [part.rows * s_t, s_t, 1], [1, BN, channels]
    return TensorDescriptor(part.x, [B, S, channels], strides, tile, tile_layout(BN, channels))


def launch(
    grid: tuple[int], q_c: Tensor, q: Tensor, c: Rows, k_r: Rows, factors: None,
    args: tuple, constants: dict[str, Any],
) -> None:  # fmt: skip
    tiles = (describe_tiles(x, constants["BN"]) for x in (c, k_r))
    latent_decode_gluon[grid](q_c, q, *tiles, *args, **constants)
