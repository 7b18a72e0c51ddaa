"""The configuration of a Kimi Linear model, with the field names of the released `config.json`."""

import copy
import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.kimi_linear.configuration_kimi_linear import (
    KimiLinearConfig as NativeKimiLinearConfig,
)

_FILLED_LATER: Any = None  # the default of a field that __post_init__ fills from other fields

_MAY_BE_ZERO = (
    "first_k_dense_replace",
    "initializer_range",
    "num_nextn_predict_layers",
    "num_shared_experts",
    "router_aux_loss_coef",
)
# Fields with one supported value. The attention_* ones come only from transformers' own configs.
_FIXED = {
    "hidden_act": "silu",
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "output_attentions": False,
}
_LAYER_TYPES = {
    "layer_types": ("linear_attention", "full_attention"),
    "mlp_layer_types": ("dense", "sparse"),
}
# Read-only properties that transformers' own class writes as fields, and the fields they come from.
_DERIVED = {
    "layer_types": "linear_attn_config",
    "linear_head_dim": "linear_attn_config",
    "linear_num_heads": "linear_attn_config",
    "linear_conv_kernel_dim": "linear_attn_config",
    "mlp_layer_types": "first_k_dense_replace and moe_layer_freq",
    "qk_head_dim": "qk_nope_head_dim + qk_rope_head_dim",
}


