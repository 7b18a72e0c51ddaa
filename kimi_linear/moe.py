"""Feed-forward layers: the dense SwiGLU of the first, the mixture of experts of the others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_kernels import expert_mlp, route
from kimi_linear.configuration_kimi_linear import KimiLinearConfig


class KimiLinearMLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x)."""

    def __init__(self, config: KimiLinearConfig, intermediate_size: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> logits [T, E], weights and expert indexes [T, top_k]."""
        acc = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(acc), self.weight.to(acc))
            weights, index = route(
                logits, self.e_score_correction_bias, self.top_k,
                n_group=self.n_group, topk_group=self.topk_group,
                renormalize=self.renormalize, scale=self.scale,
            )  # fmt: skip
        return logits, weights, index


class KimiLinearExperts(nn.Module):
    """All routed experts of a layer: gate and up rows stacked, [E, 2F, D], and down, [E, D, F]."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E  # transformers' expert parallelism makes it this rank's share
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Argument order and names as transformers' expert-parallel plans expect them."""
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, gate_up, down = (t.to(dtype) for t in (hidden_states, self.gate_up_proj, self.down_proj))
        return expert_mlp(x, gate_up, down, top_k_index, top_k_weights)


class KimiLinearMoE(nn.Module):
    """Routed experts plus the shared expert, which sees every token and is not scaled."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = KimiLinearTopkRouter(config)
        self.experts = KimiLinearExperts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = KimiLinearMLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, t, D] -> the same shape, and the router logits [b t, E]."""
        flat = x.flatten(0, -2)
        logits, weights, index = self.gate(flat)
        y = self.experts(flat, index, weights).view_as(x)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), logits
