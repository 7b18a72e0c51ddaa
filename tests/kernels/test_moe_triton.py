"""The Triton expert_mlp, forward and backward, against the reference and its fp64 run."""

import pytest
import torch

from kimi_kernels import backend, expert_mlp
from kimi_kernels.dispatch import Limits
from kimi_kernels.moe import decode_triton, experts_bwd_triton, experts_triton, grouped_gemm
from kimi_kernels.moe.autograd import expert_mlp_backward_op, expert_mlp_op
from kimi_kernels.moe.experts_triton import expert_mlp_fwd
from kimi_kernels.moe.grouped_gemm import ROW_TILES, Tile, row_tile
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.kernels.test_moe import INDEXES, NAMES

# the interpreter's sigmoid of a large negative number
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def draw(T, E, k):
    """Different experts for each token, [T, k]."""
    return torch.rand(T, E).topk(k, 1).indices


def make(T, E, D=24, F=8, k=2, dtype=torch.float32, index=None):
    """x, gate_up, down, index, weights; the products have about the variance of x."""
    index = draw(T, E, k) if index is None else index
    x, gate_up, down = (
        torch.randn(*shape, device=DEVICE, dtype=dtype) * std
        for *shape, std in ((T, D, 1.0), (E, 2 * F, D, D**-0.5), (E, D, F, F**-0.5))
    )
    return x, gate_up, down, index.to(DEVICE), torch.rand(index.shape, device=DEVICE)


def run(name, args, dy=None):
    """y, and with a gradient of it those of x, gate_up, down and weights."""
    x, gate_up, down, index, weights = args
    leaves = [t.detach().clone() for t in (x, gate_up, down, weights)]
    if dy is not None:
        leaves = [t.requires_grad_() for t in leaves]
    with backend(name):
        y = expert_mlp(*leaves[:3], index, leaves[3])
        grads = () if dy is None else torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return y.detach(), *grads


def check(args, gradients=True):
    dy = torch.randn_like(args[0]) if gradients else None
    double = [t.double() if t.is_floating_point() else t for t in args]
    got, ref = (run(name, args, dy) for name in ("triton", "reference"))
    gold = run("reference", double, None if dy is None else dy)
    for name, a, b, c in zip(NAMES[: len(got)], got, ref, gold, strict=True):
        assert_as_good_as(name, a, b, c, args[0].dtype)
        assert a.is_contiguous()
    return got


@each_dtype
@pytest.mark.parametrize("T, E, k", [(1, 8, 2), (1, 64, 8), (21, 8, 2), (9, 64, 8), (21, 128, 3)])
def test_experts(T, E, k, dtype):
    check(make(T, E, k=k, dtype=dtype))


