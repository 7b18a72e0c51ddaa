"""gated_rms_norm: Triton against the PyTorch reference, and the reference against its formula.

On a CPU the kernels run in Triton's interpreter, without bf16: it truncates casts to it.
"""

import pytest
import torch
from torch.autograd import gradcheck

from kimi_kernels import backend, gated_rms_norm
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
NAMES = ("o", "dx", "dg", "dw")


def make(*shape, dtype=torch.float32, w_dtype=None):
    """x, g, w and the upstream gradient."""
    x, g, do = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    return x, g, torch.rand(shape[-1], device=DEVICE).to(w_dtype or dtype), do


def run(name, x, g, w, do, eps=1e-5):
    """o and the gradients of x, g and w; strides are kept."""
    leaves = [t.detach().requires_grad_() for t in (x, g, w)]
    with backend(name):
        o = gated_rms_norm(*leaves, eps)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def formula(x, g, w, do, eps=1e-5):
    """The docstring's equations, forward and backward, in fp64."""
    x, g, w, do = (t.double() for t in (x, g, w, do))
    r = (x.square().mean(-1, keepdim=True) + eps) ** -0.5
    xh, s = x * r, 1 / (1 + torch.exp(-g))
    a = do * s * w
    dx = r * (a - xh * (a * xh).mean(-1, keepdim=True))
    dw = (do * xh * s).reshape(-1, w.numel()).sum(0)
    return xh * w * s, dx, do * xh * w * s * (1 - s), dw


def check(args, **options):
    got, ref = run("triton", *args, **options), run("reference", *args, **options)
    gold = formula(*args, **options)
    for name, a, b, c, leaf in zip(NAMES, got, ref, gold, (args[0], *args[:3]), strict=True):
        assert a.dtype == leaf.dtype, name
        assert_as_good_as(name, a, b, c)


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 128), (15, 128), (16, 64), (63, 128), (130, 60), (5, 1), (17, 3), (2, 7, 3, 32), (4, 256)],
)
def test_triton(shape, dtype):
    check(make(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 3, 32)])
def test_triton_without_rows(shape):
    x, g, w, do = make(*shape)
    for name, a, b in zip(
        NAMES, run("triton", x, g, w, do), run("reference", x, g, w, do), strict=True
    ):
        assert a.shape == b.shape and not a.any(), name


def test_triton_of_a_single_vector():
    x, g, w, do = (t.view(-1) for t in make(1, 60))
    check((x, g, w, do))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_triton_eps(eps):
    check(make(20, 60), eps=eps)


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_dtype
def test_triton_weight_dtype(dtype, w_dtype):
    check(make(30, 60, dtype=dtype, w_dtype=w_dtype))


def test_triton_zeros_and_large_values():
    x, g, w, do = make(20, 60)
    x[3], x[4], g[5], g[6], do[7] = 0, 1e15, 80, -80, 0
    check((x, g, w, do))


@each_dtype
def test_triton_non_contiguous(dtype):
    x, g, w, do = make(6, 5, 40, dtype=dtype)
    swapped = [t.transpose(0, 1) for t in (x, g)]
    check((*swapped, w, do.transpose(0, 1)))
    every_second = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, g)]
    check((*every_second, w, do))
    check((x, g, w, torch.ones(1, 1, 1, device=DEVICE, dtype=dtype).expand_as(x)))


def test_triton_non_contiguous_weight():
    x, g, _, do = make(6, 40)
    check((x, g, torch.rand(80, device=DEVICE)[::2], do))
    check((x, g, torch.rand(1, device=DEVICE).expand(40), do))


def test_triton_two_runs_are_bit_equal():
    args = make(130, 60)
    for a, b in zip(run("triton", *args), run("triton", *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_inputs_are_not_modified(name):
    args = make(20, 60)
    before = [t.clone() for t in args]
    run(name, *args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_rows_are_independent(name):
    x, g, w, do = make(40, 60)
    for i, a, b in zip(
        range(3), run(name, x, g, w, do), run(name, x[7:8], g[7:8], w, do[7:8]), strict=False
    ):
        assert_as_good_as(NAMES[i], a[7:8], b, b.double())


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_reference(dtype):
    args = make(9, 4, 33, dtype=dtype)
    got, gold = run("reference", *args), formula(*args)
    for name, a, b in zip(NAMES, got, gold, strict=True):
        assert_as_good_as(name, a, b.to(dtype), b)


def test_reference_gradcheck():
    x, g, w, _ = (t.double().requires_grad_() for t in make(2, 3, 4))
    with backend("reference"):
        assert gradcheck(gated_rms_norm, (x, g, w))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change",
    [
        ("g", {"g": torch.zeros(4, 5)}),
        ("g", {"g": torch.zeros(6)}),
        ("g", {"g": torch.zeros(1, 6)}),
        ("g", {"g": torch.zeros(4, 6).double()}),
        ("g", {"g": torch.zeros(4, 6, device="meta")}),
        ("w", {"w": torch.zeros(5)}),
        ("w", {"w": torch.zeros(1, 6)}),
        ("w", {"w": torch.zeros(1)}),
        ("w", {"w": torch.zeros(6, device="meta")}),
        ("x", {"x": torch.zeros(()), "g": torch.zeros(())}),
        ("eps", {"eps": None}),
        ("x", {"x": torch.zeros(4, 6).long(), "g": torch.zeros(4, 6).long()}),
    ],
)
def test_errors(name, change):
    good = {"x": torch.zeros(4, 6), "g": torch.zeros(4, 6), "w": torch.zeros(6)}
    gated_rms_norm(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        gated_rms_norm(**(good | change))
