"""Triton kernels of the RMSNorm with residual; formulas and the definition are in rms_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.operators import dispatch, first_order
from kimi_kernels.overlap import overlap, wait_for_inputs

TILE = 4096  # elements per step of a program: 4.6 KB of a released row in bf16
PROGRAMS = 512  # of the backward pass: each has a partial sum of dw


@triton.jit
def normalise(b_h, b_w, eps, D: tl.constexpr):
    """Rows h [BN, BD], of which D count, and w [BD] in fp32 -> y in fp32, r [BN]."""
    b_f = b_h.to(tl.float32)
    b_r = 1 / tl.sqrt(tl.sum(b_f * b_f, 1) / D + eps)
    b_xh = (b_f * b_r[:, None]).to(b_h.dtype).to(tl.float32)
    return b_xh * b_w[None, :], b_r


@triton.jit
def rms_norm_fwd_kernel(
    x, residual, w, y, h, r,
    N, eps,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    p, m = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    wait_for_inputs(OVERLAP)
    b_h = tl.load(x + p, mask=m, other=0.0)  # [BN, BD]
    if residual is not None:
        b_h = b_h.to(tl.float32) + tl.load(residual + p, mask=m, other=0.0).to(tl.float32)
        b_h = b_h.to(h.dtype.element_ty)
        tl.store(h + p, b_h, mask=m)
    b_y, b_r = normalise(b_h, b_w, eps, D)
    tl.store(r + o_n, b_r, mask=m_n)
    tl.store(y + p, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["share"])
def rms_norm_bwd_kernel(
    h, w, r, dy, dh, dx, dw,
    N, share,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of `share` times BN rows; dw: this program's part."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    b_dw = tl.zeros([BD], tl.float32)
    for i in range(0, share):
        o_n = (i_p * share + i) * BN + tl.arange(0, BN)
        m_n = o_n < N
        p, m = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
        b_r = tl.load(r + o_n, mask=m_n, other=0.0)  # [BN]
        b_dy = tl.load(dy + p, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
        b_xh = tl.load(h + p, mask=m, other=0.0).to(tl.float32) * b_r[:, None]
        b_a = b_dy * b_w[None, :]
        b_dx = b_r[:, None] * (b_a - b_xh * (tl.sum(b_a * b_xh, 1) / D)[:, None])
        if dh is not None:
            b_dx += tl.load(dh + p, mask=m, other=0.0).to(tl.float32)
        tl.store(dx + p, b_dx.to(dx.dtype.element_ty), mask=m)
        b_dw += tl.sum(b_dy * b_xh, 0)
    tl.store(dw + i_p * D + o_d, b_dw, mask=m_d)


# ---- launchers ---------------------------------------------------------------------------------


def tiles(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"D": D, "BN": max(1, TILE // BD), "BD": BD, "num_warps": 4 if BD <= TILE else 16}


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [N, D] contiguous, w [D] -> y and the sum, both [N, D], and r [N] fp32.

    Without a residual the sum is empty: what an operator returns may not be its input.
    """
    (N, D), size = x.shape, tiles(x.shape[1])
    y = torch.empty(N, D, dtype=torch.promote_types(x.dtype, w.dtype), device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    r = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        grid = (triton.cdiv(N, size["BN"]),)
        rms_norm_fwd_kernel[grid](x, residual, w, y, h, r, N, eps, **size, **overlap(x.device))
    return y, h, r


def rms_norm_bwd(
    h: Tensor, w: Tensor, r: Tensor, dy: Tensor, dh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx [N, D], which is dresidual too, and dw [D]. `dh`: the gradient of the sum, if it is used.

    Partial sums of dw, one row per program, are added by torch, so that the result is
    deterministic.
    """
    (N, D), size = h.shape, tiles(h.shape[1])
    rows = triton.cdiv(N, size["BN"])
    share = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, share) if N else 0
    dx, dw = torch.empty_like(h), w.new_empty(programs, D, dtype=torch.float32)
    dy, dh = dy.contiguous(), None if dh is None else dh.contiguous()
    if N:
        rms_norm_bwd_kernel[(programs,)](h, w, r, dy, dh, dx, dw, N, share, **size)
    return dx, dw.sum(0).to(w.dtype)


# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op("kimi_kernels::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rms_norm_fwd`."""
    return rms_norm_fwd(x, residual, w, eps)


@rms_norm_op.register_fake
def _(x, residual, w, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w.dtype))
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    return y, h, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("kimi_kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    h: Tensor, w: Tensor, r: Tensor, dy: Tensor, dh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `rms_norm_bwd`."""
    return rms_norm_bwd(h, w, r, dy, dh)


@rms_norm_backward_op.register_fake
def _(h, w, r, dy, dh):
    return torch.empty_like(h), torch.empty_like(w)


def _setup(ctx, inputs, output) -> None:
    x, residual, w, _ = inputs
    _, h, r = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, w, r)


def _backward(ctx, dy, dh, _dr, backward=rms_norm_backward_op):
    dx, dw = backward(*ctx.saved_tensors, dy, dh if ctx.has_residual else None)
    return dx, dx if ctx.has_residual else None, dw, None


rms_norm_op.register_autograd(_backward, setup_context=_setup)


class RMSNorm(torch.autograd.Function):
    """`rms_norm_op` and its gradient, without operators."""

    forward = staticmethod(rms_norm_fwd)
    setup_context = staticmethod(_setup)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        return _backward(ctx, *grads, rms_norm_bwd)


rms_norm_triton = dispatch(rms_norm_op, RMSNorm, rms_norm_fwd)
