"""The Triton causal_conv against the reference and its fp64 run."""

import itertools

import pytest
import torch

from kimi_kernels import backend, causal_conv, causal_conv_bwd_triton
from kimi_kernels.causal_conv_triton import causal_conv_backward_op
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.kernels.kda_cases import cumulative

# the interpreter's sigmoid of a large negative number
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
PAIRS = list(zip(KERNEL_DTYPES, [torch.int32, torch.int64, torch.int32], strict=False))
PACKED = [[0, 5, 0, 1, 2, 9, 0], [8], [0, 0], [64, 0, 65]]


def make(T, *, B=1, sizes=(6, 10), W=4, N=None, dtype=torch.float32):
    """xs, weight and initial state."""
    D = sum(sizes)
    xs = [torch.randn(B, T, s).to(DEVICE, dtype) for s in sizes]
    return xs, *(torch.randn(s).to(DEVICE, dtype) for s in ((D, W), (N or B, W - 1, D)))


def run(name, xs, weight, state=None, cu=None):
    """All outputs side by side, and the state."""
    options = {"initial_state": state, "cu_seqlens": cu, "output_final_state": True}
    with backend(name):
        ys, new = causal_conv(xs, weight, **options)
    return torch.cat(ys, -1), new


def check(xs, weight, state=None, cu=None):
    got, ref = (run(name, xs, weight, state, cu) for name in ("triton", "reference"))
    exact = None if state is None else state.double()
    gold = run("reference", [x.double() for x in xs], weight.double(), exact, cu)
    assert_as_good_as("y", got[0], ref[0], gold[0])
    assert got[1].dtype == xs[0].dtype and torch.equal(got[1], ref[1])
    return got


@pytest.mark.parametrize("W", [2, 5])
@pytest.mark.parametrize("T", [0, 1, 4])
def test_short_rows(T, W):
    """Also where there are fewer tokens than the state holds."""
    check(*make(T, B=2, sizes=(6,), W=W))


@each_dtype
@pytest.mark.parametrize("W", [2, 3, 4])
def test_lengths(W, dtype):
    xs, weight, state = make(70, sizes=(6,), W=W, dtype=dtype)
    check(xs, weight, state)
    check(xs, weight)


@each_dtype
@pytest.mark.parametrize("sizes", [(1,), (3, 129, 8), (300,)])
def test_channels(sizes, dtype):
    xs, weight, state = make(9, B=2, sizes=sizes, dtype=dtype)
    check(xs, weight, state)


@pytest.mark.gpu
@each_dtype
def test_the_sizes_of_a_layer(dtype):
    sizes = (4096,) * 3
    xs, weight, state = make(1000, B=2, sizes=sizes, dtype=dtype)
    check(xs, weight, state)
    lengths = [0, 1, 300, 0, 2, 697]
    xs, weight, state = make(1000, sizes=sizes, N=len(lengths), dtype=dtype)
    check(xs, weight, state, cumulative(lengths).to(DEVICE))


