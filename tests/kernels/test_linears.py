"""fused_linears: the one launch for a few rows against torch's linear layers."""

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import backend, fused_linears
from kimi_kernels.linears import MOST_ROWS
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as

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


def test_runs_are_bit_equal_and_rows_do_not_matter_to_each_other():
    xs, weights = make((4,), 300, (64, 30), torch.float32)
    got, again = check(xs, weights), check(xs, weights)
    some = check([x[1:3] for x in xs], weights)
    for y, z, part in zip(got, again, some, strict=True):
        assert torch.equal(y, z) and torch.equal(y[1:3], part)


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
    ],
)
def test_errors(change, message):
    given = {"xs": [torch.zeros(2, 4)] * 2, "weights": [torch.zeros(3, 4)] * 2} | change
    with pytest.raises(ValueError, match=message):
        fused_linears(given["xs"], given["weights"])


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
