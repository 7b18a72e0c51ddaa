"""The ops of Kimi Linear: a PyTorch reference defines each, Triton kernels run on GPUs."""

from kimi_kernels.causal_conv import causal_conv
from kimi_kernels.dispatch import backend
from kimi_kernels.gated_norm import gated_rms_norm
from kimi_kernels.kda import chunk_kda, fused_kda, kda_gate, kda_step, l2norm, recurrent_kda
from kimi_kernels.latents import quantize_latents, store_latents
from kimi_kernels.linears import fused_linears
from kimi_kernels.mla import latent_attention
from kimi_kernels.moe import expert_mlp, route
from kimi_kernels.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_rms_norm",
    "backend",
    "causal_conv",
    "chunk_kda",
    "expert_mlp",
    "fused_kda",
    "fused_linears",
    "gated_rms_norm",
    "kda_gate",
    "kda_step",
    "l2norm",
    "latent_attention",
    "quantize_latents",
    "recurrent_kda",
    "rms_norm",
    "route",
    "store_latents",
]
