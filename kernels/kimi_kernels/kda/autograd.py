"""The Triton ops as torch operators: autograd, torch.compile and CUDA graphs see one opaque op
each.

The backward pass is the reference's: the forward is run again in PyTorch and differentiated.
"""

import torch
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype
from kimi_kernels.kda.chunk_fwd import MAX_K, MIN_KV, chunk_kda_fwd
from kimi_kernels.kda.recurrent import recurrent_kda_fwd
from kimi_kernels.kda.reference import anchor_tree, chunk_form, fused_kda_ref, kda_ref
from kimi_kernels.kda.step import kda_step_fwd

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def own(x: Tensor) -> Tensor:
    """A contiguous copy: what an operator returns may not be its input, as dS is without tokens."""
    return x.clone(memory_format=torch.contiguous_format)


def kda_fwd(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    """`chunk_kda_fwd`, or `recurrent_kda_fwd` if the last argument says so or K or V is extreme."""
    *args, recurrent = args
    args[4:6] = (None if x is None else x.contiguous() for x in args[4:6])  # A_log and dt_bias
    K, V = q.shape[-1], args[1].shape[-1]
    tiled = MIN_KV <= K <= MAX_K and MIN_KV <= V
    forward = chunk_kda_fwd if tiled and not recurrent else recurrent_kda_fwd
    return forward(q, *args)


def kda(*args) -> tuple[Tensor, Tensor]:
    """`kda_fwd`; an operator, which costs host time, only where autograd or a compiler looks."""
    tensors = (x for x in args if isinstance(x, Tensor))
    watched = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return kda_op(*args) if watched or torch.compiler.is_compiling() else kda_fwd(*args)


@torch.library.custom_op("kimi_kernels::kda", mutates_args=())
def kda_op(
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
    recurrent: bool,
) -> tuple[Tensor, Tensor]:
    """See `kda_fwd`."""
    return kda_fwd(
        q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, recurrent
    )


@kda_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, recurrent):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), S


@torch.library.custom_op("kimi_kernels::kda_backward", mutates_args=())
def kda_backward_op(
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
    given = [x for x in tensors if x is not None]

    def forward(*given):
        leaves = iter(given)
        *x, A, dt, S0 = (None if x is None else next(leaves) for x in tensors)
        if A is None:
            return kda_ref(chunk_form, *x, scale, S0, cu_seqlens)
        return fused_kda_ref(chunk_form, *x, A, dt, lower_bound, S0, cu_seqlens)

    # vjp, because torch.autograd does not record inside an operator; what the reference caches must
    # be made outside of it
    anchor_tree(q.device, accumulation_dtype(q.dtype))
    grads = iter(torch.func.vjp(forward, *given)[1]((do, dS)))
    return tuple(q.new_empty(0) if x is None else own(next(grads)) for x in tensors)


@kda_backward_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, do, dS):
    tensors = [q, k, v, g, beta, A_log, dt_bias, initial_state]
    return tuple(q.new_empty(0) if x is None else own(x) for x in tensors)


def _setup(ctx, inputs, output) -> None:
    *tensors, scale, lower_bound, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.scalars = scale, lower_bound


def _backward(ctx, do, dS):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    args = (*tensors, *ctx.scalars, initial_state, cu_seqlens)
    grads = list(kda_backward_op(*args, do, dS))
    needed = (*ctx.needs_input_grad[:7], ctx.needs_input_grad[9])
    *first, dS0 = (g if n else None for g, n in zip(grads, needed, strict=True))
    return *first, None, None, dS0, None, None


kda_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("kimi_kernels::kda_step", mutates_args=("conv_state", "state"))
def kda_step_op(
    xs: list[Tensor],
    conv_weight: Tensor,
    conv_state: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """See `kda_step_fwd`."""
    args = (f, b, A_log, dt_bias, state, gate, norm_weight, eps)
    return kda_step_fwd(xs, conv_weight, conv_state, *args)


@kda_step_op.register_fake
def _(xs, conv_weight, conv_state, f, b, A_log, dt_bias, state, gate, norm_weight, eps):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)
