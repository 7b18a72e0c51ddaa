"""Feed-forward layers: the dense SwiGLU of the first, the mixture of experts of the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_kernels import expert_mlp, fused_linears, route
from kimi_kernels.moe import RENORM_EPS
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.decode import beside
from kimi_linear.linear import are_plain, decodes, has_plain_weight, is_bare, project
from kimi_linear.norm import KimiLinearRMSNorm

if TYPE_CHECKING:
    from kimi_linear.context import ContextSpan


class KimiLinearMLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x)."""

    def __init__(self, config: KimiLinearConfig, intermediate_size: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, D, bias=False)

    def forward(self, x: Tensor, norm: KimiLinearRMSNorm | None = None) -> Tensor:
        """x [.., D] -> the same shape; with a norm, x + y of norm(x)."""
        if norm is not None and self._fuses(x, norm):
            flat, (D, F_) = x.flatten(0, -2), self.down_proj.weight.shape
            none = x.new_empty(len(flat), 0)  # routed experts of a token
            experts = x.new_empty(0, 2 * F_, D), x.new_empty(0, D, F_), none.long(), none
            gate, up, down = self.linears()
            weights = gate.weight, up.weight, down.weight
            return expert_mlp(flat, *experts, weights, (norm.weight, norm.eps)).view_as(x)
        gate, up = project(x, self.gate_proj, self.up_proj, norm=norm)
        residual = None if norm is None else x
        return project(F.silu(gate) * up, self.down_proj, residual=residual)[0]

    def _fuses(self, x: Tensor, norm: KimiLinearRMSNorm) -> bool:
        """Whether it can be decoded with its norm as a shared expert is, without other experts."""
        return decodes(x) and are_plain(self.linears(), x) and has_plain_weight(norm, x)

    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj


class KimiLinearTopkRouter(nn.Module):
    """Sigmoid router, fp32 throughout. The correction bias moves the choice, not the weights."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        E = self.num_experts = config.num_experts  # read by transformers' expert parallelism
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(E, dtype=torch.float32))
        self.top_k = config.num_experts_per_token
        self.n_group, self.topk_group = config.router_groups
        self.renormalize = config.moe_renormalize
        self.scale = config.routed_scaling_factor
        # [E] int64 while kimi_linear.balance counts tokens; no buffer, as DDP broadcasts buffers
        self.counts: Tensor | None = None

    def forward(
        self, x: Tensor, norm: KimiLinearRMSNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], or norm(x) -> logits [T, E], weights and expert indexes [T, top_k]."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(x, norm)
            weights, index = route(
                logits, self.e_score_correction_bias, self.top_k,
                n_group=self.n_group, topk_group=self.topk_group,
                renormalize=self.renormalize, scale=self.scale,
            )  # fmt: skip
        if self.counts is not None and self.training:
            self._count(self.counts, index)
        return logits, weights, index

    def _logits(self, x: Tensor, norm: KimiLinearRMSNorm | None) -> Tensor:
        w = self.weight
        half = x.dtype == w.dtype and x.dtype in (torch.bfloat16, torch.float16)
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        plain = half and x.is_cuda and eager and type(w) in (Tensor, nn.Parameter)
        if plain and decodes(x):
            given = None if norm is None else (norm.weight, norm.eps)
            return fused_linears([x], [w], torch.float32, norm=given)[0]
        x = x if norm is None else norm(x)
        if plain:
            return torch.mm(x, w.mT, out_dtype=torch.float32)  # exact products, as below
        acc = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(acc), w.to(acc))

    @staticmethod
    def _count(counts: Tensor, index: Tensor) -> None:
        """Add the tokens of each expert to `counts`, without a host sync (bincount has one).

        Gradient checkpointing calls the forward again inside the backward, where autograd has a
        graph task: that call is not counted.
        """
        if torch._C._current_graph_task_id() == -1:
            flat = index.flatten().to(counts.device, torch.int64)
            counts.scatter_add_(0, flat, torch.ones_like(flat))


class KimiLinearExperts(nn.Module):
    """All routed experts of a layer: gate and up rows stacked, [E, 2F, D], and down, [E, D, F]."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E  # transformers' expert parallelism makes it this rank's share
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        shared: tuple[Tensor, Tensor, Tensor] | None = None,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        """`expert_mlp`; argument names and order as transformers' expert-parallel plans expect."""
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, gate_up, down = (t.to(dtype) for t in (hidden_states, self.gate_up_proj, self.down_proj))
        return expert_mlp(x, gate_up, down, top_k_index, top_k_weights, shared, norm)


