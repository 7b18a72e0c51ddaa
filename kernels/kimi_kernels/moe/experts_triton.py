"""Triton forward of the routed experts: what is not a plain product, and the launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.moe.decode_triton import DECODE_SLOTS, decode_experts
from kimi_kernels.moe.grouped_gemm import Tile, accumulate, row_tile, rows_product
from kimi_kernels.moe.plan_triton import Plan, plan_slots
from kimi_kernels.moe.reference import shared_mlp
from kimi_kernels.overlap import overlap, wait_for_inputs
from kimi_kernels.triton_math import sigmoid

# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def gate_up_tile(
    x, w, order, h, gu, depth, i_e, first, end, i_f,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    BF: tl.constexpr = BN // 2
    o_m, o_k, o_n = first + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    m_m = o_m < end
    token = tl.load(order + o_m, mask=m_m, other=0) // TOP_K
    # rows of gate and up alternate, so that both of a feature end up in one thread
    m_n, o_w = i_f * BF + o_n // 2 < F, i_f * BF + o_n // 2 + (o_n % 2) * F
    p_x = x + token.to(tl.int64)[:, None] * D + o_k[None, :]
    p_w = w + i_e.to(tl.int64) * (2 * F * D) + o_w.to(tl.int64)[None, :] * D + o_k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    acc = accumulate(acc, p_x, p_w, o_k, m_n, depth, 1, 1, BK, D % BK == 0, F % BF == 0, PREC)
    gate, up = tl.split(tl.reshape(acc, [BM, BF, 2]))
    o_f = i_f * BF + tl.arange(0, BF)
    m, row = m_m[:, None] & (o_f < F)[None, :], o_m.to(tl.int64)[:, None]
    b_h = gate * sigmoid(gate) * up
    tl.store(h + row * F + o_f[None, :], b_h.to(h.dtype.element_ty), mask=m)
    if SAVE:
        p_gu = gu + row * (2 * F) + o_f[None, :]
        tl.store(p_gu, gate.to(gu.dtype.element_ty), mask=m)
        tl.store(p_gu + F, up.to(gu.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["MT"])
def gate_up_kernel(
    x, w, order, tiles, h, gu,
    MT, depth,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """h [S, F] = SiLU(gate) up, with gate | up = gu [S, 2F] = x[token] w[e]^T, stored if SAVE."""
    wait_for_inputs(OVERLAP)
    NF: tl.constexpr = (2 * F + BN - 1) // BN
    i_t, i_f = tl.program_id(0) // NF, tl.program_id(0) % NF
    i_e, first, end = tl.load(tiles + i_t), tl.load(tiles + MT + i_t), tl.load(tiles + 2 * MT + i_t)
    if i_e < 0:
        return
    if BM == 128:
        if end - first <= 64:  # half a tile is enough
            gate_up_tile(
                x, w, order, h, gu, depth, i_e, first, end, i_f,
                TOP_K, D, F, SAVE, 64, BN, BK, PREC,
            )  # fmt: skip
            return
    gate_up_tile(
        x, w, order, h, gu, depth, i_e, first, end, i_f, TOP_K, D, F, SAVE, BM, BN, BK, PREC
    )


@triton.jit
def combine_kernel(
    y, position, offsets, weights, out,
    E: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WEIGHTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weights[t, j] y[position[t, j]] in fp32, in the order of j."""
    wait_for_inputs(OVERLAP)
    i_t, o_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    rows = tl.load(offsets + E)
    acc = tl.zeros([BD], tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(position + i_t * TOP_K + j)
        m = (o_d < D) & (row < rows)
        b_y = tl.load(y + row.to(tl.int64) * D + o_d, mask=m, other=0.0).to(tl.float32)
        if WEIGHTED:
            b_y *= tl.load(weights + i_t * TOP_K + j).to(tl.float32)
        acc += b_y
    tl.store(out + i_t * D + o_d, acc.to(out.dtype.element_ty), mask=o_d < D)


# ---- launchers ---------------------------------------------------------------------------------


def hidden_rows(
    x: Tensor, gate_up: Tensor, plan: Plan, tile: Tile, top_k: int, save: bool
) -> tuple[Tensor, Tensor]:
    """h [S, F] and, if `save`, gate | up [S, 2F], else without rows."""
    S, (_, F2, D) = plan.order.numel(), gate_up.shape
    F = F2 // 2
    h = torch.empty(S, F, dtype=x.dtype, device=x.device)
    gu = torch.empty(S if save else 0, F2, dtype=x.dtype, device=x.device)
    MT = plan.tiles.shape[1]
    gate_up_kernel[(MT * triton.cdiv(F2, tile.BN),)](
        x, gate_up, plan.order, plan.tiles, h, gu, MT, D,
        TOP_K=top_k, D=D, F=F, SAVE=save, **tile.options(x.dtype), **overlap(x.device),
    )  # fmt: skip
    return h, gu


def combine(y: Tensor, plan: Plan, weights: Tensor | None, T: int) -> Tensor:
    """[T, D]: the sum of each token's rows of y [S, D], weighted by `weights` [T, top_k]."""
    (S, D), E = y.shape, plan.offsets.numel() - 1
    out = torch.empty(T, D, dtype=y.dtype, device=y.device)
    BD = min(512, triton.next_power_of_2(D))  # 8 per thread
    combine_kernel[(T, triton.cdiv(D, BD))](
        y, plan.position, plan.offsets, weights, out,
        E=E, TOP_K=S // T, D=D, BD=BD, WEIGHTED=weights is not None, num_warps=max(1, BD // 256),
        **overlap(y.device),
    )  # fmt: skip
    return out


def few_slots(gate_up: Tensor, index: Tensor, shared: tuple[Tensor, ...] | None) -> bool:
    """Whether decode_triton.py takes so few tokens, with such a shared expert or with it alone."""
    (E, F2, D), (T, top_k) = gate_up.shape, index.shape
    if 0 in (T, D, F2) or (top_k and not E):
        return False
    S, rest = (0, 0) if shared is None else divmod(2 * len(shared[0]), F2)
    return rest == 0 and top_k + S > 0 and T * max(top_k, 1) <= DECODE_SLOTS


def expert_mlp_fwd(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    save: bool = False,
    shared: tuple[Tensor, ...] | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Plan]:
    """y [T, D], and for the backward pass if `save`: gate | up [S, 2F] by row, and the plan.

    Both are without elements if not `save`. Arguments as `expert_mlp`, checked; a norm only with
    `few_slots`.
    """
    x, gate_up, down, index, weights = (t.contiguous() for t in (x, gate_up, down, index, weights))
    (T, D), (E, F2, _), (S, top_k) = x.shape, gate_up.shape, (index.numel(), index.shape[1])
    nothing = Plan(*(index.new_empty(n, dtype=torch.int32) for n in ((0,), (0,), (0,), (3, 0))))
    if not save and few_slots(gate_up, index, shared):
        shared = None if shared is None else tuple(w.contiguous() for w in shared)
        y = decode_experts(x, gate_up, down, index, weights, shared, norm)
        return y, x.new_empty(0, F2), nothing
    if 0 not in (S, D, E, F2):
        tile = row_tile(S, E, x.dtype, x.device)
        plan = plan_slots(index, E, tile.BM)
        h, gu = hidden_rows(x, gate_up, plan, tile, top_k, save)
        y = combine(rows_product(h, down, plan, tile), plan, weights, T)
    else:
        y, gu, plan = x.new_zeros(T, D), x.new_empty(0, F2), nothing
    if shared is not None:
        y += shared_mlp(x, *shared)
    return y, gu, plan if save else nothing
