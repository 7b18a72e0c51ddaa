"""The random data that every provider of an op gets, drawn as a model starts out (TR section 4).

A shape is a dict of letters (CONTRIBUTING.md). Two draws for the same shape are equal.
"""

import torch
from torch import Tensor

Shape = dict[str, int]
Inputs = dict[str, Tensor]

DTYPE = torch.bfloat16  # of what is measured
TOP_K = 8  # experts per token
PIECE = 2**26  # numbers that `Draw.fill` draws at once
DOCUMENTS = 16  # of a packed row


class Draw:
    """Seeded random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)

    def fill(self, x: Tensor) -> Tensor:
        """Normal numbers into x, the same in every dtype, without a second x in memory."""
        for part in x.view(-1).split(PIECE):
            part.copy_(self.normal(len(part), dtype=torch.float32))
        return x

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """In fp32."""
        x = torch.rand(shape, device=self.device, generator=self.generator)
        return low + (high - low) * x

    def gate(self, H: int, K: int) -> Inputs:
        """A_log [H] with A ~ U(1, 16); dt_bias [H * K] with softplus(dt_bias) ~ logU(1e-3, 0.1)."""
        dt = 10 ** self.uniform(H * K, low=-3, high=-1)
        A_log = self.uniform(H, low=1, high=16).log()
        return {"A_log": A_log, "dt_bias": dt + (-torch.expm1(-dt)).log()}


def kda_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of `fused_kda`: q, k, f [B, T, H, K], v [B, T, H, V], b [B, T, H], the gate's."""
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    draw = Draw(dtype, device)
    x = {name: draw.normal(B, T, H, d) for name, d in (("q", K), ("k", K), ("v", V), ("f", K))}
    return x | {"b": draw.normal(B, T, H)} | draw.gate(H, K)


def kda_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`kda_inputs`, and the gradient of the output, do [B, T, H, V]."""
    x = kda_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device).normal(*x["v"].shape)}


def strong_gate_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`kda_train_inputs` with gates that forget nearly all at some tokens and nothing at others."""
    x = kda_train_inputs(shape, dtype, device)
    return x | {"f": 30 * x["f"] - 1}


def kda_step_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """One token per sequence before the convolution, and the states that it meets."""
    B, H, K, V, W = (shape[letter] for letter in "BHKVW")
    D = H * (2 * K + V)  # channels of q, k and v side by side
    draw = Draw(dtype, device)
    return draw.gate(H, K) | {
        "q": draw.normal(B, 1, H * K),
        "k": draw.normal(B, 1, H * K),
        "v": draw.normal(B, 1, H * V),
        "f": draw.normal(B, 1, H, K),
        "b": draw.normal(B, 1, H),
        "gate": draw.normal(B, 1, H, V),
        "conv_weight": draw.normal(D, W) / W**0.5,
        "conv_state": draw.normal(B, W - 1, D),
        "norm_weight": 1 + 0.1 * draw.normal(V),
        "state": draw.normal(B, H, K, V, dtype=torch.float32),
    }


def conv_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Three projections q, k, v [B, T, H * K] and weight [3 * H * K, W]."""
    B, T, H, K, W = (shape[letter] for letter in "BTHKW")
    draw = Draw(dtype, device)
    x = {name: draw.normal(B, T, H * K) for name in "qkv"}
    return x | {"weight": draw.normal(3 * H * K, W) / W**0.5}


def conv_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`conv_inputs`, and the gradients of the three outputs, do [3, B, T, H * K]."""
    x = conv_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device).normal(3, *x["q"].shape)}


def gated_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of `gated_rms_norm`: x, g [B, T, H, V] and w [V]."""
    B, T, H, V = (shape[letter] for letter in "BTHV")
    draw = Draw(dtype, device)
    x = {name: draw.normal(B, T, H, V) for name in "xg"}
    return x | {"w": 1 + 0.1 * draw.normal(V)}


def rms_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of `add_rms_norm`: x, residual [B, T, D] and w [D]."""
    B, T, D = (shape[letter] for letter in "BTD")
    draw = Draw(dtype, device)
    x = {name: draw.normal(B, T, D) for name in ("x", "residual")}
    return x | {"w": 1 + 0.1 * draw.normal(D)}


