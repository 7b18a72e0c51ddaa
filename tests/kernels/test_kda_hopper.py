"""The Gluon kernels of KDA, and what they replace, on inputs too large to take fp32 throughout.

bf16, raw inputs, K = V = 128: what the Gluon kernels serve. Other GPUs run the same tests without
them.
"""

import pytest
import torch

from kimi_kernels import fused_kda
from kimi_kernels.kda import chunk_bwd, intra_gluon, keys_gluon
from tests.helpers import DEVICE
from tests.kernels.kda_cases import check_kernel, cumulative, here, make_raw
from tests.kernels.test_kda_backward import assert_equal, check, through, upstream, with_state

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["gluon", "triton"])
def form(request, monkeypatch):
    if request.param == "triton":
        for module in (intra_gluon, keys_gluon):
            monkeypatch.setattr(module, "takes", lambda *args: False)
    return request.param


def inputs(T, H=32, HV=32, strength=1.0, N=1):
    x = make_raw(T, H=H, HV=HV, K=128, V=128, dtype=torch.bfloat16)
    x["f"] = strength * x["f"]
    assert T * HV >= chunk_bwd.EXACT_BELOW
    return with_state(x, N)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0, 300.0])
def test_gates(form, strength):
    check(fused_kda, inputs(520, strength=strength))


@pytest.mark.parametrize("H", [1, 8])
def test_grouped_heads(form, H):
    check(fused_kda, inputs(520, H=H))


def test_bounded_gate(form):
    check(fused_kda, inputs(520), lower_bound=-5.0)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_packed(form, lower_bound):
    lengths = [0, 1, 15, 16, 64, 0, 200, 300, 0]
    cu_seqlens = cumulative(lengths, torch.int32).to(DEVICE)
    x = inputs(sum(lengths), N=len(lengths))
    check(fused_kda, x, cu_seqlens=cu_seqlens, lower_bound=lower_bound)


def test_large_upstream_gradients(form):
    x = inputs(520)
    check(fused_kda, x, upstream(x, 1e4, 1e-4))


def test_runs_are_bit_equal(form):
    x = inputs(1000)
    up = upstream(x)
    first = through("triton", fused_kda, x, up)
    for _ in range(3):
        assert_equal(through("triton", fused_kda, x, up), first)


def test_half(form):
    check_kernel(fused_kda, here(make_raw(520, H=32, HV=32, K=128, V=128, dtype=torch.float16)))
