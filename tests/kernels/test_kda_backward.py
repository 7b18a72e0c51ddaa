"""The Triton backward of KDA. Gold is float64 autograd of the recurrent reference."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kimi_kernels import backend, chunk_kda, fused_kda, kda_gate, recurrent_kda
from kimi_kernels.kda import chunk_bwd, chunk_fwd
from kimi_kernels.kda.reference import fused_kda_ref, recurrent_form
from kimi_kernels.sequences import CHUNK
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.kernels.kda_cases import (
    GATES,
    KERNEL_OPS,
    PARAMETERS,
    cumulative,
    doubled,
    gradients,
    here,
    kernel_inputs,
    kernel_raw,
    make_state,
    tokens,
)

CHUNK_OPS = [KERNEL_OPS[0], KERNEL_OPS[2]]
each_op = pytest.mark.parametrize("op, make", KERNEL_OPS)
each_chunk_op = pytest.mark.parametrize("op, make", CHUNK_OPS)
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

# the interpreter's sigmoid of a large negative number
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def with_state(inputs, N=None):
    """`inputs` on the device, with random initial states."""
    (B, _, HV, V), K = inputs["v"].shape, inputs["k"].shape[-1]
    state = make_state(N or B, HV, K, V, dtype=torch.float32)
    return here(inputs | {"initial_state": state})


def upstream(inputs, size_o=1.0, size_S=1.0):
    """Random gradients of o and of the final state."""
    o, S = inputs["v"], inputs["initial_state"]
    return size_o * torch.randn_like(o), size_S * torch.randn_like(S)


def recurrent_fused(*, lower_bound=None, initial_state, cu_seqlens=None, **inputs):
    """`fused_kda` token by token, at any length."""
    del inputs["output_final_state"]
    return fused_kda_ref(recurrent_form, *inputs.values(), lower_bound, initial_state, cu_seqlens)


def through(name, op, inputs, up, **options):
    with backend(name):
        return gradients(op, inputs, *up, **options)


def exact(op, inputs, up, **options):
    """Gold."""
    form = recurrent_fused if op is fused_kda else recurrent_kda
    return through("reference", form, doubled(inputs), up, **options)


def check(op, inputs, up=None, **options):
    """o, S and every gradient by the rule -> Triton's and gold."""
    up = up or upstream(inputs)
    got, ref = (through(name, op, inputs, up, **options) for name in ("triton", "reference"))
    gold = exact(op, inputs, up, **options)
    for name in gold:
        assert_as_good_as(name, got[name], ref[name], gold[name], inputs["q"].dtype)
    return got, gold


def assert_equal(got, want, names=None):
    for name in names or want:
        assert torch.equal(got[name], want[name]), name


def packed(lengths):
    return cumulative(lengths, torch.int32).to(DEVICE)


# ---- sizes -------------------------------------------------------------------------------------


LENGTHS = [(T, torch.float32) for T in (1, 15, 16, 17, 63, 64, 65, 130)]
LENGTHS += [(T, dtype) for T in (17, 65) for dtype in KERNEL_DTYPES[1:]]


@each_chunk_op
@pytest.mark.parametrize("T, dtype", LENGTHS, ids=str)
def test_lengths(op, make, T, dtype):
    check(op, with_state(make(T, HV=1, dtype=dtype)))


@each_chunk_op
@pytest.mark.parametrize(
    "B, H, HV, K, V", [(2, 2, 4, 20, 17), (1, 1, 3, 16, 16), (1, 1, 1, 70, 40), (1, 1, 1, 128, 70)]
)
def test_shapes(op, make, B, H, HV, K, V):
    """Grouped heads, and more than one tile of K and V."""
    T = 66 if K == 70 else 20
    check(op, with_state(make(T, B=B, H=H, HV=HV, K=K, V=V, dtype=torch.float32)))


@pytest.mark.gpu
@each_chunk_op
@each_dtype
@pytest.mark.parametrize("H, HV, K, V", [(2, 4, 128, 128), (2, 2, 64, 64), (1, 2, 100, 178)])
def test_large(op, make, H, HV, K, V, dtype):
    check(op, with_state(make(500, B=2, H=H, HV=HV, K=K, V=V, dtype=dtype)))


