"""The definition of routing and of the routed experts in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype

RENORM_EPS = 1e-20


def route_ref(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights and expert indexes [T, top_k]; arguments as `route`, `bias` without a gradient."""
    T, E = logits.shape
    scores = logits.sigmoid()
    choice = scores.detach() + bias
    if n_group > 1:
        grouped = choice.view(T, n_group, E // n_group)
        best = grouped.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = grouped.masked_fill(closed[..., None], -torch.inf).view(T, E)
    index = choice.topk(top_k, -1).indices
    weights = scores.gather(1, index)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORM_EPS)
    return weights * scale, index


def shared_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[T, D] -> the same: a SwiGLU that every token goes through."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def expert_mlp_ref(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """[T, D]; arguments as `expert_mlp`. Waits for a GPU, to cut the rows into experts."""
    (T, D), E, k = x.shape, gate_up.shape[0], index.shape[1]
    absent = (index < 0) | (index >= E)
    flat, weights = index.masked_fill(absent, E).flatten(), weights.masked_fill(absent, 0)
    order = flat.argsort(stable=True)  # slots grouped by expert
    rows = x[order // k]
    counts = torch.bincount(flat, minlength=E)[:E].tolist()
    parts, start = [], 0
    for e, n in enumerate(counts):
        if n or e == 0:  # a rank without tokens has a gradient of zeros, not none
            gate, up = F.linear(rows[start : start + n], gate_up[e]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, down[e]))
            start += n
    parts.append(rows.new_zeros(T * k - start, D))  # slots of other ranks' experts
    y = torch.cat(parts)[order.argsort()].view(T, k, D)
    acc = accumulation_dtype(x.dtype)
    y = (y.to(acc) * weights.to(acc)[..., None]).sum(1).to(x.dtype)
    return y if shared is None else y + shared_mlp(x, *shared)
