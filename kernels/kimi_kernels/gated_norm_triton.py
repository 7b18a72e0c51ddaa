"""Triton kernels of the gated RMSNorm; formulas and the definition are in gated_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.operators import dispatch, first_order

# ---- kernels -----------------------------------------------------------------------------------

BN = 16  # rows per program; flat from 8 to 32 (memory-bound), so not autotuned


@triton.jit
def gated_rms_norm_fwd_kernel(
    x, g, w, o, r,
    N, eps,
    V: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_v = tl.arange(0, BV)
    m_n, m_v = o_n < N, o_v < V
    p, m = o_n[:, None] * V + o_v[None, :], m_n[:, None] & m_v[None, :]

    b_x = tl.load(x + p, mask=m, other=0.0).to(tl.float32)  # [BN, BV]
    b_g = tl.load(g + p, mask=m, other=0.0).to(tl.float32)  # [BN, BV]
    b_w = tl.load(w + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]

    b_r = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / V + eps)  # [BN]
    b_o = b_x * b_r[:, None] * b_w[None, :] * tl.sigmoid(b_g)

    tl.store(r + o_n, b_r, mask=m_n)
    tl.store(o + p, b_o.to(o.dtype.element_ty), mask=m)


@triton.jit
def gated_rms_norm_bwd_kernel(
    x, g, w, r, do, dx, dg, dw,
    N,
    V: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_v = tl.arange(0, BV)
    m_n, m_v = o_n < N, o_v < V
    p, m = o_n[:, None] * V + o_v[None, :], m_n[:, None] & m_v[None, :]

    b_x = tl.load(x + p, mask=m, other=0.0).to(tl.float32)  # [BN, BV]
    b_g = tl.load(g + p, mask=m, other=0.0).to(tl.float32)
    b_do = tl.load(do + p, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(w + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
    b_r = tl.load(r + o_n, mask=m_n, other=0.0)  # [BN]

    b_s = tl.sigmoid(b_g)
    b_xh = b_x * b_r[:, None]
    b_a = b_do * b_s * b_w[None, :]
    b_dx = b_r[:, None] * (b_a - b_xh * (tl.sum(b_a * b_xh, 1) / V)[:, None])
    b_dg = b_do * b_xh * b_w[None, :] * b_s * (1 - b_s)

    tl.store(dx + p, b_dx.to(dx.dtype.element_ty), mask=m)
    tl.store(dg + p, b_dg.to(dg.dtype.element_ty), mask=m)
    # one partial row per program; summed on the host, so the result is deterministic
    tl.store(dw + i_n * V + o_v, tl.sum(b_do * b_xh * b_s, 0), mask=m_v)


# ---- launchers ---------------------------------------------------------------------------------


def gated_rms_norm_fwd(x: Tensor, g: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, g [N, V] contiguous, w [V] -> o [N, V], r [N] fp32."""
    N, V = x.shape
    o, r = torch.empty_like(x), torch.empty(N, dtype=torch.float32, device=x.device)
    BV = triton.next_power_of_2(V)
    gated_rms_norm_fwd_kernel[(triton.cdiv(N, BN),)](x, g, w, o, r, N, eps, V=V, BN=BN, BV=BV)
    return o, r


def gated_rms_norm_bwd(
    x: Tensor, g: Tensor, w: Tensor, r: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dx, dg [N, V] and dw [V]."""
    do = do.contiguous()
    N, V = x.shape
    BV = triton.next_power_of_2(V)
    NN = triton.cdiv(N, BN)
    dx, dg = torch.empty_like(x), torch.empty_like(g)
    dw = torch.empty(NN, V, dtype=torch.float32, device=x.device)
    gated_rms_norm_bwd_kernel[(NN,)](x, g, w, r, do, dx, dg, dw, N, V=V, BN=BN, BV=BV)
    return dx, dg, dw.sum(0).to(w.dtype)


# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op("kimi_kernels::gated_rms_norm", mutates_args=())
def gated_rms_norm_op(x: Tensor, g: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `gated_rms_norm_fwd`."""
    return gated_rms_norm_fwd(x, g, w, eps)


@gated_rms_norm_op.register_fake
def _(x, g, w, eps):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("kimi_kernels::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward_op(
    x: Tensor, g: Tensor, w: Tensor, r: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gated_rms_norm_bwd`."""
    return gated_rms_norm_bwd(x, g, w, r, do)


@gated_rms_norm_backward_op.register_fake
def _(x, g, w, r, do):
    return torch.empty_like(x), torch.empty_like(g), torch.empty_like(w)


def _setup(ctx, inputs, output) -> None:
    x, g, w, _ = inputs
    ctx.save_for_backward(x, g, w, output[1])


def _backward(ctx, do, _dr, backward=gated_rms_norm_backward_op):
    return *backward(*ctx.saved_tensors, do), None


gated_rms_norm_op.register_autograd(_backward, setup_context=_setup)


class GatedRMSNorm(torch.autograd.Function):
    """`gated_rms_norm_op` and its gradient, without operators."""

    forward = staticmethod(gated_rms_norm_fwd)
    setup_context = staticmethod(_setup)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        return _backward(ctx, *grads, gated_rms_norm_bwd)


gated_rms_norm_triton = dispatch(gated_rms_norm_op, GatedRMSNorm, gated_rms_norm_fwd)
