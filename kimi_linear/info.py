"""What a model costs: parameters, weight memory and cache, from its configuration alone."""

from itertools import chain

import torch

from kimi_kernels.latents import FP8
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
CONTEXTS = (4096, 32768, 131072, 1048576)
STATE_BYTES, ACTIVATION_BYTES = 4, 2  # S is fp32; conv states and latents are bf16
SCALE_BYTES = 4  # fp32


def parameter_counts(config: KimiLinearConfig) -> dict[str, int]:
    """Parameters of the model: `total`, `routed` (all experts), `active` per token, `head`.

    `active` counts what a token's forward multiplies with: the chosen experts, the shared one and
    the head, but of the embedding only a row is read, so it is left out.
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    # the routers' correction biases are buffers here and parameters in the released code
    total = sum(x.numel() for x in chain(model.parameters(), model.buffers()))
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    idle = routed * (config.num_experts - config.num_experts_per_token) // config.num_experts
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    return {"total": total, "routed": routed, "active": total - idle - embedding, "head": head}


def cache_bytes(config: KimiLinearConfig, fp8: bool = False) -> tuple[int, int]:
    """Bytes per token (latents, bf16) and per sequence (S in fp32, conv state in bf16).

    `fp8`: with c in fp8 and a scale in fp32 per latent.
    """
    H, K = config.linear_num_heads, config.linear_head_dim
    kda_layers = config.layer_types.count("linear_attention")
    mla_layers = config.num_hidden_layers - kda_layers
    latent = (config.kv_lora_rank + config.qk_rope_head_dim) * ACTIVATION_BYTES
    if fp8:
        latent -= config.kv_lora_rank * (ACTIVATION_BYTES - FP8.itemsize) - SCALE_BYTES
    conv = (config.linear_conv_kernel_dim - 1) * 3 * H * K * ACTIVATION_BYTES
    return mla_layers * latent, kda_layers * (H * K * K * STATE_BYTES + conv)


def human_bytes(n: float) -> str:
    """Decimal units, three digits: 8064 -> '8.06 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def describe(config: KimiLinearConfig) -> str:
    """The report that `kimi-linear info` prints."""
    n, all_mla = parameter_counts(config), config.all_mla()
    kda_layers = config.layer_types.count("linear_attention")
    moe_layers = config.mlp_layer_types.count("sparse")
    mla_layers, dense_layers = (config.num_hidden_layers - x for x in (kda_layers, moe_layers))
    per_token, per_sequence = cache_bytes(config)
    all_mla_token, _ = cache_bytes(all_mla)
    fp8_token, _ = cache_bytes(config, fp8=True)
    lines = [
        f"layers             {kda_layers} KDA + {mla_layers} MLA; feed-forward: "
        f"{dense_layers} dense, {moe_layers} with {config.num_experts} experts, "
        f"{config.num_experts_per_token} per token + {config.num_shared_experts} shared",
        f"parameters         {n['total']:,}",
        f"  routed experts   {n['routed']:,} ({n['routed'] / n['total']:.1%})",
        f"  active per token {n['active']:,} ({n['active'] - n['head']:,} without the head)",
        "weights            "
        + ", ".join(f"{k} {human_bytes(n['total'] * b)}" for k, b in WEIGHT_BYTES.items())
        + " (every parameter at that width, without scales)",
        f"cache per token    {per_token:,} bytes; with every layer MLA {all_mla_token:,}",
        f"  latents in fp8   {fp8_token:,} bytes",
        f"cache per sequence {per_sequence:,} bytes whatever its length; with every layer MLA 0",
        "",
        "cache of one sequence    this model   every layer MLA   ratio",
    ]
    for context in CONTEXTS:
        if context > config.model_max_length:
            break
        ours, other = per_sequence + context * per_token, context * all_mla_token
        row = f"{ours / other:.3f}" if other else "-"
        lines.append(
            f"{context:>9,} tokens {human_bytes(ours):>18} {human_bytes(other):>17} {row:>7}"
        )
    return "\n".join(lines)
