"""kda_step, the reference and Triton, against the ops that it stands for."""

import pytest
import torch

from kimi_kernels import (
    backend,
    causal_conv,
    fused_kda,
    fused_linears,
    gated_rms_norm,
    kda_step,
)
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, check_early_launches

STATES = ("conv_state", "state")
BACKENDS = ["reference", "triton"]
each_backend = pytest.mark.parametrize("name", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def make(T=1, *, B=1, H=2, K=6, V=5, W=4, dtype=torch.float32):
    """Arguments of `kda_step` on the device; parameters and S in fp32, or in fp64 for fp64."""
    acc = torch.promote_types(dtype, torch.float32)
    D = 2 * H * K + H * V
    shapes = {
        "conv_weight": (D, W),
        "conv_state": (B, W - 1, D),
        "f": (B, T, H, K),
        "b": (B, T, H),
        "A_log": (H,),
        "dt_bias": (H * K,),
        "state": (B, H, K, V),
        "gate": (B, T, H, V),
        "norm_weight": (V,),
    }
    exact = ("A_log", "dt_bias", "state")
    args = {n: torch.randn(s).to(DEVICE, acc if n in exact else dtype) for n, s in shapes.items()}
    args["xs"] = [torch.randn(B, T, H * n).to(DEVICE, dtype) for n in (K, K, V)]
    return args


def mapped(f, args):
    return {n: [f(x) for x in a] if n == "xs" else f(a) for n, a in args.items()}


def copied(args):
    return mapped(torch.clone, args)


def composed(xs, conv_weight, conv_state, f, b, A_log, dt_bias, state, gate, norm_weight, eps=1e-5):
    """The ops one after the other -> o, the convolution's state, S."""
    qkv, conv_state = causal_conv(
        xs, conv_weight, initial_state=conv_state, output_final_state=True
    )
    q, k, v = (x.unflatten(-1, (f.shape[2], -1)) for x in qkv)
    o, state = fused_kda(
        q, k, v, f, b, A_log, dt_bias, initial_state=state, output_final_state=True
    )
    return gated_rms_norm(o, gate, norm_weight, eps), conv_state, state


def step(name, args, **options):
    """o and the two states, advanced in place."""
    args = copied(args)
    with backend(name):
        o = kda_step(**args, **options)
    return o, args["conv_state"], args["state"]


def check(args, **options):
    with backend("reference"):
        ref = composed(**args, **options)
        gold = composed(**mapped(torch.Tensor.double, args), **options)
    dtype = args["f"].dtype
    for name in BACKENDS:
        o, conv_state, state = step(name, args, **options)
        assert_as_good_as(f"{name} o", o, ref[0], gold[0], dtype)
        assert torch.equal(conv_state, ref[1]), name
        assert_as_good_as(f"{name} state", state, ref[2], gold[2], dtype)


@each_dtype
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_against_the_ops(T, B, dtype):
    check(make(T, B=B, H=1, dtype=dtype))


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_windows(W, T):
    check(make(T, W=W))


@each_dtype
@pytest.mark.parametrize("H, K, V", [(1, 1, 1), (3, 5, 16), (2, 16, 3), (1, 60, 33), (1, 128, 128)])
def test_shapes(H, K, V, dtype):
    check(make(2, H=H, K=K, V=V, dtype=dtype))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("B", [1, 33])
@pytest.mark.parametrize("K, V", [(128, 128), (256, 64)])
def test_large_shapes(B, K, V, dtype):
    check(make(3, B=B, H=32, K=K, V=V, dtype=dtype))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_eps(eps):
    check(make(2), eps=eps)


@each_dtype
def test_extremes(dtype):
    """Zero vectors, gates open and shut, saturated logits."""
    args = make(4, B=2, dtype=dtype)
    for x in args["xs"]:
        x[0] = 0
    args["conv_state"][0] = 0
    args["f"][:, 1] = 1000
    args["f"][:, 2] = -1000
    args["b"][:, 1], args["b"][:, 2] = 80, -80
    args["gate"][:, 3] = 80
    check(args)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_weights_take_any_float_dtype(dtype):
    args = make(2, dtype=torch.float32)
    args |= {n: args[n].to(dtype) for n in ("conv_weight", "norm_weight", "A_log", "dt_bias", "b")}
    check(args)


def test_float64_is_the_reference():
    args = make(3, dtype=torch.float64)
    got = composed(**args)
    args = copied(args)
    o = kda_step(**args)
    for a, b in zip((o, *(args[n] for n in STATES)), got, strict=True):
        assert_as_good_as("fp64", a, b, b)


# ---- states ------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize("pieces", [[1] * 4, [2, 1, 1]], ids=str)
def test_in_pieces_is_at_once(name, pieces, dtype):
    """The states are those of the last token, and carry everything."""
    whole = make(4, B=2, H=1, dtype=dtype)
    want = step(name, whole)
    args, outs = copied(whole), []
    sequences = {n: whole[n] for n in ("xs", "f", "b", "gate")}
    for end, n in zip(torch.tensor(pieces).cumsum(0).tolist(), pieces, strict=True):
        part = mapped(lambda x, a=end - n, b=end: x[:, a:b], sequences)
        with backend(name):
            outs.append(kda_step(**(args | part)))
    got = torch.cat(outs, 1), args["conv_state"], args["state"]
    for a, b in zip(got, want, strict=True):
        assert_as_good_as(name, a, b, b.double(), dtype)


@each_backend
def test_only_the_states_are_modified(name):
    args = make(2, B=2)
    before, places = copied(args), {n: args[n].data_ptr() for n in STATES}
    with backend(name):
        o = kda_step(**args)
    for n, x in before.items():
        same = all(map(torch.equal, x, args[n])) if n == "xs" else torch.equal(x, args[n])
        assert same == (n not in STATES), n
    assert places == {n: args[n].data_ptr() for n in STATES}
    assert not o.requires_grad


@each_backend
def test_no_gradient(name):
    args = make(2)
    leaves = {n: args[n].requires_grad_() for n in ("conv_weight", "f", "A_log", "norm_weight")}
    with backend(name), torch.no_grad():
        assert not kda_step(**(args | leaves)).requires_grad


def test_two_runs_are_bit_equal():
    args = make(3, B=2, dtype=KERNEL_DTYPES[-1])
    for a, b in zip(step("triton", args), step("triton", args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (2, 2)])
def test_strided_inputs(B, T):
    """Slices of one tensor, as a fused projection returns them, and layouts that need a copy."""
    args = make(T, B=B)
    want = step("triton", args)
    moving = {n: args[n].flatten(2) for n in ("f", "b", "gate")}
    parts = [*args["xs"], *moving.values()]
    merged = torch.cat([*parts, torch.full((B, T, 3), torch.nan, device=DEVICE)], -1)
    views = list(merged.split([x.shape[-1] for x in parts] + [3], -1)[:-1])
    sliced = args | {n: x.view(args[n].shape) for n, x in zip(moving, views[3:], strict=True)}
    sliced["xs"] = views[:3]
    names = ("conv_weight", "A_log", "dt_bias", "norm_weight", "f", "gate", "b")
    swapped = args | {n: args[n].repeat_interleave(2, -1)[..., ::2] for n in names}
    swapped["xs"] = [x.mT.contiguous().mT for x in args["xs"]]
    for layout in (sliced, swapped):
        layout = layout | {n: args[n].clone() for n in STATES}
        with backend("triton"):
            o = kda_step(**layout)
        for a, b in zip((o, *(layout[n] for n in STATES)), want, strict=True):
            assert torch.equal(a, b)


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 3])
def test_cuda_graph_advances_the_states(T):
    args = make(T, B=2, H=4, K=128, V=128, dtype=torch.bfloat16)
    step("triton", args)  # compiled before
    eager = copied(args)
    graph = torch.cuda.CUDAGraph()
    with backend("triton"), torch.cuda.graph(graph):
        o = kda_step(**args)
    for _ in range(3):
        for x in (*args["xs"], args["f"], args["gate"]):
            x.copy_(torch.randn_like(x))
        eager |= mapped(torch.clone, {n: args[n] for n in ("xs", "f", "gate")})
        graph.replay()
        with backend("triton"):
            want = kda_step(**eager)
        assert torch.equal(o, want)
        for n in STATES:
            assert torch.equal(args[n], eager[n]), n


