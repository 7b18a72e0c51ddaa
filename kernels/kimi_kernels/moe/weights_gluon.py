"""Sums over the rows of each expert on Hopper, in Gluon: `weights_kernel` of grouped_gemm.py.

Twelve warps per multiprocessor, which stay for all tiles of weights that are theirs. Four copy rows
of a and b, gathered or not, to shared memory, STAGES steps ahead, also of the next tile while the
last one is stored. Two times four multiply, [64, BN] each of the [BM, BN] of a tile, and share b.
Rows are their depth, so both operands lie transposed in shared memory, which `wgmma` reads as well.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_kernels.dispatch import capability

BM, BN, BK = gl.constexpr(128), gl.constexpr(256), gl.constexpr(64)
STAGES = gl.constexpr(4)  # 192 KB
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # [64, 64], 16 bytes each


@gluon.jit
def tile_at(t, offsets, NM: gl.constexpr, NN: gl.constexpr):
    """Of tile t: expert, its first row and the one past its last, first row and column of dw."""
    i_e = t // (NM * NN)
    first, end = gl.load(offsets + i_e), gl.load(offsets + i_e + 1)
    return i_e, first, end, t // NN % NM * BM, t % NN * BN


@gluon.jit
def copy_rows(
    a, b, order, offsets, a_s, b_s, full, empty,
    E: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    GATHER_A: gl.constexpr, GATHER_B: gl.constexpr,
):  # fmt: skip
    NM: gl.constexpr = M // BM
    NN: gl.constexpr = N // BN
    o_c, o_k = gl.arange(0, 64, gl.SliceLayout(0, ROWS)), gl.arange(0, BK, gl.SliceLayout(1, ROWS))
    i = 0
    for t in range(gl.program_id(0), E * NM * NN, gl.num_programs(0)):
        _, first, end, i_m, i_n = tile_at(t, offsets, NM, NN)
        slot = gl.load(order + first + o_k, mask=first + o_k < end, other=0)
        for k in range(first, end, BK):
            s = i % STAGES
            row = k + o_k
            m = (row < end)[:, None]
            r_a = slot // GATHER_A if GATHER_A > 0 else row
            r_b = slot // GATHER_B if GATHER_B > 0 else row
            p_a = a + r_a.to(gl.int64)[:, None] * M + (i_m + o_c)[None, :]
            p_b = b + r_b.to(gl.int64)[:, None] * N + (i_n + o_c)[None, :]
            slot = gl.load(order + row + BK, mask=row + BK < end, other=0)
            mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
            for j in gl.static_range(BM // 64):
                async_copy.async_copy_global_to_shared(a_s.index(s * 2 + j), p_a + j * 64, mask=m)
            for j in gl.static_range(BN // 64):
                part = b_s.index(s).slice(j * 64, 64, dim=1)
                async_copy.async_copy_global_to_shared(part, p_b + j * 64, mask=m)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            i += 1


@gluon.jit
def store(p, x, N: gl.constexpr):
    """x [64, n] of the accumulator's layout in quarters or whole, [64, 64] each, at p."""
    n: gl.constexpr = x.shape[1]
    if n > 64:
        left, right = x.reshape([64, 2, n // 2]).permute(0, 2, 1).split()
        store(p, left, N)
        store(p + n // 2, right, N)
    else:
        r, c = gl.arange(0, 64, gl.SliceLayout(1, ROWS)), gl.arange(0, 64, gl.SliceLayout(0, ROWS))
        gl.store(p + r[:, None] * N + c[None, :], gl.convert_layout(x, ROWS))


@gluon.jit
def multiply(
    HALF: gl.constexpr, dw, offsets, a_s, b_s, full, empty,
    E: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Rows HALF * 64 to HALF * 64 + 63 of every tile."""
    NM: gl.constexpr = M // BM
    NN: gl.constexpr = N // BN
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    i = 0
    for t in range(gl.program_id(0), E * NM * NN, gl.num_programs(0)):
        i_e, first, end, i_m, i_n = tile_at(t, offsets, NM, NN)
        acc = gl.zeros([64, BN], gl.float32, ACC)
        for k in range(first, end, BK):
            s = i % STAGES
            mbarrier.wait(full.index(s), (i // STAGES) & 1)
            b_a, b_b = a_s.index(s * 2 + HALF).permute((1, 0)), b_s.index(s)
            acc = warpgroup_mma(b_a, b_b, acc, is_async=True)
            done = warpgroup_mma_wait(1, deps=(acc, b_a, b_b))  # the step before
            acc = done[0]  # pyright: ignore[reportIndexIssue]
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=k > first)
            i += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=first < end)
        p_dw = dw + i_e.to(gl.int64) * (M * N) + (i_m + HALF * 64) * N + i_n
        store(p_dw, acc.to(dw.dtype.element_ty), N)


@gluon.jit
def weights_gluon_kernel(
    a, b, order, offsets, dw,
    E: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    GATHER_A: gl.constexpr, GATHER_B: gl.constexpr,
):  # fmt: skip
    """As `weights_kernel`, on any number of programs."""
    DT: gl.constexpr = dw.dtype.element_ty
    A_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, 64], DT)
    B_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], DT)
    a_s = gl.allocate_shared_memory(DT, [STAGES * 2, BK, 64], A_SMEM)
    b_s = gl.allocate_shared_memory(DT, [STAGES, BK, BN], B_SMEM)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)  # threads that copy
        mbarrier.init(empty.index(s), count=2)  # halves
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (0, dw, offsets, a_s, b_s, full, empty, E, M, N)),
            (multiply, (1, dw, offsets, a_s, b_s, full, empty, E, M, N)),
            (copy_rows, (a, b, order, offsets, a_s, b_s, full, empty, E, M, N, GATHER_A, GATHER_B)),
        ],
        [4, 4],  # warps of the second and third, and their registers per thread
        [216, 40],
    )


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel serves a [., M] and b [., N]: Hopper, 16 bits, whole tiles, 16 bytes."""
    return (
        capability(a.device) == (9, 0)
        and a.dtype in (torch.bfloat16, torch.float16)
        and a.shape[1] % BM.value == 0
        and b.shape[1] % BN.value == 0
        and (a.data_ptr() | b.data_ptr()) % 16 == 0
    )
