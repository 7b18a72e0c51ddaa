"""causal_conv against a loop over channels, tokens and taps."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kimi_kernels import causal_conv
from tests.helpers import assert_as_good_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def naive_conv(x, weight, state):
    """One row x [T, D], state [W-1, D] -> y, the last W-1 inputs; in Python floats."""
    (T, D), W = x.shape, weight.shape[1]
    past = torch.cat((state, x)).tolist()
    taps = weight.tolist()
    y = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for d in range(D):
            a = math.fsum(taps[d][j] * past[t + j][d] for j in range(W))  # tap W-1 meets x_t
            y[t, d] = a / (1 + math.exp(-a))
    return y, torch.tensor(past[T:], dtype=torch.float64).view(W - 1, D)


def make(T, *, B=1, sizes=(3, 2), W=4, N=None, dtype=torch.float64):
    D = sum(sizes)
    xs = tuple(torch.randn(B, T, s).to(dtype) for s in sizes)
    return xs, torch.randn(D, W).to(dtype), torch.randn(N or B, W - 1, D).to(dtype)


def doubled(xs, weight, state):
    return tuple(x.double() for x in xs), weight.double(), state.double()


def conv(xs, weight, state, cu_seqlens=None):
    """All outputs side by side, and the state."""
    ys, S = causal_conv(
        xs, weight, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return torch.cat(ys, -1), S


def tokens(xs, start, end):
    return tuple(x[:, start:end] for x in xs)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 17])
@pytest.mark.parametrize("W", [2, 3, 4, 5])
def test_against_naive(W, T):
    xs, weight, state = make(T, B=2, W=W)
    got = conv(xs, weight, state)
    rows = [naive_conv(torch.cat(xs, -1)[b], weight, state[b]) for b in range(2)]
    for i, name in enumerate(("y", "state")):
        want = torch.stack([row[i] for row in rows])
        assert_as_good_as(name, got[i], want, want)


def test_without_state_is_conv1d():
    (x,), weight, state = make(20, B=2, sizes=(6,))
    want = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=6)).mT
    (y,), S = causal_conv((x,), weight)
    assert S is None
    assert_as_good_as("y", y, want, want)
    assert_as_good_as("y from zeros", conv((x,), weight, 0 * state)[0], want, want)


@pytest.mark.parametrize("sizes", [(1,), (3, 5), (8, 8, 4), [2, 2]])
def test_projections_in_order(sizes):
    xs, weight, state = make(9, sizes=sizes)
    ys, S = causal_conv(list(xs), weight, initial_state=state, output_final_state=True)
    assert isinstance(ys, tuple)
    assert [y.shape[-1] for y in ys] == list(sizes)
    want, S_want = conv((torch.cat(xs, -1),), weight, state)
    assert torch.equal(torch.cat(ys, -1), want) and torch.equal(S, S_want)


@each_dtype
def test_dtypes(dtype):
    args = make(50, sizes=(16, 8), dtype=dtype)
    gold, got = conv(*doubled(*args)), conv(*args)
    assert_as_good_as("y", got[0], gold[0].to(dtype), gold[0])
    assert torch.equal(got[1], gold[1].to(dtype))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_has_its_own_dtype(weight_dtype):
    xs, weight, state = make(50, sizes=(16,), dtype=torch.bfloat16)
    weight = weight.to(weight_dtype)
    gold = conv(*doubled(xs, weight, state))[0]
    y = conv(xs, weight, state)[0]
    assert_as_good_as("y", y, gold.bfloat16(), gold)


# ---- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [4, 4, 9], list(range(12))])
def test_in_pieces_is_at_once(cuts):
    T = 12
    xs, weight, state = make(T)
    want, outs = conv(xs, weight, state), []
    for a, b in itertools.pairwise([0, *cuts, T]):
        y, state = conv(tokens(xs, a, b), weight, state)
        outs.append(y)
    assert_as_good_as("y", torch.cat(outs, 1), want[0], want[0])
    assert torch.equal(state, want[1])


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[0, 5, 0, 1, 2, 9, 0], [3, 4], [8], [0, 0]], ids=str)
def test_packed_is_separate(lengths, cu_dtype):
    """Also where a sequence is shorter than the window, and its state reaches back."""
    N = len(lengths)
    xs, weight, states = make(sum(lengths), N=N)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    got = conv(xs, weight, states, ends.to(cu_dtype))
    outs = [conv(tokens(xs, ends[n], ends[n + 1]), weight, states[n : n + 1]) for n in range(N)]
    for i, name in enumerate(("y", "state")):
        want = torch.cat([out[i] for out in outs], 1 - i)
        assert_as_good_as(name, got[i], want, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [0, 2, 9])
def test_later_tokens_change_no_bit(t, dtype):
    xs, weight, state = make(20, dtype=dtype)
    changed = tuple(torch.cat((x[:, : t + 1], 100 * x[:, t + 1 :].flip(1)), 1) for x in xs)
    a, b = conv(xs, weight, state)[0], conv(changed, weight, state)[0]
    assert torch.equal(a[:, : t + 1], b[:, : t + 1]) and not torch.equal(a, b)


def test_two_runs_are_bit_equal():
    args = make(50, dtype=torch.float32)
    for a, b in zip(conv(*args), conv(*args), strict=True):
        assert torch.equal(a, b)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 1, 2, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_inputs_are_not_modified(T, packed):
    xs, weight, state = make(T)
    before = [x.clone() for x in (*xs, weight, state)]
    _, S = conv(xs, weight, state, torch.tensor([0, T]) if packed else None)
    S.zero_()
    for a, b in zip((*xs, weight, state), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_the_state_holds_no_longer_tensor_alive(packed):
    """A cache keeps the state; it must not keep every input of the prefill with it."""
    xs, weight, state = make(1000)
    S = conv(xs, weight, state, torch.tensor([0, 1000]) if packed else None)[1]
    assert S.untyped_storage().nbytes() == S.numel() * S.element_size()


def test_non_contiguous_inputs():
    xs, weight, state = make(20, B=2)
    want = conv(xs, weight, state)
    merged = torch.cat((*xs, torch.full((2, 20, 1), torch.nan)), -1)
    slices = merged[..., :3], merged[..., 3:5]
    for views in (slices, tuple(x.mT.contiguous().mT for x in xs)):
        got = conv(views, weight.T.contiguous().T, state.mT.contiguous().mT)
        for name, a, b in zip(("y", "state"), got, want, strict=True):
            assert_as_good_as(name, a, b, b)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "T, cu_seqlens", [(1, None), (2, None), (6, None), (6, [0, 1, 1, 6]), (0, None)]
)
def test_gradcheck(T, cu_seqlens):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    xs, weight, state = make(T, N=3 if cu_seqlens else None, sizes=(2, 1))
    leaves = [x.requires_grad_() for x in (*xs, weight, state)]
    f = functools.partial(conv, cu_seqlens=cu)
    assert gradcheck(lambda *leaves: f(leaves[:2], *leaves[2:]), leaves)


@each_dtype
def test_gradient_dtypes(dtype):
    args = make(50, sizes=(16, 8), dtype=dtype)
    dy, dS = torch.randn(1, 50, 24).to(dtype), torch.randn(1, 3, 24).to(dtype)

    def run(xs, weight, state, *up):
        leaves = [x.clone().requires_grad_() for x in (*xs, weight, state)]
        return torch.autograd.grad(conv(leaves[:2], *leaves[2:]), leaves, up)

    got = run(*args, dy, dS)
    gold = run(*doubled(*args), dy.double(), dS.double())
    for name, a, b in zip(("dx0", "dx1", "dweight", "dstate"), got, gold, strict=True):
        assert_as_good_as(name, a, b.to(dtype), b)


# ---- errors ------------------------------------------------------------------------------------


def refuses(name, **change):
    (xs, weight, state), B, T = make(5, B=2, dtype=torch.float32), 2, 5
    good = {"xs": xs, "weight": weight, "initial_state": state}
    assert causal_conv(**good)[0][0].shape == (B, T, 3)
    with pytest.raises(ValueError, match=rf"^{name}(?!\w)"):
        causal_conv(**(good | change))


X, Y = torch.zeros(2, 5, 3), torch.zeros(2, 5, 2)


@pytest.mark.parametrize(
    "name, xs",
    [
        ("xs", ()),
        ("xs", (X, torch.zeros(5, 2))),
        (r"xs\[1\]", (X, torch.zeros(2, 4, 2))),
        (r"xs\[1\]", (X, torch.zeros(1, 5, 2))),
        (r"xs\[1\]", (X, Y.double())),
        (r"xs\[1\]", (X, Y.to("meta"))),
        (r"xs\[0\]", (X.long(), Y.long())),
        ("weight", (X,)),
    ],
)
def test_bad_xs(name, xs):
    refuses(name, xs=xs)


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (5,), (5, 1, 4), (5, 1), (5, 0), (4, 5)])
def test_bad_weight(shape):
    refuses("weight", weight=torch.zeros(shape))


def test_weight_on_another_device():
    refuses("weight", weight=torch.zeros(5, 4, device="meta"))


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(1, 3, 5),
        torch.zeros(2, 4, 5),
        torch.zeros(2, 5, 3),
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, 5).double(),
        torch.zeros(2, 3, 5, device="meta"),
    ],
)
def test_bad_initial_state(state):
    refuses("initial_state", initial_state=state)


@pytest.mark.parametrize("cu", [[1, 5], [0, 3, 2, 5], [0, 4], [0, 6], [[0, 5]], [0], [0.0, 5.0]])
def test_bad_cu_seqlens(cu):
    xs, weight, _ = make(5)
    with pytest.raises(ValueError, match=r"^cu_seqlens\b"):
        causal_conv(xs, weight, cu_seqlens=torch.tensor(cu))


def test_cu_seqlens_needs_one_row():
    refuses("cu_seqlens", cu_seqlens=torch.tensor([0, 5]), initial_state=None)


def test_one_state_per_packed_sequence():
    xs, weight, state = make(5)
    with pytest.raises(ValueError, match=r"^initial_state\b"):
        causal_conv(xs, weight, initial_state=state, cu_seqlens=torch.tensor([0, 2, 5]))
