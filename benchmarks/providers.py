"""Who computes an op: adapters from our inputs to each library's function.

A builder takes the inputs of an op and returns a call without arguments, which returns a tuple of
tensors: of a forward pass the outputs, of a training step the outputs and the gradient of every
float input, of a decode step the output and the new state, if any. A library is imported by its
builder.
"""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_kernels
from benchmarks.inputs import DOCUMENTS, Inputs, Shape
from kimi_kernels import (
    add_rms_norm,
    backend,
    causal_conv,
    expert_mlp,
    fused_kda,
    gated_rms_norm,
    latent_attention,
    quantize_latents,
)

Call = Callable[[], tuple[Tensor, ...]]
Build = Callable[[Inputs], Call]

LOWER_BOUND = -5.0  # of the bounded gate: the only one that fla's and FlashKDA's fast paths take
FLA_IN_KERNEL = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        build: see the module.
        module: the import name of an optional library, None for our own code.
        package: its distribution, for the version.
        expected: builds the reference it has to agree with, where that is not the op's own.
        fits: the shapes it is run at.
        flops, bytes: what it costs, where that is not what the op costs.
        cache: bytes that it keeps of one sequence, of an op that decodes.
    """

    build: Build
    module: str | None = None
    package: str | None = None
    expected: Build | None = None
    fits: Callable[[Shape], bool] = lambda shape: True
    flops: Callable[[Shape], float] | None = None
    bytes: Callable[[Shape], float] | None = None
    cache: Callable[[Shape], float] | None = None


def forward(load: Callable[[], Callable[..., Tensor | tuple[Tensor, ...]]]) -> Build:
    """A forward pass without autograd of the function that `load` returns."""

    def build(x: Inputs) -> Call:
        op = load()

        @torch.no_grad()
        def call():
            o = op(**x)
            return (o,) if isinstance(o, Tensor) else o

        return call

    return build


def _trained(x: Inputs) -> list[str]:
    return [name for name, t in x.items() if name != "do" and t.is_floating_point()]


def train(load: Callable[[], Callable[..., Tensor | tuple[Tensor, ...]]]) -> Build:
    """Forward and backward, from the gradient `do` to that of every other float input.

    Of several outputs `do` has the gradients side by side.
    """

    def build(x: Inputs) -> Call:
        op = load()
        leaves = {name: x[name].detach().requires_grad_() for name in _trained(x)}
        args = {name: t for name, t in x.items() if name != "do"} | leaves

        def call():
            o = op(**args)
            outputs, do = ((o,), (x["do"],)) if isinstance(o, Tensor) else (o, x["do"].unbind())
            gradients = torch.autograd.grad(outputs, tuple(leaves.values()), do)
            return *(y.detach() for y in outputs), *gradients

        return call

    return build


def gradient(name: str, build: Build) -> Build:
    """Of a training step with one output: only the gradient of one input."""

    def only_one(x: Inputs) -> Call:
        call, i = build(x), _trained(x).index(name)
        return lambda: (call()[1 + i],)

    return only_one


def reference(build: Build) -> Build:
    """`build` with every call on the PyTorch reference."""

    return _inside(lambda: backend("reference"), build)


def flash_attn(build: Build, wanted: bool = True) -> Build:
    """`build` with flash-attn-4 for attention within prompts, or without where it is installed."""

    def with_library(x: Inputs) -> Call:
        library = import_module("flash_attn.cute") if wanted else None
        name = "kimi_kernels.attention.flash_attn"
        return _inside(lambda: mock.patch(name, lambda: library), build)(x)

    return with_library


def _inside(context: Callable[[], AbstractContextManager[Any]], build: Build) -> Build:
    """`build` with every call in a context of its own."""

    def build_inside(x: Inputs) -> Call:
        call = build(x)

        def run():
            with context():
                return call()

        return run

    return build_inside


# ---- kda ---------------------------------------------------------------------------------------


def our_kda(lower_bound: float | None = None):
    return lambda **x: fused_kda(**x, lower_bound=lower_bound)[0]


def our_bounded_kda():
    return our_kda(LOWER_BOUND)


def fla_kda(**options):
    chunk_kda = import_module("fla.ops.kda").chunk_kda

    def op(q, k, v, f, b, A_log, dt_bias):
        gate = {"A_log": A_log, "dt_bias": dt_bias}
        return chunk_kda(q, k, v, f, b, **gate, **FLA_IN_KERNEL, **options)[0]

    return op


def fla_bounded_kda():
    return fla_kda(lower_bound=LOWER_BOUND, safe_gate=True)


def flash_kda():
    fwd = import_module("flash_kda").fwd

    def op(q, k, v, f, b, A_log, dt_bias):
        H, K = q.shape[2:]
        o = torch.empty_like(v)
        fwd(q, k, v, f, b, K**-0.5, o, A_log, dt_bias.view(H, K), LOWER_BOUND)
        return o

    return op


# ---- kda_step ----------------------------------------------------------------------------------


def _projections(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x["q"], x["k"], x["v"]


def _heads(H: int, *xs: Tensor) -> list[Tensor]:
    """[B, 1, H * d] -> [B, 1, H, d], each."""
    return [x.unflatten(-1, (H, -1)) for x in xs]


def our_kda_step(x: Inputs) -> Call:
    conv_state, state = x["conv_state"].clone(), x["state"].clone()
    args = (x["f"], x["b"], x["A_log"], x["dt_bias"], state, x["gate"], x["norm_weight"])
    xs = _projections(x)

    @torch.no_grad()
    def call():
        return kimi_kernels.kda_step(xs, x["conv_weight"], conv_state, *args), state

    return call


def kda_step_in_parts(x: Inputs) -> Call:
    """The definition of the step: the ops of the model one after the other."""
    H = x["f"].shape[2]
    gate = (x["f"], x["b"], x["A_log"], x["dt_bias"])

    @torch.no_grad()
    def call():
        xs, _ = causal_conv(_projections(x), x["conv_weight"], initial_state=x["conv_state"])
        q, k, v = _heads(H, *xs)
        o, S = fused_kda(q, k, v, *gate, initial_state=x["state"], output_final_state=True)
        assert S is not None
        return gated_rms_norm(o, x["gate"], x["norm_weight"]), S

    return call


def recurrence(x: Inputs) -> Call:
    """The recurrence of the step alone, on q, k and v as they come."""
    q, k, v = _heads(x["f"].shape[2], *_projections(x))
    gate = (x["f"], x["b"], x["A_log"], x["dt_bias"])

    @torch.no_grad()
    def call():
        o, S = fused_kda(q, k, v, *gate, initial_state=x["state"], output_final_state=True)
        assert S is not None
        return o, S

    return call


def _fla_recurrent(x: Inputs) -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's recurrent kernel from a state of its own; it writes the new state elsewhere."""
    fused_recurrent_kda = import_module("fla.ops.kda").fused_recurrent_kda
    options = {"A_log": x["A_log"], "dt_bias": x["dt_bias"], "initial_state": x["state"].clone()}
    options |= FLA_IN_KERNEL | {"output_final_state": True}
    return lambda q, k, v: fused_recurrent_kda(q, k, v, x["f"], x["b"], **options)


