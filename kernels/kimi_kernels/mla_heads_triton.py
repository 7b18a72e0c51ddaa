"""The products on both sides of MLA's decoding, a head each, for a few rows.

    q_c = W_k,h^T q_n      o_h = W_v,h o_c

As in linears_triton.py the time is that of reading the weights, 4 MB each at the released sizes,
which is done before the vectors are there.
"""

import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.linears_triton import COLUMNS, some_outputs
from kimi_kernels.overlap import overlap, prefer_shared, wait_for_inputs

CHANNELS, OUTPUTS = 64, 4  # of q_c and of o per program


@triton.jit(do_not_specialize=["rows"])
def absorb_kernel(
    q, w, q_c, rows, s_w,
    H: tl.constexpr, D: tl.constexpr, D_n: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """q_c [H, rows, R]: q [rows, H, D], its first D_n, times w [H, D_n, R] with heads s_w apart."""
    NR: tl.constexpr = (R + BR - 1) // BR
    i_h, i_r = tl.program_id(0) // NR, tl.program_id(0) % NR
    o_d, o_r = tl.arange(0, BD), i_r * BR + tl.arange(0, BR)
    m_d, m_r = o_d < D_n, o_r < R
    p_w = w + i_h.to(tl.int64) * s_w + o_d[:, None] * R + o_r[None, :]
    b_w = tl.load(p_w, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BD, BR]
    wait_for_inputs(OVERLAP, EARLY=True)
    for i in tl.static_range(BM):
        b_q = tl.load(q + (i * H + i_h) * D + o_d, mask=m_d & (i < rows), other=0.0)
        b_y = tl.sum(b_w.to(tl.float32) * b_q.to(tl.float32)[:, None], 0)
        p_y = q_c + (i_h * rows + i) * R + o_r
        tl.store(p_y, b_y.to(q_c.dtype.element_ty), mask=m_r & (i < rows))


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    o_c, w, o, rows, s_w,
    H: tl.constexpr, D_v: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """o [rows, H, D_v]: o_c [H, rows, R] times w [H, D_v, R]^T, whose heads lie s_w apart."""
    NV: tl.constexpr = (D_v + BN - 1) // BN
    i_h, i_v = (tl.program_id(0) // NV).to(tl.int64), tl.program_id(0) % NV
    some_outputs(
        o_c + i_h * rows * R, w + i_h * s_w, o + i_h * D_v, None, None, i_v, rows, 0.0, H * D_v,
        D_v, R, BM, BN, BK, 2, OVERLAP, EARLY=True,
    )  # fmt: skip


def absorb(q: Tensor, w: Tensor) -> Tensor:
    """q_c [H, rows, R] from q [rows, H, D] contiguous and w [H, D_n, R], rows of w contiguous."""
    (rows, H, D), (_, D_n, R) = q.shape, w.shape
    q_c = q.new_empty(H, rows, R)
    BR = min(CHANNELS, triton.next_power_of_2(R))
    kernel = absorb_kernel[(H * triton.cdiv(R, BR),)](
        q, w, q_c, rows, w.stride(0), H=H, D=D, D_n=D_n, R=R,
        BM=triton.next_power_of_2(rows), BD=triton.next_power_of_2(D_n), BR=BR,
        num_warps=4, **overlap(q.device),
    )  # fmt: skip
    prefer_shared(kernel)
    return q_c


def expand(o_c: Tensor, w: Tensor, o: Tensor) -> None:
    """o [rows, H, D_v] from o_c [H, rows, R], both contiguous, and w [H, D_v, R], as `absorb`."""
    (H, rows, R), D_v = o_c.shape, w.shape[1]
    expand_kernel[(H * triton.cdiv(D_v, OUTPUTS),)](
        o_c, w, o, rows, w.stride(0), H=H, D_v=D_v, R=R,
        BM=triton.next_power_of_2(rows), BN=OUTPUTS, BK=min(COLUMNS, triton.next_power_of_2(R)),
        num_warps=1, **overlap(o.device),
    )  # fmt: skip