@pytest.mark.gpu
@pytest.mark.parametrize("B, T", [(1, 1), (2, 1), (1, 3)])
def test_a_chain_of_layers_that_begin_early(B, T):
    """Projections, the product that ends in f and the gate, the step, the output projection."""
    D, H, K, L = 512, 32, 128, 6
    args = make(T, B=B, H=H, K=K, V=K, dtype=torch.bfloat16)
    states = [[args[n].clone() for n in STATES] for _ in range(L)]
    kept = {n: args[n] for n in ("conv_weight", "A_log", "dt_bias", "norm_weight")}
    norm = torch.randn(D, device=DEVICE).bfloat16()
    first = [
        torch.randn(L, n, D, device=DEVICE).bfloat16() / 20 for n in (*[H * K] * 3, 128, 128, H)
    ]
    second = torch.randn(L, 2, H * K, 128, device=DEVICE).bfloat16() / 10
    last = torch.randn(L, D, H * K, device=DEVICE).bfloat16() / 60

    def chain(y):
        fresh = [[x.clone() for x in pair] for pair in states]
        for i, (conv_state, state) in enumerate(fresh):
            *xs, f, g, b = fused_linears([y] * 6, [w[i] for w in first], norm=(norm, 1e-5))
            f, g = (x.unflatten(-1, (H, K)) for x in fused_linears((f, g), second[i].unbind()))
            o = kda_step(xs, conv_state=conv_state, state=state, f=f, b=b, gate=g, **kept)
            (y,) = fused_linears([o.flatten(-2)], [last[i]], residual=y)
        return y

    check_early_launches(chain, torch.randn(B, T, D, device=DEVICE).bfloat16())


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_a_state_of_more_elements_than_2_to_31():
    B, H, K, V = 4100, 32, 128, 128
    args = make(1, B=1, H=H, K=K, V=V, dtype=torch.bfloat16)
    want = step("triton", args)
    per_row = ("conv_state", "f", "b", "state", "gate")
    rows = {n: args[n].expand(B, *args[n].shape[1:]).contiguous() for n in per_row}
    rows["xs"] = [x.expand(B, -1, -1).contiguous() for x in args["xs"]]
    with backend("triton"):
        o = kda_step(**(args | rows))
    for a, b in zip((o, rows["conv_state"], rows["state"]), want, strict=True):
        assert torch.equal(a[-1:], b) and torch.equal(a[:1], b)


