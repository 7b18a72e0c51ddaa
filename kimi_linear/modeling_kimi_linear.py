"""`KimiLinearForCausalLM`: the wiring. Mixers are in kda.py and mla.py, feed-forwards in moe.py."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from kimi_kernels.dispatch import use_triton
from kimi_linear.assisted import AssistedGeneration
from kimi_linear.cache import KimiLinearCache
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.context import ContextSpan
from kimi_linear.decode import captured_step, decode_graphs
from kimi_linear.kda import ForgetGate, GatedRMSNorm, KimiDeltaAttention
from kimi_linear.layout import TokenLayout, packing_arguments, plan_tokens
from kimi_linear.linear import decodes
from kimi_linear.loss import check_labels, head_loss, skips_logits
from kimi_linear.mla import KimiLatentAttention
from kimi_linear.moe import (
    KimiLinearExperts,
    KimiLinearMLP,
    KimiLinearMoE,
    KimiLinearTopkRouter,
    sequence_balance_loss,
    with_auxiliary_loss,
)
from kimi_linear.norm import KimiLinearRMSNorm
from kimi_linear.weights import check_checkpoint, check_placement, in_memory, released_conversions

# tokens of a prompt that go through the layers at once; at the released widths they take 94 KB each
PIECE = 65536
LOSS_KEYS = ("num_items_in_batch", "shift_labels", "ignore_index")


class KimiLinearDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: x += mixer(norm(x)), x += feed_forward(norm(x))."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        is_kda = config.layer_types[layer_idx] == "linear_attention"
        self.is_moe = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = (KimiDeltaAttention if is_kda else KimiLatentAttention)(config, layer_idx)
        dense = config.intermediate_size
        self.mlp = KimiLinearMoE(config) if self.is_moe else KimiLinearMLP(config, dense)
        self.input_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, layout: TokenLayout, past_key_values: KimiLinearCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, t, D] -> the same shape, and the router logits [b t, E] of an MoE layer."""
        router_logits = None
        if decodes(x):  # norms and sums in the launches of the projections
            x = self.self_attn(x, layout, past_key_values, self.input_layernorm)
            y = self.mlp(x, self.post_attention_layernorm)
            return y if self.is_moe else (y, None)
        y = self.self_attn(self.input_layernorm(x), layout, past_key_values)
        y, x = self.post_attention_layernorm(y, x)
        y = self.mlp(y)
        if self.is_moe:
            y, router_logits = y
        return x + y, router_logits


class KimiLinearPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config_class = KimiLinearConfig
    config: KimiLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KimiLinearDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "e_score_correction_bias"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As flash-linear-attention and transformers initialise KDA."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ForgetGate):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1.0, 16.0).log())
            low, high = math.log(1e-3), math.log(1e-1)
            dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp().clamp_min(1e-4)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
        elif isinstance(module, KimiLinearExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, KimiLinearTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, GatedRMSNorm | KimiLinearRMSNorm):
            init.ones_(module.weight)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers' conversions of `kimi_linear` weights are for this model too."""
        return False

    @property
    def _weight_conversions(self):
        """What `save_pretrained` reverts: always to the released layout."""
        if getattr(self, "hf_quantizer", None) is not None:
            return self.__dict__.get("_loaded_conversions")
        return released_conversions()

    @_weight_conversions.setter
    def _weight_conversions(self, value) -> None:
        self.__dict__["_loaded_conversions"] = value

    def _resolve_parallel_plans(self, distributed_config: Any):
        """Lets `tp_plan={}` split the experts alone: transformers 5.23 says so, but refuses it."""
        parent: Any = super()
        if distributed_config.ep_size > 1 and distributed_config.tp_plan == {}:
            self._tp_plan = self._ep_plan  # not empty, and dropped for what the expert plan names
            distributed_config = replace(distributed_config, tp_plan=None)
        return parent._resolve_parallel_plans(distributed_config)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        check_placement(model)
        is_adapter = model._hf_peft_config_loaded  # an adapter's file has nothing but the adapter
        if not (load_config.is_quantized or is_adapter):
            any_shape = load_config.ignore_mismatched_sizes
            check_checkpoint(model, checkpoint_files, state_dict, any_shape)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Also of released names, which are those in the files that `Trainer` resumes from."""
        return super().load_state_dict(in_memory(self, state_dict, strict), strict, assign)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """Write the released layout: per-expert tensors, three convolutions, and its config.json.

        The config's `auto_map` is left out, since the remote code it names is not saved along.
        """
        head = getattr(self, "lm_head", None)
        tied = head is not None and head.weight is self.get_input_embeddings().weight
        if tied and not self._hf_peft_config_loaded:  # transformers' native model never ties
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"].clone()
        auto_map = self.config.__dict__.pop("auto_map", None)
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            if auto_map is not None:
                self.config.auto_map = auto_map


@dataclass
class KimiLinearModelOutput(MoeModelOutputWithPast):
    """transformers' output of a decoder with experts, and the auxiliary loss if one is computed."""

    aux_loss: Tensor | None = None