@pytest.mark.parametrize("weight_dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
@each_dtype
def test_weight_has_its_own_dtype(dtype, weight_dtype):
    xs, weight, state = make(5, dtype=dtype)
    check(xs, weight.to(weight_dtype), state)


@each_dtype
def test_large_values(dtype):
    xs, weight, state = make(9, dtype=dtype)
    xs[0][:, 3] = 1000
    xs[1][:, 4] = -1000
    xs[1][:, 5] = 0
    check(xs, weight, state)


# ---- packed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, cu_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed(lengths, cu_dtype, dtype):
    xs, weight, state = make(sum(lengths), sizes=(6,), N=len(lengths), dtype=dtype)
    check(xs, weight, state, cumulative(lengths, cu_dtype).to(DEVICE))


def test_packed_without_a_state():
    xs, weight, _ = make(17, dtype=torch.float32)
    check(xs, weight, None, cumulative(PACKED[0]).to(DEVICE))


def test_packed_is_separate():
    """To the bit."""
    lengths = [5, 0, 1, 66]
    xs, weight, state = make(sum(lengths), N=len(lengths))
    ends = cumulative(lengths).tolist()
    got = run("triton", xs, weight, state, torch.tensor(ends, device=DEVICE))
    outs = [
        run("triton", [x[:, a:b] for x in xs], weight, state[n : n + 1])
        for n, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    for i in range(2):
        assert torch.equal(got[i], torch.cat([out[i] for out in outs], 1 - i))


# ---- memory and time ---------------------------------------------------------------------------


@pytest.mark.parametrize("B, T", [(3, 1), (1, 9), (2, 9), (2, 0)])
def test_strided_inputs(B, T):
    """Slices of one projection, and layouts that need a copy: to the bit the same."""
    xs, weight, state = make(T, B=B)
    want = check(xs, weight, state)
    merged = torch.cat([*xs, torch.full((B, T, 3), torch.nan, device=DEVICE)], -1)
    slices = merged.split([6, 10, 3], -1)[:2]
    swapped = [x.mT.contiguous().mT for x in xs]
    for views in (slices, swapped):
        strided = weight.T.contiguous().T, state.mT.contiguous().mT
        for a, b in zip(run("triton", views, *strided), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, [1, 0, 8]], ids=str)
def test_nothing_is_modified_and_runs_are_bit_equal(lengths):
    xs, weight, state = make(9, N=None if lengths is None else 3)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    before = [x.clone() for x in (*xs, weight, state)]
    y, S = run("triton", xs, weight, state, cu)
    for a, b in zip((y, S), run("triton", xs, weight, state, cu), strict=True):
        assert torch.equal(a, b)
    S.zero_()
    for a, b in zip((*xs, weight, state), before, strict=True):
        assert torch.equal(a, b)
    assert S.untyped_storage().nbytes() == S.numel() * S.element_size()


@each_dtype
@pytest.mark.parametrize("t", [0, 63, 64])
def test_later_tokens_change_no_bit(t, dtype):
    xs, weight, state = make(70, dtype=dtype)
    changed = [torch.cat((x[:, : t + 1], 100 * x[:, t + 1 :].flip(1)), 1) for x in xs]
    a, b = (run("triton", x, weight, state)[0] for x in (xs, changed))
    assert torch.equal(a[:, : t + 1], b[:, : t + 1]) and not torch.equal(a, b)


def test_in_pieces_is_at_once():
    xs, weight, state = make(9)
    want, outs = run("triton", xs, weight, state), []
    for a, b in ((0, 1), (1, 3), (3, 3), (3, 9)):
        y, state = run("triton", [x[:, a:b] for x in xs], weight, state)
        outs.append(y)
    assert torch.equal(torch.cat(outs, 1), want[0]) and torch.equal(state, want[1])


def test_the_state_only_if_asked_for():
    xs, weight, _ = make(5)
    with backend("triton"):
        ys, state = causal_conv(xs, weight)
    assert state is None and isinstance(ys, tuple)
    assert [y.shape for y in ys] == [x.shape for x in xs]
    assert all(y.is_contiguous() for y in ys)


# ---- gradients ---------------------------------------------------------------------------------


def gradients(name, xs, weight, state, up, cu=None):
    """y, the state, and the gradients of every tensor."""
    given = [x for x in (*xs, weight, state) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in given]
    rest = leaves[len(xs) :] + [None] * (state is None)
    out = run(name, leaves[: len(xs)], *rest, cu)
    up = [u.to(o.dtype) for u, o in zip(up, out, strict=True)]
    return *(o.detach() for o in out), *torch.autograd.grad(out, leaves, up, materialize_grads=True)


def check_gradients(xs, weight, state=None, cu=None):
    N = xs[0].shape[0] if cu is None else len(cu) - 1
    D, W = weight.shape
    up = [torch.randn(*shape, device=DEVICE) for shape in ((*xs[0].shape[:2], D), (N, W - 1, D))]
    got, ref = (gradients(name, xs, weight, state, up, cu) for name in ("triton", "reference"))
    exact = None if state is None else state.double()
    up = [u.to(xs[0].dtype).double() for u in up]
    gold = gradients("reference", [x.double() for x in xs], weight.double(), exact, up, cu)
    names = ["y", "state", *(f"dx{i}" for i in range(len(xs))), "dweight", "dstate"]
    for name, a, b, c in zip(names[: len(got)], got, ref, gold, strict=True):
        assert_as_good_as(name, a, b, c, xs[0].dtype)
    return got


@pytest.mark.parametrize(
    "dtype, with_state", [*((d, True) for d in KERNEL_DTYPES), (torch.float32, False)]
)
@pytest.mark.parametrize(
    "B, T, lengths", [(2, 0, None), (2, 2, None), (1, 70, None), (1, 9, [0, 1, 8])]
)
def test_gradients(B, T, lengths, with_state, dtype):
    N = B if lengths is None else len(lengths)
    xs, weight, state = make(T, B=B, N=N, dtype=dtype)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    check_gradients(xs, weight, state if with_state else None, cu)


@pytest.mark.parametrize("T", [1, 3, 4, 7, 64, 66])
@pytest.mark.parametrize("W", [2, 3, 5, 6, 10])
def test_gradients_of_windows(W, T):
    check_gradients(*make(T, sizes=(6,), W=W))


@pytest.mark.parametrize("dtype, cu_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_gradients_packed(lengths, cu_dtype, dtype):
    xs, weight, state = make(sum(lengths), sizes=(6,), N=len(lengths), dtype=dtype)
    check_gradients(xs, weight, state, cumulative(lengths, cu_dtype).to(DEVICE))


@each_dtype
def test_gradients_of_channels(dtype):
    check_gradients(*make(9, B=2, sizes=(3, 129, 8, 1), dtype=dtype))
    check_gradients(*make(5, sizes=(700,), dtype=dtype))


@pytest.mark.parametrize("weight_dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
@each_dtype
def test_gradients_with_a_weight_of_its_own_dtype(dtype, weight_dtype):
    xs, weight, state = make(5, dtype=dtype)
    check_gradients(xs, weight.to(weight_dtype), state)


@each_dtype
def test_gradients_of_large_values(dtype):
    """Where SiLU is flat or the identity."""
    xs, weight, state = make(9, dtype=dtype)
    xs[0][:, 3] = 1000
    xs[1][:, 4] = -1000
    xs[1][:, 5] = 0
    check_gradients(xs, weight, state)


@pytest.mark.parametrize("B, T, lengths", [(3, 130, None), (1, 270, [1, 70, 0, 2, 64, 130, 3, 0])])
def test_gradients_with_several_chunks_per_program(B, T, lengths, monkeypatch):
    """All but dweight are the same to the bit, however the chunks are shared out."""
    xs, weight, state = make(T, B=B, sizes=(6,), N=None if lengths is None else len(lengths))
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    outs = []
    for programs in (512, 3, 1):
        monkeypatch.setattr(causal_conv_bwd_triton, "PROGRAMS", programs)
        torch.manual_seed(1)
        *first, _, dstate = check_gradients(xs, weight, state, cu)
        outs.append([*first, dstate])
    for out in outs[1:]:
        for a, b in zip(out, outs[0], strict=True):
            assert torch.equal(a, b)


def test_packed_gradients_are_separate():
    """To the bit; dweight is their sum."""
    lengths = [5, 0, 1, 66]
    xs, weight, state = make(sum(lengths), N=len(lengths))
    up = torch.randn(1, sum(lengths), 16, device=DEVICE), torch.randn(state.shape, device=DEVICE)
    ends = cumulative(lengths).tolist()
    got = gradients("triton", xs, weight, state, up, torch.tensor(ends, device=DEVICE))
    outs = []
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        rows, one = [x[:, a:b] for x in xs], slice(n, n + 1)
        outs.append(gradients("triton", rows, weight, state[one], (up[0][:, a:b], up[1][one])))
    for i, dim in ((2, 1), (3, 1), (5, 0)):
        assert torch.equal(got[i], torch.cat([out[i] for out in outs], dim))
    dw = sum(out[4] for out in outs)
    assert_as_good_as("dweight", got[4], dw, dw)


@pytest.mark.parametrize("t", [1, 63, 64])
def test_gradients_before_change_no_bit(t):
    """dx from token t on comes from dy from t on."""
    xs, weight, state = make(70)
    dy, dS = torch.randn(1, 70, 16, device=DEVICE), torch.randn(state.shape, device=DEVICE)
    changed = torch.cat((100 * dy[:, :t].flip(1), dy[:, t:]), 1)
    a, b = (gradients("triton", xs, weight, state, (u, dS)) for u in (dy, changed))
    for i in (2, 3):
        assert torch.equal(a[i][:, t:], b[i][:, t:]) and not torch.equal(a[i], b[i])


def backward(xs, weight, state, ups, cu=None):
    """Gradients of all, from those of every output and of the final state."""
    return causal_conv_backward_op(xs, weight, state, cu, ups)


@pytest.mark.parametrize("B, T", [(3, 1), (1, 9), (2, 9), (2, 0)])
def test_strided_upstream_gradients(B, T):
    xs, weight, state = make(T, B=B)
    ups = [torch.randn_like(x) for x in (*xs, state)]
    want = backward(xs, weight, state, ups)
    merged = torch.cat([*ups[:2], torch.full((B, T, 3), torch.nan, device=DEVICE)], -1)
    slices = [*merged.split([6, 10, 3], -1)[:2], ups[2]]
    swapped = [u.mT.contiguous().mT for u in ups]
    for views in (slices, swapped):
        strided = weight.T.contiguous().T, state.mT.contiguous().mT
        for a, b in zip(backward(xs, *strided, views), want, strict=True):
            assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, None), (2, 1, None), (1, 9, 1)])
