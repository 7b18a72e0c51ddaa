"""The activations of KDA in front of the recurrence: l2norm and the forget gate (TR section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype, check_float, check_shape

L2_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim.

    Args:
        x: `[..., K]`, any float dtype; computed in fp32 or better.

    Returns:
        `[..., K]` in `x.dtype`. Differentiable.

    Raises:
        ValueError: not a float.
    """
    check_float("x", x, x)
    x_ = x.to(accumulation_dtype(x.dtype))
    return (x_ * torch.rsqrt(x_.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def kda_gate_checks(f: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None) -> None:
    """The `ValueError`s of `kda_gate`."""
    if f.ndim < 2:
        raise ValueError(f"f has shape {list(f.shape)}, want [..., H, K]")
    check_float("f", f, f)
    H, K = f.shape[-2:]
    check_shape("A_log", A_log, H)
    check_shape("dt_bias", dt_bias, H * K)
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        check_float(name, x, f)
    if lower_bound is not None and not -float("inf") < lower_bound < 0:
        raise ValueError(f"lower_bound is {lower_bound}, want a finite number < 0, or None")


def kda_gate(f: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None = None) -> Tensor:
    """The log-decay of KDA, natural log, <= 0 (TR section 4; the released checkpoint is unbounded).

        g = -exp(A_log) softplus(f + dt_bias)                   without a bound
        g = lower_bound sigmoid(exp(A_log) (f + dt_bias))       with one, in (lower_bound, 0)

    Args:
        f: gate projection, `[..., H, K]`, any float dtype.
        A_log: `[H]`.
        dt_bias: `[H * K]`, head-major.
        lower_bound: finite and < 0, or None.

    Returns:
        `[..., H, K]` in fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError: a wrong shape, or a bound that is not finite and negative.
    """
    kda_gate_checks(f, A_log, dt_bias, lower_bound)
    H, K = f.shape[-2:]
    acc = accumulation_dtype(f.dtype)
    x = f.to(acc) + dt_bias.to(acc).view(H, K)
    A = A_log.to(acc).exp().view(H, 1)
    return -A * F.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(A * x)
