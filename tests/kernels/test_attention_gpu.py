"""Attention within prompts on a GPU: with flash-attn-4, where it is installed, and by torch."""

import pytest
import torch

from kimi_kernels import attention, latent_attention
from tests.kernels.test_attention import check, check_without_gradient, ends_of, gradient_for
from tests.kernels.test_mla import make, make_on_gpu, run

pytestmark = pytest.mark.gpu
HAS_CUDNN = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def released(B, T, S, dtype=torch.bfloat16, H=4):
    return make_on_gpu(T, S, dtype, B=B, H=H)


@pytest.fixture(params=["flash-attn-4", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(attention, "flash_attn", lambda: None)
    elif attention.flash_attn() is None:
        pytest.skip("flash-attn-4 is not installed")
    return request.param


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    "B, T, S",
    [(3, 20, 20), (2, 1000, 1000), (1, 2500, 2500), (2, 200, 333), (1, 700, 5000)],
)
def test_prompts(B, T, S, dtype, library):
    args = released(B, T, S, dtype)
    check(args)
    check_without_gradient(args)


@DTYPES
@pytest.mark.parametrize(
    "lengths",
    [[0, 20, 0, 50, 1, 0], [0, 0], [4096, 3, 40, 4200], [5000, 1], list(range(1, 65))],
    ids=str,
)
def test_documents(lengths, dtype, library):
    T = sum(lengths)
    check(released(1, T, T, dtype, H=2), cu_seqlens=ends_of(lengths))


@pytest.mark.parametrize(
    "widths",
    [{}, {"D_n": 32, "P": 16, "D_v": 32, "R": 64}, {"D_n": 12, "P": 4, "D_v": 40, "R": 16}],
    ids=str,
)
def test_other_widths(widths, library):
    several, one = (
        [x.cuda() for x in make(700, 700, B=B, dtype=torch.bfloat16, **widths)] for B in (2, 1)
    )
    check(several)
    check(one, cu_seqlens=ends_of([300, 1, 399]))


def test_documents_of_one_token(library):
    """Without gradients: those of queries and keys are nothing but rounding."""
    check_without_gradient(released(1, 9, 9), cu_seqlens=torch.arange(10))
    check_without_gradient(released(2, 1, 1))


def test_deterministic(library):
    args = released(1, 3000, 3000)
    do = gradient_for(args)
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, {"cu_seqlens": ends_of([1000, 2000])}):
            found = [run(args, do, **options) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cu", [None, ends_of([1000, 2000])], ids=["one", "two"])
def test_no_gradient_of_the_gradient(cu, library):
    q, latent, w_kv = released(1, 3000, 3000)
    o = latent_attention(q, latent.requires_grad_(), w_kv, scale=0.4, cu_seqlens=cu)
    with pytest.raises(RuntimeError, match=r"not implemented|have no gradients"):
        (dlatent,) = torch.autograd.grad(o.sum(), latent, create_graph=True)
        dlatent.sum().backward()


def names_of(*inputs, **options):
    """Of the operators of torch that run in `latent_attention`."""
    with torch.profiler.profile() as profile:
        latent_attention(*inputs, scale=0.4, **options)
    return {event.key.split("::")[-1] for event in profile.key_averages()}


@pytest.mark.skipif(not HAS_CUDNN, reason="cuDNN attends at these widths on Hopper and Blackwell")
@pytest.mark.parametrize("T, S", [(700, 700), (5000, 5000), (700, 1400), (5000, 6000)])
@pytest.mark.parametrize("trains", [False, True])
def test_the_library_is_used(T, S, trains, library):
    args = [x.requires_grad_(trains) for x in released(1, T, S)]
    names, few = names_of(*args), T == 700
    assert ("FlashAttnFunc" in names) == (library == "flash-attn-4")
    by_torch = library == "torch" and few and not trains
    assert ("_scaled_dot_product_flash_attention" in names) == by_torch
    by_cudnn = library == "torch" and not by_torch
    assert ("_scaled_dot_product_cudnn_attention" in names) == by_cudnn


def test_the_library_is_used_for_documents(library):
    names = names_of(*released(1, 900, 900), cu_seqlens=ends_of([400, 500]))
    assert ("FlashAttnVarlenFunc" in names) == (library == "flash-attn-4")
    assert ("_varlen_attn" in names) == (library == "torch")