def test_expanded_upstream_gradients(shape):
    xs, weight, state = make(9, B=2)
    rows = [torch.randn([n or x.shape[-1] for n in shape], device=DEVICE) for x in xs]
    ups = [u.expand_as(x) for u, x in zip(rows, xs, strict=True)]
    ups.append(torch.randn(1, 1, 1, device=DEVICE).expand_as(state))
    want = backward(xs, weight, state, [u.contiguous() for u in ups])
    for a, b in zip(backward(xs, weight, state, ups), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, [1, 0, 8]], ids=str)
def test_backward_modifies_nothing_and_is_bit_equal(lengths):
    xs, weight, state = make(9, N=None if lengths is None else 3)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    ups = [torch.randn_like(x) for x in (*xs, state)]
    before = [x.clone() for x in (*xs, weight, state, *ups)]
    got, again = (backward(xs, weight, state, ups, cu) for _ in range(2))
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)
        a.zero_()
    for a, b in zip((*xs, weight, state, *ups), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [[9], [1, 0, 8]], ids=str)
def test_without_a_gradient_is_a_gradient_of_zeros(lengths):
    """Of the final state, or of all outputs."""
    xs, weight, state = make(9, N=len(lengths))
    cu = cumulative(lengths).to(DEVICE)
    dy, dS = torch.randn(1, 9, 16, device=DEVICE), torch.randn(state.shape, device=DEVICE)
    for index, up in enumerate((dy, dS)):
        leaves = [x.clone().requires_grad_() for x in (*xs, weight, state)]
        out = run("triton", leaves[:2], *leaves[2:], cu)
        got = torch.autograd.grad(out[index], leaves, up, materialize_grads=True)
        ups = [torch.zeros_like(dy), torch.zeros_like(dS)]
        ups[index] = up
        want = gradients("triton", xs, weight, state, ups, cu)[2:]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, [0, 3, 2]], ids=str)
