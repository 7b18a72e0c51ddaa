"""fused_linears: the one launch for a few rows against torch's linear layers."""

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import backend, fused_linears, linears_triton, rms_norm
from kimi_kernels.linears import MOST_ROWS
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def make(rows, K, sizes, dtype, shared=True):
    xs = [
        torch.randn(*rows, K, device=DEVICE).to(dtype) for _ in range(1 if shared else len(sizes))
    ]
    weights = [(torch.randn(n, K, device=DEVICE) / max(1, K) ** 0.5).to(dtype) for n in sizes]
    return (xs * len(sizes) if shared else xs), weights


def check(xs, weights, dtype=None):
    with backend("triton"):
        got = fused_linears(xs, weights, dtype)
    assert len(got) == len(weights)
    for i, (y, x, w) in enumerate(zip(got, xs, weights, strict=True)):
        ref = F.linear(x, w).to(dtype or x.dtype)
        gold = F.linear(x.double(), w.double())
        assert_as_good_as(f"y {i}", y, ref, gold, x.dtype if dtype is None else None)
    return got


@each_dtype
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (3,), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_rows(rows, shared, dtype):
    check(*make(rows, 40, (7, 32, 1, 10), dtype, shared))


@each_dtype
@pytest.mark.parametrize("K", [1, 31, 256, 300, 1000])
@pytest.mark.parametrize("sizes", [(1,), (2, 3), (64, 5, 64)], ids=str)
def test_sizes(K, sizes, dtype):
    check(*make((2,), K, sizes, dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16][: len(KERNEL_DTYPES) - 1], ids=str
)
def test_fp32_outputs_are_not_rounded(dtype):
    for rows in (1, MOST_ROWS + 1):
        check(*make((rows,), 300, (20, 3), dtype), torch.float32)


def check_block(rows, K, N, dtype):
    """A layer with a norm before it, with and without a residual."""
    (x,), (w,) = make(rows, K, (N,), dtype)
    x, norm = 3 * x, torch.randn(K, device=DEVICE).to(dtype)
    residual = torch.randn(*rows, N, device=DEVICE).to(dtype)

    def block(x, w, norm, residual):
        return residual + F.linear(rms_norm(x, norm, 1e-5), w)

    with backend("triton"):
        (got,) = fused_linears([x], [w], norm=(norm, 1e-5), residual=residual)
        (plain,) = fused_linears([x], [w], norm=(norm, 1e-5))
    with backend("reference"):
        ref = block(x, w, norm, residual)
        gold = block(*(t.double() for t in (x, w, norm, residual)))
    assert_as_good_as("y", got, ref, gold)
    assert_as_good_as("without the residual", plain, ref - residual, gold - residual.double())


@each_dtype
@pytest.mark.parametrize("rows", [(1, 1), (2,), (3,)], ids=str)
@pytest.mark.parametrize(
    "K, N", [(40, 7), (300, 64), pytest.param(1000, 5000, marks=pytest.mark.gpu)]
)
def test_norm_and_residual(rows, K, N, dtype):
    check_block(rows, K, N, dtype)


