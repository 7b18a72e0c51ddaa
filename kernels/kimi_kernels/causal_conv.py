"""Causal depthwise convolution with SiLU, the short convolution of KDA (TR section 4).

    a_t = sum_j weight[:, j] x_{t-(W-1)+j},  y_t = SiLU(a_t)     j = W-1 meets the current token

What lies before the first token is the carried state: the last W-1 inputs, zeros at the start.
Backward, from dy and dS, the gradients of y and of the final state:

    da_t         = dy_t s (1 + a_t (1 - s)),  s = sigmoid(a_t)     0 for tokens past the last
    dx_t         = sum_j weight[:, j] da_{t+(W-1)-j}  +  dS_{t-T+(W-1)}
    dweight[:,j] = sum_t da_t x_{t-(W-1)+j}

where dx_t of t < 0 is the gradient of the state before, and dS has rows 0 to W-2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import (
    accumulation_dtype,
    check_float,
    check_like,
    check_list,
    check_shape,
    check_state,
    count_sequences,
    sequence_bounds,
)
from kimi_kernels.dispatch import use_triton


def causal_conv_ref(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 or better. x [B, T, D], weight [D, W], state [B, W-1, D]."""
    T, W = x.shape[1], weight.shape[1]
    acc = accumulation_dtype(x.dtype)
    xs = torch.cat((state, x), 1)  # [B, W-1+T, D]
    xa = xs.to(acc)  # once, so that its gradient is summed before it is rounded
    y = sum(xa[:, j : j + T] * weight[:, j].to(acc) for j in range(W))
    return F.silu(y).to(x.dtype), xs[:, T:].clone()


def causal_convs_ref(
    xs: Sequence[Tensor], weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """The definition on public layouts: the outputs, then the final state."""
    x, W = torch.cat(tuple(xs), -1), weight.shape[1]
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, x)
    if initial_state is None:
        N = x.shape[0] if bounds is None else len(bounds)
        initial_state = x.new_zeros(N, W - 1, x.shape[-1])
    if bounds is None:
        y, state = causal_conv_ref(x, weight, initial_state)
    else:
        parts = [
            causal_conv_ref(x[:, start:end], weight, initial_state[n : n + 1])
            for n, (start, end) in enumerate(bounds)
        ]
        y, state = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    return [*y.split([x.shape[-1] for x in xs], -1), state]


def causal_conv(
    xs: Sequence[Tensor],
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Causal depthwise convolution and SiLU over several projections at once.

    The projections are taken as they lie in memory (KDA has three, for q, k and v), so nobody has
    to concatenate or transpose them.

    Args:
        xs: tensors `[B, T, D_i]` of one dtype; bf16, fp16, fp32 or fp64.
        weight: `[D, W]` with D = sum of D_i, W >= 2; row order as `xs`. Any float dtype.
        initial_state: the W-1 inputs before the first token, oldest first, `[N, W-1, D]` in the
            dtype of `xs`; N = B, or the number of packed sequences. Default zeros. It is not
            modified.
        output_final_state: also return the last W-1 inputs of each sequence.
        cu_seqlens: as in `chunk_kda`.

    Returns:
        Outputs `[B, T, D_i]` in the dtype of `xs`, and the state `[N, W-1, D]` or None.
        Differentiable in `xs`, `weight` and `initial_state`.

    Raises:
        ValueError: a wrong shape, dtype or device, or cu_seqlens as in `chunk_kda`.
    """
    check_list("xs", xs)
    if not xs or any(x.ndim != 3 for x in xs):
        raise ValueError(
            f"xs has shapes {[list(x.shape) for x in xs]}, want one or more [B, T, D_i]"
        )
    B, T = xs[0].shape[:2]
    check_float("xs[0]", xs[0], xs[0])
    for i, x in enumerate(xs):
        check_shape(f"xs[{i}]", x, B, T, x.shape[-1])
        check_like(f"xs[{i}]", x, "xs[0]", xs[0])
    D = sum(x.shape[-1] for x in xs)
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, want [{D}, W] with W >= 2")
    check_float("weight", weight, xs[0])
    W = weight.shape[1]
    N = count_sequences(cu_seqlens, xs[0])
    check_state("initial_state", initial_state, xs[0], xs[0].dtype, N, W - 1, D)
    if use_triton(xs[0]):
        from kimi_kernels.causal_conv_triton import causal_conv_triton

        options = (initial_state, output_final_state, cu_seqlens)
        *ys, state = causal_conv_triton(weight, *options, *xs)
    else:
        *ys, state = causal_convs_ref(xs, weight, initial_state, cu_seqlens)
    return tuple(ys), state if output_final_state else None
