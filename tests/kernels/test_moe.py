"""route against a loop over tokens, expert_mlp against all experts on all tokens."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from kimi_kernels import expert_mlp, route
from tests.helpers import assert_as_good_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# ---- routing -----------------------------------------------------------------------------------


def naive_route(logits, bias, top_k, n_group=1, topk_group=1, renormalize=True, scale=1.0):
    """{expert: weight} of every token, in Python floats."""
    E = logits.shape[1]
    size, chosen = E // n_group, []
    for row in logits.tolist():
        score = [1 / (1 + math.exp(-x)) for x in row]
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]

        def best_two(group, biased=biased):
            return sum(sorted(biased[group * size : (group + 1) * size])[-2:])

        groups = sorted(range(n_group), key=best_two, reverse=True)[:topk_group]
        allowed = [e for e in range(E) if n_group == 1 or e // size in groups]
        experts = sorted(allowed, key=lambda e, biased=biased: biased[e], reverse=True)[:top_k]
        total = sum(score[e] for e in experts) + 1e-20 if renormalize else 1.0
        chosen.append({e: scale * score[e] / total for e in experts})
    return chosen


def by_expert(weights, index, E):
    """[T, E]: the weight of every expert, zero where it was not chosen."""
    return torch.zeros(len(index), E, dtype=weights.dtype).scatter(1, index, weights)


def inputs(T=40, E=16, dtype=torch.float64):
    return torch.randn(T, E).to(dtype), torch.randn(E).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 2.446])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "top_k, n_group, topk_group",
    [(1, 1, 1), (4, 1, 1), (16, 1, 1), (4, 4, 2), (3, 2, 1), (8, 8, 4), (4, 4, 1), (5, 4, 4)],
)
def test_route(top_k, n_group, topk_group, renormalize, scale):
    logits, bias = inputs()
    options = {"n_group": n_group, "topk_group": topk_group}
    options |= {"renormalize": renormalize, "scale": scale}
    weights, index = route(logits, bias, top_k, **options)
    assert weights.dtype == logits.dtype and index.dtype == torch.int64
    assert weights.shape == index.shape == (40, top_k)
    want = torch.zeros(40, 16, dtype=torch.float64)
    for t, experts in enumerate(naive_route(logits, bias, top_k, **options)):
        assert set(index[t].tolist()) == set(experts)
        for e, weight in experts.items():
            want[t, e] = weight
    assert_as_good_as("weights", by_expert(weights, index, 16), want, want)


def test_route_fp32():
    logits, bias = inputs(dtype=torch.float32)
    gold = route(logits.double(), bias.double(), 4, scale=2.446)
    got = route(logits, bias, 4, scale=2.446)
    a, b = by_expert(*got, 16), by_expert(*gold, 16)
    assert_as_good_as("weights", a, b.float(), b)


def test_bias_moves_the_choice_but_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    free = torch.zeros(4).double()
    pushed = torch.tensor([0.0, 0.0, 0.0, 5.0]).double()
    _, index = route(logits, free, 2)
    assert set(index[0].tolist()) == {0, 1}
    weights, index = route(logits, pushed, 2, renormalize=False)
    assert set(index[0].tolist()) == {0, 3}
    assert torch.equal(by_expert(weights, index, 4)[0, [0, 3]], logits.sigmoid()[0, [0, 3]])
    everyone = free + 0.37  # the same for all: nothing moves
    assert torch.equal(
        by_expert(*route(logits, everyone, 2), 4), by_expert(*route(logits, free, 2), 4)
    )


def test_a_closed_group_stays_closed():
    """The best expert of all loses to a group whose best two sum higher; negative scores too."""
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]], dtype=torch.float64)
    for shift in (0.0, -10.0):  # biased scores below zero must not lose to the closed groups
        bias = torch.full((4,), shift, dtype=torch.float64)
        _, index = route(logits, bias, 2, n_group=2, topk_group=1)
        assert set(index[0].tolist()) == {2, 3}


def test_scores_that_underflow_give_finite_weights():
    weights, _ = route(torch.full((2, 8), -1000.0), torch.zeros(8), 3)
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("n_group", [1, 4])
def test_route_without_tokens(n_group):
    weights, index = route(torch.zeros(0, 8), torch.zeros(8), 2, n_group=n_group)
    assert weights.shape == index.shape == (0, 2)


@pytest.mark.parametrize("n_group", [1, 4])
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_gradient(renormalize, n_group):
    logits, bias = inputs(T=6, E=8)
    bias.requires_grad_()

    def weights(x):
        return route(
            x, bias, 2, n_group=n_group, topk_group=1, renormalize=renormalize, scale=2.446
        )[0]

    assert gradcheck(weights, logits.requires_grad_())
    weights(logits).sum().backward()
    assert bias.grad is None


def test_route_modifies_nothing_and_repeats():
    logits, bias = inputs()
    before = logits.clone(), bias.clone()
    first, second = (route(logits, bias, 4, n_group=4, topk_group=2) for _ in range(2))
    assert torch.equal(logits, before[0]) and torch.equal(bias, before[1])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", {"logits": torch.zeros(8)}),
        ("logits", {"logits": torch.zeros(1, 2, 8)}),
        ("logits", {"logits": torch.zeros(2, 8).bfloat16()}),
        ("logits", {"logits": torch.zeros(2, 8).long()}),
        ("bias", {"bias": torch.zeros(7)}),
        ("bias", {"bias": torch.zeros(1, 8)}),
        ("bias", {"bias": torch.zeros(8, device="meta")}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 9}),
        ("top_k", {"top_k": 5, "n_group": 2}),
        ("n_group", {"n_group": 0}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 8}),
        ("topk_group", {"n_group": 4, "topk_group": 0}),
        ("topk_group", {"n_group": 4, "topk_group": 5}),
        ("topk_group", {"topk_group": 2}),
    ],
)
def test_route_errors(name, change):
    good = {"logits": torch.zeros(2, 8), "bias": torch.zeros(8), "top_k": 1}
    route(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        route(**(good | change))


# ---- experts -----------------------------------------------------------------------------------


def all_experts(x, gate_up, down, index, weights):
    """Every expert on every token, weighted by what the token gave it; E or more is nobody."""
    E, F = gate_up.shape[0], down.shape[2]
    h = torch.einsum("td,efd->tef", x, gate_up)
    h = h[..., :F] / (1 + torch.exp(-h[..., :F])) * h[..., F:]
    y = torch.einsum("tef,edf->ted", h, down)
    share = torch.zeros(len(x), E, dtype=x.dtype)
    for e in range(E):
        share[:, e] = (weights * (index == e)).sum(1)
    return torch.einsum("te,ted->td", share, y)


def make(T=40, E=6, k=2, D=7, F=5, dtype=torch.float64, index=None):
    """x, gate_up, down, weights, index; every token has k different experts."""
    x, gate_up, down = torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    if index is None:
        index = torch.rand(T, E).topk(k, 1).indices
    weights = torch.rand(index.shape).to(torch.promote_types(dtype, torch.float32))
    return *(t.to(dtype) for t in (x, gate_up, down)), weights, index


def run(x, gate_up, down, weights, index, do=None, op=expert_mlp):
    """y, and with an upstream gradient those of x, gate_up, down and weights."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
    y = op(*leaves[:3], index, leaves[3])
    return y.detach(), *(() if do is None else torch.autograd.grad(y, leaves, do))