def rms_norm_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`rms_norm_inputs`, and the gradients of norm and sum, do [2, B, T, D]."""
    x = rms_norm_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device).normal(2, *x["x"].shape)}


def gated_norm_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`gated_norm_inputs`, and the gradient of the output, do [B, T, H, V]."""
    x = gated_norm_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device).normal(*x["x"].shape)}


def latent_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """q [B, T, H, K + K/2], latent [B, S, R + K/2] with normalised c, w_kv [2 H K, R].

    Scores have a standard deviation of 1.
    """
    B, T, S, H, K, R = (shape[letter] for letter in "BTSHKR")
    draw = Draw(torch.float32, device)  # the mean of numbers drawn in bf16 is not 0
    x = {
        "q": draw.normal(B, T, H, K + K // 2),
        "latent": _normalised(draw.normal(B, S, R + K // 2), R),
        "w_kv": draw.normal(2 * H * K, R) / R**0.5,
    }
    return {name: t.to(dtype) for name, t in x.items()}


def prompt_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`latent_inputs` of one row, with a query for each token."""
    return latent_inputs(shape | {"B": 1, "S": shape["T"]}, dtype, device)


def prompt_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`prompt_inputs`, and the gradient of the output, do [B, T, H, K]."""
    x = prompt_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device, seed=1).normal(*x["q"].shape[:3], shape["K"])}


def outlier_latent_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`latent_inputs` with a channel in 64 as large as 30 others, and scores thrice as large."""
    x, R = latent_inputs(shape, torch.float32, device), shape["R"]
    size = torch.ones(x["latent"].shape[-1], device=device)
    size[::64] = 30
    rms = size.square().mean(-1).sqrt()
    x |= {"q": 3 * x["q"], "latent": _normalised(x["latent"] * size / rms, R)}
    return {name: t.to(dtype) for name, t in x.items()}


def _normalised(latent: Tensor, R: int) -> Tensor:
    """With an RMS of 1 over the R channels of c."""
    c, k_r = latent[..., :R], latent[..., R:]
    return torch.cat((c * c.square().mean(-1, keepdim=True).rsqrt(), k_r), -1)


def _routed(draw: Draw, T: int, D: int, E: int) -> Inputs:
    """x [T, D]; index [T, 8], different ones of E experts, all as likely; weights [T, 8], fp32."""
    scores = draw.normal(T, TOP_K, dtype=torch.float32).sigmoid()
    return {
        "x": draw.normal(T, D),
        "index": draw.uniform(T, E, low=0, high=1).topk(TOP_K).indices,
        "weights": 2.446 * scores / scores.sum(-1, keepdim=True),
    }


def moe_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of `expert_mlp` for B T tokens."""
    B, T, D, E, F = (shape[letter] for letter in "BTDEF")
    draw = Draw(dtype, device)
    return _routed(draw, B * T, D, E) | {
        "gate_up": 0.02 * draw.normal(E, 2 * F, D),
        "down": 0.02 * draw.normal(E, D, F),
    }


def other_tokens(x: Inputs, i: int) -> Inputs:
    """`moe_inputs` with tokens that went to other experts; for i = 0 the same tokens."""
    (T, D), E = x["x"].shape, x["gate_up"].shape[0]
    return x | _routed(Draw(x["x"].dtype, x["x"].device, seed=i), T, D, E)


def moe_train_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`moe_inputs`, and the gradient of the output, do [B T, D]."""
    x = moe_inputs(shape, dtype, device)
    return x | {"do": Draw(dtype, device, seed=1).normal(*x["x"].shape)}
