"""The models under test: one language model, three mixers that differ in the recurrence alone."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kimi_kernels.kda import l2norm
from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.kda import KimiDeltaAttention

MIXERS = ("kda", "scalar", "softmax")


class PerHead(nn.Module):
    """A parameter [H, ...] that stands for one of [H K, ...], the same for all K channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.channels, *x.shape[1:]).flatten(0, 1)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x[:: self.channels].clone()


class SoftmaxAttention(KimiDeltaAttention):
    """KDA's block around causal softmax attention: projections, short convolution, gated norm.

    q and k are normalised as in KDA, to the length sqrt(K). Nothing rotates them: order comes from
    the convolution and the causal mask. The library's MLA has neither positions nor a convolution,
    and so nothing that tells a key from the value beside it.
    """

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.forget_gate, self.b_proj

    def forward(self, x: Tensor, layout: Any, cache: Any) -> Tensor:
        """x [B, T, D] -> the same shape; full rows only."""
        if cache is not None or layout.cu_seqlens is not None:
            raise ValueError("softmax attention takes full rows: neither a cache nor cu_seqlens")
        xs, _ = self.conv1d((self.q_proj(x), self.k_proj(x), self.v_proj(x)), None, False, None)
        q, k, v = (y.unflatten(-1, self.heads).transpose(1, 2) for y in xs)  # [B, H, T, K]
        K = q.shape[-1]
        q, k = (l2norm(y) * K**0.5 for y in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, self.heads)
        return self.o_proj(self.o_norm(o, gate).flatten(-2))


def build(mixer: str, vocab: int, heads: int, head_dim: int) -> Any:
    """A fresh model in fp32: two layers, D = heads * head_dim, dense feed-forwards of 4 D.

    The embedding is the head, as in Zoology. At length 64 with 2048 words KDA then leaves the
    plateau of MQAR (loss log 1024) within 300 steps on a CPU; untied it was on it after 900.

    `scalar` is KDA with one decay per head, the gated delta rule: the matrix and the bias that end
    in a gate per channel are tied over the channels of a head.
    """
    D, layers = heads * head_dim, 2
    config = KimiLinearConfig(
        vocab_size=vocab, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=layers,
        first_k_dense_replace=layers, num_attention_heads=heads,
        linear_attn_config={
            "num_heads": heads, "head_dim": head_dim, "short_conv_kernel_size": 4,
            "kda_layers": list(range(1, layers + 1)), "full_attn_layers": [],
        },
        bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = KimiLinearForCausalLM(config)
    for i, layer in enumerate(model.model.layers):
        if mixer == "scalar":
            gate = layer.self_attn.forget_gate
            for module, name in ((gate.f_b_proj, "weight"), (gate, "dt_bias")):
                parametrize.register_parametrization(module, name, PerHead(head_dim))
        elif mixer == "softmax":
            layer.self_attn = SoftmaxAttention(config, i).apply(model._init_weights)
    return model
