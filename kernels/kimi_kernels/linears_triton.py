"""Triton kernel of linears.py: vectors times matrices, streamed by programs of one warp."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 2, 256  # of a weight, per step of a program: 16 bytes per thread and row


@triton.jit
def some_outputs(
    x, w, y, i_n, rows,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN columns of y [rows, N] = x [rows, K] times w [N, K]^T."""
    o_m, o_n, o_k = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    p_w = w + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    acc = tl.zeros([BM, BN, BK], tl.float32)
    for k in tl.static_range(0, K, BK):
        m_k = o_k < K - k
        m_x = (o_m < rows)[:, None] & m_k[None, :]
        b_x = tl.load(x + o_m[:, None] * K + k + o_k[None, :], mask=m_x, other=0.0)
        b_w = tl.load(p_w + k, mask=(o_n < N)[:, None] & m_k[None, :], other=0.0)
        acc += b_x.to(tl.float32)[:, None, :] * b_w.to(tl.float32)[None, :, :]
    p_y = y + o_m[:, None] * N + o_n[None, :]
    m = (o_m < rows)[:, None] & (o_n < N)[None, :]
    tl.store(p_y, tl.sum(acc, 2).to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def fused_linears_kernel(
    xs, ws, ys, rows,
    SIZES: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All outputs: programs are dealt to the weights in their order."""
    i_p = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        programs = (SIZES[i] + BN - 1) // BN
        if (i_p >= 0) & (i_p < programs):
            some_outputs(xs[i], ws[i], ys[i], i_p, rows, SIZES[i], K, BM, BN, BK)
        i_p -= programs


def fused_linears_fwd(
    xs: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """As `fused_linears`, checked, with at least one row."""
    *shape, K = xs[0].shape
    rows, sizes = xs[0].numel() // max(K, 1), tuple(w.shape[0] for w in weights)
    ys = tuple(xs[0].new_empty(*shape, n, dtype=dtype) for n in sizes)
    fused_linears_kernel[(sum(triton.cdiv(n, ROWS) for n in sizes),)](
        tuple(x.contiguous() for x in xs), tuple(w.contiguous() for w in weights), ys, rows,
        SIZES=sizes, K=K, BM=triton.next_power_of_2(rows), BN=ROWS,
        BK=min(COLUMNS, triton.next_power_of_2(K)), num_warps=1,
    )  # fmt: skip
    return ys
