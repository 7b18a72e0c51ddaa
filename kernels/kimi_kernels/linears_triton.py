"""Triton kernel of linears.py: vectors times matrices, streamed by programs of one warp.

Of more than two rows, several products are tiles on tensor cores.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.linears import MOST_ROWS
from kimi_kernels.overlap import overlap, wait_for_inputs

COLUMNS = 256  # of a weight, per step of a program: 16 bytes per thread and row
MOST_SHORT = 16384  # outputs of a launch of short programs


@triton.jit
def load_columns(w, k, o_k, m_n, K: tl.constexpr):
    m = m_n[:, None] & (o_k < K - k)[None, :]
    return tl.load(w + k, mask=m, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vector(x, k, o_k, m, K: tl.constexpr):
    return tl.load(x + k + o_k, mask=m & (o_k < K - k), other=0.0)


@triton.jit
def some_outputs(
    x, w, y, norm, residual, i_n, rows, eps, s_y,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """BN columns of y [rows, N] = x [rows, K] times w [N, K]^T; rows of y and residual s_y apart.

    With a norm [K], of x / RMS(x) norm. AHEAD tiles of w are read before x is there.
    """
    o_n, o_k = i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m_n, p_w = o_n < N, w + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    early, norms, sums, squares = (), (), (), ()
    for k in tl.static_range(0, min(K, AHEAD * BK), BK):
        early += (load_columns(p_w, k, o_k, m_n, K),)
        if norm is not None:
            norms += (load_vector(norm, k, o_k, True, K),)
    for _ in tl.static_range(BM):
        sums += (tl.zeros([BN, BK], tl.float32),)
        squares += (tl.zeros([BK], tl.float32),)
    wait_for_inputs(OVERLAP, EARLY)
    for k in tl.static_range(0, K, BK):
        if k < AHEAD * BK:
            b_w = early[k // BK].to(tl.float32)
        else:
            b_w = load_columns(p_w, k, o_k, m_n, K).to(tl.float32)
        old, old_squares, sums, squares = sums, squares, (), ()
        for i in tl.static_range(BM):
            b_x = load_vector(x + i * K, k, o_k, i < rows, K).to(tl.float32)
            if norm is not None:
                squares += (old_squares[i] + b_x * b_x,)
                if k < AHEAD * BK:
                    b_x *= norms[k // BK].to(tl.float32)
                else:
                    b_x *= load_vector(norm, k, o_k, True, K).to(tl.float32)
            sums += (old[i] + b_w * b_x[None, :],)
    for i in tl.static_range(BM):
        b_y, m_y, at = tl.sum(sums[i], 1), m_n & (i < rows), i * s_y + o_n
        if norm is not None:
            b_y *= tl.rsqrt(tl.sum(squares[i], 0) / K + eps)
        if residual is not None:
            b_y += tl.load(residual + at, mask=m_y, other=0.0).to(tl.float32)
        tl.store(y + at, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def tile_of_outputs(
    x, w, y, i_n, rows,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of y [rows, N] on tensor cores: the weights are their left operand, 64 rows of it.

    Without a norm: RMS(x) would take a pass over x of its own in every program.
    """
    o_m, o_n, o_k = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m_m, m_n = o_m < rows, o_n < N
    p_x, p_w = x + o_m[:, None] * K + o_k[None, :], w + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    b_y = tl.zeros([BN, BM], tl.float32)
    wait_for_inputs(OVERLAP)
    for k in range(0, K, BK):
        b_w = load_columns(p_w, k, o_k, m_n, K)
        b_x = tl.load(p_x + k, mask=m_m[:, None] & (o_k < K - k)[None, :], other=0.0)
        b_y = tl.dot(b_w, tl.trans(b_x), b_y)
    p_y = y + o_m[None, :] * N + o_n[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["rows"])
def fused_linears_kernel(
    xs, ws, ys, norm, residual, rows, eps,
    SIZES: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All outputs: programs are dealt to the weights in their order."""
    i_p = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        programs = (SIZES[i] + BN - 1) // BN
        if (i_p >= 0) & (i_p < programs):
            if BM < 16:
                some_outputs(
                    xs[i], ws[i], ys[i], norm, residual, i_p, rows, eps, SIZES[i],
                    SIZES[i], K, BM, BN, BK, AHEAD, OVERLAP,
                )  # fmt: skip
            else:
                tile_of_outputs(xs[i], ws[i], ys[i], i_p, rows, SIZES[i], K, BM, BN, BK, OVERLAP)
        i_p -= programs


def pick_tiles(N: int, K: int, rows: int) -> dict[str, int]:
    """Of a launch with N outputs in all: two rows of weights per program, 16 where they are short.

    More programs of fewer registers run at once then, and the last ones end soon; but each costs
    1.3 ns, so it is four rows of a head. Where all programs run at once they read 32 rows of steps
    ahead, 128 registers; else two steps for one token: with 68 registers 3696 programs run at once.
    """
    if rows > MOST_ROWS:
        BM, BN, BK, stages = 16, 32 if N > 8192 else 64, 128, 4
        if rows > 16:  # two programs, of 96 KB, on each of 132 multiprocessors
            BM, BN, BK = triton.next_power_of_2(rows), 64, 64
            stages = 6 if BM <= 64 and N <= 264 * BN else 4
        tiles = {"BM": BM, "BN": BN, "BK": min(BK, max(16, triton.next_power_of_2(K)))}
        return tiles | {"AHEAD": 0, "num_warps": 4, "num_stages": stages}
    BN = 16 if K <= COLUMNS else 4 if N > MOST_SHORT and rows == 1 else 2
    BM, BK = triton.next_power_of_2(rows), min(COLUMNS, triton.next_power_of_2(K))
    ahead = 32 // BN if N // BN <= 2048 else 2 if rows == 1 and N <= MOST_SHORT else 0
    return {"BM": BM, "BN": BN, "BK": BK, "AHEAD": ahead, "num_warps": 1}


def fused_linears_fwd(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `fused_linears`, checked, with at least one row; of more than two no norm or residual."""
    *shape, K = xs[0].shape
    rows, sizes = xs[0].numel() // max(K, 1), tuple(w.shape[0] for w in weights)
    ys = tuple(xs[0].new_empty(*shape, n, dtype=dtype) for n in sizes)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    tiles = pick_tiles(sum(sizes), K, rows)
    fused_linears_kernel[(sum(triton.cdiv(n, tiles["BN"]) for n in sizes),)](
        tuple(x.contiguous() for x in xs), tuple(w.contiguous() for w in weights), ys,
        norm_weight, None if residual is None else residual.contiguous(), rows, eps,
        SIZES=sizes, K=K, **tiles, **overlap(xs[0].device),
    )  # fmt: skip
    return ys