@each_dtype
def test_released_number_of_experts(dtype):
    check(make(4, 256, D=20, F=17, k=8, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("D, F", [(1, 1), (16, 32), (65, 3), (130, 129), (7, 70)])
def test_sizes(D, F, dtype):
    check(make(20 if D > 1 else 400, 3, D, F, dtype=dtype))  # 20 numbers are no sample


@pytest.mark.parametrize("name", INDEXES)
def test_uneven_experts(name):
    index = INDEXES[name]
    args = make(len(index), 6, index=index)
    check(args)
    check(args, gradients=False)


@pytest.mark.parametrize("index", [[[-1, 2]], [[5, 2**40], [-(2**40), 6]]], ids=str)
def test_an_index_that_is_no_expert_contributes_nothing(index):
    """Below 0 too, which the reference refuses."""
    index = torch.tensor(index)
    args = make(len(index), 6, index=torch.where((index < 0) | (index > 5), 6, index))
    dy = torch.randn_like(args[0])
    for up in (dy, None):
        got = run("triton", [*args[:3], index.to(DEVICE), args[4]], up)
        for a, b in zip(got, run("triton", args, up), strict=True):
            assert torch.equal(a, b)


@each_dtype
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_have_their_own_dtype(weight_dtype, dtype):
    *args, weights = make(5, 6, dtype=dtype)
    args.append(weights.bfloat16().to(weight_dtype))
    dy = torch.randn_like(args[0])
    *got, dweights = run("triton", args, dy)
    *want, exact = run("triton", [*args[:4], args[4].float()], dy)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert dweights.dtype == weight_dtype
    if weight_dtype == torch.float64 or DEVICE == "cuda":  # the interpreter's bf16 is wrong
        assert torch.equal(dweights, exact.to(weight_dtype))


@each_dtype
def test_the_weighted_sum_is_rounded_once(dtype):
    """Every expert returns exactly 1, so the result is the sum of the weights, exact in fp32."""
    gate_up = torch.tensor([[32.0], [1.0]]).expand(8, 2, 1).to(DEVICE, dtype)  # silu(32) is 32
    down = torch.full((8, 1, 1), 1 / 32, device=DEVICE, dtype=dtype)
    weights = 1 + torch.randint(2**11, (50, 8), device=DEVICE) / 2**11
    args = torch.ones(50, 1, device=DEVICE, dtype=dtype), gate_up, down
    index = torch.arange(8, device=DEVICE).expand(50, 8)
    for T in (2, 50):
        y = run("triton", [args[0][:T], *args[1:], index[:T], weights[:T]])[0]
        assert torch.equal(y[:, 0], weights[:T].sum(1).to(dtype))


@each_dtype
def test_large_values(dtype):
    """Where SiLU is flat or the identity."""
    x, gate_up, down, index, weights = make(9, 4, dtype=dtype)
    x[3], x[4], x[5] = 30 * x[3], 0, 100
    gate_up[1, :8] = gate_up[1, :8].abs() * -20
    check((x, gate_up, down, index, weights))


# ---- tiles -------------------------------------------------------------------------------------

COUNTS = {  # rows per expert
    "small tiles": [15, 16, 17, 0, 31, 32, 33, 1],
    "half tiles": [63, 64, 65, 1],
    "whole tiles": [127, 128, 0, 193],
}


def by_counts(counts):
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return index[torch.randperm(len(index))][:, None]


@pytest.mark.parametrize(
    "tile, name",
    [(t, name) for _, t in ROW_TILES for name in list(COUNTS)[t.BM > 32 :][:2]],
    ids=lambda x: x if isinstance(x, str) else f"{x.BM}x{x.BN}",
)
def test_every_tile(tile, name, monkeypatch):
    """With rows of its edges, and of the edges of the next or the last size."""
    monkeypatch.setattr(grouped_gemm, "ROW_TILES", [(float("inf"), tile)])
    index = by_counts(COUNTS[name])
    check(make(len(index), len(COUNTS[name]), D=68, F=20, dtype=torch.float16, index=index))


@pytest.mark.parametrize("D, F", [(128, 64), (64, 128), (72, 256)])
def test_even_sizes(D, F):
    """Without masks."""
    check(make(40, 3, D, F, dtype=torch.float16))


def test_row_tiles(monkeypatch):
    def tile(S, E, dtype):
        return row_tile(S, E, dtype, torch.device("meta"))

    assert tile(8, 256, torch.bfloat16).BM == 16
    assert tile(65536, 256, torch.bfloat16) == Tile(128, 256, 64, 8, 3)
    assert tile(65536, 256, torch.float32).BM == 64
    assert tile(1 << 40, 1, torch.float16).BM == 128
    monkeypatch.setattr(grouped_gemm, "device_limits", lambda device: Limits(132, 99 * 1024))
    assert tile(65536, 256, torch.bfloat16) == Tile(128, 128, 64, 4, 3)
    assert tile(8, 256, torch.bfloat16).BM == 16


# ---- decoding ----------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """How many calls took the path of few slots."""
    calls = []

    def noted(*args):
        calls.append(args)
        return decode_triton.decode_experts(*args)

    monkeypatch.setattr(experts_triton, "decode_experts", noted)
    return calls


@each_dtype
@pytest.mark.parametrize(
    "T, E, k, D", [(1, 256, 8, 20), (5, 64, 8, 8), (8, 8, 8, 6), (64, 3, 1, 4), (2, 40, 32, 10)]
)
def test_decode(T, E, k, D, dtype, decoded):
    check(make(T, E, D, F=3, k=k, dtype=dtype), gradients=False)
    assert len(decoded) == 1


@each_dtype
@pytest.mark.parametrize("T, D, F", [(3, 1, 1), (3, 3, 9), (3, 300, 70), (1, 20, 1100)])
def test_decode_sizes(T, D, F, dtype, decoded):
    check(make(T, 5, D, F, dtype=dtype), gradients=False)
    assert decoded


@each_dtype
def test_decode_in_steps(dtype, decoded, monkeypatch):
    """Of smaller tiles: several of x, and of h more than one pass of the loop makes."""
    monkeypatch.setattr(decode_triton, "HIDDEN_TILE", (1, 16))
    monkeypatch.setattr(decode_triton, "SUM_TILE", (2, 4))
    check(make(1, 5, 21, 21, dtype=dtype), gradients=False)
    assert decoded


def make_shared(F, dtype=torch.float32, D=24):
    """gate, up and down of a shared expert."""
    shapes = (F, D), (F, D), (D, F)
    return [(torch.randn(*s, device=DEVICE) * s[1] ** -0.5).to(dtype) for s in shapes]


def check_shared(args, shared, dtype=torch.float32, w_norm=None):
    found = []
    for name, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        *floats, index, weights = (t.to(cast) if t.is_floating_point() else t for t in args)
        norm = None if w_norm is None else (w_norm.to(cast), 1e-5)
        with backend(name):
            found.append(expert_mlp(*floats, index, weights, [w.to(cast) for w in shared], norm))
    assert_as_good_as("y", *found, dtype)


@each_dtype
@pytest.mark.parametrize("F_s", [8, 24, 5])
@pytest.mark.parametrize("T, k", [(1, 8), (3, 2), (40, 4)])
@pytest.mark.parametrize("normed", [False, True], ids=["", "norm"])
def test_shared_expert(T, k, F_s, dtype, normed, decoded):
    """In the launches of the others where few tokens have one or several of their width."""
    w_norm = torch.randn(8, device=DEVICE).to(dtype) if normed else None
    check_shared(make(T, 9, D=8, k=k, dtype=dtype), make_shared(F_s, dtype, D=8), dtype, w_norm)
    assert bool(decoded) == (T * k <= 64 and F_s % 8 == 0)


@each_dtype
@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("F, F_s", [(8, 8), (8, 24)])
def test_shared_expert_alone(T, F, F_s, dtype, decoded):
    """A dense layer with its norm: there are no routed experts."""
    x, norm, shared, found = make(T, 2)[0], torch.randn(24), make_shared(F_s), []
    index = torch.zeros(T, 0, dtype=torch.int64, device=DEVICE)
    given = x, x.new_zeros(0, 2 * F, 24), x.new_zeros(0, 24, F), norm.to(DEVICE, dtype), *shared
    for name, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        x, gate_up, down, w_norm, *ws = (t.to(cast) for t in given)
        with backend(name):
            found.append(expert_mlp(x, gate_up, down, index, index.to(cast), ws, (w_norm, 1e-5)))
    assert_as_good_as("y", *found, dtype)
    assert bool(decoded) == (T <= 64)


def test_a_shared_expert_wider_than_what_is_read_ahead(decoded, monkeypatch):
    """The released one is not."""
    monkeypatch.setattr(decode_triton, "HIDDEN_TILE", (1, 2))
    D = 2 * (decode_triton.SHARED_AHEAD.value + 2)
    check_shared(make(2, 3, D=D), make_shared(8, D=D))
    assert decoded


def test_gradients_of_a_shared_expert():
    x, gate_up, down, index, weights = make(6, 9)
    shared, grads = make_shared(8), []
    for name in ("triton", "reference"):
        leaves = [w.clone().requires_grad_() for w in shared]
        with backend(name):
            expert_mlp(x, gate_up, down, index, weights, tuple(leaves)).sum().backward()
        grads.append([w.grad for w in leaves])
    for a, b in zip(*grads, strict=True):
        assert_as_good_as("dw", a, b, b)


def test_decode_of_experts_elsewhere(decoded):
    args = make(3, 6, index=torch.full((3, 2), 6))
    assert not run("triton", args)[0].any() and decoded


def test_more_slots_are_sorted(decoded):
    check(make(9, 16, k=8), gradients=False)
    assert not decoded


def test_gradients_are_never_decoded(decoded):
    check(make(1, 16, k=8))
    assert not decoded


# ---- memory and order --------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 3])
def test_nothing_to_do(T):
    """No tokens, no slots, or experts without a hidden layer."""
    args = make(T, 4)
    dy = torch.randn_like(args[0])
    x, gate_up, down, index, weights = args
    empty = [x, gate_up[:, :0], down[..., :0], index, weights]
    none = [x, gate_up, down, index[:, :0], weights[:, :0]]
    for some in (empty, none, *([args] if T == 0 else [])):
        for up in (None, dy):
            got = run("triton", some, up)
            for a, b in zip(got[1:], (*some[:3], some[4]), strict=False):
                assert a.shape == b.shape
            assert all(not t.any() for t in got)


def test_every_expert_elsewhere_gives_zeros():
    args = make(40, 6, index=torch.full((40, 2), 6))
    for t in run("triton", args, torch.randn_like(args[0])):
        assert not t.any()


def test_experts_without_tokens_have_gradients_of_zero():
    args = make(40, 6, index=torch.tensor([[0, 5]]).expand(40, 2))
    *_, dgate_up, ddown, _ = run("triton", args, torch.randn_like(args[0]))
    assert not dgate_up[1:5].any() and not ddown[1:5].any()
    assert dgate_up[[0, 5]].any() and ddown[[0, 5]].any()


@pytest.mark.parametrize("T", [3, 40])
def test_nothing_is_modified_and_runs_are_bit_equal(T):
    args, dy = make(T, 6), torch.randn(T, 24, device=DEVICE)
    before = [t.clone() for t in (*args, dy)]
    for up in (dy, None):
        for a, b in zip(run("triton", args, up), run("triton", args, up), strict=True):
            assert torch.equal(a, b)
    for a, b in zip((*args, dy), before, strict=True):
        assert torch.equal(a, b)


def test_backward_twice():
    """What was kept for the backward pass is not changed by it."""
    x, gate_up, down, index, weights = make(40, 6)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    with backend("triton"):
        y = expert_mlp(*leaves[:3], index, leaves[3])
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_forward_for_the_backward_has_the_same_bits():
    args = make(40, 6)
    assert torch.equal(run("triton", args, args[0])[0], run("triton", args)[0])


@pytest.mark.parametrize("T", [3, 40])
def test_a_token_does_not_see_the_others(T):
    """To the bit, where they go to the same experts."""
    x, *rest = make(T, 6)
    changed = torch.cat((x[:2], 100 * x[2:].flip(0)))
    a, b = (run("triton", [t, *rest])[0] for t in (x, changed))
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a, b)
    dy = torch.randn_like(x)
    a, b = (run("triton", [x, *rest], up) for up in (dy, torch.cat((dy[:2], -dy[2:]))))
    assert torch.equal(a[1][:2], b[1][:2]) and torch.equal(a[4][:2], b[4][:2])


@pytest.mark.parametrize("T", [3, 40])
def test_non_contiguous(T):
    args = make(T, 6)
    dy = torch.randn_like(args[0])
    views = [t.mT.contiguous().mT for t in args]
    for up, strided in ((dy, dy.mT.contiguous().mT), (None, None)):
        for a, b in zip(run("triton", views, strided), run("triton", args, up), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("i", range(4))
def test_one_gradient_at_a_time(i):
    """Frozen experts cost no product of weights, and no gradient depends on the others."""
    x, gate_up, down, index, weights = make(20, 6)
    dy = torch.randn_like(x)
    want = run("triton", (x, gate_up, down, index, weights), dy)[1 + i]
    given = [x, gate_up, down, weights]
    given[i] = given[i].clone().requires_grad_()
    with backend("triton"):
        expert_mlp(*given[:3], index, given[3]).backward(dy)
    assert torch.equal(given[i].grad, want)
    assert sum(t.grad is not None for t in given) == 1


@pytest.mark.parametrize(
    "needed, rows, sums",
    [
        ((True, True, True, True), 2, 2),
        ((True, False, False, True), 2, 0),
        ((False, False, True, False), 1, 1),
        ((False, False, False, True), 1, 0),
    ],
)
def test_only_the_products_that_are_needed(needed, rows, sums, monkeypatch):
    made = []
    x, gate_up, down, index, weights = make(20, 6)
    _, gu, plan = expert_mlp_fwd(x, gate_up, down, index, weights, save=True)
    for name in ("rows_product", "weights_product"):
        product = getattr(experts_bwd_triton, name)

        def noted(*args, name=name, product=product, **options):
            made.append(name)
            return product(*args, **options)

        monkeypatch.setattr(experts_bwd_triton, name, noted)
    grads = expert_mlp_backward_op(x, gate_up, down, weights, gu, list(plan), x, list(needed))
    assert sorted(made) == ["rows_product"] * rows + ["weights_product"] * sums
    assert [g.numel() > 0 for g in grads] == list(needed)


def test_what_is_kept_for_the_backward():
    """Inputs by reference, gate | up and the plan: nothing of size top_k D."""
    T, E, D, F, k = 40, 6, 300, 4, 2
    args = make(T, E, D, F, k)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    inputs, kept = {t.data_ptr() for t in leaves}, 0

    def pack(t):
        nonlocal kept
        kept += 0 if t.data_ptr() in inputs else t.numel() * t.element_size()
        return t

    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_mlp(*leaves)
    S = T * k
    tiles = experts_triton.plan_slots(
        args[3], E, row_tile(S, E, torch.float32, args[0].device).BM
    ).tiles
    assert kept == 4 * (S * 2 * F + 2 * S + E + 1 + tiles.numel())


# ---- operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("T, k", [(3, 2), (20, 4), (0, 2)])
def test_opcheck(T, k):
    x, gate_up, down, index, weights = make(T, 6, D=8, F=4, k=k)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    torch.library.opcheck(expert_mlp_op, (*leaves[:3], index, leaves[3], True))
    given = [t.detach() for t in leaves]
    torch.library.opcheck(expert_mlp_op, (*given[:3], index, given[3], False))
    _, gu, *plan = expert_mlp_op(*given[:3], index, given[3], True)
    for needed in ([True] * 4, [True, False, False, True]):
        args = (*given, gu, list(plan), torch.randn_like(x), needed)
        torch.library.opcheck(expert_mlp_backward_op, args)


def check_compiled(compiler, T, grad, dtype=torch.float32):
    """One graph, also for another number of tokens."""
    torch.compiler.reset()
    compiled = torch.compile(expert_mlp, fullgraph=True, backend=compiler)
    for n in (T, T + 3):
        x, gate_up, down, index, weights = make(n, 6, dtype=dtype)
        leaves, dy = [x, gate_up, down, weights], torch.randn_like(x)
        if grad:
            leaves = [t.requires_grad_() for t in leaves]
        outs = []
        with backend("triton"):
            for op in (compiled, expert_mlp):
                y = op(*leaves[:3], index, leaves[3])
                outs.append([y.detach(), *(torch.autograd.grad(y, leaves, dy) if grad else ())])
        for a, b in zip(*outs, strict=True):
            assert torch.equal(a, b)


class TestCompile:
    @pytest.fixture
    def poison_empty(self):
        """Not here: the compiler would trace it."""

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("T", [3, 40])
    def test_compile(self, T, grad):
        check_compiled("aot_eager", T, grad)

    @pytest.mark.gpu
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("T", [3, 40])
    @each_dtype
    def test_compile_with_inductor(self, dtype, T, grad):
        check_compiled("inductor", T, grad, dtype)
