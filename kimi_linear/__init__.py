"""Kimi Linear for PyTorch and Hugging Face transformers.

Importing this package registers the model with AutoConfig, AutoModel and AutoModelForCausalLM, and
its tokenizer with AutoTokenizer.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kimi_linear.balance import LoadBalancingCallback, freeze_router
from kimi_linear.cache import KimiLinearCache
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.lora import lora_config
from kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearModel,
    KimiLinearPreTrainedModel,
)
from kimi_linear.tokenization_kimi_linear import KimiLinearTokenizer, register_tokenizer

__version__ = "0.1.0"

__all__ = [
    "KimiLinearCache",
    "KimiLinearConfig",
    "KimiLinearForCausalLM",
    "KimiLinearModel",
    "KimiLinearPreTrainedModel",
    "KimiLinearTokenizer",
    "LoadBalancingCallback",
    "freeze_router",
    "lora_config",
]

AutoConfig.register("kimi_linear", KimiLinearConfig, exist_ok=True)
AutoModel.register(KimiLinearConfig, KimiLinearModel, exist_ok=True)
AutoModelForCausalLM.register(KimiLinearConfig, KimiLinearForCausalLM, exist_ok=True)
register_tokenizer()