NAMES = ("y", "dx", "dgate_up", "ddown", "dweights")

INDEXES = {
    "all to one": torch.full((9, 1), 3),
    "skewed": torch.tensor([[0, 1]] * 7 + [[0, 5], [2, 0]]),  # 3 and 4 get none; 2 and 5 get one
    "one token": torch.tensor([[4, 2]]),
    "all experts": torch.arange(6).repeat(3, 1),
    "the same expert twice": torch.tensor([[1, 1], [2, 3]]),
    "some elsewhere": torch.tensor([[0, 6], [9, 2], [6, 100], [5, 1]]),
}


def check(args):
    do = torch.randn(args[0].shape).double()
    got, gold = run(*args, do), run(*args, do, op=all_experts)
    for name, a, b in zip(NAMES, got, gold, strict=True):
        assert_as_good_as(name, a, b, b)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_experts(k):
    check(make(k=k))


@pytest.mark.parametrize("name", INDEXES)
def test_uneven_experts(name):
    check(make(T=len(INDEXES[name]), index=INDEXES[name]))


@pytest.mark.parametrize("D, F, E", [(1, 1, 6), (3, 8, 6), (16, 1, 40)])
def test_expert_shapes(D, F, E):
    check(make(D=D, F=F, E=E))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_expert_dtypes(dtype):
    """Against products in the same dtype: the hidden layer is rounded, the sum is not."""
    args = make(D=32, F=16, dtype=dtype)
    do = torch.randn(40, 32).to(dtype)

    def plain(x, gate_up, down, index, weights):
        y = 0
        for slot in range(2):
            rows = []
            for t, e in enumerate(index[:, slot].tolist()):
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                rows.append(down[e] @ (torch.nn.functional.silu(gate) * up))
            y = y + torch.stack(rows).float() * weights[:, slot, None]
        return y.to(dtype)

    got, ref = run(*args, do), run(*args, do, op=plain)
    double = [t.double() if t.is_floating_point() else t for t in args]
    gold = run(*double, do.double(), op=all_experts)
    for name, a, b, c in zip(NAMES, got, ref, gold, strict=True):
        assert_as_good_as(name, a, b, c)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_weighted_sum_is_rounded_once(dtype):
    """Every expert returns exactly 1, so the result is the sum of the weights, exact in fp32."""
    gate_up = torch.tensor([[32.0], [1.0]]).expand(8, 2, 1).to(dtype)  # silu(32) is 32
    down = torch.full((8, 1, 1), 1 / 32).to(dtype)
    weights = 1 + torch.randint(2**11, (50, 8)) / 2**11  # 12 bits: more than 16-bit floats have
    index = torch.arange(8).expand(50, 8)
    y = expert_mlp(torch.ones(50, 1).to(dtype), gate_up, down, index, weights)
    assert torch.equal(y[:, 0], weights.sum(1).to(dtype))


