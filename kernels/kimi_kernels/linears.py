"""Several linear layers at once, for a few tokens.

A product of a vector with a matrix takes as long as reading the matrix, and a launch of its own
takes 2 us more. The projections at the head of a layer read the same vector: one launch makes them
all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import check_like, check_shape
from kimi_kernels.dispatch import use_triton
from kimi_kernels.operators import wants_gradient

MOST_ROWS = 4  # of x; for more, tensor cores are faster than reading each weight into registers


def few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has rows, and so few that reading the weights is what takes time."""
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def fused_linears(
    xs: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """y_i = x_i W_i^T; the same tensor may be given several times.

    Triton makes them in one launch for up to 4 rows of x without a gradient, with products and sums
    in fp32. Otherwise, and for a compiler, they are `torch.nn.functional.linear`.

    Args:
        xs: `[..., K]`, all of one shape; bf16, fp16, fp32 or fp64.
        weights: `[N_i, K]`, same dtype.
        dtype: of the outputs, default that of the inputs; fp32 or wider: not rounded to theirs.

    Returns:
        `[..., N_i]` each.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if not xs or len(xs) != len(weights):
        raise ValueError(f"got {len(xs)} xs and {len(weights)} weights, want as many, at least one")
    x = xs[0]
    for i, (y, w) in enumerate(zip(xs, weights, strict=True)):
        check_shape(f"xs[{i}]", y, *x.shape)
        check_like(f"xs[{i}]", y, "xs[0]", x)
        if w.ndim != 2:
            raise ValueError(f"weights[{i}] has shape {list(w.shape)}, want [N, {x.shape[-1]}]")
        check_shape(f"weights[{i}]", w, w.shape[0], x.shape[-1])
        check_like(f"weights[{i}]", w, "xs[0]", x)
    fused = few_rows(x) and use_triton(x) and not wants_gradient(*xs, *weights)
    if fused and not torch.compiler.is_compiling():
        from kimi_kernels.linears_triton import fused_linears_fwd

        return fused_linears_fwd(xs, weights, dtype or x.dtype)
    out = dtype or x.dtype
    wide = torch.promote_types(x.dtype, out)
    return tuple(F.linear(y.to(wide), w.to(wide)).to(out) for y, w in zip(xs, weights, strict=True))
