"""RMSNorm of the residual stream, with the addition before it.

    h = x + residual                     rounded to x.dtype
    r = rsqrt(mean_d(h²) + eps)          [N]
    y = w · (h · r)                      h · r rounded to x.dtype first, as transformers has it

    N rows of D channels.

Backward, with x̂ = h·r, a = dy·w and dh the gradient of the sum from elsewhere:
    dx = dresidual = r · (a − x̂ · mean_d(a·x̂)) + dh       dw = Σ_n dy · x̂
"""

import torch
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype, check_like, check_rms_norm, check_shape
from kimi_kernels.dispatch import use_triton


def rms_norm_ref(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The definition. x [..., D], w [D] -> [..., D]."""
    h = x.to(accumulation_dtype(x.dtype))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dim, times `w`.

    Args:
        x: values, `[..., D]`; bf16, fp16, fp32, or fp64 on the reference path.
        w: norm weight, `[D]`, any float dtype.
        eps: added to the mean square.

    Returns:
        `[..., D]` in the dtype that `x` and `w` promote to. Differentiable in both.

    Raises:
        ValueError: a wrong shape, dtype or device, or eps that is no number.
    """
    return _run(x, None, w, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum: one pass over both instead of two.

    Args:
        x, residual: `[..., D]` of one dtype.
        w, eps: as in `rms_norm`.

    Returns:
        The norm, and the sum `[..., D]` in `x.dtype`. Differentiable in x, residual and w.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    check_shape("residual", residual, *x.shape)
    check_like("residual", residual, "x", x)
    return _run(x, residual, w, eps)


def _run(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, w, eps)
    if not use_triton(x):
        h = x if residual is None else x + residual
        return rms_norm_ref(h, w, eps), h
    from kimi_kernels.rms_norm_triton import rms_norm_triton

    rows = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, residual)]
    y, h, _ = rms_norm_triton(*rows, w.contiguous(), eps)
    return y.view(x.shape), x if residual is None else h.view(x.shape)
