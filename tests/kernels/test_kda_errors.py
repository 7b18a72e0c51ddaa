"""Bad input to KDA: a ValueError whose message starts with the argument."""

import math

import pytest
import torch

from kimi_kernels import chunk_kda, fused_kda, recurrent_kda

B, T, H, HV, K, V = 2, 3, 2, 4, 6, 5
FP64, FP32, BF16, INT = torch.float64, torch.float32, torch.bfloat16, torch.int64


def good(op) -> dict[str, torch.Tensor]:
    gate, beta = ("f", "b") if op is fused_kda else ("g", "beta")
    inputs = {
        "q": torch.zeros(B, T, H, K),
        "k": torch.zeros(B, T, H, K),
        "v": torch.zeros(B, T, HV, V),
        gate: torch.zeros(B, T, HV, K),
        beta: torch.zeros(B, T, HV),
    }
    if op is fused_kda:
        inputs |= {"A_log": torch.zeros(HV), "dt_bias": torch.zeros(HV * K)}
    return inputs


def refuses(op, name, change):
    op(**good(op))
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        op(**(good(op) | change))


each_op = pytest.mark.parametrize("op", [chunk_kda, recurrent_kda, fused_kda])


@each_op
@pytest.mark.parametrize(
    "name, shape",
    [
        ("q", (T, H, K)),
        ("q", (1, B, T, H, K)),
        ("q", ()),
        ("k", (B, T, H)),
        ("k", (B, T, H, K + 1)),
        ("k", (B, T, H + 1, K)),
        ("k", (B, T + 1, H, K)),
        ("k", (1, T, H, K)),
        ("v", (B, T, HV)),
        ("v", (B, T + 1, HV, V)),
        ("v", (1, T, HV, V)),
        ("v", (B, T, 3, V)),  # not a multiple of H
        ("v", (B, T, 1, V)),
        ("gate", (B, T, HV)),
        ("gate", (B, T, HV, 1)),
        ("gate", (B, T, H, K)),
        ("gate", (B, T + 1, HV, K)),
        ("gate", (1, T, HV, K)),
        ("beta", (B, T)),
        ("beta", (B, T, HV, 1)),
        ("beta", (B, T, H)),
        ("beta", (B, T + 1, HV)),
        ("initial_state", (B, HV, V, K)),
        ("initial_state", (B, H, K, V)),
        ("initial_state", (1, HV, K, V)),
        ("initial_state", (B + 1, HV, K, V)),
        ("initial_state", (HV, K, V)),
    ],
)
def test_shapes(op, name, shape):
    if op is fused_kda:
        name = {"gate": "f", "beta": "b"}.get(name, name)
    name = {"gate": "g"}.get(name, name)
    refuses(op, name, {name: torch.zeros(shape)})


@each_op
@pytest.mark.parametrize(
    "name, x",
    [
        ("q", torch.zeros(B, T, H, K, dtype=INT)),
        ("q", torch.zeros(B, T, H, K, dtype=torch.complex64)),
        ("k", torch.zeros(B, T, H, K, dtype=BF16)),
        ("k", torch.zeros(B, T, H, K, dtype=INT)),
        ("v", torch.zeros(B, T, HV, V, dtype=FP64)),
        ("gate", torch.zeros(B, T, HV, K, dtype=INT)),
        ("beta", torch.zeros(B, T, HV, dtype=torch.bool)),
        ("initial_state", torch.zeros(B, HV, K, V, dtype=BF16)),
        ("initial_state", torch.zeros(B, HV, K, V, dtype=FP64)),
        ("initial_state", torch.zeros(B, HV, K, V, dtype=INT)),
    ],
    ids=lambda x: str(x.dtype) if isinstance(x, torch.Tensor) else x,
)
def test_dtypes(op, name, x):
    if op is fused_kda:
        name = {"gate": "f", "beta": "b"}.get(name, name)
    name = {"gate": "g"}.get(name, name)
    refuses(op, name, {name: x})


@each_op
@pytest.mark.parametrize("name", ["k", "v", "gate", "beta", "initial_state"])
def test_devices(op, name):
    name = ({"gate": "f", "beta": "b"} if op is fused_kda else {"gate": "g"}).get(name, name)
    x = (good(op) | {"initial_state": torch.zeros(B, HV, K, V)})[name]
    refuses(op, name, {name: x.to("meta")})


@each_op
@pytest.mark.parametrize("dtype, wanted", [(FP64, FP64), (BF16, FP32), (torch.float16, FP32)])
def test_state_dtype_follows_the_inputs(op, dtype, wanted):
    inputs = {n: x.to(dtype) if n in "qkv" else x for n, x in good(op).items()}
    state = torch.zeros(B, HV, K, V, dtype=wanted)
    assert op(**inputs, initial_state=state, output_final_state=True)[1].dtype == wanted
    wrong = FP32 if wanted is FP64 else dtype
    with pytest.raises(ValueError, match=r"^initial_state\b"):
        op(**inputs, initial_state=state.to(wrong))


@each_op
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([1, 3]),
        torch.tensor([-1, 3]),
        torch.tensor([0, 2, 1, 3]),
        torch.tensor([0, 4, 3]),
        torch.tensor([0, 2]),
        torch.tensor([0, 4]),
        torch.tensor([0, 3], dtype=torch.int16),
        torch.tensor([0.0, 3.0]),
        torch.tensor([[0, 3]]),
        torch.tensor(3),
        torch.tensor([0]),
        torch.tensor([], dtype=INT),
    ],
    ids=str,
)
def test_cu_seqlens(op, cu_seqlens):
    row = {name: x[:1] if x.ndim > 1 else x for name, x in good(op).items()}
    op(**row, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^cu_seqlens\b"):
        op(**row, cu_seqlens=cu_seqlens)


@each_op
def test_cu_seqlens_needs_one_row(op):
    refuses(op, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 3])})


@each_op
@pytest.mark.parametrize("N", [1, 3])
def test_one_state_per_packed_sequence(op, N):
    row = {name: x[:1] if x.ndim > 1 else x for name, x in good(op).items()}
    with pytest.raises(ValueError, match=r"^initial_state\b"):
        op(**row, cu_seqlens=torch.tensor([0, 1, 3]), initial_state=torch.zeros(N, HV, K, V))


@pytest.mark.parametrize(
    "name, value",
    [
        ("A_log", torch.zeros(H)),
        ("A_log", torch.zeros(1, 1, HV, 1)),
        ("dt_bias", torch.zeros(HV, K)),
        ("dt_bias", torch.zeros(K)),
        ("dt_bias", torch.zeros(HV)),
        ("lower_bound", 0.0),
        ("lower_bound", 5.0),
        ("lower_bound", -math.inf),
        ("lower_bound", math.inf),
        ("lower_bound", math.nan),
    ],
)
def test_gate_parameters(name, value):
    refuses(fused_kda, name, {name: value})


@each_op
def test_the_message_says_what_came_and_what_was_wanted(op):
    with pytest.raises(ValueError, match=r"^k has shape \[2, 3, 2, 7\], want \[2, 3, 2, 6\]$"):
        op(**(good(op) | {"k": torch.zeros(B, T, H, K + 1)}))
    with pytest.raises(ValueError, match=r"^v is torch.float64 on cpu, want torch.float32 on cpu"):
        op(**(good(op) | {"v": torch.zeros(B, T, HV, V, dtype=FP64)}))
