"""The Triton experts for autograd, and as operators of torch for a compiler."""

import torch
from torch import Tensor

from kimi_kernels.moe.experts_bwd_triton import expert_mlp_bwd
from kimi_kernels.moe.experts_triton import expert_mlp_fwd, few_slots
from kimi_kernels.moe.grouped_gemm import row_tile
from kimi_kernels.moe.plan_triton import Plan, max_tiles
from kimi_kernels.moe.reference import shared_mlp
from kimi_kernels.operators import first_order, wants_gradient
from kimi_kernels.rms_norm import rms_norm

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def expert_mlp_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None,
    norm: tuple[Tensor, float] | None,
) -> Tensor:
    """`expert_mlp_fwd`, differentiable; an operator only for a compiler, as it costs host time."""
    args = (x, gate_up, down, index, weights)
    save = wants_gradient(*args, *(shared or ()), *(norm or ()))
    plain = not (save or torch.compiler.is_compiling())
    if norm is not None and not (plain and few_slots(gate_up, index, shared)):
        return x + expert_mlp_triton(rms_norm(x, *norm), *args[1:], shared, None)
    if plain:
        return expert_mlp_fwd(*args, shared=shared, norm=norm)[0]
    if torch.compiler.is_compiling():
        y = expert_mlp_op(*args, save)[0]
    else:
        y = Experts.apply(*args, save)[0]
    return y if shared is None else y + shared_mlp(x, *shared)


@torch.library.custom_op("kimi_kernels::expert_mlp", mutates_args=())
def expert_mlp_op(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor, save: bool
) -> Outputs:
    """See `expert_mlp_fwd`: y, gate | up, and the plan."""
    y, gu, plan = expert_mlp_fwd(x, gate_up, down, index, weights, save)
    return y, gu, *plan


@expert_mlp_op.register_fake
def _(x, gate_up, down, index, weights, save):
    (T, D), (E, F2, _), S = x.shape, gate_up.shape, index.shape[0] * index.shape[1]
    save = save and 0 not in (S, D, E, F2)
    tiles = max_tiles(S, E, row_tile(S, E, x.dtype, x.device).BM) if save else 0
    shapes = ((S,), (S,), (E + 1,), (3, tiles)) if save else ((0,), (0,), (0,), (3, 0))
    plan = (index.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return x.new_empty(T, D), x.new_empty(S if save else 0, F2), *plan


@torch.library.custom_op("kimi_kernels::expert_mlp_backward", mutates_args=())
def expert_mlp_backward_op(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    gu: Tensor,
    plan: list[Tensor],
    dy: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `expert_mlp_bwd`; without elements where not needed."""
    grads = expert_mlp_bwd(x, gate_up, down, weights, gu, Plan(*plan), dy, needed)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@expert_mlp_backward_op.register_fake
def _(x, gate_up, down, weights, gu, plan, dy, needed):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else x.new_empty(0)
        for t, n in zip((x, gate_up, down, weights), needed, strict=True)
    )


def _setup(ctx, inputs, output) -> None:
    x, gate_up, down, _, weights, _ = inputs
    ctx.save_for_backward(x, gate_up, down, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for gate | up would be as large as it


def _backward(ctx, dy, *_, backward=expert_mlp_backward_op):
    if dy is None:
        return (None,) * 6
    *args, order, position, offsets, tiles = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = backward(*args, Plan(order, position, offsets, tiles), dy, needed)
    dx, dgate_up, ddown, dweights = (g if n else None for g, n in zip(grads, needed, strict=True))
    return dx, dgate_up, ddown, None, dweights, None


expert_mlp_op.register_autograd(_backward, setup_context=_setup)


class Experts(torch.autograd.Function):
    """`expert_mlp_op` and its gradient, without operators."""

    @staticmethod
    def forward(*args):
        y, gu, plan = expert_mlp_fwd(*args)
        return y, gu, *plan

    setup_context = staticmethod(_setup)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        return _backward(ctx, *grads, backward=expert_mlp_bwd)
