"""rms_norm and add_rms_norm: Triton against the PyTorch reference, and that against its formula."""

import pytest
import torch
from torch.autograd import gradcheck

from kimi_kernels import add_rms_norm, backend, rms_norm, rms_norm_triton
from kimi_kernels.rms_norm_triton import rms_norm_op
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
NAMES = ("y", "h", "dx", "dresidual", "dw")


def make(*shape, dtype=torch.float32, w_dtype=None):
    """x, residual, w and the gradients of the norm and of the sum."""
    x, residual, dh = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    w = torch.rand(shape[-1], device=DEVICE).to(w_dtype or dtype)
    dy = torch.randn(shape, device=DEVICE).to(torch.promote_types(dtype, w.dtype))
    return x, residual, w, dy, dh


def run(name, x, residual, w, dy, dh, eps=1e-5):
    """The norm, the sum and the gradients of x, residual and w; strides are kept."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, w)]
    with backend(name):
        outputs = add_rms_norm(*leaves, eps)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, (dy, dh))


def formula(x, residual, w, dy, dh, eps=1e-5):
    """The docstring's equations, forward and backward, in fp64, on the rounded sum."""
    h, w, dy, dh = (t.double() for t in (x + residual, w, dy, dh))
    r = (h.square().mean(-1, keepdim=True) + eps) ** -0.5
    xh, a = h * r, dy * w
    dx = r * (a - xh * (a * xh).mean(-1, keepdim=True)) + dh
    return xh * w, h, dx, dx, (dy * xh).reshape(-1, w.numel()).sum(0)


def check(args, **options):
    got, ref = run("triton", *args, **options), run("reference", *args, **options)
    for name, a, b, c in zip(NAMES, got, ref, formula(*args, **options), strict=True):
        assert_as_good_as(name, a, b, c, args[0].dtype)
    assert torch.equal(got[1], args[0] + args[1])


@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 128), (15, 128), (16, 64), (63, 100), (5, 1), (2, 7, 3, 32), (3, 2304), (2, 5000)]
)
def test_triton(shape, dtype):
    check(make(*shape, dtype=dtype))


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float16], ids=str)
@each_dtype
def test_triton_weight_dtype(dtype, w_dtype):
    check(make(30, 60, dtype=dtype, w_dtype=w_dtype))


@each_dtype
def test_without_residual(dtype):
    x, _, w, dy, _ = make(30, 60, dtype=dtype)
    nothing = torch.zeros_like(x)
    results = {}
    for name in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        with backend(name):
            y = rms_norm(*leaves, 0.1)
        results[name] = y.detach(), *torch.autograd.grad(y, leaves, dy)
    y, _, dx, _, dw = formula(x, nothing, w, dy, nothing, eps=0.1)
    for n, a, b, c in zip("yxw", *results.values(), (y, dx, dw), strict=True):
        assert_as_good_as(n, a, b, c)


def test_several_rows_per_program(monkeypatch):
    monkeypatch.setattr(rms_norm_triton, "PROGRAMS", 8)
    check(make(2 * 8 * 64 + 5, 64))


def test_triton_zeros_and_large_values():
    x, residual, w, dy, dh = make(20, 60)
    x[3], residual[3], x[4], dy[7] = 0, 0, 1e15, 0
    check((x, residual, w, dy, dh))


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 3, 32)])
def test_triton_without_rows(shape):
    args = make(*shape)
    for name, a, b in zip(NAMES, run("triton", *args), run("reference", *args), strict=True):
        assert a.shape == b.shape and not a.any(), name


@each_dtype
def test_triton_non_contiguous(dtype):
    x, residual, w, dy, dh = make(6, 5, 40, dtype=dtype)
    swapped = [t.transpose(0, 1) for t in (x, residual)]
    upstream = [t.transpose(0, 1) for t in (dy, dh)]
    check((*swapped, w, *upstream))
    check((x, residual, w.repeat_interleave(2)[::2], dy, dh))


def test_a_sum_that_nobody_uses():
    x, residual, w, dy, dh = make(20, 60)
    leaf = x.requires_grad_()
    with backend("triton"):
        y, _ = add_rms_norm(leaf, residual, w)
    (got,) = torch.autograd.grad(y, leaf, dy)
    want = run("triton", x, residual, w, dy, torch.zeros_like(dh))[2]
    assert torch.equal(got, want)


def test_triton_two_runs_are_bit_equal():
    args = make(130, 60)
    for a, b in zip(run("triton", *args), run("triton", *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    x, r, w = (t.requires_grad_() for t in make(5, 17)[:3])
    torch.library.opcheck(rms_norm_op, (x, r if residual else None, w, 1e-5))


# ---- reference ---------------------------------------------------------------------------------


def test_reference_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, _, w, _, _ = make(9, 33, dtype=dtype)
        norm = LlamaRMSNorm(33, eps=1e-5).to(DEVICE, dtype)
        norm.weight.data.copy_(w)
        with backend("reference"):
            assert torch.equal(rms_norm(x, w), norm(x))


def test_reference_gradcheck():
    x, residual, w, _, _ = (t.double().requires_grad_() for t in make(2, 3, 4))
    with backend("reference"):
        assert gradcheck(add_rms_norm, (x, residual, w))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change",
    [
        ("residual", {"residual": torch.zeros(4, 5)}),
        ("residual", {"residual": torch.zeros(6)}),
        ("residual", {"residual": torch.zeros(4, 6).double()}),
        ("residual", {"residual": torch.zeros(4, 6, device="meta")}),
        ("w", {"w": torch.zeros(5)}),
        ("w", {"w": torch.zeros(1, 6)}),
        ("w", {"w": torch.zeros(6, device="meta")}),
        ("x", {"x": torch.zeros(()), "residual": torch.zeros(())}),
        ("x", {x: torch.zeros(4, 6).to(torch.float8_e4m3fn) for x in ("x", "residual")}),
        ("eps", {"eps": None}),
        ("x", {"x": torch.zeros(4, 6).long(), "residual": torch.zeros(4, 6).long()}),
    ],
)
def test_errors(name, change):
    good = {"x": torch.zeros(4, 6), "residual": torch.zeros(4, 6), "w": torch.zeros(6)}
    add_rms_norm(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        add_rms_norm(**(good | change))