class KimiLinearModel(KimiLinearPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: KimiLinearConfig) -> None:
        config.validate()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [KimiLinearDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KimiLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        context: ContextSpan | None = None,
        **kwargs: Any,
    ) -> KimiLinearModelOutput:
        """Run the decoder; arguments as in `KimiLinearForCausalLM.forward`."""
        packing = packing_arguments(cu_seqlens, kwargs)
        x = _the_input(input_ids, inputs_embeds, self.config.hidden_size)
        cache = past_key_values
        if cache is not None:
            if not isinstance(cache, KimiLinearCache):
                kind = type(cache).__name__
                raise ValueError(f"past_key_values is a {kind}, want a kimi_linear.KimiLinearCache")
            cache.check(self.config, x.shape[0])
        if self.training and self.gradient_checkpointing and (cache is not None or use_cache):
            raise ValueError(
                "past_key_values or use_cache: gradient checkpointing cannot fill a cache"
            )
        past, lengths = (0, None) if cache is None else (cache.seen, cache.lengths)
        static = not torch.is_grad_enabled() and use_triton(self.embed_tokens.weight)
        what = x, attention_mask, position_ids, *packing
        if context is None:
            layout = plan_tokens(*what, past, lengths, static)
        else:
            experts = (m for m in self.modules() if isinstance(m, KimiLinearExperts))
            if any(m.num_experts < self.config.num_experts for m in experts):
                raise ValueError("context: ranks that share the experts need the same tokens")
            layout = context.layout(*what)
        if layout.packed and (cache is not None or use_cache):
            kind = "packed documents" if context is None else "a span of a sequence"
            raise ValueError(f"past_key_values or use_cache: {kind} cannot fill a cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not layout.packed
        if use_cache and cache is None:
            cache = KimiLinearCache(self.config)

        want_states = _asked(output_hidden_states, self.config.output_hidden_states)
        want_logits = _asked(output_router_logits, self.config.output_router_logits)
        long = math.prod(x.shape[:2]) > PIECE and not (layout.packed or torch.is_grad_enabled())
        balanced = self.training and self.config.router_aux_loss_coef > 0
        if long and cache is not None and not (want_states or want_logits or balanced):
            return self._in_pieces(x, attention_mask, cache)
        if cache is not None:
            cache.begin(layout.shape[1], layout.cu_seqlens is None)

        x = layout.pack(self.embed_tokens(x) if inputs_embeds is None else x)
        states: Any = (x,) if want_states else None
        logits: Any = () if want_logits else None
        routed: list[Tensor] = []  # for the auxiliary loss: real tokens only
        for layer in self.layers:
            x, router_logits = layer(x, layout, past_key_values=cache)
            if balanced and router_logits is not None:
                routed.append(router_logits)
            if states is not None:
                states += (x,)
            if logits is not None and router_logits is not None:
                logits += (layout.unpack(router_logits[None]).flatten(0, -2),)
        x = layout.unpack(self.norm(x))
        if cache is not None:
            cache.advance(layout.shape[1], layout.lengths)
        if states is not None:  # as transformers has it: the last one is after the norm
            states = (*(layout.unpack(s) for s in states[:-1]), x)
        aux_loss = None
        if routed:
            cu_seqlens = layout.cu_seqlens if context is None else context.cu_seqlens
            if cu_seqlens is None:  # full rows
                B, T = layout.shape
                cu_seqlens = torch.arange(0, B * T + 1, T, device=x.device)
            top_k = self.config.num_experts_per_token
            aux_loss = sequence_balance_loss(routed, cu_seqlens, top_k, context)
        return KimiLinearModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=states,
            router_logits=logits,
            aux_loss=aux_loss,
        )

    def _in_pieces(
        self, x: Tensor, mask: Tensor | None, cache: KimiLinearCache
    ) -> KimiLinearModelOutput:
        """A long prompt, ids or embeddings: some columns after the others, through the cache."""
        (B, T), past, hidden = x.shape[:2], cache.seen, []
        for t in range(0, T, max(1, PIECE // B)):
            part = x[:, t : t + max(1, PIECE // B)]
            outputs = self(
                **{"inputs_embeds" if x.is_floating_point() else "input_ids": part},
                attention_mask=None if mask is None else mask[:, : past + t + part.shape[1]],
                past_key_values=cache,
                output_hidden_states=False,
                output_router_logits=False,
            )
            hidden.append(outputs.last_hidden_state)
        return KimiLinearModelOutput(torch.cat(hidden, 1), past_key_values=cache)


class KimiLinearForCausalLM(KimiLinearPreTrainedModel, AssistedGeneration, GenerationMixin):
    """Kimi Linear with a language-modelling head (moonshotai/Kimi-Linear-48B-A3B)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.model = KimiLinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KimiLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        skip_logits: bool | None = None,
        context: ContextSpan | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits, and the loss if `labels` are given.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds`, `[B, T, hidden_size]`.
            attention_mask: `[B, past + T]`, 1 for tokens, 0 for padding, anywhere.
            position_ids: `[B, T]`. The model has no positions; where they do not increase within a
                row, a new packed document starts.
            past_key_values: a `KimiLinearCache`, extended in place.
            labels: `[B, T]`, -100 where no loss is wanted; shifted here.
            use_cache: fill and return a cache. Default: `config.use_cache`, except in training and
                for packed documents.
            logits_to_keep: keep the last so many positions, or those of an index tensor; 0, all of
                them, as `labels` without `shift_labels` want it.
            cu_seqlens: `[N+1]`, ends of the documents packed into one row. The arguments of
                transformers' `DataCollatorWithFlattening` (`cu_seq_lens_q`, `seq_idx`, ...) say the
                same.
            output_hidden_states, output_router_logits: also return them; router logits are one
                `[B T, E]` per MoE layer. Default: the config's.
            skip_logits: compute the loss alone, with Liger-Kernel, in far less memory. Default: in
                training with `labels`, where that is possible (`loss.why_not_fused`).
            context: which span of a row over several processes this is, by
                `context.shard_sequence`, which also makes the other arguments.

        Returns:
            Logits `[B, kept, vocab_size]`, zero where there is padding, None where skipped, and
            what was asked for.

        Raises:
            ValueError: names the argument whose shape, dtype or structure does not fit, before
                anything is changed. Values of ids and labels are not looked at.
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        others = (attention_mask, position_ids, inputs_embeds, labels, cu_seqlens, context)
        others += (output_hidden_states, output_router_logits, skip_logits, *kwargs.values())
        if all(x is None or x is False for x in others):
            logits = captured_step(self, input_ids, past_key_values)
            if logits is not None:
                return MoeCausalLMOutputWithPast(
                    logits=logits[:, keep], past_key_values=past_key_values
                )
        skip = skips_logits(self, skip_logits, labels, logits_to_keep)
        x = input_ids if inputs_embeds is None else inputs_embeds
        check_labels(labels, x, logits_to_keep, kwargs.get("shift_labels"))
        loss_kwargs = {k: kwargs.pop(k) for k in LOSS_KEYS if k in kwargs}
        if context is not None and labels is not None:
            loss_kwargs = context.loss_arguments(**loss_kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            context=context,
            **kwargs,
        )
        x, loss = outputs.last_hidden_state, None
        logits = None if skip else self.lm_head(x[:, keep])
        if labels is not None:
            if skip:
                loss = head_loss(self.lm_head, x, labels, **loss_kwargs)
            else:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_kwargs)
            coef = self.config.router_aux_loss_coef
            if context is not None:
                loss = context.total(loss)
            loss = with_auxiliary_loss(
                loss, outputs.aux_loss, coef, labels, **loss_kwargs, context=context
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def generate(self, *args, **kwargs):
        """As transformers has it; the CUDA graphs of its cache serve no other call."""
        parent: Any = super()
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if kwargs.get("inputs_embeds") is None and isinstance(ids, Tensor) and not ids.numel():
            raise ValueError(f"input_ids has shape {list(ids.shape)}, want at least one token")
        outputs = None
        try:
            outputs = parent.generate(*args, **kwargs)
            return outputs
        finally:
            for cache in (kwargs.get("past_key_values"), getattr(outputs, "past_key_values", None)):
                if isinstance(cache, KimiLinearCache) and cache.graphs is not None:
                    cache.graphs.active = False

    def prepare_inputs_for_generation(  # transformers looks at the arguments' names
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False,
        **kwargs,
    ):  # fmt: skip
        """After the first forward the mask says nothing that the cache does not know."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        cache = inputs.get("past_key_values")
        if not is_first_iteration and isinstance(cache, KimiLinearCache) and cache.seen:
            inputs["attention_mask"] = inputs["position_ids"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """`generate` gets a KimiLinearCache instead of transformers' DynamicCache."""
        cache, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}, want None: see KimiLinearCache")
        if cache is not None and generation_config.use_cache is False:
            raise ValueError("use_cache is False, but past_key_values is given: want one of them")
        if cache is None:
            if generation_config.use_cache is False:
                return
            cache = KimiLinearCache.configured(self.config, generation_config)
            model_kwargs["past_key_values"] = cache
        else:
            if generation_config.cache_config and isinstance(cache, KimiLinearCache):
                asked = KimiLinearCache.configured(self.config, generation_config).latent_dtype
                if asked != cache.latent_dtype:
                    raise ValueError(
                        f"cache_config has latent_dtype {asked}, but past_key_values was made with "
                        f"{cache.latent_dtype}"
                    )
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if isinstance(cache, KimiLinearCache) and self.device.type == "cuda":
            cache.plan(max_cache_length)
            cache.graphs = decode_graphs(self, cache.graphs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """Refuse what transformers would cut out of the wrong end of the sequence.

        The tokenizer of `stop_strings`, which transformers leaves to the forward, goes no further.
        """
        model_kwargs.pop("tokenizer", None)
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        given = (input_ids if embeds is None else embeds).shape[1]
        total = given if mask is None else mask.shape[1]
        if mask is None:  # transformers drops a mask of ones and notes its length
            total = getattr(generation_config, "_mask_length", total)
        if cache is not None and total <= cache.get_seq_length():
            raise ValueError(
                f"past_key_values holds {cache.get_seq_length()} columns, the sequence {total}: "
                "want the whole sequence, or its new tokens with an attention_mask of the whole"
            )
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _asked(argument: bool | None, default: bool | None) -> bool:
    return bool(default if argument is None else argument)


def _the_input(input_ids: Tensor | None, inputs_embeds: Tensor | None, D: int) -> Tensor:
    """Whichever of the two is given, checked."""
    if input_ids is not None and inputs_embeds is None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}, want [batch, tokens]")
        return input_ids
    if input_ids is not None or inputs_embeds is None:
        given = "neither" if inputs_embeds is None else "both"
        raise ValueError(f"input_ids or inputs_embeds: want exactly one of them, got {given}")
    shape = list(inputs_embeds.shape)
    if len(shape) != 3 or shape[-1] != D:
        raise ValueError(f"inputs_embeds has shape {shape}, want [batch, tokens, {D}]")
    return inputs_embeds
