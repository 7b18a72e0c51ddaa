"""Kimi Linear for PyTorch and Hugging Face transformers.

Importing this package registers the model with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kimi_linear.cache import KimiLinearCache
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearModel,
    KimiLinearPreTrainedModel,
)

__version__ = "0.1.0"

__all__ = [
    "KimiLinearCache",
    "KimiLinearConfig",
    "KimiLinearForCausalLM",
    "KimiLinearModel",
    "KimiLinearPreTrainedModel",
]

AutoConfig.register("kimi_linear", KimiLinearConfig, exist_ok=True)
AutoModel.register(KimiLinearConfig, KimiLinearModel, exist_ok=True)
AutoModelForCausalLM.register(KimiLinearConfig, KimiLinearForCausalLM, exist_ok=True)
