"""Triton routing, forward and backward, and its operators; reference.py defines it."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.moe.reference import RENORM_EPS
from kimi_kernels.operators import dispatch, first_order
from kimi_kernels.overlap import overlap, wait_for_inputs

# ---- kernels -----------------------------------------------------------------------------------

EPS = tl.constexpr(RENORM_EPS)
NEVER = tl.constexpr(-(2**31))  # below the key of every float

if os.environ.get("TRITON_INTERPRET") == "1":

    @triton.jit
    def score(x):
        """sigmoid."""
        return 1.0 / (1.0 + tl.exp(-x))

else:
    from triton.language.extra import libdevice

    @triton.jit
    def score(x):
        """sigmoid with the exponential and the division of torch, so that the choice is its."""
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def sort_key(x):
    """int32 above NEVER that orders fp32 `x`, NaN highest as in topk.

    In 32 bits a warp finds the largest with one instruction.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0: -0 is 0
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), NEVER + 1)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def route_fwd_kernel(
    logits, bias, weights, index,
    scale,
    E: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr,
    RENORM: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token per program: the best expert, TOP_K times over."""
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // N_GROUP
    o_g, o_s, o_k = tl.arange(0, BG)[:, None], tl.arange(0, BS)[None, :], tl.arange(0, BK)
    o_e, m_e = o_g * SIZE + o_s, (o_g < N_GROUP) & (o_s < SIZE)  # [BG, BS]
    b_s = score(tl.load(logits + i_t * E + o_e, mask=m_e, other=0.0))
    b_b = tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    key = tl.where(m_e, sort_key(b_s + b_b), NEVER)
    if N_GROUP > 1:
        first = tl.max(key, 1)  # [BG]
        i_s = tl.min(tl.where(key == first[:, None], o_s, BS), 1)  # of equal ones the lowest
        second = tl.max(tl.where(o_s == i_s[:, None], NEVER, key), 1)
        o = tl.arange(0, BG)
        group = tl.where(o < N_GROUP, sort_key(key_value(first) + key_value(second)), NEVER)
        for _ in range(TOPK_GROUP):
            i_g = tl.min(tl.where(group == tl.max(group, 0), o, BG), 0)
            group = tl.where(o == i_g, NEVER, group)
        open_ = (group == NEVER) & (o < N_GROUP)
        key = tl.where(open_[:, None], key, NEVER)
    b_i = tl.zeros([BK], tl.int32)
    for j in range(TOP_K):
        best = tl.max(tl.max(key, 1), 0)
        i_e = tl.min(tl.min(tl.where(key == best, o_e, E), 1), 0)
        key = tl.where(o_e == i_e, NEVER, key)
        b_i = tl.where(o_k == j, i_e, b_i)
    m_k = o_k < TOP_K
    at = b_i // SIZE * BS + b_i % SIZE
    b_w = tl.where(m_k, tl.gather(tl.reshape(b_s, [BG * BS]), at, 0), 0.0)
    if RENORM:
        b_w = tl.div_rn(b_w, tl.sum(b_w, 0) + EPS)
    tl.store(weights + i_t * TOP_K + o_k, b_w * scale, mask=m_k)
    tl.store(index + i_t * TOP_K + o_k, b_i.to(tl.int64), mask=m_k)


@triton.jit
def route_bwd_kernel(
    logits, index, dweights, dlogits,
    scale,
    E: tl.constexpr, TOP_K: tl.constexpr, RENORM: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    o_e, o_k = tl.arange(0, BE), tl.arange(0, BK)
    m_k = o_k < TOP_K
    b_i = tl.load(index + i_t * TOP_K + o_k, mask=m_k, other=0)
    b_dw = tl.load(dweights + i_t * TOP_K + o_k, mask=m_k, other=0.0) * scale
    b_s = tl.where(m_k, score(tl.load(logits + i_t * E + b_i)), 0.0)
    if RENORM:
        total = tl.sum(b_s, 0) + EPS
        b_dw = (b_dw - tl.sum(b_dw * tl.div_rn(b_s, total), 0)) / total
    tl.store(dlogits + i_t * E + o_e, tl.zeros([BE], tl.float32), mask=o_e < E)
    tl.debug_barrier()  # the zeros before what replaces some of them
    tl.store(dlogits + i_t * E + b_i, b_dw * b_s * (1.0 - b_s), mask=m_k)


# ---- launchers ---------------------------------------------------------------------------------


def route_fwd(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights fp32 and indexes int64, [T, top_k], from logits [T, E] fp32."""
    T, E = logits.shape
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    index = torch.empty(T, top_k, dtype=torch.int64, device=logits.device)
    BG, BS = triton.next_power_of_2(n_group), triton.next_power_of_2(E // n_group)
    if T:
        route_fwd_kernel[(T,)](
            logits.contiguous(), bias.contiguous(), weights, index, scale,
            E=E, N_GROUP=n_group, TOPK_GROUP=topk_group, TOP_K=top_k, RENORM=renormalize,
            BG=BG, BS=BS, BK=triton.next_power_of_2(top_k), num_warps=warps(BG * BS),
            **overlap(logits.device),
        )  # fmt: skip
    return weights, index


def route_bwd(
    logits: Tensor, index: Tensor, dweights: Tensor, renormalize: bool, scale: float
) -> Tensor:
    """dlogits [T, E] from dweights [T, top_k]."""
    (T, E), top_k = logits.shape, index.shape[1]
    dlogits = torch.empty(T, E, dtype=torch.float32, device=logits.device)
    BE = triton.next_power_of_2(E)
    if T:
        route_bwd_kernel[(T,)](
            logits.contiguous(), index, dweights.contiguous(), dlogits, scale,
            E=E, TOP_K=top_k, RENORM=renormalize,
            BE=BE, BK=triton.next_power_of_2(top_k), num_warps=warps(BE),
        )  # fmt: skip
    return dlogits


def warps(experts: int) -> int:
    """8 experts per thread: 256 take one warp, whose reductions need no barrier."""
    return min(16, max(1, experts // 256))


# ---- autograd ----------------------------------------------------------------------------------


@torch.library.custom_op("kimi_kernels::route", mutates_args=())
def route_op(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `route_fwd`."""
    return route_fwd(logits, bias, top_k, n_group, topk_group, renormalize, scale)


@route_op.register_fake
def _(logits, bias, top_k, n_group, topk_group, renormalize, scale):
    weights = logits.new_empty(logits.shape[0], top_k)
    return weights, torch.empty_like(weights, dtype=torch.int64)


@torch.library.custom_op("kimi_kernels::route_backward", mutates_args=())
def route_backward_op(
    logits: Tensor, index: Tensor, dweights: Tensor, renormalize: bool, scale: float
) -> Tensor:
    """See `route_bwd`."""
    return route_bwd(logits, index, dweights, renormalize, scale)


@route_backward_op.register_fake
def _(logits, index, dweights, renormalize, scale):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, *_, renormalize, scale = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scalars = renormalize, scale


def _backward(ctx, dweights, _, backward=route_backward_op):
    return backward(*ctx.saved_tensors, dweights, *ctx.scalars), *[None] * 6


route_op.register_autograd(_backward, setup_context=_setup)


class Route(torch.autograd.Function):
    """`route_op` and its gradient, without operators."""

    forward = staticmethod(route_fwd)
    setup_context = staticmethod(_setup)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        return _backward(ctx, *grads, route_bwd)


route_triton = dispatch(route_op, Route, route_fwd)
