"""Kimi Delta Attention, the mixer of three layers out of four (arXiv 2510.26692, section 4)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from kimi_kernels import causal_conv, fused_kda, gated_rms_norm, kda_step
from kimi_linear.cache import KDALayerCache, KimiLinearCache
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.layout import DECODE_TOKENS, TokenLayout
from kimi_linear.linear import is_bare, project
from kimi_linear.norm import KimiLinearRMSNorm

logger = logging.get_logger(__name__)

HALF = (torch.bfloat16, torch.float16)


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution with SiLU over q, k and v; its weight is [3 H K, 1, W]."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        xs: Sequence[Tensor],
        state: Tensor | None,
        keep_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        weight = self.weight.squeeze(1)
        return causal_conv(
            xs, weight, initial_state=state, output_final_state=keep_state, cu_seqlens=cu_seqlens
        )


class ForgetGate(nn.Module):
    """The low-rank projection of the decay and its parameters; `fused_kda` turns them into g."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        H, K = config.linear_num_heads, config.linear_head_dim
        self.f_a_proj = nn.Linear(config.hidden_size, K, bias=False)
        self.f_b_proj = nn.Linear(K, H * K, bias=False)
        # fp32 whatever the model's dtype: a bf16 A_log is off by up to 0.4 %, and so is every decay
        self.dt_bias = nn.Parameter(torch.empty(H * K, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(1, 1, H, 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, t, D] -> the raw gate [b, t, H K], A_log [H], dt_bias [H K]."""
        half = torch.autocast(x.device.type, x.dtype) if x.dtype in HALF else nullcontext()
        with half:
            f = self.f_b_proj(self.f_a_proj(x))  # weights in fp32: see fsdp.py
        # copies: FSDP frees what it gathered when this returns
        return f, self.A_log.flatten().clone(), self.dt_bias.clone()


class GatedRMSNorm(nn.Module):
    """RMSNorm over the value channels of a head, then the sigmoid output gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


class KimiDeltaAttention(nn.Module):
    """KDA mixer: projections, short convolution, delta rule with per-channel decay, gated norm."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        D, H, K = config.hidden_size, config.linear_num_heads, config.linear_head_dim
        self.layer_idx, self.heads = layer_idx, (H, K)
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, H * K, bias=False)
        self.v_proj = nn.Linear(D, H * K, bias=False)
        self.conv1d = ShortConvolution(3 * H * K, config.linear_conv_kernel_dim)
        self.forget_gate = ForgetGate(config)
        self.b_proj = nn.Linear(D, H, bias=False)
        self.g_a_proj = nn.Linear(D, K, bias=False)
        self.g_b_proj = nn.Linear(K, H * K, bias=False)
        self.o_norm = GatedRMSNorm(K, config.rms_norm_eps)
        self.o_proj = nn.Linear(H * K, D, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        cache: KimiLinearCache | None,
        norm: KimiLinearRMSNorm | None = None,
    ) -> Tensor:
        """x [b, t, D] as `layout.pack` left it -> the same shape; with a norm, x + y of norm(x)."""
        forget, residual = self.forget_gate, None if norm is None else x
        if type(forget) is ForgetGate and is_bare(forget):
            *xs, f, g, b = project(
                x, self.q_proj, self.k_proj, self.v_proj,
                forget.f_a_proj, self.g_a_proj, self.b_proj, norm=norm,
            )  # fmt: skip
            f, g = project((f, g), forget.f_b_proj, self.g_b_proj)
            A_log, dt_bias = forget.A_log.flatten(), forget.dt_bias
        else:
            x = x if norm is None else norm(x)
            xs = project(x, self.q_proj, self.k_proj, self.v_proj)
            f, A_log, dt_bias = forget(x)
            b, g = self.b_proj(x), self.g_b_proj(self.g_a_proj(x))
        if self.training and A_log.dtype in HALF:
            logger.warning_once(
                f"A_log is {A_log.dtype}, which moves decays by up to 0.4 %; from_pretrained keeps "
                "it in float32, and under FSDP 2 kimi_linear.fsdp.shard_gates does"
            )
        f, gate = f.unflatten(-1, self.heads), g.unflatten(-1, self.heads)
        layer = None if cache is None else cast(KDALayerCache, cache.layers[self.layer_idx])
        weight, o_norm = self.conv1d.weight.squeeze(1), self.o_norm
        if cache is not None:
            cache.rollback.write(self.layer_idx, xs, f, b, (weight, A_log, dt_bias))
        if layer is not None and self._steps(x, layout, layer):
            conv_state, S = layer.writable_states()
            o = kda_step(
                xs, weight, conv_state, f, b, A_log, dt_bias, S, gate, o_norm.weight, o_norm.eps
            )
            return project(o.flatten(-2), self.o_proj, residual=residual)[0]
        conv_state, S = (None, None) if layer is None else layer.states()
        keep, cu, context = layer is not None, layout.cu_seqlens, layout.context
        if context is not None:
            xs, conv_state = context.conv_state(xs, weight.shape[1])
        xs, conv_state = self.conv1d(xs, conv_state, keep, cu)
        q, k, v = (y.unflatten(-1, self.heads) for y in xs)
        if context is not None:
            o = context.delta_rule(q, k, v, f, b, A_log, dt_bias)
        else:
            o, S = fused_kda(
                q, k, v, f, b, A_log, dt_bias,
                initial_state=S, output_final_state=keep, cu_seqlens=cu,
            )  # fmt: skip
        if layer is not None:
            layer.update_conv_state(cast(Tensor, conv_state))
            layer.update_recurrent_state(cast(Tensor, S))
        return project(o_norm(o, gate).flatten(-2), self.o_proj, residual=residual)[0]

    def _steps(self, x: Tensor, layout: TokenLayout, layer: KDALayerCache) -> bool:
        """Whether these tokens are decoded: few, after others, unpadded, without a gradient."""
        few = x.shape[1] <= DECODE_TOKENS and layout.cu_seqlens is None
        plain = not torch.is_grad_enabled() and is_bare(self.conv1d) and is_bare(self.o_norm)
        return few and plain and layer.states()[1] is not None