def test_opcheck_of_the_backward(lengths):
    N = 1 if lengths is None else len(lengths)
    xs, weight, state = make(5, sizes=(3, 4), N=N)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    ups = [torch.randn_like(x) for x in (*xs, state)]
    torch.library.opcheck(causal_conv_backward_op, (xs, weight, state, cu, ups))
    ups[-1] = state.new_empty(0)
    torch.library.opcheck(causal_conv_backward_op, (xs, weight, None, cu, ups))


def test_one_input_at_a_time():
    xs, weight, state = make(5)
    up = torch.randn(1, 5, 16, device=DEVICE), torch.randn(state.shape, device=DEVICE)
    _, _, *want = gradients("triton", xs, weight, state, up)
    given = [*xs, weight, state]
    for i, x in enumerate(given):
        leaf = x.clone().requires_grad_()
        args = [*given[:i], leaf, *given[i + 1 :]]
        torch.autograd.backward(run("triton", args[:2], *args[2:]), up)
        assert torch.equal(leaf.grad, want[i])
        assert not any(other.requires_grad for other in given)


def test_gradient_without_the_state():
    """What is not returned has no gradient, and none of the others changes."""
    xs, weight, state = make(5)
    leaf = xs[0].clone().requires_grad_()
    with backend("triton"):
        ys, _ = causal_conv([leaf, xs[1]], weight, initial_state=state)
    up = torch.randn(1, 5, 16, device=DEVICE)
    ys[0].backward(up[..., :6])
    zeros = torch.zeros_like(state)
    want = gradients("triton", xs, weight, state, (up, zeros))[2]
    assert_as_good_as("dx0", leaf.grad, want, want)


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_elements_than_2_to_31():
    """Bit-equal where one compilation does both, so all have a state."""
    T, D = 140_000, 16384
    x = torch.randn(1, T, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(D, 4, device=DEVICE)
    none = x.new_zeros(1, 3, D)
    y, state = run("triton", [x], weight, none)
    tail, want = run("triton", [x[:, -100:]], weight, x[:, -103:-100])
    assert torch.equal(y[:, -100:], tail) and torch.equal(state, want)
    head, _ = run("triton", [x[:, :100]], weight, none)
    assert torch.equal(y[:, :100], head)


@pytest.mark.gpu
@each_dtype
def test_gradients_at_the_sizes_of_a_layer(dtype):
    sizes = (4096,) * 3
    check_gradients(*make(1000, B=2, sizes=sizes, dtype=dtype))
    lengths = [0, 1, 300, 0, 2, 697]
    xs, weight, state = make(1000, sizes=sizes, N=len(lengths), dtype=dtype)
    check_gradients(xs, weight, state, cumulative(lengths).to(DEVICE))
    check_gradients(xs, weight, None, cumulative(lengths).to(DEVICE))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_gradients_of_more_elements_than_2_to_31():
    T, D = 140_000, 16384
    x = torch.randn(1, T, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(D, 4, device=DEVICE)
    none, dy = x.new_zeros(1, 3, D), torch.randn_like(x)
    dS = torch.randn_like(none)
    dx, dw, dstate = backward([x], weight, none, [dy, dS])
    tail, last, _ = backward([x[:, -100:]], weight, x[:, -103:-100], [dy[:, -100:], dS])
    assert torch.equal(dx[:, -100:], tail)
    head, _, want = backward([x[:, :100]], weight, none, [dy[:, :100], torch.zeros_like(none)])
    assert torch.equal(dx[:, :97], head[:, :97]) and torch.equal(dstate, want)
    parts = [backward([x[:, :-100]], weight, none, [dy[:, :-100], 0 * dS])[1], last]
    assert_as_good_as("dweight", dw, sum(parts), sum(p.double() for p in parts))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [1, 0, 69]], ids=str)
def test_cuda_graph_of_the_backward_without_a_host_sync(lengths):
    xs, weight, state = make(70, N=None if lengths is None else 3, dtype=torch.bfloat16)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    ups = [torch.randn_like(x) for x in (*xs, state)]
    want = backward(xs, weight, state, ups, cu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(xs, weight, state, ups, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backward(xs, weight, state, ups, cu)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [1, 0, 69]], ids=str)
def test_cuda_graph_without_a_host_sync(lengths):
    xs, weight, state = make(70, N=None if lengths is None else 3, dtype=torch.bfloat16)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    want = run("triton", xs, weight, state, cu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", xs, weight, state, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run("triton", xs, weight, state, cu)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
