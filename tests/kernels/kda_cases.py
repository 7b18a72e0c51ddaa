"""What the KDA tests share: an independent definition, inputs, and how to take gradients."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from kimi_kernels import backend, chunk_kda, fused_kda, recurrent_kda
from tests.helpers import DEVICE, assert_as_good_as

GATES = ["ordinary", "zero", "strong", "mixed", "resets", "all -inf"]
KEYS = ["random", "repeated", "zero"]
NAMES = ("q", "k", "v", "g", "beta")
PARAMETERS = ("A_log", "dt_bias")  # of fused_kda, without a time axis


def naive_kda(q, k, v, g, beta, scale=None, initial_state=None) -> tuple[Tensor, Tensor]:
    """TR eq. 1 as printed, in fp64: one head and one token at a time, plain matrices -> o, S.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T (scale q_t)
    """
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    scale = 1 / math.sqrt(K) if scale is None else scale
    eye = torch.eye(K, dtype=torch.float64)
    outputs, states = [], []
    for b, h in product(range(B), range(HV)):
        i = h // (HV // H)  # the query/key head of value head h
        S = torch.zeros(K, V, dtype=torch.float64)
        if initial_state is not None:
            S = initial_state[b, h].double()
        for t in range(T):
            key, write = k[b, t, i], beta[b, t, h]
            S = (eye - write * torch.outer(key, key)) @ torch.diag(g[b, t, h].exp()) @ S
            S = S + write * torch.outer(key, v[b, t, h])
            outputs.append(S.mT @ (scale * q[b, t, i]))
        states.append(S)
    o = torch.stack(outputs) if outputs else v.new_zeros(0)
    return o.view(B, HV, T, V).transpose(1, 2), torch.stack(states).view(B, HV, K, V)


def make_gate(kind: str, *shape: int) -> Tensor:
    """Log-decays [B, T, HV, K] in fp64; `mixed` has all strengths side by side in one row."""
    g = -torch.rand(shape, dtype=torch.float64)
    match kind:
        case "zero":
            return g * 0
        case "strong":
            return g * 3000
        case "mixed":
            return g * torch.tensor([0.0, 1e-3, 1.0, 30.0, 3000.0])[torch.randint(5, shape)]
        case "resets":
            return g.masked_fill(torch.rand(shape) < 0.1, -torch.inf)
        case "all -inf":
            return torch.full_like(g, -torch.inf)
    return g


def make_inputs(
    T: int,
    *,
    B: int = 1,
    H: int = 1,
    HV: int = 2,
    K: int = 6,
    V: int = 5,
    gate: str = "ordinary",
    keys: str = "random",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Arguments of `chunk_kda` in `dtype`; gate and beta are kept in fp32 or better."""
    acc = torch.promote_types(dtype, torch.float32)
    q, k = (torch.randn(B, T, H, K, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, T, HV, V, dtype=torch.float64)
    beta = torch.rand(B, T, HV, dtype=torch.float64)
    if keys == "repeated":
        k, beta = torch.randn(K, dtype=torch.float64).expand_as(k), 1 - 1e-6 * beta
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    if keys == "zero":
        q, k, v, beta = (torch.zeros_like(x) for x in (q, k, v, beta))
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "g": make_gate(gate, B, T, HV, K).to(acc),
        "beta": beta.to(acc),
    }


def make_state(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, so not symmetric in K and V."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make_raw(
    T: int, *, B: int = 1, H: int = 1, HV: int = 2, K: int = 6, V: int = 5, dtype=torch.float64
) -> dict[str, Tensor]:
    """Arguments of `fused_kda`: raw projections, A_log and dt_bias."""
    x = make_inputs(T, B=B, H=H, HV=HV, K=K, V=V, dtype=dtype)
    acc = x["g"].dtype
    return {
        "q": 3 * x["q"],
        "k": x["k"] / 2,
        "v": x["v"],
        "f": torch.randn(B, T, HV, K).to(dtype),
        "b": torch.randn(B, T, HV).to(dtype),
        "A_log": torch.rand(HV).to(acc),
        "dt_bias": torch.randn(HV * K).to(acc),
    }


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


def tokens(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Views of some tokens of the arguments of `chunk_kda` or `fused_kda`."""
    return {n: x if n in PARAMETERS else x[:, start:end] for n, x in inputs.items()}


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def gradients(op, inputs: dict[str, Tensor], do: Tensor, dS: Tensor, **options):
    """o, S and the gradient of every tensor of `inputs`, from upstream gradients of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, S = op(**leaves, output_final_state=True, **options)
    up = (do.to(o.dtype), dS.to(S.dtype))
    grads = torch.autograd.grad((o, S), tuple(leaves.values()), up, materialize_grads=True)
    names = [f"d{name}" for name in inputs]
    return {"o": o.detach(), "S": S.detach()} | dict(zip(names, grads, strict=True))


# ---- kernels -----------------------------------------------------------------------------------


def here(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the device that the kernels are tested on."""
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def run(name: str, op, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """o and S of one backend."""
    with backend(name):
        return op(**inputs, output_final_state=True, **options)


def check_kernel(op, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """Triton against the reference in the same dtype, gold in fp64 -> Triton's o and S."""
    dtype = inputs["q"].dtype
    got, ref = run("triton", op, inputs, **options), run("reference", op, inputs, **options)
    form = recurrent_kda if op is chunk_kda else op
    gold = run("reference", form, doubled(inputs), **options)
    assert got[1].dtype == torch.float32
    for name, a, b, c in zip("oS", got, ref, gold, strict=True):
        assert_as_good_as(name, a, b, c, dtype)
    return got


OPS = [
    pytest.param(chunk_kda, make_inputs, id="chunk_kda"),
    pytest.param(recurrent_kda, make_inputs, id="recurrent_kda"),
    pytest.param(fused_kda, make_raw, id="fused_kda"),
]

# the chunk kernel takes K and V from 16 on; these are not multiples of a tile
kernel_inputs, kernel_raw = (partial(make, K=20, V=17) for make in (make_inputs, make_raw))
KERNEL_OPS = [
    pytest.param(chunk_kda, kernel_inputs, id="chunk_kda"),
    pytest.param(recurrent_kda, kernel_inputs, id="recurrent_kda"),
    pytest.param(fused_kda, kernel_raw, id="fused_kda"),
]
