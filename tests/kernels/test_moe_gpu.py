"""expert_mlp on a GPU: the released widths, CUDA graphs, host syncs, more than 2^31 elements."""

import pytest
import torch

from kimi_kernels import expert_mlp, fused_linears, route
from kimi_kernels.moe import grouped_gemm, weights_gluon
from kimi_kernels.moe.grouped_gemm import ROW_TILES, weights_product
from kimi_kernels.moe.plan_triton import plan_slots
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches
from tests.kernels.test_moe import NAMES
from tests.kernels.test_moe_triton import by_counts, check, draw, make, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("much_memory")]
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
E, D, F, k = 256, 2304, 1024, 8  # released
HAS_ROOM = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 1e11
E_TRAINED = E if HAS_ROOM else 64  # weights and gradients in fp64 take 60 GB


@pytest.fixture
def poison_empty():
    """Not here: it would double what the tests below write."""


@pytest.mark.parametrize("T", [1, 5, 8, 9, 32])
@each_dtype
def test_decoding_at_released_widths(T, dtype):
    check(make(T, E, D, F, k, dtype), gradients=False)


@pytest.mark.parametrize("T", [1, 8, 48])
def test_a_chain_of_layers_that_begin_early(T):
    """Twenty of one layer's experts, each time chosen anew by what the time before has given."""

    def weights(*shape):
        return torch.randn(shape, device=DEVICE).bfloat16() / shape[-1] ** 0.5

    routers, bias = weights(20, 16, D), torch.zeros(16, device=DEVICE)
    gate_up, down = weights(16, 2 * F, D), weights(16, D, F)
    shared = weights(F, D), weights(F, D), weights(D, F)
    norm = torch.ones(D, device=DEVICE).bfloat16(), 1e-5

    def chain(x):
        for w in routers:
            (logits,) = fused_linears([x], [w], torch.float32, norm=norm)
            scores, index = route(logits, bias, k)
            x = expert_mlp(x, gate_up, down, index, scores, shared, norm)
        return x

    check_early_launches(chain, torch.randn(T, D, device=DEVICE).bfloat16())


@pytest.mark.parametrize("T", [1, 32, 500, 1500])
@each_dtype
def test_released_widths(T, dtype):
    check(make(T, E_TRAINED, D, F, k, dtype))


@pytest.mark.parametrize("last", [E_TRAINED, 40, 8])
def test_prefill_at_released_widths(last):
    """8192 tokens over all experts, over some, and all of them over the same eight."""
    check(make(8192, E_TRAINED, D, F, k, torch.bfloat16, draw(8192, last, k)))


def test_prefill_of_one_rank():
    """An eighth of the experts is here."""
    check(make(8192, 32, D, F, k, torch.bfloat16, draw(8192, 256, k)))


@pytest.mark.parametrize("tile", [t for _, t in ROW_TILES], ids=lambda t: f"{t.BM}x{t.BN}")
@pytest.mark.parametrize("sizes", [(384, 256), (130, 70), (65, 33)], ids=str)
def test_every_tile_of_16_bits(tile, sizes, monkeypatch):
    """In fp16 and bf16, and the tiles of neither weights nor rows read what is not theirs."""
    monkeypatch.setattr(grouped_gemm, "ROW_TILES", [(float("inf"), tile)])
    for dtype in (torch.float16, torch.bfloat16):
        check(make(300, 5, *sizes, 2, dtype, draw(300, 4, 2)))  # the fifth gets no token