# ---- upstream gradients ------------------------------------------------------------------------


def largest(dtype):
    """Size of upstream gradients whose own gradients still fit in `dtype`."""
    return 100.0 if dtype == torch.float16 else 1e4


@each_chunk_op
@each_dtype
@pytest.mark.parametrize("size_o, size_S", [(1e-4, 1.0), (1.0, 1e-4), (1e4, 1e4)])
def test_sizes_of_upstream_gradients(op, make, size_o, size_S, dtype):
    inputs = with_state(make(40, HV=1, dtype=dtype))
    sizes = (min(size, largest(dtype)) for size in (size_o, size_S))
    check(op, inputs, upstream(inputs, *sizes))


@each_chunk_op
@each_dtype
def test_gradients_of_o_fall_over_time(op, make, dtype):
    """To 1 / `largest`: no token's gradient is disturbed by the larger ones before it."""
    inputs = with_state(make(70, HV=1, dtype=dtype))
    top = largest(dtype)
    size = top ** torch.linspace(1, -1, 70, device=DEVICE).view(1, -1, 1, 1)
    do, dS = upstream(inputs, size_S=1 / top)
    up = (do * size).to(dtype), dS
    got, ref = (through(name, op, inputs, up) for name in ("triton", "reference"))
    gold = exact(op, inputs, up)
    for name in [f"d{n}" for n in inputs if n not in (*PARAMETERS, "initial_state")]:
        by = size if gold[name].ndim == 4 else size[..., 0]
        assert_as_good_as(name, *(x[name].double() / by for x in (got, ref, gold)), dtype)


@each_chunk_op
def test_expanded_upstream_gradients(op, make):
    """Those of a sum have stride 0."""
    inputs = with_state(make(20, HV=1, dtype=torch.float32))
    want = through("triton", op, inputs, [torch.ones_like(x) for x in upstream(inputs)])
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with backend("triton"):
        o, S = op(**leaves, output_final_state=True)
    grads = torch.autograd.grad(o.sum() + S.sum(), tuple(leaves.values()))
    assert_equal(dict(zip([f"d{n}" for n in leaves], grads, strict=True)), want, want.keys() - "oS")


@each_chunk_op
def test_strided_upstream_gradients(op, make):
    """Heads before tokens, a slice, and every second channel of a tensor whose others are NaN."""
    inputs = with_state(make(3, B=2, dtype=torch.float32))
    do, dS = upstream(inputs)
    want = through("triton", op, inputs, (do, dS))
    V = do.shape[-1]
    layouts = [torch.full((*do.shape[:-1], 3 * V), torch.nan, device=DEVICE) for _ in range(2)]
    views = [layouts[0][..., 3 : 3 + V], layouts[1][..., : 2 * V : 2], do.mT.contiguous().mT]
    for view in (*views, do.transpose(1, 2).contiguous().transpose(1, 2)):
        view.copy_(do)
        assert not view.is_contiguous()
        assert_equal(through("triton", op, inputs, (view, dS.mT.contiguous().mT)), want)


# ---- gates and keys ----------------------------------------------------------------------------


def assert_closed(g, dg):
    """exp(g) is 0 in fp32, and so is the gradient of g."""
    assert not dg[g < -120].any()


@each_dtype
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, dtype):
    inputs = with_state(kernel_inputs(70, HV=1, gate=gate, dtype=dtype))
    got, _ = check(chunk_kda, inputs)
    assert_closed(inputs["g"], got["dg"])


def make_closing(decay, dtype):
    """Raw inputs with this log-decay per token in about half of the channels, elsewhere 0 to -1."""
    inputs = kernel_raw(70, HV=1, dtype=torch.float32)
    A_log = 5.0 if decay == -2661 else 8.0
    x = torch.rand_like(inputs["f"])
    x = torch.where(torch.rand_like(x) < 0.5, -decay, x) / math.exp(A_log)
    inputs["A_log"].fill_(A_log)
    inputs["f"] = x + torch.log(-torch.expm1(-x)) - inputs["dt_bias"]  # the inverse of softplus
    return {name: y if name in PARAMETERS else y.to(dtype) for name, y in inputs.items()}