@each_dtype
@pytest.mark.parametrize("rows, BN, AHEAD", [((1, 1), 4, 8), ((2,), 2, 0)], ids=str)
def test_tiles_of_many_outputs(rows, BN, AHEAD, dtype, monkeypatch):
    """Of more than 4096, with fewer here: the interpreter would take minutes."""
    picked = linears_triton.pick_tiles(5000, 1000, rows[0])
    assert (picked["BN"], picked["AHEAD"]) == (BN, AHEAD)
    monkeypatch.setattr(linears_triton, "pick_tiles", lambda N, K, rows: picked)
    check_block(rows, 1000, 70 + BN // 2, dtype)


def test_runs_are_bit_equal_and_rows_do_not_matter_to_each_other():
    xs, weights = make((4,), 300, (64, 30), torch.float32)
    xs = [x[:2] for x in xs]
    got, again = check(xs, weights), check(xs, weights)
    some = check([x[1:2] for x in xs], weights)
    for y, z, part in zip(got, again, some, strict=True):
        assert torch.equal(y, z) and torch.equal(y[1:2], part)


@pytest.mark.parametrize("rows, K, sizes", [((0,), 4, (3,)), ((2,), 0, (3,)), ((2,), 4, (0, 3))])
def test_nothing_to_do(rows, K, sizes):
    xs, weights = make(rows, K, sizes, torch.float32)
    for y, n in zip(fused_linears(xs, weights), sizes, strict=True):
        assert y.shape == (*rows, n) and not (K == 0 and y.any())


def test_strided():
    xs, weights = make((2,), 40, (8, 9), torch.float32, shared=False)
    strided = [torch.stack((t, t), -1)[..., 0] for t in (*xs, *weights)]
    got, want = check(strided[:2], strided[2:]), check(xs, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_and_fp64_take_the_reference():
    xs, weights = make((2,), 8, (3, 4), torch.float32)
    leaves = [w.requires_grad_() for w in weights]
    with backend("triton"):
        sum(y.sum() for y in fused_linears(xs, leaves)).backward()
    assert all(torch.allclose(w.grad, xs[0].sum(0).expand_as(w)) for w in leaves)
    y, _ = fused_linears([x.double() for x in xs], [w.detach().double() for w in weights])
    assert y.dtype == torch.float64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"xs": []}, "got 0 xs and 2 weights"),
        ({"xs": [torch.zeros(2, 4), torch.zeros(3, 4)]}, r"xs\[1\] has shape \[3, 4\], want"),
        ({"weights": [torch.zeros(3, 4), torch.zeros(4)]}, r"weights\[1\] has shape \[4\]"),
        ({"weights": [torch.zeros(3, 5), torch.zeros(3, 4)]}, r"weights\[0\] has shape \[3, 5\]"),
        ({"weights": [torch.zeros(3, 4).half(), torch.zeros(3, 4)]}, r"weights\[0\] is torch.fl"),
        ({"norm": (torch.zeros(3), 1e-5)}, r"norm\[0\] has shape \[3\], want \[4\]"),
        ({"norm": (torch.zeros(4).half(), 1e-5)}, r"norm\[0\] is torch.float16"),
        ({"residual": torch.zeros(2, 3)}, "residual goes with one weight, got 2"),
        (
            {"xs": [torch.zeros(2, 4)], "weights": [torch.zeros(3, 4)]}
            | {"residual": torch.zeros(2, 4)},
            r"residual has shape \[2, 4\], want \[2, 3\]",
        ),
    ],
)
def test_errors(change, message):
    given = {"xs": [torch.zeros(2, 4)] * 2, "weights": [torch.zeros(3, 4)] * 2} | change
    with pytest.raises(ValueError, match=message):
        fused_linears(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(4096, 4096, 4096, 128, 32, 128), (163840,)], ids=str)
@each_dtype
def test_released_sizes(rows, sizes, dtype):
    check(*make((rows, 1), 2304, sizes, dtype))


@pytest.mark.gpu
def test_cuda_graph():
    xs, weights = make((1,), 2304, (4096, 128), torch.bfloat16)
    fused_linears(xs, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fused_linears(xs, weights)
    xs[0].normal_()
    graph.replay()
    for a, b in zip(got, fused_linears(xs, weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F", [(64, 48), (2304, 9216)])
def test_a_chain_of_launches_that_begin_early(D, F):
    """Twenty residual blocks in a CUDA graph, each of which reads what the ones before wrote."""
    norm = torch.randn(D, device=DEVICE).bfloat16()
    up, down = (
        torch.randn(20, *shape, device=DEVICE).bfloat16() / 50 for shape in ((F, D), (D, F))
    )
    x = torch.randn(1, D, device=DEVICE).bfloat16()

    def chain(y):
        for w_up, w_down in zip(up, down, strict=True):
            (h,) = fused_linears([y], [w_up], norm=(norm, 1e-5))
            (y,) = fused_linears([h], [w_down], residual=y)
        return y

    check_early_launches(chain, x)
