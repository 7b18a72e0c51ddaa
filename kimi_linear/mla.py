"""Multi-head latent attention without positional encoding, every fourth layer and the last one."""

from typing import cast

import torch
from torch import Tensor, nn

from kimi_kernels import latent_attention
from kimi_linear.cache import KimiLinearCache, LatentLayerCache
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.layout import TokenLayout
from kimi_linear.linear import has_plain_weight, is_bare, project
from kimi_linear.norm import KimiLinearRMSNorm

LATENT_NORM_EPS = (
    1e-6  # of the latents' norms, unlike rms_norm_eps (as in the released modeling_kimi.py)
)


def linear_weight(linear: nn.Module, like: Tensor, rank: int) -> Tensor:
    """The matrix [out, rank] that `linear` applies, also under LoRA, quantisation or offloading.

    Raises:
        ValueError: it, or an adapter of it, has a bias.
    """
    if type(linear) is nn.Linear and linear.bias is None and is_bare(linear):
        return linear.weight.to(like.dtype)
    for name, _ in linear.named_parameters():
        if name.split(".")[-1] == "bias":
            raise ValueError(f"kv_b_proj has {name}, want no bias: MLA takes it for a matrix")
    return linear(torch.eye(rank, device=like.device, dtype=like.dtype)).T


class KimiLatentAttention(nn.Module):
    """MLA mixer; attends to the latents in the cache, which hold no padding."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        D, H = config.hidden_size, config.num_attention_heads
        R, P = config.kv_lora_rank, config.qk_rope_head_dim
        self.layer_idx, self.latent_rank, self.rope_dim = layer_idx, R, P
        self.head_dim = config.qk_nope_head_dim + P
        self.scale = self.head_dim**-0.5
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = KimiLinearRMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * self.head_dim, bias=False)
        self.q_lora_rank = config.q_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(D, R + P, bias=False)
        self.kv_a_layernorm = KimiLinearRMSNorm(R, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(R, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        cache: KimiLinearCache | None,
        norm: KimiLinearRMSNorm | None = None,
    ) -> Tensor:
        """x [b, t, D] as `layout.pack` left it -> the same shape; with a norm, x + y of norm(x)."""
        first = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        q, latent = project(x, first, self.kv_a_proj_with_mqa, norm=norm)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (-1, self.head_dim))
        own, later = self.kv_a_layernorm, None
        if layout.static and has_plain_weight(own, latent):  # with the store
            later = own.weight, own.eps
        else:
            c, k_r = latent.split((self.latent_rank, self.rope_dim), -1)
            latent = torch.cat((own(c).to(k_r.dtype), k_r), -1)
        w_kv = linear_weight(self.kv_b_proj, latent, self.latent_rank)
        if cache is not None:
            layer = cast(LatentLayerCache, cache.layers[self.layer_idx])
            stored = layer.update(latent, layout, later)
        if layout.context is not None:
            o = layout.context.attention(q, latent, w_kv, self.scale)
        elif cache is None or not cache.seen:  # nothing but these tokens
            latent = latent if cache is None else layer.seen(latent)
            ends = layout.host_seqlens
            o = latent_attention(q, latent, w_kv, scale=self.scale, cu_seqlens=ends)
        else:
            q, at = layout.unpack(q), layout.positions
            o = layout.pack(latent_attention(q, stored, w_kv, scale=self.scale, positions=at))
        return project(o.flatten(-2), self.o_proj, residual=None if norm is None else x)[0]