# ---- errors ------------------------------------------------------------------------------------

GOOD = {"B": 2, "H": 3, "K": 4, "V": 5, "W": 4}
D = 3 * 13


@each_backend
@pytest.mark.parametrize(
    "argument, change",
    [
        ("conv_weight", torch.zeros(D, 1)),
        ("conv_weight", torch.zeros(D + 1, 4)),
        ("conv_weight", torch.zeros(D)),
        ("conv_weight", torch.zeros(D, 4).long()),
        ("conv_state", torch.zeros(2, 4, D)),
        ("conv_state", torch.zeros(1, 3, D)),
        ("conv_state", torch.zeros(2, 3, D).double()),
        ("conv_state", torch.zeros(2, D, 3).mT),
        ("b", torch.zeros(2, 1, 3, 1)),
        ("b", torch.zeros(2, 1, 3).long()),
        ("A_log", torch.zeros(4)),
        ("A_log", torch.zeros(3).long()),
        ("dt_bias", torch.zeros(3)),
        ("dt_bias", torch.zeros(3, 4)),
        ("conv_state", None),
        ("state", None),
        ("state", torch.zeros(2, 3, 5, 4)),
        ("state", torch.zeros(2, 3, 4, 5).half()),
        ("state", torch.zeros(2, 3, 5, 4).mT),
        ("gate", torch.zeros(2, 1, 15)),
        ("gate", torch.zeros(2, 2, 3, 5)),
        ("gate", torch.zeros(2, 1, 3, 5).double()),
        ("gate", torch.zeros(())),
        ("norm_weight", torch.zeros(4)),
        ("norm_weight", torch.zeros(5).long()),
        (r"xs\[1\]", [torch.zeros(2, 1, n) for n in (12, 13, 15)]),
        (r"xs\[2\]", [torch.zeros(2, n, 12 + 3 * (n > 1)) for n in (1, 1, 2)]),
        (r"xs\[0\]", [torch.zeros(2, 1, n).double() for n in (12, 12, 15)]),
        ("xs", [torch.zeros(2, 1, n) for n in (12, 12)]),
        ("eps", None),
        ("f", torch.zeros(2, 1, 12)),
        ("f", torch.zeros(2, 1, 3, 4, 1)),
    ],
)
def test_errors(name, argument, change):
    args = make(**GOOD)
    step("reference", args)
    key = argument.partition("\\")[0]
    match change:
        case list():
            change = [x.to(DEVICE) for x in change]
        case torch.Tensor():
            change = change.to(DEVICE)
    with backend(name), pytest.raises(ValueError, match=rf"^{argument}(?!\w)"):
        kda_step(**(args | {key: change}))
