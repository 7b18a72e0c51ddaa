"""A training step of a whole model: forward, loss and backward, of ours and of transformers' own.

Letters of its shape: L layers, every fourth MLA; D model dim; H heads of KDA and of MLA; K their
key and value dim; E experts, 8 per token, and F their dim; R latent rank; `vocab`, the tokens.
Everything else is as released. The weights are among the inputs: all providers share them.
"""

from importlib import import_module
from typing import Any

import torch

from benchmarks.inputs import Inputs, Shape
from benchmarks.providers import Call

LETTERS = ("L", "D", "H", "K", "E", "F", "R", "vocab")
# of the weights whose gradients a call returns: everything lies behind the first one
COMPARED = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.experts.down_proj")


def config(shape: Shape) -> Any:
    """Ours."""
    L, D, H, K, E, F, R, vocab = (shape[letter] for letter in LETTERS)
    return import_module("kimi_linear").KimiLinearConfig(
        num_hidden_layers=L, hidden_size=D, intermediate_size=4 * D,
        num_attention_heads=H, linear_head_dim=K, kv_lora_rank=R,
        qk_nope_head_dim=K, qk_rope_head_dim=K // 2, v_head_dim=K,
        num_experts=E, moe_intermediate_size=F,
        vocab_size=vocab, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def model_of(config: Any, device: torch.device | str, **options: Any) -> Any:
    """A fresh model, ours or native as the config is, built where it is to be."""
    with torch.device(device):
        return import_module("transformers").AutoModelForCausalLM.from_config(config, **options)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """ids [B, T], the sizes of the model by `LETTERS`, and its weights by their names."""
    torch.manual_seed(0)
    weights = model_of(config(shape), device, dtype=dtype).state_dict()
    ids = torch.randint(shape["vocab"], (shape["B"], shape["T"]), device=device)
    return {"ids": ids, "sizes": torch.tensor([shape[letter] for letter in LETTERS]), **weights}


def weights(x: Inputs) -> Inputs:
    """Those of the model among the inputs."""
    return {name: t for name, t in x.items() if "." in name}


def on_weights(config: Any, x: Inputs) -> Any:
    """A model whose parameters are the weights among the inputs, not copies."""
    model = model_of(config, "meta")
    model.load_state_dict(weights(x), assign=True)
    return model


def _step(config: Any, x: Inputs) -> Call:
    """A call leaves no gradients behind, so its peak memory has them and what leads to them."""
    model = on_weights(config, x).train()

    def call():
        loss = model(x["ids"], labels=x["ids"], use_cache=False).loss
        loss.backward()
        gradients = [model.get_parameter(name).grad for name in COMPARED]
        model.zero_grad(set_to_none=True)
        return loss.detach(), *gradients

    return call


def our_config(x: Inputs) -> Any:
    return config(dict(zip(LETTERS, x["sizes"].tolist(), strict=True)))


def native_config(x: Inputs) -> Any:
    """transformers' own, of the same model."""
    package = import_module("transformers.models.kimi_linear")
    return package.KimiLinearConfig(**our_config(x).to_dict())


def ours(x: Inputs) -> Call:
    return _step(our_config(x), x)


def native(x: Inputs) -> Call:
    """transformers' own model, which runs on fla-core's kernels where that is installed."""
    return _step(native_config(x), x)
