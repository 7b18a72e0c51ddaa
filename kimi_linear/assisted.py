"""`generate` with drafted tokens: by an assistant model, or looked up in the prompt.

transformers drafts, checks all drafts in one forward, and drops the rejected ones by `cache.crop`.
Its first forward has the whole prompt in it, and what a forward has brought is recorded for `crop`:
so here the prompt goes first, all but its last token.
"""

import copy
from functools import wraps
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from kimi_linear.cache import KimiLinearCache
from kimi_linear.rollback import RECORDED

ASSISTED: Any = GenerationMixin._assisted_decoding  # pyright: ignore[reportAttributeAccessIssue]
NOT_OF_THE_MODEL = signature(ASSISTED).parameters  # of its arguments


class AssistedGeneration(GenerationMixin):
    """What assisted generation needs around a `KimiLinearCache`."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name in ("assistant_early_exit", "use_mtp"):
            if getattr(generation_config, name, None):
                raise ValueError(
                    f"{name}: assisted generation wants assistant_model or prompt_lookup_num_tokens"
                )
        assistant = generation_mode_kwargs.get("assistant_model")
        drafts = {"prompt_lookup_num_tokens": generation_config}
        if assistant is not None:
            drafts["num_assistant_tokens"] = assistant.generation_config
        for name, config in drafts.items():
            if (n := getattr(config, name, None) or 0) >= RECORDED:
                raise ValueError(f"{name} is {n}, want less than {RECORDED}")
        parent: Any = super()
        parent._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    @wraps(ASSISTED)
    def _assisted_decoding(self, input_ids, *args, **kwargs):
        parent: Any = super()
        cache, config = kwargs.get("past_key_values"), kwargs["generation_config"]
        if not isinstance(cache, KimiLinearCache):
            return parent._assisted_decoding(input_ids, *args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: assisted generation wants input_ids")
        if len(input_ids) != 1:
            raise ValueError(f"input_ids has {len(input_ids)} rows, assisted generation wants one")
        inputs = {k: x for k, x in kwargs.items() if k not in NOT_OF_THE_MODEL}
        self._read_prompt(input_ids, config, inputs)
        record = cache.rollback
        before, record.drafts = record.on, True
        try:
            return parent._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            record.on, record.drafts = before, False
            record.drop()

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """An assistant is asked again and again, and drops what was rejected in between."""
        cache = model_kwargs.get("past_key_values")
        if generation_config.is_assistant and isinstance(cache, KimiLinearCache):
            if not cache.rollback.on:
                self._read_prompt(input_ids, generation_config, model_kwargs)
            cache.activate_past_recording()
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _read_prompt(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict) -> None:
        """Run what the cache has not seen of the prompt, but not its last token."""
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        T, seen = input_ids.shape[1], cache.seen
        total = getattr(generation_config, "_mask_length", T) if mask is None else mask.shape[1]
        if total != T or seen >= T:
            raise ValueError(
                f"past_key_values holds {seen} columns, input_ids {T}, attention_mask {total}: "
                "assisted generation wants the whole sequence, with at least one new token"
            )
        if seen == T - 1:
            return
        config, inputs = copy.copy(generation_config), dict(model_kwargs)
        config._mask_length = T - 1
        for name in ("attention_mask", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][..., :-1]
        parent: Any = super()
        parent._prefill(input_ids[:, :-1], config, inputs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """The first drafts come with all that the cache has not seen, not with the prompt."""
        cache = kwargs.get("past_key_values")
        first = next_sequence_length is None and kwargs.get("is_first_iteration")
        if first and isinstance(cache, KimiLinearCache) and cache.rollback.drafts:
            next_sequence_length = input_ids.shape[1] - cache.seen
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs
        )