def fla_recurrence(x: Inputs) -> Call:
    op = _fla_recurrent(x)
    q, k, v = _heads(x["f"].shape[2], *_projections(x))
    return torch.no_grad()(lambda: op(q, k, v))


def fla_kda_step(x: Inputs) -> Call:
    """As fla's layer: one convolution per projection, the recurrence, the gated norm."""
    update = import_module("fla.modules.convolution").causal_conv1d_update
    recurrent, norm = _fla_recurrent(x), fla_norm()
    xs, H = _projections(x), x["f"].shape[2]
    sizes = [t.shape[-1] for t in xs]
    weights = x["conv_weight"].split(sizes)
    # fla keeps the last W inputs, [B, D, W], where W - 1 are needed
    caches = [F.pad(s.mT, (1, 0)).contiguous() for s in x["conv_state"].split(sizes, -1)]
    conv = list(zip(xs, caches, weights, strict=True))

    @torch.no_grad()
    def call():
        ys = [update(x=t, cache=c, weight=w, activation="silu")[0] for t, c, w in conv]
        o, S = recurrent(*_heads(H, *ys))
        return norm(o, x["gate"], x["norm_weight"]), S

    return call


# ---- conv, gated_norm --------------------------------------------------------------------------


def our_conv():
    return lambda q, k, v, weight: causal_conv((q, k, v), weight)[0]