def _check(ok: bool, field: str, got: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{field}: got {got!r}, expected {wanted}")


def _is_int(value: object, low: int = 1) -> bool:
    return type(value) is int and value >= low  # `type`, because bool is an int


def _dense_or_sparse(num_layers: int, first_k_dense: int, freq: int) -> list[str]:
    """The feed-forward of each layer: sparse from layer `first_k_dense` on, every `freq` layers."""
    sparse = [i >= first_k_dense and i % freq == 0 for i in range(num_layers)]
    return ["sparse" if is_sparse else "dense" for is_sparse in sparse]


class KimiLinearConfig(PreTrainedConfig):
    """Shape and behaviour of a Kimi Linear model (KDA and MLA layers, mixture of experts).

    The fields are those of the `config.json` of `moonshotai/Kimi-Linear-48B-A3B-Instruct`
    (arXiv 2510.26692), and so are the defaults, except `num_experts`: 128 here, 256 there. That
    file, and a field this class does not know, survive loading and saving unchanged. A file that
    transformers' own `KimiLinearConfig` saved loads too, and is saved in the released form.
    A value that the model cannot honour raises a `ValueError` that names the field, at
    construction and again in `save_pretrained`.

    Args:
        vocab_size: Rows of the embedding and of the language-model head.
        hidden_size: Width D of the residual stream.
        num_hidden_layers: Number of blocks.
        intermediate_size: Width of the dense feed-forward of the first layers.
        moe_intermediate_size: Width F of one expert.
        num_attention_heads: Heads of an MLA layer.
        num_key_value_heads: Must equal `num_attention_heads`, the default.
        head_dim: Kept for the file. No layer is sized from it.
        hidden_act: Activation of the feed-forwards; `"silu"` only.
        q_lora_rank: Rank of a low-rank query projection in MLA, or None for a full one.
        kv_lora_rank: Rank R of the MLA latent that the cache holds.
        qk_nope_head_dim: Query/key dims of an MLA head that come from the latent.
        qk_rope_head_dim: Query/key dims that all MLA heads share. They are not rotated.
        v_head_dim: Value dims of an MLA head.
        mla_use_nope: MLA without positional encoding; True only.
        rope_theta: Kept for the file, unused.
        rope_scaling: Kept for the file, unused.
        num_experts: Routed experts E of a layer.
        num_experts_per_token: Routed experts each token goes to.
        num_shared_experts: Experts that every token goes to.
        moe_router_activation_func: Score function of the router; `"sigmoid"` only.
        moe_renormalize: Divide the weights of the chosen experts by their sum.
        routed_scaling_factor: Factor on those weights.
        use_grouped_topk: Choose groups of experts first. False ignores the next two fields.
        num_expert_group: Number of groups.
        topk_group: Groups each token may choose experts from.
        first_k_dense_replace: Layers at the start with a dense feed-forward; 1 by default.
        moe_layer_freq: From there on layers divisible by this (from 0) have experts; 1 by default.
        rms_norm_eps: Epsilon of the RMS norms.
        initializer_range: Standard deviation of fresh weights.
        bos_token_id: Id of the token that begins a text.
        eos_token_id: Id or ids that end generation.
        pad_token_id: Id of the padding token, inside the vocabulary, or None.
        tie_word_embeddings: Use the embedding as the language-model head.
        model_max_length: Context length in tokens.
        use_cache: Return the cache from `forward` by default.
        num_nextn_predict_layers: Multi-token-prediction layers; 0 only.
        linear_attn_config: A dict of `head_dim` (1 to 256), `num_heads` and
            `short_conv_kernel_size` (at least 2) of the KDA layers, and of `kda_layers` and
            `full_attn_layers`, which together list each layer once, counted from 1. By default
            128, `num_attention_heads`, 4, and MLA at layers 4, 8, 12, ... and the last.
        output_router_logits: Return the router logits from `forward` by default.
        router_aux_loss_coef: Weight of the sequence-level auxiliary loss in training
            (`kimi_linear.moe.sequence_balance_loss`). At 0, the default, there is none and the
            saved file does not name the field.
    """

    model_type = "kimi_linear"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Module names are those of transformers' own model, and plan words change between versions.
    base_model_tp_plan = NativeKimiLinearConfig.base_model_tp_plan
    base_model_pp_plan = NativeKimiLinearConfig.base_model_pp_plan
    base_model_ep_plan = NativeKimiLinearConfig.base_model_ep_plan
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "model_max_length",
        "n_group": "num_expert_group",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "norm_topk_prob": "moe_renormalize",
        "num_experts_per_tok": "num_experts_per_token",
        "num_local_experts": "num_experts",
    }

    vocab_size: int = 163840
    hidden_size: int = 2304
    num_hidden_layers: int = 27
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_attention_heads: int = 32
    num_key_value_heads: int = _FILLED_LATER
    head_dim: int = 72
    hidden_act: str = "silu"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mla_use_nope: bool = True
    rope_theta: float | None = 10000.0
    rope_scaling: dict[str, Any] | None = None
    num_experts: int = 128
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_router_activation_func: str = "sigmoid"
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    use_grouped_topk: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = _FILLED_LATER
    moe_layer_freq: int = _FILLED_LATER
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163586
    pad_token_id: int | None = 163839
    tie_word_embeddings: bool = False
    model_max_length: int = 1048576
    use_cache: bool = True
    num_nextn_predict_layers: int = 0
    linear_attn_config: dict[str, Any] = _FILLED_LATER
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        derived = {name: kwargs.pop(name, None) for name in _DERIVED}
        for name in ("num_hidden_layers", "num_attention_heads"):  # defaults are made from these
            _check(_is_int(n := getattr(self, name)), name, n, "an int above 0")
        n = self.num_hidden_layers
        for name, allowed in _LAYER_TYPES.items():
            if (types := derived[name]) is not None:
                ok = type(types) is list and len(types) == n and all(t in allowed for t in types)
                _check(ok, name, types, f"a list of num_hidden_layers ({n}) words among {allowed}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.linear_attn_config is None:
            self._fill_linear_attn_config(derived)
        else:
            self.linear_attn_config = copy.deepcopy(self.linear_attn_config)  # not the caller's
        self._fill_sparse_layers(derived["mlp_layer_types"])
        self._validate_linear_attn_config()  # already here: the base class reads `layer_types`
        super().__post_init__(**kwargs)
        self.validate()
        for name, value in derived.items():
            wanted = f"{getattr(self, name)!r}, which {_DERIVED[name]} of this config mean"
            _check(value in (None, getattr(self, name)), name, value, wanted)

    def _fill_linear_attn_config(self, derived: dict[str, Any]) -> None:
        layers = range(1, self.num_hidden_layers + 1)
        if (types := derived["layer_types"]) is None:
            full = [i for i in layers if i % 4 == 0 or i == self.num_hidden_layers]
        else:
            full = [i for i in layers if types[i - 1] == "full_attention"]
        self.linear_attn_config = {
            "full_attn_layers": full,
            "head_dim": derived["linear_head_dim"] or 128,
            "kda_layers": [i for i in layers if i not in full],
            "num_heads": derived["linear_num_heads"] or self.num_attention_heads,
            "short_conv_kernel_size": derived["linear_conv_kernel_dim"] or 4,
        }

    def _fill_sparse_layers(self, types: list[str] | None) -> None:
        first, freq, n = 1, 1, self.num_hidden_layers
        if types is not None:
            first = types.index("sparse") if "sparse" in types else n
            freqs = (f for f in range(1, n + 1) if _dense_or_sparse(n, first, f) == types)
            freq = next(freqs, 0)
            wanted = "a pattern that some first_k_dense_replace and moe_layer_freq describe"
            _check(freq > 0, "mlp_layer_types", types, wanted)
        if self.first_k_dense_replace is None:
            self.first_k_dense_replace = first
        if self.moe_layer_freq is None:
            self.moe_layer_freq = freq

    def validate(self) -> None:
        """Raises `ValueError`, naming the field, unless the model can be built as configured."""
        for name, kind in KimiLinearConfig.__annotations__.items():
            got, zero = getattr(self, name), name in _MAY_BE_ZERO
            if kind is bool:
                _check(type(got) is bool, name, got, "True or False")
            elif kind in (int, float):
                ok = type(got) in (int, kind) and (0 < got < math.inf or (zero and got == 0))
                wanted = "an int" if kind is int else "a finite number"
                _check(ok, name, got, f"{wanted} {'not below' if zero else 'above'} 0")
        for name, value in _FIXED.items():
            got = getattr(self, name, None)
            absent = got is None and not hasattr(type(self), name)
            _check(absent or got == value, name, got, repr(value))
        got, heads = self.num_key_value_heads, self.num_attention_heads
        wanted = f"num_attention_heads ({heads}): MLA has no grouped keys"
        _check(got == heads, "num_key_value_heads", got, wanted)
        got = self.q_lora_rank
        _check(got is None or _is_int(got), "q_lora_rank", got, "None or an int above 0")
        got, n = self.first_k_dense_replace, self.num_hidden_layers
        _check(got <= n, "first_k_dense_replace", got, f"at most num_hidden_layers ({n})")
        got, vocab = self.pad_token_id, self.vocab_size
        ok = got is None or (_is_int(got, low=0) and got < vocab)
        _check(ok, "pad_token_id", got, f"None or an id below vocab_size ({vocab})")
        self._validate_experts()
        self._validate_linear_attn_config()
        super().validate()  # pyright: ignore[reportAttributeAccessIssue]

    def _validate_experts(self) -> None:
        experts, top_k = self.num_experts, self.num_experts_per_token
        groups, topk_group = self.router_groups
        _check(top_k <= experts, "num_experts_per_token", top_k, f"at most num_experts ({experts})")
        size = experts // groups
        wanted = f"1, or a divisor of num_experts ({experts}) that leaves groups of 2 or more"
        ok = groups == 1 or (experts % groups == 0 and size >= 2)  # a group scores by its top two
        _check(ok, "num_expert_group", groups, wanted)
        wanted = f"at most num_expert_group ({groups})"
        _check(topk_group <= groups, "topk_group", topk_group, wanted)
        wanted = f"enough groups of {size} experts for num_experts_per_token ({top_k})"
        _check(topk_group * size >= top_k, "topk_group", topk_group, wanted)

    def _validate_linear_attn_config(self) -> None:
        field, config, n = "linear_attn_config", self.linear_attn_config, self.num_hidden_layers
        _check(isinstance(config, dict), field, config, "a dict")
        limits = {"head_dim": (1, 256), "num_heads": (1, None), "short_conv_kernel_size": (2, None)}
        lists = ("kda_layers", "full_attn_layers")
        missing = [key for key in (*limits, *lists) if key not in config]
        _check(not missing, field, config, f"also the keys {missing}")
        for key, (low, high) in limits.items():
            got = config[key]
            ok = _is_int(got, low) and (high is None or got <= high)
            wanted = f"an int, at least {low}" + (f" and at most {high}" if high else "")
            _check(ok, f"{field}[{key!r}]", got, wanted)
        for key in lists:
            got = config[key]
            ok = isinstance(got, list) and all(_is_int(i) and i <= n for i in got)
            wanted = f"a list of layers, counted from 1 to num_hidden_layers ({n})"
            _check(ok, f"{field}[{key!r}]", got, wanted)
        layers = config["kda_layers"] + config["full_attn_layers"]
        repeated = sorted({i for i in layers if layers.count(i) > 1})
        _check(not repeated, field, config, f"each layer once, but {repeated} are repeated")
        absent = [i for i in range(1, n + 1) if i not in layers]
        _check(not absent, field, config, f"each layer once, but {absent} are in neither list")

    @property
    def layer_types(self) -> list[str]:
        """`"linear_attention"` (KDA) or `"full_attention"` (MLA) for each layer, from layer 0."""
        kda = set(self.linear_attn_config["kda_layers"])
        layers = range(1, self.num_hidden_layers + 1)
        return ["linear_attention" if i in kda else "full_attention" for i in layers]

    @property
    def mlp_layer_types(self) -> list[str]:
        """`"dense"` or `"sparse"` (experts) for each layer, from layer 0."""
        first_dense, freq = self.first_k_dense_replace, self.moe_layer_freq
        return _dense_or_sparse(self.num_hidden_layers, first_dense, freq)

    @property
    def linear_head_dim(self) -> int:
        """Key and value dims of a KDA head."""
        return self.linear_attn_config["head_dim"]

    @property
    def linear_num_heads(self) -> int:
        """Heads of a KDA layer."""
        return self.linear_attn_config["num_heads"]

    @property
    def linear_conv_kernel_dim(self) -> int:
        """Taps of the short convolutions of a KDA layer."""
        return self.linear_attn_config["short_conv_kernel_size"]

    @property
    def qk_head_dim(self) -> int:
        """Query and key dims of an MLA head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def router_groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may use, that the router works with."""
        return (self.num_expert_group, self.topk_group) if self.use_grouped_topk else (1, 1)

    def all_mla(self) -> "KimiLinearConfig":
        """Returns a copy in which every layer is an MLA layer, to compare against."""
        config = copy.deepcopy(self)
        every_layer = list(range(1, self.num_hidden_layers + 1))
        config.linear_attn_config.update(kda_layers=[], full_attn_layers=every_layer)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields in the released form, with names and values that JSON can hold."""
        output = super().to_dict()
        if not self.router_aux_loss_coef:  # the released file has no such field
            output.pop("router_aux_loss_coef", None)
        if self.moe_layer_freq != 1:
            # transformers' own class does not know this rule, only the list it leads to.
            output["mlp_layer_types"] = self.mlp_layer_types
        return output

    def __eq__(self, other: object) -> bool:
        # What would be saved: the version and the path that a config came from do not count.
        same_class = isinstance(other, KimiLinearConfig)
        return same_class and self.to_diff_dict() == other.to_diff_dict()
