"""The Triton route against the reference and its fp64 run."""

import pytest
import torch

from kimi_kernels import backend, route
from kimi_kernels.moe.routing_triton import route_backward_op, route_op
from tests.helpers import DEVICE, assert_as_good_as

# the interpreter's exponential of a large negative number
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
SHAPES = [  # T, E, top_k, n_group, topk_group
    (20, 16, 4, 1, 1),
    (9, 8, 8, 1, 1),
    (4, 256, 8, 1, 1),
    (3, 7, 3, 1, 1),
    (3, 1, 1, 1, 1),
    (4, 1000, 32, 1, 1),
    (20, 16, 4, 4, 2),
    (9, 12, 3, 3, 1),
    (9, 12, 5, 2, 2),
    (4, 256, 8, 8, 4),
    (3, 96, 32, 4, 3),
]


def make(T, E, dtype=torch.float32):
    return torch.randn(T, E, device=DEVICE, dtype=dtype), torch.randn(E, device=DEVICE) / 4


def run(name, logits, bias, top_k, n_group=1, topk_group=1, up=None, **options):
    """Weights, indexes, and with a gradient of the weights by expert that of the logits."""
    leaf = logits.detach().clone().requires_grad_(up is not None)
    groups = {"n_group": n_group, "topk_group": topk_group}
    with backend(name):
        weights, index = route(leaf, bias, top_k, **groups, **options)
        if up is None:
            return weights, index
        return weights.detach(), index, torch.autograd.grad(weights, leaf, up.gather(1, index))[0]


def by_expert(weights, index, E):
    return weights.new_zeros(len(index), E).scatter(1, index, weights)


def check_choice(logits, bias, index, want):
    """The same scores were chosen: another expert only where it scores the same to the bit."""
    biased = logits.sigmoid() + bias
    got, want = (biased.gather(1, i).sort(1).values for i in (index, want))
    assert torch.equal(got, want)
    assert all(len(set(row)) == len(row) for row in index.tolist())


def check(T, E, top_k, n_group=1, topk_group=1, **options):
    logits, bias = make(T, E)
    up = torch.randn(T, E, device=DEVICE)
    args = (top_k, n_group, topk_group)
    got, ref = (run(n, logits, bias, *args, up, **options) for n in ("triton", "reference"))
    gold = run("reference", logits.double(), bias.double(), *args, up.double(), **options)
    assert got[1].dtype == torch.int64 and got[0].shape == got[1].shape == (T, top_k)
    check_choice(logits, bias, got[1], ref[1])
    a, b, c = (by_expert(x[0], x[1], E) for x in (got, ref, gold))
    assert_as_good_as("weights", a, b, c)
    assert_as_good_as("dlogits", got[2], ref[2], gold[2])


@pytest.mark.parametrize("renormalize, scale", [(True, 2.446), (False, 1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(shape, renormalize, scale):
    check(*shape, renormalize=renormalize, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(8192, 256, 8, 1, 1), (8192, 256, 8, 8, 4), (1000, 128, 6, 1, 1)], ids=str
)
def test_route_of_many(shape):
    check(*shape, scale=2.446)


def test_best_first_and_the_lowest_index_of_equals():
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 0, -1, 2]], device=DEVICE)
    index = run("triton", logits, torch.zeros(8, device=DEVICE), 6)[1]
    assert index.tolist() == [[1, 3, 7, 2, 4, 0]]
    equal = torch.zeros(2, 12, device=DEVICE)
    index = run("triton", equal, torch.zeros(12, device=DEVICE), 5, 4, 2)[1]
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 2  # groups 0 and 1 of 3 experts


def test_biased_scores_below_zero():
    logits, bias = make(9, 12)
    index = run("triton", logits, bias - 10, 3, 3, 1)[1]
    check_choice(logits, bias - 10, index, run("reference", logits, bias - 10, 3, 3, 1)[1])


def test_an_expert_biased_by_minus_infinity_is_the_last_choice():
    logits, bias = make(5, 8)
    bias[2] = -torch.inf
    assert not (run("triton", logits, bias, 7)[1] == 2).any()
    assert (run("triton", logits, bias, 8)[1] == 2).any(1).all()