@each_dtype
@pytest.mark.parametrize("decay", [-2661, -44000])
def test_raw_gates_that_close(decay, dtype):
    inputs = with_state(make_closing(decay, dtype))
    got, _ = check(fused_kda, inputs)
    g = kda_gate(inputs["f"], inputs["A_log"], inputs["dt_bias"])
    assert 0.3 < (g < 0.9 * decay).float().mean() < 0.7
    assert_closed(g, got["df"])


@each_dtype
def test_all_raw_gates_closed(dtype):
    inputs = make_closing(-2661, dtype)
    inputs["f"] += 40
    got, _ = check(fused_kda, with_state(inputs))
    for name in ("df", "dA_log", "ddt_bias", "dinitial_state"):
        assert not got[name].any(), name


@each_dtype
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("part", [0.3, 1.0], ids=["some", "all"])
def test_saturated_activations(part, lower_bound, dtype):
    """f and b of -100 and 100."""
    inputs = kernel_raw(70, HV=1, dtype=dtype)
    for name in ("f", "b"):
        x = inputs[name]
        saturated = torch.where(torch.rand(x.shape) < 0.5, -100.0, 100.0).to(x)
        inputs[name] = torch.where(torch.rand(x.shape) < part, saturated, x)
    got, _ = check(fused_kda, with_state(inputs), lower_bound=lower_bound)
    assert not got["db"][inputs["b"].abs().to(DEVICE) == 100].any()


@each_chunk_op
@each_dtype
@pytest.mark.parametrize("every", [1, 3])
def test_zero_vectors(op, make, every, dtype):
    inputs = make(70, HV=1, dtype=dtype)
    for i, name in enumerate("qkv"):
        inputs[name][:, min(i, every - 1) :: every] = 0
    check(op, with_state(inputs))


@each_dtype
@pytest.mark.parametrize("beta", [0.0, 0.9999, 1.0])
def test_repeated_keys(beta, dtype):
    """dbeta is right where beta is 0."""
    inputs = kernel_inputs(70, HV=1, dtype=dtype)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"][:, ::2] = beta
    got, gold = check(chunk_kda, with_state(inputs))
    assert gold["dbeta"][:, ::2].all() and got["dbeta"][:, ::2].all()


@each_dtype
def test_beta_zero_everywhere(dtype):
    inputs = kernel_inputs(70, HV=1, dtype=dtype)
    inputs["beta"].zero_()
    got, _ = check(chunk_kda, with_state(inputs))
    assert not got["dv"].any()


@each_dtype
@pytest.mark.parametrize("t", [0, 43, 64])
def test_nothing_passes_a_closed_gate(t, dtype):
    """All gates are closed at token t: no gradient of what comes from there reaches the past."""
    inputs = kernel_inputs(70, HV=1, dtype=dtype)
    inputs["g"][:, t] = -torch.inf
    inputs = with_state(inputs)
    do, dS = upstream(inputs)
    do[:, :t] = 0
    got, _ = check(chunk_kda, inputs, (do, dS))
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert not got[name][:, :t].any(), name
    assert not got["dg"][:, t].any() and not got["dinitial_state"].any()


# ---- packed sequences --------------------------------------------------------------------------


@each_chunk_op
@each_dtype
@pytest.mark.parametrize("lengths", [[0, 17, 0, 0, 66, 1, 0]], ids=str)
def test_packed(op, make, lengths, dtype):
    inputs = with_state(make(sum(lengths), HV=1, dtype=dtype), N=len(lengths))
    up = upstream(inputs)
    got, _ = check(op, inputs, up, cu_seqlens=packed(lengths))
    empty = torch.tensor(lengths) == 0
    assert torch.equal(got["dinitial_state"][empty.to(DEVICE)], up[1][empty.to(DEVICE)])


@pytest.mark.gpu
@each_chunk_op
@each_dtype
@pytest.mark.parametrize("lengths", [[0, 5, 0, 340, 1, 200, 0], [1] * 100], ids=len)
def test_large_packed(op, make, lengths, dtype):
    inputs = make(sum(lengths), H=2, HV=4, K=128, V=128, dtype=dtype)
    check(op, with_state(inputs, N=len(lengths)), cu_seqlens=packed(lengths))


