"""Attention in two parts, of a past and of the queries' own tokens, and its gradient."""

import pytest
import torch

from kimi_kernels import attention, mla, mla_past
from tests.helpers import assert_as_good_as

NAMES = ("o", "dq", "dk", "dv")
SHAPES = [(1, 2), (5, 6), (5, 40), (64, 200)]


def make(T, S, *, B=2, H=3, D=24, V=16, dtype=torch.float64, device="cpu"):
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, V)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def whole(q, k, v, scale):
    """One softmax over all that a query sees."""
    T, S = q.shape[2], k.shape[2]
    seen = mla._visible(torch.arange(S - T, S, device=q.device), S)
    return (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def run(op, args, do, scale=0.3):
    leaves = [x.detach().clone().requires_grad_() for x in args]
    o = op(*leaves, scale)
    return o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))


def forward(q, k, v, causal, scale):
    """What cuDNN computes, written out."""
    o, lse = mla.attend(q, k, v, causal, scale)
    return o, lse, []


def backward(do, q, k, v, o, lse, state, causal, scale):
    p = (q @ k.mT * scale - lse).exp()
    p = p.tril() if causal else p
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ do


@pytest.mark.parametrize("T, S", SHAPES)
def test_the_formula(T, S, monkeypatch):
    """With cuDNN's two calls written out, in fp64."""
    monkeypatch.setattr(mla_past, "cudnn_attention", forward)
    monkeypatch.setattr(mla_past, "cudnn_gradient", backward)
    args = make(T, S)
    do = torch.randn(2, 3, T, 16).double()
    gold = run(whole, args, do)
    for name, a, b in zip(NAMES, run(mla_past.attend_after_others, args, do), gold, strict=True):
        assert_as_good_as(name, a, b, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("T, S", [(64, 65), (128, 1000), (1000, 1500), (513, 4096)])
@pytest.mark.parametrize("D, V", [(192, 128), (128, 128)])
def test_on_a_gpu(T, S, D, V, dtype):
    args = make(T, S, D=D, V=V, dtype=dtype, device="cuda")
    do, scale = torch.randn(2, 3, T, V, device="cuda", dtype=dtype), D**-0.5
    found = [
        run(mla_past.attend_after_others, args, do, scale),
        run(whole, args, do, scale),
        run(whole, [x.double() for x in args], do, scale),
    ]
    for name, *results in zip(NAMES, *found, strict=True):
        assert_as_good_as(name, *results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_latent_attention_takes_it(dtype, monkeypatch):
    """With a gradient, many queries after other tokens; in fp32 it is torch's own attention."""
    calls = []
    monkeypatch.setattr(attention, "flash_attn", lambda: None)

    def count(*args):
        calls.append(args)
        return mla_past.attend_after_others(*args)

    monkeypatch.setattr(attention, "attend_after_others", count)
    for cast, want in [(dtype, 1), (torch.float32, 1)]:
        q = torch.randn(1, 700, 4, 192, device="cuda", dtype=cast, requires_grad=True)
        latent = torch.randn(1, 1000, 576, device="cuda", dtype=cast)
        w_kv = torch.randn(4 * 256, 512, device="cuda", dtype=cast) / 23
        mla.latent_attention(q, latent, w_kv, scale=192**-0.5).sum().backward()
        assert len(calls) == want
