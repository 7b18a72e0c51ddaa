"""Latents: what fp8 rounds them to, and the kernel that stores them."""

import pytest
import torch

from kimi_kernels import (
    backend,
    fused_linears,
    latent_attention,
    quantize_latents,
    rms_norm,
    store_latents,
)
from kimi_kernels.latents import FP8, LARGEST, LEAST, QuantizedLatents
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches

BITS = torch.uint8


def latents(*shape, dtype=torch.float32):
    """Of all sizes, in tokens and in channels."""
    x = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(3).exp()
    return (x * torch.randn(shape[-1]).mul(2).exp()).clamp(-6e4, 6e4).to(DEVICE, dtype)


def buffer(B, S, R, P, dtype):
    sizes = ((B, S, R), FP8), ((B, S, P), dtype), ((B, S), torch.float32)
    return QuantizedLatents(*(torch.zeros(s, dtype=d, device=DEVICE) for s, d in sizes))


def parts(x):
    """Of latents of either kind, with e4m3 as bytes."""
    held = x if isinstance(x, QuantizedLatents) else (x,)
    return [y.view(BITS) if y.dtype == FP8 else y for y in held]


def equal(a, b):
    return all(map(torch.equal, parts(a), parts(b)))


def normalised(x, norm):
    R = norm[0].numel()
    return torch.cat((rms_norm(x[:, :R], *norm), x[:, R:]), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_definition(dtype):
    """The largest number of a token is exact, all others to 4 bits, or to 2^-10 of the scale."""
    x = latents(3, 50, 40, dtype=dtype)
    x[0, 0] = 0
    got = quantize_latents(x, 32)
    c, wide = x[..., :32].double(), got._replace(k_r=x[..., 32:].double()).dequantize()
    most, scale = c.abs().amax(-1), got.scale.double()
    assert torch.equal(wide[..., 32:], x[..., 32:].double())
    assert (scale[0, 0] == LEAST) and (wide[0, 0, :32] == 0).all()
    torch.testing.assert_close(scale, (most / LARGEST).clamp_min(LEAST), rtol=1e-6, atol=0)
    torch.testing.assert_close(wide[..., :32].abs().amax(-1), most, rtol=1e-6, atol=0)
    error = (wide[..., :32] - c).abs()
    assert (error <= torch.maximum(c.abs() * 2**-4, scale[..., None] * 2**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twice_is_once(dtype):
    once = quantize_latents(latents(5, 20, 40, dtype=dtype), 32)
    twice = quantize_latents(once.dequantize(), 32)
    assert torch.equal(once.c.float(), twice.c.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x = latents(4, 40)
    x[1, 3] = bad
    for name in ("reference", "triton"):
        into = buffer(1, 4, 32, 8, x.dtype)
        where = torch.arange(4, device=DEVICE)
        with backend(name):
            store_latents(x, into, torch.zeros_like(where), where)
        c = into.dequantize()[0, :, :32]
        assert not torch.isfinite(c[1]).any() and torch.isfinite(c[[0, 2, 3]]).all()


@pytest.mark.parametrize("R, P", [(32, 8), (33, 0), (1, 3), (512, 64)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_stores_the_definition(R, P, dtype):
    """To the bit, and nothing else."""
    x = latents(40, R + P, dtype=dtype)
    x[3], x[4, :R] = 0, 1e-7
    where = torch.randperm(3 * 50, device=DEVICE)[:40]
    rows, columns = where // 50, where % 50
    want, got = buffer(3, 50, R, P, dtype), buffer(3, 50, R, P, dtype)
    for part, new in zip(want, quantize_latents(x, R), strict=True):
        bits = BITS if part.dtype == FP8 else part.dtype
        part.view(bits)[rows, columns] = new.view(bits)
    for name in ("reference", "triton"):
        with backend(name):
            store_latents(x, got, rows, columns)
        assert equal(got, want)
    with backend("triton"):
        store_latents(x.mT.contiguous().mT, got, rows.flip(0).contiguous().flip(0), columns)
    assert equal(got, want)


@pytest.mark.parametrize("part", range(4))
def test_kernel_rounds_as_torch(part):
    """The scale is 1: every code, halfway between two, and next to that."""
    codes = torch.arange(256, dtype=BITS).view(FP8).float()
    codes = codes[codes.isfinite()].sort().values
    middle = (codes[1:] + codes[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.full_like(middle, x)) for x in (1e9, -1e9))
    x = [codes, middle, up, down][part].to(DEVICE)
    x = torch.stack((x, torch.full_like(x, LARGEST)), 1)
    got, where = buffer(1, len(x), 2, 0, x.dtype), torch.arange(len(x), device=DEVICE)
    with backend("triton"):
        store_latents(x, got, torch.zeros_like(where), where)
    assert (got.scale == 1).all() and torch.equal(got.c[0].float(), x.to(FP8).float())


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("R, P", [(32, 8), (256, 16), (512, 64), (8192, 0)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_norm_is_rms_norm(R, P, dtype, fp8):
    """To the bit: what a decode step stores is what a prompt does. Rows given or not."""
    x, norm = latents(12, R + P, dtype=dtype), (torch.randn(R, device=DEVICE).to(dtype), 1e-6)
    columns = torch.randperm(20, device=DEVICE)[:12]
    rows = torch.arange(3, device=DEVICE).repeat_interleave(4)
    for name in ("reference", "triton"):
        found = []
        with backend(name):
            y = normalised(x, norm)
            for args in ((y, rows, None), (y, None, None), (x, rows, norm), (x, None, norm)):
                into = buffer(3, 20, R, P, dtype) if fp8 else x.new_zeros(3, 20, R + P)
                store_latents(args[0], into, args[1], columns, args[2])
                found.append(into)
        assert all(equal(into, found[0]) for into in found)
        plain = found[0].dequantize() if fp8 else found[0]
        assert torch.equal(plain[rows, columns][:, R:], x[:, R:])
        assert fp8 or torch.equal(plain[rows, columns], y)
        plain[rows, columns] = 0
        assert not plain.any()  # nothing else is written


@pytest.mark.parametrize("R, P", [(1, 3), (20, 4), (33, 0)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_norm_of_odd_sizes(R, P, dtype):
    x, norm = latents(3, R + P, dtype=dtype), (torch.randn(R, device=DEVICE).to(dtype), 1e-6)
    where, into = torch.arange(3, device=DEVICE), x.new_zeros(1, 3, R + P)
    with backend("triton"):
        store_latents(x, into, None, where, norm)
    with backend("reference"):
        gold = normalised(x.double(), (norm[0].double(), norm[1]))
        assert_as_good_as("latents", into[0], normalised(x, norm), gold)


def test_no_tokens():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for name in ("reference", "triton"):
        with backend(name):
            for into in (buffer(1, 4, 32, 8, torch.float32), torch.zeros(0, 4, 40, device=DEVICE)):
                store_latents(latents(0, 40), into, none, none)
                store_latents(latents(0, 40), into, None, none)


def test_errors():
    good = {"latent": torch.zeros(2, 12), "into": buffer(1, 4, 8, 4, torch.float32)}
    good = {"latent": good["latent"].to(DEVICE), "into": good["into"]}
    good |= {x: torch.zeros(2, dtype=torch.int64, device=DEVICE) for x in ("rows", "columns")}
    store_latents(**good)
    into, longer = good["into"], buffer(1, 8, 8, 4, torch.float32)
    for R in (0, 13):
        with pytest.raises(ValueError, match=rf"latent has shape \[2, 12\], want \[\.\.\., {R}"):
            quantize_latents(good["latent"], R)
    with pytest.raises(ValueError, match=r"latent is torch\.int64"):
        quantize_latents(good["latent"].long(), 8)
    for match, change in {
        r"latent has shape \[1, 2, 12\], want": {"latent": good["latent"][None]},
        r"latent\.k_r has shape": {"latent": good["latent"][:, :11]},
        r"latent\.k_r is": {"latent": good["latent"].half()},
        r"latent\.c is": {"into": into._replace(c=into.c.half())},
        r"latent\.scale is": {"into": into._replace(scale=into.scale.half())},
        r"latent\.scale has shape": {"into": into._replace(scale=into.scale[:, :3])},
        "rows has shape": {"rows": good["rows"][:1]},
        "columns is": {"columns": good["rows"].int()},
        "into has t": {"into": QuantizedLatents(*(x[:, ::2] for x in longer))},
        r"norm\[0\] has": {"norm": (torch.zeros(7, device=DEVICE), 1e-6)},
        r"norm\[0\] is": {"norm": (torch.zeros(8, device=DEVICE).half(), 1e-6)},
        r"norm\[0\] has shape \[13\]": {"norm": (torch.zeros(13, device=DEVICE), 1e-6)}
        | {"into": torch.zeros(1, 4, 12, device=DEVICE)},
        r"norm\[0\] has shape \[0\]": {"norm": (torch.zeros(0, device=DEVICE), 1e-6)}
        | {"into": torch.zeros(1, 4, 12, device=DEVICE)},
        r"norm\[1\]": {"norm": (torch.zeros(8, device=DEVICE), None)},
        "norm has": {"norm": (torch.zeros(8, device=DEVICE),)},
        r"latent has shape \[2, 7\]": {"latent": good["latent"][:, :7]},
        "latent is": {"latent": good["latent"].long()},
        "into is a tuple": {"into": tuple(into)},
        "into has shapes": {"into": into._replace(c=into.c[0])},
        "columns is None": {"columns": None},
        "into has shape \\[": {"into": torch.zeros(1, 4, 11, device=DEVICE)},
        "into is": {"into": torch.zeros(1, 4, 12, device=DEVICE).half()},
        "latent has 2 tokens, want as many": {"into": buffer(3, 4, 8, 4, torch.float32)}
        | {"rows": None},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{match}"):
            store_latents(**(good | change))


@pytest.mark.gpu
def test_a_chain_of_launches_that_begin_early():
    """Twenty times: a projection, the store of its latent, a projection of what was stored."""
    R, P, D = 512, 64, 64
    norm = torch.randn(R, device=DEVICE).bfloat16(), 1e-6
    down, up = (torch.randn(20, *n, device=DEVICE).bfloat16() / 50 for n in ((R + P, D), (D, D)))
    column, x = torch.tensor([5], device=DEVICE), torch.randn(1, D, device=DEVICE).bfloat16()
    buffers = x.new_zeros(20, 1, 9, R + P)

    def chain(y):
        for w_down, w_up, into in zip(down, up, buffers, strict=True):
            (latent,) = fused_linears([y], [w_down])
            store_latents(latent, into, None, column, norm)
            (y,) = fused_linears([into[0, 5:6, :D]], [w_up], residual=y)
        return y

    check_early_launches(chain, x, buffers.zero_)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("S", [9, 5000, 20000])
def test_a_chain_of_layers_that_begin_early(S, fp8):
    """Six times: projections, the store of the latent, attention, the output projection."""
    H, N, R, P, D, L = 32, 128, 512, 64, 512, 6

    def weights(*shape):
        return torch.randn(L, *shape, device=DEVICE).bfloat16() / shape[1] ** 0.5

    norm = torch.randn(R, device=DEVICE).bfloat16(), 1e-6
    parts = weights(H * (N + P), D), weights(R + P, D), weights(2 * H * N, R), weights(D, H * N)
    column, x = torch.tensor([S - 4], device=DEVICE), torch.randn(1, D, device=DEVICE).bfloat16()
    old = torch.randn(1, S, R + P, device=DEVICE).bfloat16()
    old = quantize_latents(old, R) if fp8 else QuantizedLatents(old, *old.new_empty(2, 0))
    caches = [old._make(y.clone() for y in old) for _ in range(L)]

    def refill():
        for cache in caches:
            for y, z in zip(cache, old, strict=True):
                y.view(BITS).copy_(z.view(BITS))

    def chain(y):
        for cache, w_q, w_down, w_kv, w_o in zip(caches, *parts, strict=True):
            into = cache if fp8 else cache.c
            q, latent = fused_linears([y, y], [w_q, w_down])
            store_latents(latent, into, None, column, norm)
            q = q.view(1, 1, H, N + P)
            o = latent_attention(q, into, w_kv, scale=0.07, positions=column[None])
            (y,) = fused_linears([o.view(1, H * N)], [w_o], residual=y)
        return y

    check_early_launches(chain, x, refill)
