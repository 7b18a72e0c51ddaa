"""What the ops cost: FLOPs and bytes of one call as formulas of the shape.

FLOPs are those of the algorithm (TR section 6.2, chunks of 64), 2 per multiply-add; bytes are the
fewest that must pass through device memory, each input read and each output written once.
"""

import functools
from importlib import import_module
from typing import Any

from benchmarks import model_step, trainer_step
from benchmarks.inputs import DTYPE, TOP_K, Shape

SIZE = DTYPE.itemsize  # bytes


def tokens(s: Shape) -> int:
    """Tokens times heads."""
    return s["B"] * s["T"] * s["H"]


def kda_flops(s: Shape) -> float:
    """Forward."""
    K, V, C = s["K"], s["V"], 64
    return tokens(s) * (6 * K * V + C * (2 * K + V) + C * C)


def kda_bytes(s: Shape) -> float:
    """q, k, f, v, b in; o out."""
    return tokens(s) * SIZE * (3 * s["K"] + 2 * s["V"] + 1)


def kda_train_bytes(s: Shape) -> float:
    """The forward pass; then the same five and do in, five gradients out."""
    return kda_bytes(s) + tokens(s) * SIZE * (6 * s["K"] + 3 * s["V"] + 2)


def step_flops(s: Shape) -> float:
    B, H, K, V, W = (s[letter] for letter in "BHKVW")
    return B * H * (7 * K * V + 2 * W * (2 * K + V) + 8 * V)


def step_bytes(s: Shape) -> float:
    """Both states in and out; projections, f, b, gate and weights in; o out."""
    B, H, K, V, W = (s[letter] for letter in "BHKVW")
    D = H * (2 * K + V)
    state = 2 * B * H * K * V * 4
    return state + SIZE * (B * (D + H * K + H + 2 * H * V + 2 * (W - 1) * D) + D * W)


def conv_bytes(s: Shape) -> float:
    """x and weight in; y out."""
    return SIZE * 3 * s["K"] * (2 * tokens(s) + s["H"] * s["W"])


def conv_train_bytes(s: Shape) -> float:
    """The forward pass; then x, weight and dy in, dx and dweight out."""
    return conv_bytes(s) + SIZE * 3 * s["K"] * (3 * tokens(s) + 2 * s["H"] * s["W"])


def norm_bytes(s: Shape) -> float:
    """x, g and w in; o out."""
    return SIZE * s["V"] * (3 * tokens(s) + 1)


def norm_train_bytes(s: Shape) -> float:
    """The forward pass; then x, g, w and do in, dx, dg and dw out."""
    return norm_bytes(s) + SIZE * s["V"] * (5 * tokens(s) + 2)


def moe_flops(s: Shape) -> float:
    """Forward: gate, up and down."""
    return 6 * s["B"] * s["T"] * TOP_K * s["D"] * s["F"]


def moe_bytes(s: Shape) -> float:
    """E (1 - (1 - k / E)^n) experts, the mean that n tokens hit, x, index and weights in; y out."""
    B, T, D, E, F = (s[letter] for letter in "BTDEF")
    hit = E * (1 - (1 - TOP_K / E) ** (B * T))
    return SIZE * (hit * 3 * D * F + 2 * B * T * D) + B * T * TOP_K * (8 + 4)


def moe_train_bytes(s: Shape) -> float:
    """The forward pass; then the same and do in, gradients of x, weights and E experts out."""
    B, T, D, E, F = (s[letter] for letter in "BTDEF")
    return 2 * moe_bytes(s) + SIZE * (E * 3 * D * F + B * T * D) + B * T * TOP_K * 4


