"""fused_linears: the one launch for few rows against torch's linear layers."""

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import backend, fused_linears, linears_triton, rms_norm
from kimi_kernels.linears import MOST_ROWS, TILE_ROWS
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches

HALF = [dtype for dtype in KERNEL_DTYPES if dtype != torch.float32]
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
half = pytest.mark.parametrize("dtype", HALF, ids=str)


def make(rows, K, sizes, dtype, shared=True):
    xs = [
        torch.randn(*rows, K, device=DEVICE).to(dtype) for _ in range(1 if shared else len(sizes))
    ]
    weights = [(torch.randn(n, K, device=DEVICE) / max(1, K) ** 0.5).to(dtype) for n in sizes]
    return (xs * len(sizes) if shared else xs), weights


def check(xs, weights, dtype=None, residual=None):
    with backend("triton"):
        got = fused_linears(xs, weights, dtype, residual=residual)
    assert len(got) == len(weights)
    for i, (y, x, w) in enumerate(zip(got, xs, weights, strict=True)):
        ref = F.linear(x, w).to(dtype or x.dtype)
        gold = F.linear(x.double(), w.double())
        if residual is not None:
            ref, gold = residual + ref, residual.double() + gold
        assert_as_good_as(f"y {i}", y, ref, gold, x.dtype if dtype is None else None)
    return got


@each_dtype
@pytest.mark.parametrize(
    "rows", [(1,), (1, 1), (2, 1), (3,), (1, 4), (8,), (2, 4), (16,), (17,), (3, 43)], ids=str
)
@pytest.mark.parametrize("shared", [True, False])
def test_rows(rows, shared, dtype):
    check(*make(rows, 40, (7, 32, 1, 10), dtype, shared))


@each_dtype
@pytest.mark.parametrize("K", [1, 31, 256, 300, 1000])
@pytest.mark.parametrize("sizes", [(1,), (2, 3), (64, 5, 64)], ids=str)
@pytest.mark.parametrize("rows", [2, 8, 40])
def test_sizes(rows, K, sizes, dtype):
    check(*make((rows,), K, sizes, dtype))


@half
def test_fp32_outputs_are_not_rounded(dtype):
    for rows in (1, MOST_ROWS + 1, TILE_ROWS + 1):
        check(*make((rows,), 300, (20, 3), dtype), torch.float32)


@each_dtype
@pytest.mark.parametrize("rows", [(2,), (3,), (2, 4), (17,)], ids=str)
def test_residual_without_a_norm(rows, dtype):
    xs, weights = make(rows, 300, (70,), dtype)
    for out in {dtype, torch.float32}:
        check(xs, weights, out, torch.randn(*rows, 70, device=DEVICE).to(out))


