"""Inference with a whole model, ours and transformers' own: a prompt, a decode step, `generate`.

Letters of a shape: as in model_step.py, and S, the tokens of the prompt or context before the new
ones, and N, how many `generate` makes. A context is not computed but drawn, layer by layer and in
place: how long a decode step takes does not hang on the values, and a prompt of 2^20 tokens is
never run. All providers get the same one. Every call appends its token to it, up to `ROOM` of them.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Draw, Inputs, Shape
from benchmarks.model_step import inputs, native_config, on_weights, our_config, weights
from benchmarks.providers import Call

TOKENS = 65536  # of a context in fp8 that are drawn at a time
ROOM = 512  # tokens that a context has room for beyond its own: more than a measurement takes
States = Iterable[tuple[Tensor, ...]]  # of each layer, see `drawn_states`


def decode_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """ids [B, 1], the length S of the context before them, and the model."""
    x = inputs(shape | {"T": 1}, dtype, device)
    return x | {"S": torch.tensor(shape["S"])}


def generate_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A prompt, ids [B, S], the number N of new tokens, and the model."""
    x = inputs(shape | {"T": shape["S"]}, dtype, device)
    return x | {"N": torch.tensor(shape["N"])}


# ---- contexts ----------------------------------------------------------------------------------


def drawn_states(
    config: Any,
    B: int,
    S: int,
    dtype: torch.dtype,
    device: torch.device,
    room: int = 0,
    fp8: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Per layer what S tokens leave behind, as large as theirs: always the same random numbers.

    Of KDA the conv state [B, W-1, 3 H K] and the recurrent state [B, H, K, K], not in 16 bits; of
    MLA the latents [B, S + room, R + P], zeros behind S, or what a cache in fp8 keeps of them. Each
    layer is drawn when its turn comes, and the latents, row by row, where they will stay: at the
    largest batch there is no room for a copy of them.
    """
    draw = Draw(torch.float32, device)
    H, K, W = config.linear_num_heads, config.linear_head_dim, config.linear_conv_kernel_dim
    for kind in config.layer_types:
        if kind == "linear_attention":
            conv, state = draw.normal(B, W - 1, 3 * H * K), draw.normal(B, H, K, K)
            yield conv.to(dtype), state.to(torch.promote_types(dtype, torch.float32))
        else:
            R, P = config.kv_lora_rank, config.qk_rope_head_dim
            sizes = ((R, torch.uint8), (P, dtype), (0, torch.float32)) if fp8 else ((R + P, dtype),)
            held = tuple(
                torch.zeros(B, S + room, *([n] if n else []), dtype=kind, device=device)
                for n, kind in sizes
            )
            for i in range(B):
                if not fp8:
                    draw.fill(held[0][i, :S])
                    continue
                for s in range(0, S, TOKENS):
                    n = min(TOKENS, S - s)
                    row = draw.fill(torch.empty(1, n, R + P, dtype=dtype, device=device))
                    c, *others = import_module("kimi_kernels").quantize_latents(row, R)
                    for x, new in zip(held, (c.view(torch.uint8), *others), strict=True):
                        x[i, s : s + n] = new[0]
            yield held


@torch.no_grad()
def our_cache(config: Any, S: int, states: States, fp8: bool = False) -> Any:
    """A cache as a prompt of S tokens would have left it; it takes the states as they are."""
    latent_dtype = torch.float8_e4m3fn if fp8 else None
    cache = import_module("kimi_linear").KimiLinearCache(config, latent_dtype=latent_dtype)
    for layer, tensors in zip(cache.layers, states, strict=True):
        (layer.lazy_initialization(*tensors) if len(tensors) == 2 else layer.hold(tensors))
    cache.advance(S, None)
    return cache


def native_cache(config: Any, states: States) -> Any:
    """The same for transformers' own model: the cache that its `generate` makes."""
    cache = import_module("transformers").DynamicCache(config=config)
    for i, tensors in enumerate(states):
        if len(tensors) == 2:
            conv_state, state = tensors
            # it keeps the last W inputs, [B, 3 H K, W], where W - 1 are needed
            cache.update_conv_state(F.pad(conv_state.mT, (1, 0)), i)
            cache.update_recurrent_state(state, i)
        else:
            sizes = config.kv_lora_rank, config.qk_rope_head_dim
            cache.update(*tensors[0][:, None].split(sizes, -1), i)
    return cache


def _model(config: Any, x: Inputs) -> Any:
    return on_weights(config, x).eval().requires_grad_(False)


def _all_mla(x: Inputs) -> tuple[Any, Inputs]:
    """The same model with every layer MLA: KDA layers become copies of the last layer's mixer."""
    config = our_config(x)
    L, kinds = config.num_hidden_layers, config.layer_types
    mixer = [f"model.layers.{i}.self_attn." for i in range(L)]
    kda = tuple(mixer[i] for i in range(L) if kinds[i] == "linear_attention")
    own = {name: t for name, t in x.items() if not name.startswith(kda)}
    mla = {name: t for name, t in weights(x).items() if name.startswith(mixer[-1])}
    copies = {name.replace(mixer[-1], to): t.clone() for to in kda for name, t in mla.items()}
    return config.all_mla(), own | copies


# ---- prefill -----------------------------------------------------------------------------------


def _prefill(config: Any, x: Inputs, cache: Any) -> Call:
    """Into a fresh cache, made by `cache(config=...)`; the logits of the last position."""
    model = _model(config, x)

    @torch.no_grad()
    def call():
        fresh = cache(config=config)
        return (model(x["ids"], past_key_values=fresh, logits_to_keep=1).logits,)

    return call


def _our_prefill(config: Any, x: Inputs) -> Call:
    return _prefill(config, x, import_module("kimi_linear").KimiLinearCache)


def our_prefill(x: Inputs) -> Call:
    return _our_prefill(our_config(x), x)


def all_mla_prefill(x: Inputs) -> Call:
    return _our_prefill(*_all_mla(x))


def native_prefill(x: Inputs) -> Call:
    return _prefill(native_config(x), x, import_module("transformers").DynamicCache)


# ---- decode step -------------------------------------------------------------------------------


def _context(
    config: Any, x: Inputs, room: int = 0, fp8: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    dtype, ids = x["lm_head.weight"].dtype, x["ids"]
    return drawn_states(config, len(ids), int(x["S"]), dtype, ids.device, room, fp8)


def _step(model: Any, x: Inputs, cache: Any) -> Call:
    """The logits of one more token per row: always the same token, after one more each time."""
    return torch.no_grad()(lambda: (model(x["ids"], past_key_values=cache).logits,))


def _our_step(config: Any, x: Inputs, fp8: bool = False) -> Call:
    """On a GPU by way of CUDA graphs, as `generate` decodes: the second call captures one."""
    model = _model(config, x)
    cache = our_cache(config, int(x["S"]), _context(config, x, ROOM, fp8), fp8)
    if model.device.type == "cuda":
        cache.graphs = import_module("kimi_linear.decode").decode_graphs(model, None)
    return _step(model, x, cache)


def our_step(x: Inputs) -> Call:
    return _our_step(our_config(x), x)


def fp8_step(x: Inputs) -> Call:
    """The same with the latents in fp8."""
    return _our_step(our_config(x), x, fp8=True)


def all_mla_step(x: Inputs) -> Call:
    return _our_step(*_all_mla(x))


def native_step(x: Inputs) -> Call:
    config = native_config(x)
    return _step(_model(config, x), x, native_cache(config, _context(config, x)))


# ---- generate ----------------------------------------------------------------------------------


def _generate(config: Any, x: Inputs) -> Call:
    """Greedy, N tokens after the prompt: a time is that of all of them, the prompt included.

    The model has no token that ends a text. The logits of each new token are returned, since the
    tokens themselves hang on rounding.
    """
    model, N = _model(config, x), int(x["N"])
    options = {"max_new_tokens": N, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(x["ids"])
    return lambda: model.generate(x["ids"], attention_mask=mask, **options).logits


def our_generate(x: Inputs) -> Call:
    return _generate(our_config(x), x)


def native_generate(x: Inputs) -> Call:
    return _generate(native_config(x), x)