@each_chunk_op
@each_dtype
def test_documents_are_separate(op, make, dtype):
    """By the rule the same as alone, and to the bit the same beside neighbours of NaN."""
    lengths, n = [9, 0, 66, 5], 2
    (a, b), cu = cumulative(lengths)[n : n + 2].tolist(), packed(lengths)
    inputs = with_state(make(sum(lengths), HV=1, dtype=dtype), N=len(lengths))
    up = upstream(inputs)

    def document(x, name):
        if name.removeprefix("d") in ("S", "initial_state"):
            return x[n : n + 1]
        return x[:, a:b] if x.ndim > 2 else x

    def nan_outside(x, name):
        if x.ndim <= 2:
            return x
        out = torch.full_like(x, torch.nan)
        document(out, name).copy_(document(x, name))
        return out

    alone = {name: document(x, name) for name, x in inputs.items()}
    alone_up = [document(x, name) for name, x in zip("oS", up, strict=True)]
    gold = exact(op, alone, alone_up)
    ref = through("reference", op, alone, alone_up)
    got = through("triton", op, inputs, up, cu_seqlens=cu)
    inputs = {name: nan_outside(x, name) for name, x in inputs.items()}
    up = [nan_outside(x, name) for name, x in zip("oS", up, strict=True)]
    beside = through("triton", op, inputs, up, cu_seqlens=cu)
    for name in [name for name in gold if name[1:] not in PARAMETERS]:
        x = document(got[name], name)
        assert_as_good_as(name, x, ref[name], gold[name], dtype)
        assert torch.equal(x, document(beside[name], name)), name


# ---- segments ----------------------------------------------------------------------------------


@pytest.fixture
def set_segments(monkeypatch):
    """A function that makes every backward pass go in segments of that many chunks of a head."""

    def set_chunks(chunks):
        for module in (chunk_fwd, chunk_bwd):
            monkeypatch.setattr(module, "BACKWARD_TOKENS", chunks * CHUNK)

    return set_chunks


@each_op
@pytest.mark.parametrize("B, lengths", [(2, None), (1, [0, 130, 0, 10, 0])], ids=str)
def test_segments(op, make, B, lengths, set_segments):
    """Of one chunk. A token loop leaves no states between them: the backward pass makes them."""
    set_segments(1)
    T = 70 if lengths is None else sum(lengths)
    inputs = with_state(make(T, B=B, HV=1, dtype=torch.float32), N=len(lengths or range(B)))
    check(op, inputs, **({} if lengths is None else {"cu_seqlens": packed(lengths)}))


@each_dtype
@pytest.mark.parametrize("lengths", [[130], [0, 64, 64, 0], [10, 120]], ids=str)
def test_segments_of_two_chunks(lengths, dtype, set_segments):
    set_segments(2)
    inputs = kernel_inputs(sum(lengths), HV=1, dtype=dtype)
    check(chunk_kda, with_state(inputs, N=len(lengths)), cu_seqlens=packed(lengths))


def test_segments_of_few_tokens(set_segments):
    """So few that the forward pass goes token by token."""
    set_segments(1)
    inputs = with_state(kernel_raw(10, HV=1, dtype=torch.float32), N=4)
    check(fused_kda, inputs, cu_seqlens=packed([3, 0, 5, 2]))


@pytest.mark.gpu
@each_chunk_op
@each_dtype
@pytest.mark.parametrize("lengths", [None, [100, 0, 700, 1, 199]], ids=str)
def test_large_segments(op, make, lengths, dtype, set_segments):
    set_segments(4 * 3)
    inputs = make(1000, H=2, HV=4, K=128, V=128, dtype=dtype)
    options = {} if lengths is None else {"cu_seqlens": packed(lengths)}
    check(op, with_state(inputs, N=len(lengths or [0])), **options)


# ---- the same again ----------------------------------------------------------------------------


@pytest.mark.gpu
@each_chunk_op
@each_dtype
def test_large_runs_are_bit_equal(op, make, dtype):
    inputs = with_state(make(2000, B=2, H=4, HV=8, K=128, V=128, dtype=dtype))
    up = upstream(inputs)
    first = through("triton", op, inputs, up)
    for _ in range(3):
        assert_equal(through("triton", op, inputs, up), first)