@pytest.mark.parametrize(
    "rows, dtype, normed, one",
    [
        ((2,), torch.float32, True, True),
        ((3,), torch.float32, False, False),
        ((3,), torch.float16, False, True),
        ((3,), torch.float16, True, False),
        ((TILE_ROWS,), torch.float16, False, True),
        ((TILE_ROWS + 1,), torch.float16, False, False),
    ],
)
def test_what_is_one_launch(rows, dtype, normed, one, monkeypatch):
    xs, weights = make(rows, 8, (3, 4), dtype)
    norm, calls, launch = xs[0][0], [], linears_triton.fused_linears_fwd
    monkeypatch.setattr(
        linears_triton, "fused_linears_fwd", lambda *args: calls.append(args) or launch(*args)
    )
    with backend("triton"):
        fused_linears(xs, weights, norm=(norm, 1e-5) if normed else None)
        fused_linears(xs[:1], weights[:1])
    assert len(calls) == one + (rows[0] == 2)


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
@pytest.mark.parametrize(
    "N, rows, BN, AHEAD",
    [(5000, (1, 1), 2, 2), (5000, (2,), 2, 0), (20_000, (1, 1), 4, 0), (20_000, (2,), 2, 0)],
    ids=str,
)
def test_tiles_of_many_outputs(N, rows, BN, AHEAD, dtype, monkeypatch):
    """Of more than run at once, with fewer here: the interpreter would take minutes."""
    picked = linears_triton.pick_tiles(N, 1000, rows[0])
    assert (picked["BN"], picked["AHEAD"]) == (BN, AHEAD)
    monkeypatch.setattr(linears_triton, "pick_tiles", lambda N, K, rows: picked)
    check_block(rows, 1000, 70 + BN // 2, dtype)


@pytest.mark.parametrize(
    "rows, N, BM, BN, stages",
    [
        (8, 8192, 16, 64, 4), (16, 8193, 16, 32, 4), (17, 16896, 32, 64, 6),
        (33, 16897, 64, 64, 4), (TILE_ROWS, 8192, TILE_ROWS, 64, 4),
    ],
)  # fmt: skip
@half
def test_tiles_on_tensor_cores(rows, N, BM, BN, stages, dtype, monkeypatch):
    """Of weights that end within a tile, and tiles for more outputs than are here."""
    picked = linears_triton.pick_tiles(N, 1000, rows)
    assert [picked[x] for x in ("BM", "BN", "num_stages")] == [BM, BN, stages]
    monkeypatch.setattr(linears_triton, "pick_tiles", lambda N, K, rows: picked)
    check(*make((rows,), 1000, (70, BN, 1, 0, BN + 1), dtype))


@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (8, torch.float16)], ids=str)
def test_runs_are_bit_equal_and_rows_do_not_matter_to_each_other(rows, dtype):
    xs, weights = make((2 * rows,), 300, (64, 30), dtype)
    xs = [x[:rows] for x in xs]
    got, again = check(xs, weights), check(xs, weights)
    some = check([x[rows // 2 :] for x in xs], weights)
    for y, z, part in zip(got, again, some, strict=True):
        assert torch.equal(y, z) and torch.equal(y[rows // 2 :], part)


@pytest.mark.parametrize("K, sizes", [(0, (3,)), (4, (0,)), (4, (0, 3))])
@pytest.mark.parametrize("rows", [0, 2, 8])
def test_nothing_to_do(rows, K, sizes):
    xs, weights = make((rows,), K, sizes, torch.float16)
    with backend("triton"):
        got = fused_linears(xs, weights)
    for y, n in zip(got, sizes, strict=True):
        assert y.shape == (rows, n) and not (K == 0 and y.any())


@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (8, torch.float16)], ids=str)
def test_strided(rows, dtype):
    xs, weights = make((rows,), 40, (8, 9), dtype, shared=False)
    strided = [torch.stack((t, t), -1)[..., 0] for t in (*xs, *weights)]
    got, want = check(strided[:2], strided[2:]), check(xs, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (8, torch.float16)], ids=str)
def test_gradients_and_fp64_take_the_reference(rows, dtype):
    xs, weights = make((rows,), 8, (3, 4), dtype)
    leaves = [w.requires_grad_() for w in weights]
    with backend("triton"):
        sum(y.sum() for y in fused_linears(xs, leaves)).backward()
    for w in leaves:
        gold = xs[0].double().sum(0).expand_as(w)
        assert_as_good_as("dw", w.grad, gold.to(dtype), gold)
    y, _ = fused_linears([x.double() for x in xs], [w.detach().double() for w in weights])
    assert y.dtype == torch.float64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"xs": []}, "got 0 xs and 2 weights"),
        ({"xs": torch.zeros(2, 2, 4)}, "xs is a tensor, want a list"),
        ({"weights": torch.zeros(2, 3, 4)}, "weights is a tensor, want a list"),
        ({"xs": [torch.zeros(2, 4), torch.zeros(3, 4)]}, r"xs\[1\] has shape \[3, 4\], want"),
        ({"weights": [torch.zeros(3, 4), torch.zeros(4)]}, r"weights\[1\] has shape \[4\]"),
        ({"weights": [torch.zeros(3, 5), torch.zeros(3, 4)]}, r"weights\[0\] has shape \[3, 5\]"),
        ({"weights": [torch.zeros(3, 4).half(), torch.zeros(3, 4)]}, r"weights\[0\] is torch.fl"),
        ({"norm": (torch.zeros(3), 1e-5)}, r"norm\[0\] has shape \[3\], want \[4\]"),
        ({"norm": (torch.zeros(4).half(), 1e-5)}, r"norm\[0\] is torch.float16"),
        ({"norm": torch.zeros(2, 4)}, "norm has other parts"),
        ({"norm": (torch.zeros(4),)}, "norm has other parts"),
        ({"norm": (torch.zeros(4), torch.zeros(()))}, r"norm\[1\] is tensor.*, want a number"),
        ({"dtype": torch.int32}, r"dtype is torch\.int32"),
        ({"xs": [torch.zeros(())] * 2}, r"xs\[0\] has no dimensions"),
        (
            {"xs": [torch.zeros(2, 4).int()] * 2, "weights": [torch.zeros(3, 4).int()] * 2},
            r"xs\[0\] is torch\.int32",
        ),
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
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 17, 48, 100, TILE_ROWS])
@pytest.mark.parametrize("sizes", [(4096, 4096, 4096, 128, 32, 128), (163840,)], ids=str)
@each_dtype
def test_released_sizes(rows, sizes, dtype):
    check(*make((rows, 1), 2304, sizes, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("K", [4096, 9216])
@each_dtype
def test_released_sizes_with_a_residual(rows, K, dtype):
    residual = torch.randn(rows, 1, 2304, device=DEVICE).to(dtype)
    check(*make((rows, 1), K, (2304,), dtype), residual=residual)


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


@pytest.mark.gpu
@pytest.mark.parametrize("D, F", [(64, 48), (2304, 9216)])
@pytest.mark.parametrize("rows", [8, 48, 100])
def test_a_chain_of_tiles_that_begin_early(rows, D, F):
    """The same of more rows, with two products in a launch and nothing between the launches."""
    up, down = (
        torch.randn(20, 2, *shape, device=DEVICE).bfloat16() / shape[1] ** 0.5
        for shape in ((F, D), (D, F))
    )
    x = torch.randn(2, rows, D, device=DEVICE).bfloat16()

    def chain(y):
        ys = y.unbind()
        for w_up, w_down in zip(up, down, strict=True):
            ys = fused_linears(fused_linears(ys, w_up.unbind()), w_down.unbind())
        return torch.stack(ys)

    check_early_launches(chain, x)