def fla_conv():
    conv = import_module("fla.modules.convolution").causal_conv1d

    def op(q, k, v, weight):
        weights = weight.chunk(3)
        return tuple(
            conv(x=x, weight=w, activation="silu")[0]
            for x, w in zip((q, k, v), weights, strict=True)
        )

    return op


def our_norm():
    return gated_rms_norm


def fla_norm():
    """What fla's `FusedRMSNormGated` calls."""
    norm = import_module("fla.modules.fused_norm_gate").rms_norm_gated
    return lambda x, g, w: norm(x, g, w, None, activation="sigmoid", eps=1e-5)


def our_add_norm():
    return add_rms_norm


def torch_add_norm():
    """torch's own fused norm, after an addition."""

    def op(x, residual, w):
        h = x + residual
        return F.rms_norm(h, w.shape, w, 1e-5), h

    return op


# ---- mla ---------------------------------------------------------------------------------------


def _documents(T: int, generator: random.Random) -> Tensor:
    """Ends of documents of random lengths, as the host has them; others at each call."""
    cuts = sorted(generator.sample(range(1, T), DOCUMENTS - 1))
    return torch.tensor([0, *cuts, T])


def our_prompt(documents: bool):
    """Attention within a prompt, or within packed documents."""
    generator = random.Random(0)

    def op(q, latent, w_kv):
        ends = _documents(q.shape[1], generator) if documents else None
        return latent_attention(q, latent, w_kv, scale=q.shape[-1] ** -0.5, cu_seqlens=ends)

    return op


def sdpa_prompt(documents: bool):
    """A call of torch's attention for each document."""
    generator = random.Random(0)

    def op(q, latent, w_kv):
        (_, T, H, D), R = q.shape, w_kv.shape[1]
        D_n = D - (latent.shape[2] - R)
        kv = F.linear(latent[..., :R], w_kv).unflatten(-1, (H, -1)).transpose(1, 2)
        k_r = latent[:, None, :, R:].expand(-1, H, -1, -1)
        k, v = torch.cat((kv[..., :D_n], k_r), -1), kv[..., D_n:]
        lengths = _documents(T, generator).diff().tolist() if documents else [T]
        parts = zip(*(x.split(lengths, 2) for x in (q.transpose(1, 2), k, v)), strict=True)
        outputs = [F.scaled_dot_product_attention(*x, is_causal=True) for x in parts]
        return torch.cat(outputs, 2).transpose(1, 2)

    return op


# ---- mla_fp8 -----------------------------------------------------------------------------------


def our_latent_attention():
    return lambda q, latent, w_kv: latent_attention(q, latent, w_kv, scale=q.shape[-1] ** -0.5)


def fp8_latent_attention():
    def op(q, latent, w_kv):
        latents = quantize_latents(latent, w_kv.shape[1])
        return latent_attention(q, latents, w_kv, scale=q.shape[-1] ** -0.5)

    return op


# ---- moe ---------------------------------------------------------------------------------------


def our_experts():
    return expert_mlp


def _transformers_experts(implementation: str):
    """The experts of transformers' own model, with an `experts_implementation`, on our weights."""
    package = import_module("transformers.models.kimi_linear")
    modeling = import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    with torch.device("meta"):
        experts = modeling.KimiLinearExperts(
            package.KimiLinearConfig(experts_implementation=implementation)
        )
    del experts.gate_up_proj, experts.down_proj  # parameters: tensors come in their place

    def op(x, gate_up, down, index, weights):
        experts.gate_up_proj, experts.down_proj = gate_up, down
        experts.num_experts = gate_up.shape[0]
        return experts(x, index, weights)

    return op


def grouped_mm():
    return _transformers_experts("grouped_mm")


def batched_mm():
    """It copies the weights of every token's experts."""
    return _transformers_experts("batched_mm")


def scattermoe():
    """As its `GLUMLP` (0.3.0), with gate rows first."""
    library = import_module("scattermoe")

    def op(x, gate_up, down, index, weights):
        E, k = gate_up.shape[0], index.shape[1]
        plan = library.flatten_sort_count(index, num_experts=E)
        gu = library.parallel_linear(x, gate_up.mT, k, *plan, grouped_out=True)
        gate, up = gu.chunk(2, -1)
        h = F.silu(gate) * up
        weights = weights.to(x.dtype)  # it multiplies them with y
        return library.parallel_linear(h, down.mT, 1, *plan, gates=weights, grouped_in=True)

    return op
