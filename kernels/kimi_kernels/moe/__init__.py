"""Mixture of experts: routing and the routed experts (the released model: 256 of them, top 8).

s = sigmoid(logits)                      selection on s + bias, weights from the unbiased s
y = sum_{e in top k} w_e down_e( SiLU(gate_e x) * up_e x )

README.md has the backward pass and the plan of the kernels.
"""

import torch
from torch import Tensor

from kimi_kernels.checks import check_float, check_like, check_norm, check_shape
from kimi_kernels.dispatch import use_triton
from kimi_kernels.moe.reference import RENORM_EPS, expert_mlp_ref, route_ref
from kimi_kernels.rms_norm import rms_norm

__all__ = ["RENORM_EPS", "expert_mlp", "route"]


def route(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts per token and weigh them (DeepSeek-V3 routing with sigmoid scores).

    With more than one group a token first keeps the `topk_group` groups whose two best biased
    scores sum highest, then chooses among their experts.

    Args:
        logits: `[T, E]`, fp32 or fp64.
        bias: `e_score_correction_bias`, `[E]`: moves the choice, never the weights. No gradient.
        top_k: experts per token.
        n_group, topk_group: number of equal groups of experts, and how many a token may use.
        renormalize: divide the chosen scores by their sum (+1e-20).
        scale: `routed_scaling_factor`, multiplied in last.

    Returns:
        weights `[T, top_k]` in `logits.dtype`, differentiable in `logits`, and expert indexes
        `[T, top_k]` int64. The order of the chosen experts is not defined, nor is the choice
        between equal biased scores; the Triton kernel returns the best first and of equal ones the
        lowest index.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit together.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, want [T, E]")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits is {logits.dtype}, want float32 or float64")
    E = logits.shape[1]
    check_shape("bias", bias, E)
    check_float("bias", bias, logits)
    if n_group < 1 or E % n_group:
        raise ValueError(f"n_group is {n_group}, want a divisor of the {E} experts")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group is {topk_group}, want 1..{n_group}")
    if not 1 <= top_k <= E // n_group * topk_group:
        raise ValueError(f"top_k is {top_k}, want 1..{E // n_group * topk_group}")
    if n_group > 1 and E // n_group < 2:
        raise ValueError(f"n_group is {n_group}, want at least 2 of the {E} experts per group")
    args = (logits, bias.detach(), top_k, n_group, topk_group, renormalize, scale)
    if not use_triton(logits):
        return route_ref(*args)
    from kimi_kernels.moe.routing_triton import route_triton

    return route_triton(*args)


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """The routed experts' SwiGLU and their weighted sum, and a shared expert's if it is given.

    With `norm` a whole residual block: x plus that of rms_norm(x).

    Args:
        x: tokens, `[T, D]`; bf16, fp16, fp32 or fp64.
        gate_up: `[E, 2F, D]`, gate rows first, same dtype as `x`.
        down: `[E, D, F]`, same dtype.
        index: experts of each token, `[T, k]` int64. An index below 0 or of E or more contributes
            nothing (how expert-parallel plans mark experts of other ranks).
        weights: `[T, k]`, any float dtype; the sum is taken in fp32 or better and rounded once.
        shared: gate and up `[F_s, D]` and down `[D, F_s]` of an expert that every token goes to,
            with weight 1; same dtype. Decoding makes it in the launches of the others, of which
            there may be none (E = k = 0); else it is two matrix products of its own, rounded before
            they are added.
        norm: weight `[D]`, same dtype, and eps. Decoding makes norm and sum in the same launches.

    Returns:
        `[T, D]` in `x.dtype`. Differentiable in all of them but `index`.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    if x.ndim != 2 or gate_up.ndim != 3:
        raise ValueError(
            f"x has shape {list(x.shape)} and gate_up {list(gate_up.shape)}, "
            "want [T, D] and [E, 2F, D]"
        )
    (T, D), (E, F2, _) = x.shape, gate_up.shape
    check_float("x", x, x)
    check_shape("gate_up", gate_up, E, F2 // 2 * 2, D)
    check_shape("down", down, E, D, F2 // 2)
    if index.ndim != 2:
        raise ValueError(f"index has shape {list(index.shape)}, want [{T}, k]")
    check_shape("index", index, T, index.shape[1])
    if index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(f"index is {index.dtype} on {index.device}, want int64 on {x.device}")
    check_shape("weights", weights, *index.shape)
    check_float("weights", weights, x)
    for name, w in (("gate_up", gate_up), ("down", down)):
        check_like(name, w, "x", x)
    if shared is not None:
        if len(shared) != 3:
            raise ValueError(f"shared has {len(shared)} tensors, want gate, up and down")
        shape = shared[0].shape[0] if shared[0].ndim else 1, D
        for i, (w, want) in enumerate(zip(shared, (shape, shape, shape[::-1]), strict=True)):
            check_shape(f"shared[{i}]", w, *want)
            check_like(f"shared[{i}]", w, "x", x)
    if norm is not None:
        check_norm(norm, "x", x, D)
    if use_triton(x):
        from kimi_kernels.moe.autograd import expert_mlp_triton

        return expert_mlp_triton(x, gate_up, down, index, weights, shared, norm)
    if norm is not None:
        return x + expert_mlp_ref(rms_norm(x, *norm), gate_up, down, index, weights, shared)
    return expert_mlp_ref(x, gate_up, down, index, weights, shared)
