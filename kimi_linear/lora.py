"""LoRA by PEFT: which parts of the model an adapter is put on."""

from typing import TYPE_CHECKING

from transformers.utils.versions import require_version

if TYPE_CHECKING:
    from peft import LoraConfig

PEFT = "peft>=0.20"  # 0.18 lays out experts' factors differently, 0.19 loads none in 5.23
KDA = ("q_proj", "k_proj", "v_proj", "o_proj", "b_proj")
KDA_GATES = ("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")
MLA = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")  # shared experts and dense layers
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # [E, 2F, D], [E, D, F]


def lora_config(
    r: int = 16,
    *,
    alpha: int | None = None,
    dropout: float = 0.0,
    shared_experts: bool = True,
    experts: bool = False,
) -> "LoraConfig":
    """LoRA on every projection of KDA and MLA, and on experts if asked for.

        model = peft.get_peft_model(model, kimi_linear.lora_config(r=16))

    Everything else stays as it is: routers and their biases, A_log, dt_bias, convolutions, norms,
    embeddings and `lm_head`. `model.merge_and_unload().save_pretrained(folder)` writes the merged
    model in the released layout, rounded to the model's dtype.

    The routed experts are parameters, not linear layers: PEFT gives each expert its own factors,
    and adds their product to the whole stack before each forward. So an adapted layer needs a
    second copy of its experts in the forward pass, which lives until the backward pass, and there a
    gradient of that size: in bf16 at the released size 3.6 GB each per layer, and 94 GB of copies
    without gradient checkpointing, which leaves one layer's at a time. Merge before generating, or
    each step adds the products again. At the released size 1,304,128 r parameters are trained, and
    51,118,080 r more with `experts`.

    Args:
        r: rank of each projection, and of each expert.
        alpha: the update is alpha / r times the product of the factors; 2 r if None.
        dropout: on the input of linear layers; for kv_b_proj one mask for all tokens. PEFT has none
            for routed experts.
        shared_experts: also the shared experts and the dense layers.
        experts: also the routed experts.

    Raises:
        ImportError: PEFT 0.20 or newer is not installed.
        ValueError: a rank below 1, or dropout with `experts`.
    """
    if r < 1:
        raise ValueError(f"r is {r}, want at least 1")
    if experts and dropout:
        raise ValueError(f"dropout is {dropout}, want 0 with experts: PEFT has none for parameters")
    require_version(PEFT, f"lora_config: pip install '{PEFT}'")
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=sorted({*KDA, *KDA_GATES, *MLA, *(MLP if shared_experts else ())}),
        target_parameters=list(EXPERTS) if experts else None,
    )