def test_experts_without_tokens():
    y = expert_mlp(*make(T=0)[:3], torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 7) and y.dtype == torch.float64


@pytest.mark.parametrize("index", [6, -1, 2**31, -(2**62), 2**62])
def test_every_expert_elsewhere_gives_zeros(index):
    """Also gradients of zeros, not none: every rank then takes part in what follows them."""
    x, gate_up, down, weights, index = make(T=3, index=torch.full((3, 2), index))
    weights.fill_(torch.nan)  # what is not used need not be finite
    assert not any(y.any() for y in run(x, gate_up, down, weights, index))


def test_expert_gradcheck():
    x, gate_up, down, weights, index = make(T=4, E=3, D=3, F=2)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    assert gradcheck(lambda x, g, d, w: expert_mlp(x, g, d, index, w), leaves)


def test_experts_modify_nothing_and_repeat():
    args, do = make(dtype=torch.float32), torch.randn(40, 7)
    before = [t.clone() for t in args]
    for a, b in zip(run(*args, do), run(*args, do), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b)


def test_a_token_does_not_see_the_others():
    args = make(dtype=torch.float64)
    whole = run(*args)[0]
    x, gate_up, down, weights, index = args
    for t in (0, 17, 39):
        one = expert_mlp(x[t : t + 1], gate_up, down, index[t : t + 1], weights[t : t + 1])
        assert_as_good_as("y", one, whole[t : t + 1], whole[t : t + 1])


def test_experts_non_contiguous():
    x, gate_up, down, weights, index = make()
    want = run(x, gate_up, down, weights, index)[0]
    views = [t.mT.contiguous().mT for t in (x, gate_up, down, index, weights)]
    got = expert_mlp(*views)
    assert_as_good_as("y", got, want, want)


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {"x": torch.zeros(7)}),
        ("x", {"x": torch.zeros(1, 4, 7)}),
        ("x", {"x": torch.zeros(4, 7).long()}),
        ("norm", {"norm": (torch.ones(7),)}),
        (r"shared\[0\]", {"shared": (torch.zeros(()),) * 3}),
        (r"x .*gate_up", {"gate_up": torch.zeros(10, 7)}),
        ("gate_up", {"gate_up": torch.zeros(6, 10, 8)}),
        ("gate_up", {"gate_up": torch.zeros(6, 11, 7)}),
        ("gate_up", {"gate_up": torch.zeros(6, 10, 7).double()}),
        ("down", {"down": torch.zeros(6, 5, 7)}),
        ("down", {"down": torch.zeros(5, 7, 5)}),
        ("down", {"down": torch.zeros(6, 7, 5).bfloat16()}),
        ("down", {"down": torch.zeros(6, 7, 5, device="meta")}),
        ("index", {"index": torch.zeros(3, 2).long()}),
        ("index", {"index": torch.zeros(4).long()}),
        ("index", {"index": torch.zeros(4, 2)}),
        ("index", {"index": torch.zeros(4, 2, device="meta").long()}),
        ("weights", {"weights": torch.zeros(4, 3)}),
        ("weights", {"weights": torch.zeros(4)}),
        ("weights", {"weights": torch.zeros(4, 2, device="meta")}),
    ],
)
def test_expert_errors(name, change):
    good = {
        "x": torch.zeros(4, 7),
        "gate_up": torch.zeros(6, 10, 7),
        "down": torch.zeros(6, 7, 5),
        "index": torch.zeros(4, 2).long(),
        "weights": torch.zeros(4, 2),
    }
    expert_mlp(**good)
    with pytest.raises(ValueError, match=rf"^{name}(?!\w)"):
        expert_mlp(**(good | change))