@pytest.mark.parametrize("form", ["gluon", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, N", [(128, 256), (2304, 1024), (2048, 2304)])
def test_sums_over_rows(M, N, dtype, form, monkeypatch):
    """Both forms, of experts with no row, one, some steps of 64, and one more; gathered or not."""
    if form == "triton":
        monkeypatch.setattr(weights_gluon, "takes", lambda *args: False)
    counts = [0, 1, 63, 64, 65, 0, 128, 0, 300, 7, 0]
    index = by_counts(counts).view(-1, 2)  # two slots of each token
    plan = plan_slots(index.to(DEVICE), len(counts), 128)
    S, slots = index.numel(), plan.order.long()
    for gather_a, gather_b in ((0, 0), (2, 0), (0, 2)):
        a, b = (
            torch.randn(S // gather if gather else S, n, device=DEVICE, dtype=dtype)
            for n, gather in ((M, gather_a), (N, gather_b))
        )
        got = weights_product(a, b, len(counts), plan, gather_a=gather_a, gather_b=gather_b)
        rows = (a[slots // 2] if gather_a else a), (b[slots // 2] if gather_b else b)
        for e, (x, y) in enumerate(zip(*(r.split(counts) for r in rows), strict=True)):
            assert_as_good_as(f"{e}", got[e], x.mT @ y, x.double().mT @ y.double(), dtype)
        again = weights_product(a, b, len(counts), plan, gather_a=gather_a, gather_b=gather_b)
        assert torch.equal(got, again)


@pytest.mark.parametrize("T", [3, 40, 500])
def test_no_host_sync_and_cuda_graph(T):
    """Routing and experts, forward and backward; replayed with other tokens to other experts."""
    x, gate_up, down, _, _ = make(T, 64, 256, 128, k, torch.bfloat16)
    logits, dy = torch.randn(T, 64, device=DEVICE), torch.randn_like(x)

    def step(grad):
        weights, index = route(logits, logits.new_zeros(64), k)
        return run("triton", (x, gate_up, down, index, weights), dy if grad else None)

    for grad in (True, False):
        step(grad)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(grad)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            logits.copy_(torch.randn_like(logits))
            want = step(grad)
            for t in got:
                t.fill_(torch.nan)
            graph.replay()
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("T", [1, 32, 500, 8192])
def test_runs_are_bit_equal(T):
    args = make(T, 64, 512, 256, k, torch.bfloat16)
    dy = torch.randn_like(args[0])
    for up in (dy, None):
        want = run("triton", args, up)
        for _ in range(3):
            for a, b in zip(run("triton", args, up), want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(2304, 64), (64, 1152)], ids=str)
def test_more_elements_than_2_to_31(sizes):
    """Slots x D, or slots x 2F: the last tokens as alone, and weights as the sum of two halves."""
    T, n = 120_000, 2000
    x, gate_up, down, index, weights = make(T, 16, *sizes, k, torch.bfloat16)
    dy = torch.randn_like(x)

    def part(rows):
        return run("triton", (x[rows], gate_up, down, index[rows], weights[rows]), dy[rows])

    got, tail = part(slice(None)), part(slice(T - n, T))
    for name, i in (("y", 0), ("dx", 1), ("dweights", 4)):
        assert_as_good_as(name, got[i][-n:], tail[i], tail[i].double())
    halves = part(slice(0, T // 2)), part(slice(T // 2, T))
    for i in (2, 3):
        want = halves[0][i].double() + halves[1][i].double()
        assert_as_good_as(NAMES[i], got[i], want.to(got[i].dtype), want)


def test_more_weights_than_2_to_31():
    """The last of 300 experts, and the gradients of its weights."""
    args = make(70, 300, 2304, 1600, 2, torch.bfloat16, 298 + draw(70, 2, 2))
    x, gate_up, down, index, weights = args
    dy = torch.randn_like(x)
    got = run("triton", args, dy)
    few = run("triton", (x, gate_up[298:], down[298:], index - 298, weights), dy)
    for name, a, b in zip(NAMES, got, few, strict=True):
        a = a[298:] if a.ndim == 3 else a
        assert_as_good_as(name, a, b, b.double())
    assert not got[2][:298].any() and not got[3][:298].any()
    for a, b in zip(run("triton", args), few, strict=False):  # and decoding
        assert_as_good_as("y", a, b, b.double())
    one = run("triton", (x[:9], gate_up, down, index[:9], weights[:9]))[0]
    assert_as_good_as("y", one, few[0][:9], few[0][:9].double())
