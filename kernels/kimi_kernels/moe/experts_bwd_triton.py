"""Triton backward of the routed experts; README.md derives it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.moe.experts_triton import combine
from kimi_kernels.moe.grouped_gemm import row_tile, rows_product, weights_product
from kimi_kernels.moe.plan_triton import Plan
from kimi_kernels.triton_math import sigmoid


@triton.jit
def swiglu_grads_kernel(
    gu, dh, weights, order, offsets, dgu, dweights,
    E: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """One row: dgu [S, 2F], dweights [S] by slot = <h, dh>, and dh [S, F] becomes weight h."""
    i_r = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + i_r)
    if i_r >= tl.load(offsets + E):
        tl.store(dweights + slot, 0.0)
        return
    weight = tl.load(weights + slot).to(tl.float32)
    dot = tl.zeros([BF], tl.float32)
    for f in range(0, F, BF):
        o_f = f + tl.arange(0, BF)
        m, p = o_f < F, i_r * (2 * F) + o_f
        gate = tl.load(gu + p, mask=m, other=0.0).to(tl.float32)
        up = tl.load(gu + p + F, mask=m, other=0.0).to(tl.float32)
        b_dh = tl.load(dh + i_r * F + o_f, mask=m, other=0.0).to(tl.float32)
        s = sigmoid(gate)
        silu = gate * s
        dot += silu * up * b_dh
        tl.debug_barrier()  # every thread has read dh before any overwrites it
        tl.store(dh + i_r * F + o_f, (silu * up * weight).to(dh.dtype.element_ty), mask=m)
        b_dh *= weight
        dgate = b_dh * up * (s + silu * (1.0 - s))
        tl.store(dgu + p, dgate.to(dgu.dtype.element_ty), mask=m)
        tl.store(dgu + p + F, (b_dh * silu).to(dgu.dtype.element_ty), mask=m)
    tl.store(dweights + slot, tl.sum(dot, 0).to(dweights.dtype.element_ty))


def expert_mlp_bwd(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    gu: Tensor,
    plan: Plan,
    dy: Tensor,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, gate_up, down and weights, None where not `needed`.

    Arguments as `expert_mlp`, `gu` and `plan` as `expert_mlp_fwd` gave them, dy `[T, D]`.
    """
    if not plan.order.numel():
        tensors = (x, gate_up, down, weights)
        return [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
            for t, n in zip(tensors, needed, strict=True)
        ]
    x, gate_up, down, weights, dy = (t.contiguous() for t in (x, gate_up, down, weights, dy))
    (S, F2), (T, top_k), E = gu.shape, weights.shape, gate_up.shape[0]
    F, tile = F2 // 2, row_tile(S, E, x.dtype, x.device)
    need_x, need_gate_up, need_down, need_weights = needed
    dh = rows_product(dy, down, plan, tile, trans=True, gather=top_k)
    dgu, dweights = torch.empty_like(gu), torch.empty_like(weights)
    swiglu_grads_kernel[(S,)](
        gu, dh, weights, plan.order, plan.offsets, dgu, dweights,
        E=E, F=F, BF=min(1024, triton.next_power_of_2(F)),
    )  # fmt: skip
    ddown = dgate_up = dx = None
    if need_down:
        ddown = weights_product(dy, dh, E, plan, gather_a=top_k)
    del dh
    if need_gate_up:
        dgate_up = weights_product(dgu, x, E, plan, gather_b=top_k)
    if need_x:
        dx = combine(rows_product(dgu, gate_up, plan, tile, trans=True), plan, None, T)
    return [dx, dgate_up, ddown, dweights if need_weights else None]