def latent_flops(s: Shape) -> float:
    """Scores with R + K/2 channels, a sum of R, and the products with W_k and W_v."""
    B, T, S, H, K, R = (s[letter] for letter in "BTSHKR")
    return 2 * B * T * H * (S * (2 * R + K // 2) + 2 * K * R)


def latent_bytes(s: Shape) -> float:
    """Latents, queries and weights in; o out."""
    B, T, S, H, K, R = (s[letter] for letter in "BTSHKR")
    return SIZE * (B * S * (R + K // 2) + B * T * H * (2 * K + K // 2) + 2 * H * K * R)


def prompt_flops(s: Shape, documents: int = 1) -> float:
    """Keys and values, scores and sums of what a token sees; cuts at random make 2 / (n + 1) of T.

    Products of K keys and values and R latents; heads have K + K/2 channels and K values.
    """
    T, H, K, R = (s[letter] for letter in "THKR")
    pairs = T * T / (documents + 1)
    return 2 * H * (T * R * 2 * K + pairs * (2 * K + K // 2))


def prompt_bytes(s: Shape) -> float:
    """Latents, queries and weights in; o out."""
    return latent_bytes(s | {"B": 1, "S": s["T"]})


def prompt_train_bytes(s: Shape) -> float:
    """The forward pass, then its inputs and the gradient of o in, and as many gradients out."""
    return 3 * prompt_bytes(s) - SIZE * s["T"] * s["H"] * s["K"]


# ---- model: letters as in model_step.py and model_decode.py --------------------------------------


def _model(s: Shape, all_mla: bool = False) -> tuple[Any, dict[str, int], int, int]:
    """The config, its parameters, how many layers are KDA and how many MLA."""
    return _counted(tuple(s[letter] for letter in model_step.LETTERS), all_mla)


@functools.cache
def _counted(sizes: tuple[int, ...], all_mla: bool) -> tuple[Any, dict[str, int], int, int]:
    config = model_step.config(dict(zip(model_step.LETTERS, sizes, strict=True)))
    config = config.all_mla() if all_mla else config
    kda, mla = (config.layer_types.count(f"{kind}_attention") for kind in ("linear", "full"))
    return config, import_module("kimi_linear.info").parameter_counts(config), kda, mla


def weight_bytes(s: Shape) -> float:
    """Of every weight, as they lie in memory."""
    return SIZE * _model(s)[1]["total"]


def cached(s: Shape, all_mla: bool = False, fp8: bool = False) -> tuple[int, int]:
    """Bytes that the cache of one sequence holds per token, and beside its tokens."""
    return import_module("kimi_linear.info").cache_bytes(_model(s, all_mla)[0], fp8)


def sequence_bytes(s: Shape, all_mla: bool = False, fp8: bool = False) -> float:
    """Of the cache of one sequence of S tokens."""
    latent, state = cached(s, all_mla, fp8)
    return s["S"] * latent + state


def _mixers(s: Shape, all_mla: bool) -> float:
    """Forward, beside the projections: KDA in chunks and causal MLA."""
    _, _, kda, mla = _model(s, all_mla)
    B, T, H, K = (s[letter] for letter in "BTHK")
    # half of 2 T^2 per channel of k and v
    return kda * kda_flops(s | {"V": K}) + mla * B * H * T * T * (2 * K + K // 2)


def train_step_flops(s: Shape) -> float:
    """6 per active parameter and token; thrice the forward of the mixers."""
    return 6 * _model(s)[1]["active"] * s["B"] * s["T"] + 3 * _mixers(s, False)


def train_step_bytes(s: Shape) -> float:
    """Every weight in, every gradient out."""
    return 2 * weight_bytes(s)


def trainer_step_flops(s: Shape) -> float:
    """Those of a training step on the documents; clipping and SGD have few."""
    return train_step_flops(trainer_step.as_rows(s))


def trainer_step_bytes(s: Shape) -> float:
    """A training step; gradients in for their norm; both in for the update, weights out."""
    return train_step_bytes(s) + 4 * SIZE * _model(s)[1]["total"]


def prefill_flops(s: Shape, all_mla: bool = False) -> float:
    """2 per active parameter and token, but the head at the last one only; the mixers."""
    n = _model(s, all_mla)[1]
    return 2 * s["B"] * (s["T"] * (n["active"] - n["head"]) + n["head"]) + _mixers(s, all_mla)


def _forward_bytes(s: Shape, tokens: int, n: dict[str, int]) -> float:
    """Weights in: of the embedding `tokens` rows, of the experts the mean that so many hit; one
    position of logits per row out."""
    missed = (1 - TOP_K / s["E"]) ** tokens
    weights = n["total"] - n["head"] - missed * n["routed"]  # the embedding is as large as the head
    return SIZE * (weights + tokens * s["D"] + s["B"] * s["vocab"])


def prefill_bytes(s: Shape, all_mla: bool = False) -> float:
    """What a forward reads; states and latents out."""
    n, (latent, state) = _model(s, all_mla)[1], cached(s, all_mla)
    return _forward_bytes(s, s["B"] * s["T"], n) + s["B"] * (s["T"] * latent + state)


def decode_step_flops(s: Shape, all_mla: bool = False) -> float:
    """2 per active parameter and row; the recurrence of KDA, MLA on latents of S tokens."""
    _, n, kda, mla = _model(s, all_mla)
    B, S, H, K, R = (s[letter] for letter in "BSHKR")
    attention = 2 * H * S * (2 * R + K // 2)  # per row: scores with R + K/2 channels, a sum of R
    return B * (2 * n["active"] + kda * 7 * H * K * K + mla * attention)


def decode_step_bytes(s: Shape, all_mla: bool = False, fp8: bool = False) -> float:
    """What a forward of B tokens reads; states in and out, latents of S tokens in, of one out."""
    n, (latent, state) = _model(s, all_mla)[1], cached(s, all_mla, fp8)
    return _forward_bytes(s, s["B"], n) + s["B"] * ((s["S"] + 1) * latent + 2 * state)


def _steps_of(s: Shape) -> tuple[Shape, int, Shape]:
    """`generate`: the prompt; the steps after it, and one of their mean length."""
    return s | {"T": s["S"]}, s["N"] - 1, s | {"S": s["S"] + s["N"] // 2}


def generate_flops(s: Shape) -> float:
    """The prompt, which gives the first token, and a step for each of the others."""
    prompt, steps, step = _steps_of(s)
    return prefill_flops(prompt) + steps * decode_step_flops(step)


def generate_bytes(s: Shape) -> float:
    """As its FLOPs."""
    prompt, steps, step = _steps_of(s)
    return prefill_bytes(prompt) + steps * decode_step_bytes(step)