@each_op
def test_checkpointing_changes_no_bit(op, make):
    inputs = with_state(make(20, HV=1, dtype=KERNEL_DTYPES[-1]))
    up = upstream(inputs)

    def again(**leaves):
        return checkpoint(op, use_reentrant=False, **leaves)

    assert_equal(*(through("triton", f, inputs, up) for f in (op, again)))


# ---- what the host may not do ------------------------------------------------------------------


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("lengths", [None, [70, 0, 5, 25]], ids=str)
def test_no_host_sync(op, make, lengths, set_segments):
    set_segments(2)
    options = {} if lengths is None else {"cu_seqlens": packed(lengths)}
    inputs = with_state(make(100, dtype=torch.bfloat16), N=len(lengths or [0]))
    up = upstream(inputs)
    want = through("triton", op, inputs, up, **options)  # compiled from here on
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = through("triton", op, inputs, up, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(got, want)


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("T", [5, 100])
@pytest.mark.parametrize("is_packed", [False, True])
def test_cuda_graph(op, make, T, is_packed):
    """Forward and backward, replayed on other inputs and lengths: to the bit as an eager call."""
    sizes = {"H": 2, "HV": 4, "K": 128, "V": 128, "dtype": torch.bfloat16}
    first, second = (with_state(make(T, **sizes), N=3 if is_packed else 1) for _ in range(2))
    options, other = {}, {}
    if is_packed:
        options, other = ({"cu_seqlens": packed(x)} for x in ([T - 3, 0, 3], [1, T - 2, 1]))
    up, other_up = upstream(first), upstream(second)
    want = through("triton", op, second, other_up, **other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        through("triton", op, first, up, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = through("triton", op, first, up, **options)
    for old, new in zip(
        (*first.values(), *up, *options.values()),
        (*second.values(), *other_up, *other.values()),
        strict=True,
    ):
        old.copy_(new)
    for x in got.values():
        x.fill_(torch.nan)
    graph.replay()
    assert_equal(got, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
@pytest.mark.slow
@each_chunk_op
def test_more_elements_than_2_to_31(op, make):
    """A short document behind them has the gradients that it has alone."""
    H, HV, K, V, last = 1, 32, 128, 16, 100
    T = 2**31 // (HV * K) + 200
    inputs = {}
    for n in make(1, H=1, HV=1, K=1, V=1):
        shape = {"q": (1, T, H, K), "k": (1, T, H, K), "v": (1, T, HV, V), "A_log": (HV,)}
        shape |= {n: (1, T, HV, K) for n in "gf"} | {"dt_bias": (HV * K,)}
        inputs[n] = torch.randn(shape.get(n, (1, T, HV)), device=DEVICE, dtype=torch.bfloat16)
    if "g" in inputs:
        inputs["g"].abs_().neg_()
        inputs["beta"].sigmoid_()
        inputs["k"] /= inputs["k"].norm(dim=-1, keepdim=True)
    do = torch.randn_like(inputs["v"])
    S = make_state(2, HV, K, V, dtype=torch.float32).to(DEVICE)
    leaves = {n: x.requires_grad_() for n, x in (inputs | {"initial_state": S}).items()}
    with backend("triton"):
        outs = op(**leaves, output_final_state=True, cu_seqlens=packed([T - last, last]))
    names = [n for n in leaves if n not in PARAMETERS]
    grads = torch.autograd.grad(outs, [leaves[n] for n in names], (do, torch.ones_like(S)))
    del outs
    alone = {n: x.detach() for n, x in tokens(inputs, T - last, T).items()}
    alone["initial_state"] = S[1:].detach()
    _, gold = check(op, alone, up := (do[:, T - last :], torch.ones_like(S[1:])))
    ref = through("reference", op, alone, up)
    for n, x in zip(names, grads, strict=True):
        x = x[1:] if n == "initial_state" else x[:, T - last :]
        assert_as_good_as(n, x, ref[f"d{n}"], gold[f"d{n}"], torch.bfloat16)
