"""Several linear layers at once, for a few tokens.

A product of a vector with a matrix takes as long as reading the matrix, and a launch of its own
takes 2 us more. The projections at the head of a layer read the same vector: one launch makes them
all, and the norm before them and the residual after them on the way.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import (
    channels,
    check_float,
    check_like,
    check_list,
    check_norm,
    check_shape,
    is_wide_float,
)
from kimi_kernels.dispatch import use_triton
from kimi_kernels.operators import wants_gradient
from kimi_kernels.rms_norm import rms_norm

MOST_ROWS = 2  # of x; for more, tensor cores are faster than reading each weight into registers
TILE_ROWS = 128  # of x in 16 bits, of a launch on tensor cores; for more, or one weight, cuBLAS


def few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has rows, and so few that reading the weights is what takes time."""
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def share_a_launch(x: Tensor, products: int) -> bool:
    """Whether so many products of x [..., K], without a norm, are one launch."""
    tile = products > 1 and x.element_size() == 2 and 0 < x.numel() <= TILE_ROWS * x.shape[-1]
    return few_rows(x) or tile


def fused_linears(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x_i W_i^T, or residual + rms_norm(x_i) W_i^T; a tensor may be given several times.

    Triton makes them in one launch for up to 2 rows of x without a gradient, in fp32 up to the
    output, and several products in 16 bits without a norm for up to 128. Otherwise, and for a
    compiler, they are `rms_norm` and `torch.nn.functional.linear`.

    Args:
        xs: `[..., K]`, all of one shape; bf16, fp16, fp32 or fp64.
        weights: `[N_i, K]`, same dtype.
        dtype: of the outputs, default that of the inputs; fp32 or wider: not rounded to theirs.
        norm: weight `[K]` and eps of an RMSNorm of every x; same dtype.
        residual: added to the output, which must be one; its shape and dtype.

    Returns:
        `[..., N_i]` each.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a norm without eps.
    """
    check_list("xs", xs)
    check_list("weights", weights)
    if not xs or len(xs) != len(weights):
        raise ValueError(f"got {len(xs)} xs and {len(weights)} weights, want as many, at least one")
    x, K = xs[0], channels("xs[0]", xs[0])
    check_float("xs[0]", x, x)
    for i, (y, w) in enumerate(zip(xs, weights, strict=True)):
        check_shape(f"xs[{i}]", y, *x.shape)
        check_like(f"xs[{i}]", y, "xs[0]", x)
        if w.ndim != 2:
            raise ValueError(f"weights[{i}] has shape {list(w.shape)}, want [N, {K}]")
        check_shape(f"weights[{i}]", w, w.shape[0], K)
        check_like(f"weights[{i}]", w, "xs[0]", x)
    out = dtype or x.dtype
    if not is_wide_float(out):
        raise ValueError(f"dtype is {out}, want a float of 16 bits or more")
    if norm is not None:
        check_norm(norm, "xs[0]", x, K)
    if residual is not None:
        if len(weights) != 1:
            raise ValueError(f"residual goes with one weight, got {len(weights)}")
        check_shape("residual", residual, *x.shape[:-1], weights[0].shape[0])
        if residual.dtype != out or residual.device != x.device:
            raise ValueError(
                f"residual is {residual.dtype} on {residual.device}, want {out} on {x.device}"
            )
    given = (*xs, *weights, None if norm is None else norm[0], residual)
    small = share_a_launch(x, len(weights)) if norm is None else few_rows(x)
    fused = small and use_triton(x) and not wants_gradient(*given)
    if fused and not torch.compiler.is_compiling():
        from kimi_kernels.linears_triton import fused_linears_fwd

        return fused_linears_fwd(xs, weights, out, norm, residual)
    wide = torch.promote_types(x.dtype, out)
    if norm is not None:
        xs = [rms_norm(y, *norm) for y in xs]
    ys = tuple(F.linear(y.to(wide), w.to(wide)).to(out) for y, w in zip(xs, weights, strict=True))
    return ys if residual is None else (residual + ys[0],)