def test_extreme_logits():
    """Scores that underflow or saturate: finite weights and gradients, and equals in order."""
    logits = torch.full((3, 8), -1000.0, device=DEVICE)
    logits[1], logits[2, :4] = 1000.0, torch.inf
    up = torch.randn(3, 8, device=DEVICE)
    weights, index, dlogits = run("triton", logits, torch.zeros(8, device=DEVICE), 3, up=up)
    assert torch.isfinite(weights).all() and torch.isfinite(dlogits).all()
    assert index.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("value", [torch.nan, -torch.nan])
def test_nan_gives_different_experts_that_exist(value):
    """A model that diverged must not make the next kernel read outside its memory."""
    logits, bias = make(4, 7)
    logits[0, 3], logits[1] = value, value
    logits[2, :3] = value
    for groups in ((), (7, 1, 1)):
        index = run("triton", logits, bias, 5, *groups[1:])[1]
        assert (index >= 0).all() and (index < 7).all()
        assert all(len(set(row)) == 5 for row in index.tolist())


@pytest.mark.parametrize("groups", [(), (4, 2)])
def test_without_tokens(groups):
    logits, bias = make(0, 8)
    weights, index, dlogits = run("triton", logits, bias, 2, *groups, up=logits)
    assert weights.shape == index.shape == (0, 2) and dlogits.shape == (0, 8)


def test_nothing_is_modified_runs_are_bit_equal_and_strides_do_not_matter():
    logits, bias = make(9, 12)
    up = torch.randn(9, 12, device=DEVICE)
    before = logits.clone(), bias.clone()
    want = run("triton", logits, bias, 4, 3, 2, up)
    views = logits.mT.contiguous().mT, torch.stack((bias, bias), 1)[:, 0]
    for args in ((logits, bias), views):
        for a, b in zip(run("triton", *args, 4, 3, 2, up), want, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(logits, before[0]) and torch.equal(bias, before[1])


def test_a_token_does_not_see_the_others():
    logits, bias = make(9, 12)
    want = run("triton", logits, bias, 4)
    for a, b in zip(run("triton", logits[3:5], bias, 4), want, strict=True):
        assert torch.equal(a, b[3:5])


def test_bias_has_no_gradient():
    logits, bias = make(3, 8)
    bias.requires_grad_()
    with backend("triton"):
        weights, index = route(logits.requires_grad_(), bias, 2)
    weights.sum().backward()
    assert bias.grad is None and logits.grad is not None and not index.requires_grad
    with backend("triton"):
        assert not route(logits.detach(), bias, 2)[0].requires_grad


# ---- operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_opcheck(groups):
    logits, bias = make(5, 12)
    args = (logits.requires_grad_(), bias, 3, *groups, True, 2.446)
    torch.library.opcheck(route_op, args)
    index = torch.stack([torch.randperm(12)[:3] for _ in range(5)]).to(DEVICE)
    up = torch.randn(5, 3, device=DEVICE)
    torch.library.opcheck(route_backward_op, (logits.detach(), index, up, True, 2.446))


def choose(logits, bias):
    return route(logits, bias, 3, scale=2.446)[0]


def check_compiled(compiler):
    torch.compiler.reset()
    logits, bias = make(5, 12)
    leaf, up = logits.requires_grad_(), torch.randn(5, 3, device=DEVICE)
    with backend("triton"):
        compiled = torch.compile(choose, fullgraph=True, backend=compiler)
        got, want = ((w, torch.autograd.grad(w, leaf, up)[0]) for w in (
            compiled(leaf, bias), choose(leaf, bias)
        ))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class TestCompile:
    @pytest.fixture
    def poison_empty(self):
        """Not here: the compiler would trace it."""

    def test_compile(self):
        check_compiled("aot_eager")

    @pytest.mark.gpu
    def test_compile_with_inductor(self):
        check_compiled("inductor")


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graph_without_a_host_sync():
    logits, bias = make(70, 256)
    up = torch.randn(70, 8, device=DEVICE)

    def step():
        weights, index = run("triton", logits, bias, 8)
        return weights, index, route_backward_op(logits, index, up, True, 1.0)

    want = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.zero_()
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_elements_than_2_to_31():
    logits, bias = make(2**23 + 100, 256)
    weights, index = run("triton", logits, bias, 8)
    tail = run("triton", logits[-100:], bias, 8)
    assert torch.equal(weights[-100:], tail[0]) and torch.equal(index[-100:], tail[1])
    up = torch.randn_like(weights)
    got = route_backward_op(logits, index, up, True, 1.0)[-100:]
    assert torch.equal(got, route_backward_op(logits[-100:], index[-100:], up[-100:], True, 1.0))
