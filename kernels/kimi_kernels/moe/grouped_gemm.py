"""Grouped matrix products: the rows of each expert times its weights, and sums over its rows.

A row is a slot (token, j) at its place in `Plan.order`; plan_triton.py says which rows and tiles
there are. The grid is the worst case, and programs without a tile exit. Tiles of one expert are
neighbours in the grid, so that they run together and its weights come from memory once and from L2
after that. No atomics: every output element is written by one program, and sums over rows are in
the order of the rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.dispatch import device_limits
from kimi_kernels.moe import weights_gluon
from kimi_kernels.moe.plan_triton import Plan
from kimi_kernels.overlap import overlap, wait_for_inputs


class Tile(NamedTuple):
    """Of a product: output tile, depth of a step, warps per program, length of the pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory per program."""
        return self.stages * (self.BM + self.BN) * self.BK * dtype.itemsize

    def options(self, dtype: torch.dtype) -> dict:
        """As keyword arguments of a launch."""
        meta = {"BM": self.BM, "BN": self.BN, "BK": self.BK}
        meta["PREC"] = "tf32x3" if dtype == torch.float32 else "ieee"
        return meta | {"num_warps": self.warps, "num_stages": self.stages}


# rows per expert up to which a tile is used, and the tile; of several the first that fits
ROW_TILES = [
    (8, Tile(16, 64, 128, 4, 4)),
    (24, Tile(32, 128, 64, 4, 4)),
    (float("inf"), Tile(128, 256, 64, 8, 3)),
    (float("inf"), Tile(128, 128, 64, 4, 3)),
]
ROW_TILES_FP32 = [(8, Tile(16, 64, 32, 4, 3)), (float("inf"), Tile(64, 64, 32, 4, 3))]
WEIGHT_TILE, WEIGHT_TILE_FP32 = Tile(128, 128, 64, 4, 2), Tile(64, 64, 32, 4, 3)


def row_tile(S: int, E: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """For S slots that are spread over E experts."""
    table = ROW_TILES_FP32 if dtype == torch.float32 else ROW_TILES
    fits = ((rows, t) for rows, t in table if t.shared(dtype) <= device_limits(device).shared)
    return next(tile for rows, tile in fits if rows * E >= S)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def accumulate(
    acc, p_a, p_b, o_k, m_n, K,
    s_a: tl.constexpr, s_b: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc + a b over K, from pointers to the first [BM, BK] of a and [BK, BN] of b.

    `s_a` and `s_b` are strides of k. `m_n` [BN] is what may be read of b, not looked at if EVEN_N.
    K is no constant, or the loop would be unrolled.
    """
    for k in range(0, K, BK):
        if EVEN_K:
            b_a = tl.load(p_a)
        else:
            b_a = tl.load(p_a, mask=(o_k < K - k)[None, :], other=0.0)
        if EVEN_K:
            if EVEN_N:
                b_b = tl.load(p_b)
            else:
                b_b = tl.load(p_b, mask=m_n[None, :], other=0.0)
        else:
            b_b = tl.load(p_b, mask=(o_k < K - k)[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision=PREC)
        p_a += BK * s_a
        p_b += BK * s_b
    return acc


@triton.jit
def rows_tile(
    a, w, order, out, depth, i_e, first, end, i_n,
    K: tl.constexpr, N: tl.constexpr, TRANS: tl.constexpr, GATHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    s_k: tl.constexpr = N if TRANS else 1
    s_n: tl.constexpr = 1 if TRANS else K
    o_m, o_k, o_n = first + tl.arange(0, BM), tl.arange(0, BK), i_n * BN + tl.arange(0, BN)
    row = tl.minimum(o_m, end - 1)  # what is read past the last row is not stored
    if GATHER > 0:
        row = tl.load(order + row) // GATHER
    p_a = a + row.to(tl.int64)[:, None] * K + o_k[None, :]
    p_w = w + i_e.to(tl.int64) * (K * N)
    p_w += o_n.to(tl.int64)[None, :] * s_n + o_k.to(tl.int64)[:, None] * s_k
    acc = tl.zeros([BM, BN], tl.float32)
    acc = accumulate(acc, p_a, p_w, o_k, o_n < N, depth, 1, s_k, BK, K % BK == 0, N % BN == 0, PREC)
    p_out = out + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    m = (o_m < end)[:, None] & (o_n < N)[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["MT"])
def rows_kernel(
    a, w, order, tiles, out,
    MT, depth,
    K: tl.constexpr, N: tl.constexpr, TRANS: tl.constexpr, GATHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [S, N] = a times w[e]^T, w [E, N, K], or if TRANS times w[e], w [E, K, N].

    a [S, K], or if GATHER > 0 [T, K], which a row reads at its token, slot // GATHER.
    """
    wait_for_inputs(OVERLAP)
    NN: tl.constexpr = (N + BN - 1) // BN
    i_t, i_n = tl.program_id(0) // NN, tl.program_id(0) % NN
    i_e, first, end = tl.load(tiles + i_t), tl.load(tiles + MT + i_t), tl.load(tiles + 2 * MT + i_t)
    if i_e < 0:
        return
    if BM == 128:
        if end - first <= 64:  # half a tile is enough
            rows_tile(
                a, w, order, out, depth, i_e, first, end, i_n,
                K, N, TRANS, GATHER, 64, BN, BK, PREC,
            )  # fmt: skip
            return
    rows_tile(a, w, order, out, depth, i_e, first, end, i_n, K, N, TRANS, GATHER, BM, BN, BK, PREC)


@triton.jit
def weights_kernel(
    a, b, order, offsets, dw,
    M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dw [E, M, N] = sum over the rows of each expert of a[row] b[row]^T; zeros without rows.

    a [S, M] and b [S, N], or if GATHER > 0 [T, ...], as in `rows_kernel`.
    """
    NM: tl.constexpr = (M + BM - 1) // BM
    NN: tl.constexpr = (N + BN - 1) // BN
    i_e, i_mn = tl.program_id(0) // (NM * NN), tl.program_id(0) % (NM * NN)
    i_m, i_n = i_mn // NN, i_mn % NN
    first, end = tl.load(offsets + i_e), tl.load(offsets + i_e + 1)
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    slot = tl.load(order + first + o_k, mask=first + o_k < end, other=0)
    for k in range(first, end, BK):
        row = k + o_k
        m_a, m_b = (row < end)[:, None], (row < end)[:, None]
        if M % BM != 0:
            m_a = m_a & (o_m < M)[None, :]
        if N % BN != 0:
            m_b = m_b & (o_n < N)[None, :]
        r_a = slot // GATHER_A if GATHER_A > 0 else row
        r_b = slot // GATHER_B if GATHER_B > 0 else row
        p_a = a + r_a.to(tl.int64)[:, None] * M + o_m[None, :]
        p_b = b + r_b.to(tl.int64)[:, None] * N + o_n[None, :]
        b_a, b_b = tl.load(p_a, mask=m_a, other=0.0), tl.load(p_b, mask=m_b, other=0.0)
        # of the next step: loaded where it is used, an index would shorten the pipeline by a step
        slot = tl.load(order + row + BK, mask=row + BK < end, other=0)
        acc = tl.dot(tl.trans(b_a), b_b, acc, input_precision=PREC)
    p_dw = dw + i_e.to(tl.int64) * (M * N) + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_dw, acc.to(dw.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


# ---- launchers ---------------------------------------------------------------------------------


def rows_product(
    a: Tensor, w: Tensor, plan: Plan, tile: Tile, *, trans: bool = False, gather: int = 0
) -> Tensor:
    """[S, N]: every row times the weights of its expert, rows past the last expert unwritten.

    Args:
        a: `[S, K]` by row, or `[T, K]` by token if `gather` is top_k.
        w: `[E, N, K]`, or `[E, K, N]` if `trans`.
    """
    S, (_, N, K) = plan.order.numel(), (w.mT if trans else w).shape
    out = torch.empty(S, N, dtype=a.dtype, device=a.device)
    MT = plan.tiles.shape[1]
    rows_kernel[(MT * triton.cdiv(N, tile.BN),)](
        a, w, plan.order, plan.tiles, out, MT, K,
        K=K, N=N, TRANS=trans, GATHER=gather, **tile.options(a.dtype), **overlap(a.device),
    )  # fmt: skip
    return out


def weights_product(
    a: Tensor, b: Tensor, E: int, plan: Plan, *, gather_a: int = 0, gather_b: int = 0
) -> Tensor:
    """[E, M, N]: a^T b over each expert's rows; a [S, M] and b [S, N], [T, ...] where gathered."""
    M, N = a.shape[1], b.shape[1]
    dw = torch.empty(E, M, N, dtype=a.dtype, device=a.device)
    meta = {"M": M, "N": N, "GATHER_A": gather_a, "GATHER_B": gather_b}
    args = a, b, plan.order, plan.offsets, dw
    if weights_gluon.takes(a, b):
        kernel: Any = weights_gluon.weights_gluon_kernel
        kernel[(device_limits(a.device).processors,)](*args, E=E, **meta)
        return dw
    tile = WEIGHT_TILE_FP32 if a.dtype == torch.float32 else WEIGHT_TILE
    programs = E * triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN)
    weights_kernel[(programs,)](*args, **meta, **tile.options(a.dtype))
    return dw