class KimiLinearMoE(nn.Module):
    """Routed experts plus the shared expert, which sees every token and is not scaled."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = KimiLinearTopkRouter(config)
        self.experts = KimiLinearExperts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = KimiLinearMLP(config, shared) if shared else None

    def forward(self, x: Tensor, norm: KimiLinearRMSNorm | None = None) -> tuple[Tensor, Tensor]:
        """x [b, t, D] -> the same shape, and the router logits [b t, E].

        With a norm, x + y of norm(x).
        """
        flat, shared = x.flatten(0, -2), self.shared_experts
        if norm is not None and not self._fuses(flat, norm):
            y, logits = self(norm(x))
            return x + y, logits
        own = None if shared is None or norm is not None else beside(lambda: shared(x), x)
        logits, weights, index = self.gate(flat, norm)
        if norm is not None:
            linears = None if shared is None else tuple(m.weight for m in shared.linears())
            y = self.experts(flat, index, weights, linears, (norm.weight, norm.eps))
            return y.view_as(x), logits
        y = self.experts(flat, index, weights).view_as(x)
        return (y if own is None else y + own()), logits

    def _fuses(self, x: Tensor, norm: KimiLinearRMSNorm) -> bool:
        """Whether norm, router, all experts and the shared one can be decoded together."""
        shared, parts = self.shared_experts, (self.gate, self.experts)
        here = self.experts.num_experts == self.gate.num_experts
        plain = here and all(map(is_bare, parts)) and has_plain_weight(norm, x)
        if shared is not None:
            plain = plain and is_bare(shared) and are_plain(shared.linears(), x)
        return plain and decodes(x)


def sequence_balance_loss(
    logits: Sequence[Tensor],
    cu_seqlens: Tensor,
    top_k: int,
    context: "ContextSpan | None" = None,
) -> Tensor:
    """DeepSeek-V3's sequence-wise auxiliary loss (arXiv 2412.19437, eq. 17 to 20) with alpha = 1.

    For one layer and a sequence of T tokens, with s = sigmoid(logits) and E experts:

        f_i = E / (top_k T) sum_t [s_ti among the top_k of s_t]    no gradient
        P_i = 1 / T sum_t s_ti / sum_j s_tj
        L   = sum_i f_i P_i

    L is 1 for even loads and E / top_k when all tokens go to the same experts with all their score.
    As in the paper the choice counts without the correction bias and without groups: L is to
    balance the scores themselves. The result is the mean over sequences, summed over layers.

    Args:
        logits: of each layer, `[n, E]`: the real tokens of all sequences, one after another.
        cu_seqlens: ends of the sequences, `[N+1]` from 0 to n. Empty sequences do not count.
        top_k: experts per token.
        context: the tokens of `logits` are this span of the sequences, over several processes.

    Returns:
        A scalar in the dtype of the logits, differentiable in them. Bit-equal between runs: counts
        are integers, and no sum uses atomics on floats.

    Raises:
        ValueError: shapes or counts that do not fit together.
    """
    if not logits or any(x.ndim != 2 or x.shape != logits[0].shape for x in logits):
        raise ValueError(f"logits has shapes {[list(x.shape) for x in logits]}, want equal [n, E]")
    (n, E), device = logits[0].shape, logits[0].device
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, want [N+1] with N >= 1")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}, want 1..{E}")
    cu_seqlens = cu_seqlens.to(device, torch.int64)
    N, lengths = cu_seqlens.numel() - 1, cu_seqlens.diff()
    token = torch.arange(n, device=device) + (0 if context is None else context.start)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)  # [n]
    share = 1.0 / (lengths[sequence] * (lengths > 0).sum()).to(logits[0].dtype)  # [n]
    total = logits[0].new_zeros(())
    for x in logits:
        s = x.to(device).sigmoid()
        slot = (sequence[:, None] * E + s.detach().topk(top_k, -1).indices).flatten()
        counts = slot.new_zeros(N * E).scatter_add_(0, slot, torch.ones_like(slot)).view(N, E)
        if context is not None:
            counts = context.total(counts)
        f = counts.to(s.dtype) * (E / top_k) / lengths.clamp(min=1)[:, None]
        per_token = (f[sequence] * s).sum(-1) / (s.sum(-1) + RENORM_EPS)
        total = total + (per_token * share).sum()
    return total if context is None else context.total(total)


def with_auxiliary_loss(
    loss: Tensor,
    aux_loss: Tensor | None,
    coefficient: float,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    context: "ContextSpan | None" = None,
) -> Tensor:
    """loss + coefficient share aux_loss, or `loss` where there is no auxiliary loss.

    `num_items_in_batch` counts the labels of all the batches that one optimizer step accumulates.
    Where it is given, share is the part of them that is in this batch, so that the auxiliary loss
    adds up to a mean over these batches as the loss does, not to their number. Else share is 1.
    With a `context` the labels are those of a span, and their number that of the whole batch.
    """
    if aux_loss is None:
        return loss
    aux_loss = coefficient * aux_loss.to(loss.device)
    if num_items_in_batch is not None:
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        items = targets.ne(ignore_index).sum().to(loss.device)
        items = items if context is None else context.total(items)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        aux_loss = aux_loss * (items / num_items_in_batch)
    return loss + aux_loss
