"""The Triton ops for autograd, and as operators of torch, of which a compiler sees one each."""

import torch
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype
from kimi_kernels.kda.chunk_bwd import chunk_kda_bwd
from kimi_kernels.kda.chunk_fwd import MAX_K, MIN_KV, chunk_kda_fwd, count_borders
from kimi_kernels.kda.recurrent import recurrent_kda_fwd
from kimi_kernels.kda.reference import anchor_tree, chunk_form, fused_kda_ref, kda_ref
from kimi_kernels.kda.step import kda_step_fwd
from kimi_kernels.operators import dispatch, first_order

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def tiled(q: Tensor, v: Tensor) -> bool:
    """Whether the chunk kernels take these K and V."""
    return MIN_KV <= q.shape[-1] <= MAX_K and v.shape[-1] >= MIN_KV


def kda_fwd(q, k, v, *args, recurrent: bool, for_backward: bool = False):
    """o, S and the states between the segments of the backward pass, none token by token.

    `chunk_kda_fwd`, or `recurrent_kda_fwd` if `recurrent` or if K or V is extreme.
    """
    if tiled(q, v) and not recurrent:
        return chunk_kda_fwd(q, k, v, *args, for_backward=for_backward)
    o, S = recurrent_kda_fwd(q, k, v, *args)
    return o, S, S.new_empty(0, *S.shape[1:])


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kda_fwd`."""
    args = (k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens)
    return kda_fwd(q, *args, recurrent=recurrent, for_backward=True)


@kda_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, recurrent):
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = v.new_empty(N, HV, K, V, dtype=torch.float32)
    borders = 0
    if tiled(q, v) and not recurrent:
        borders = count_borders(B, T, HV, None if cu_seqlens is None else N)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, S, S.new_empty(borders, HV, K, V)


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
    o: Tensor,
    borders: Tensor,
    do: Tensor,
    dS: Tensor,
) -> Grads:
    """See `kda_bwd`; empty where the argument is None."""
    args = (k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens)
    grads = kda_bwd(q, *args, o, borders, do, dS)
    return tuple(q.new_empty(0) if x is None else x for x in grads)


def kda_bwd(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor | None, ...]:
    """Gradients of every tensor argument; None where that is None."""
    return (chunk_kda_bwd if tiled(q, v) else reference_bwd)(q, k, v, *args)


def reference_bwd(*args) -> tuple[Tensor | None, ...]:
    """As `chunk_kda_bwd` for any K and V: the reference's forward again, and its gradient."""
    *first, scale, lower_bound, initial_state, cu_seqlens, _o, _borders, do, dS = args
    tensors = [*first, initial_state]
    q = args[0]

    def forward(*given):
        leaves = iter(given)
        *x, A, dt, S0 = (None if x is None else next(leaves) for x in tensors)
        if A is None:
            return kda_ref(chunk_form, *x, scale, S0, cu_seqlens)
        return fused_kda_ref(chunk_form, *x, A, dt, lower_bound, S0, cu_seqlens)

    # vjp, because torch.autograd does not record inside an operator; what the reference caches must
    # be made outside of it
    anchor_tree(q.device, accumulation_dtype(q.dtype))
    given = [x for x in tensors if x is not None]
    grads = iter(torch.func.vjp(forward, *given)[1]((do, dS)))
    # copies: what an operator returns may not be its input, as dS is without tokens
    return tuple(
        None if x is None else next(grads).clone(memory_format=torch.contiguous_format)
        for x in tensors
    )


@kda_backward_op.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens, *args):
    tensors = [q, k, v, g, beta, A_log, dt_bias, initial_state]
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in tensors
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, scale, lower_bound, initial_state, cu_seqlens, _ = inputs
    o, _, borders = output
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, o, borders)
    ctx.scalars = scale, lower_bound


def _backward(ctx, do, dS, _, backward=kda_backward_op):
    *tensors, initial_state, cu_seqlens, o, borders = ctx.saved_tensors
    args = (*tensors, *ctx.scalars, initial_state, cu_seqlens, o, borders)
    grads = backward(*args, do, dS)
    needed = (*ctx.needs_input_grad[:7], ctx.needs_input_grad[9])
    *first, dS0 = (g if n else None for g, n in zip(grads, needed, strict=True))
    return *first, None, None, dS0, None, None


kda_op.register_autograd(_backward, setup_context=_setup)


class KDA(torch.autograd.Function):
    """`kda_op` and its gradient, without operators."""

    @staticmethod
    def forward(*args):
        return kda_fwd(*args[:-1], recurrent=args[-1], for_backward=True)

    setup_context = staticmethod(_setup)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        return _backward(ctx, *grads, kda_bwd)


kda = dispatch(kda_op, KDA, lambda *args: kda_fwd(*args[:-1], recurrent=args[-1]))


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
