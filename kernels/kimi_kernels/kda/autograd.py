"""The Triton ops as torch operators: autograd, torch.compile and CUDA graphs see one opaque op each.

The backward pass is the reference's: the forward is run again in PyTorch and differentiated.
"""

import torch
from torch import Tensor

from kimi_kernels.kda.chunk_fwd import chunk_kda_fwd
from kimi_kernels.kda.reference import chunk_form, fused_kda_ref, kda_ref

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("kimi_kernels::chunk_kda", mutates_args=())
def chunk_kda_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `chunk_kda_fwd`."""
    return chunk_kda_fwd(
        q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens
    )


@chunk_kda_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), S


@torch.library.custom_op("kimi_kernels::chunk_kda_backward", mutates_args=())
def chunk_kda_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dS: Tensor,
) -> Grads:
    """Gradients of every tensor argument; empty where the argument is None."""
    tensors = [q, k, v, g, beta, A_log, dt_bias, initial_state]
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        x, (A, dt, S0) = leaves[:5], leaves[5:]
        if A is None:
            o, S = kda_ref(chunk_form, *x, scale, S0, cu_seqlens)
        else:
            o, S = fused_kda_ref(chunk_form, *x, A, dt, lower_bound, S0, cu_seqlens)
        given = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad((o, S), given, (do, dS), materialize_grads=True))
    return tuple(q.new_empty(0) if leaf is None else next(grads) for leaf in leaves)


@chunk_kda_backward_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, do, dS):
    tensors = [q, k, v, g, beta, A_log, dt_bias, initial_state]
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


def _setup(ctx, inputs, output) -> None:
    *tensors, scale, lower_bound, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.scalars = scale, lower_bound


def _backward(ctx, do, dS):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    args = (*tensors, *ctx.scalars, initial_state, cu_seqlens)
    grads = list(chunk_kda_backward_op(*args, do, dS))
    needed = (*ctx.needs_input_grad[:7], ctx.needs_input_grad[9])
    *first, dS0 = (g if n else None for g, n in zip(grads, needed, strict=True))
    return *first, None, None, dS0, None


chunk_kda_op.register_autograd(_backward, setup_context=_setup)
