"""Gated RMSNorm, the output norm of a KDA head (TR eq. 10).

    r = rsqrt(mean_v(x²) + eps)          [N]
    o = x · r · w · sigmoid(g)           [N, V]

    N = B·T·H rows, one per (batch, token, head);  V = head value dim.

Backward, with x̂ = x·r, s = sigmoid(g) and a = do·s·w:
    dx = r · (a − x̂ · mean_v(a·x̂))       dg = do · x̂ · w · s·(1−s)       dw = Σ_n do · x̂ · s
"""

import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype, check_like, check_rms_norm, check_shape
from kimi_kernels.dispatch import use_triton


def gated_rms_norm_ref(x: Tensor, g: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition, in fp32 or better. x, g [..., V], w [V] -> [..., V]."""
    acc = accumulation_dtype(x.dtype)
    x_, g_, w_ = x.to(acc), g.to(acc), w.to(acc)
    return (F.rms_norm(x_, (x.shape[-1],), w_, eps) * g_.sigmoid()).to(x.dtype)


def gated_rms_norm(x: Tensor, g: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dim, times `w`, times `sigmoid(g)`.

    Args:
        x: values, `[..., V]`; bf16, fp16, fp32, or fp64 on the reference path.
        g: gate logits, `[..., V]`, same dtype as `x`.
        w: norm weight, `[V]`, any float dtype.
        eps: added to the mean square.

    Returns:
        `[..., V]` in `x.dtype`. Differentiable in `x`, `g` and `w`.

    Raises:
        ValueError: a wrong shape, dtype or device, or eps that is no number.
    """
    check_shape("g", g, *x.shape)
    check_like("g", g, "x", x)
    check_rms_norm(x, w, eps)
    if not use_triton(x):
        return gated_rms_norm_ref(x, g, w, eps)
    from kimi_kernels.gated_norm_triton import gated_rms_norm_triton

    x_, g_ = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, g))
    return gated_rms_norm_triton(x_, g_, w.contiguous(), eps)[0].view(x.shape)
