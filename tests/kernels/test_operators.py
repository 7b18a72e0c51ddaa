"""The Triton ops as torch operators: opcheck, and whole graphs under torch.compile."""

import pytest
import torch

from kimi_kernels import (
    backend,
    causal_conv,
    expert_mlp,
    fused_kda,
    gated_rms_norm,
    rms_norm,
    route,
)
from kimi_kernels.causal_conv_triton import causal_conv_op
from kimi_kernels.gated_norm_triton import gated_rms_norm_op
from kimi_kernels.kda.autograd import kda_op, kda_step_op
from tests.helpers import DEVICE, assert_as_good_as
from tests.kernels.kda_cases import cumulative, kernel_inputs, kernel_raw, make_state
from tests.kernels.test_kda_step import make as make_step
from tests.kernels.test_moe_triton import make as make_experts


@pytest.fixture
def poison_empty():
    """Not here: the compiler would trace it."""


def leaf(x):
    return x.to(DEVICE).requires_grad_() if x.is_floating_point() else x.to(DEVICE)


@pytest.mark.parametrize(
    "make, recurrent, lengths",
    [
        (kernel_inputs, True, None),
        (kernel_inputs, False, [0, 3, 2]),
        (kernel_raw, True, [0, 3, 2]),
        (kernel_raw, False, None),
    ],
)
def test_opcheck_of_kda(make, recurrent, lengths):
    x = {n: leaf(x) for n, x in make(5, dtype=torch.float32).items()}
    *qkvgb, A_log, dt_bias = x.values() if make is kernel_raw else (*x.values(), None, None)
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    S = leaf(make_state(1 if cu is None else len(lengths), 2, 20, 17, dtype=torch.float32))
    state = None if recurrent else S
    torch.library.opcheck(kda_op, (*qkvgb, A_log, dt_bias, 20**-0.5, None, state, cu, recurrent))


@pytest.mark.parametrize("final, lengths", [(True, [0, 3, 2]), (False, None)])
def test_opcheck_of_causal_conv(final, lengths):
    xs, weight = [leaf(torch.randn(1, 5, n)) for n in (3, 4)], leaf(torch.randn(7, 4))
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    S = leaf(torch.randn(1 if cu is None else len(lengths), 3, 7))
    torch.library.opcheck(causal_conv_op, (xs, weight, S if final else None, final, cu))


def test_opcheck_of_gated_rms_norm():
    x, g, w = (leaf(torch.randn(s)) for s in ((5, 17), (5, 17), (17,)))
    torch.library.opcheck(gated_rms_norm_op, (x, g, w, 1e-5))


def test_opcheck_of_kda_step():
    args = make_step(2, B=2)
    torch.library.opcheck(kda_step_op, (args.pop("xs"), *args.values(), 1e-5))


# ---- gradients of gradients ---------------------------------------------------------------------


def norm_call():
    x, w = (leaf(torch.randn(s)) for s in ((5, 17), (17,)))
    return lambda: rms_norm(x, w, 1e-5), x


def gated_norm_call():
    x, g, w = (leaf(torch.randn(s)) for s in ((5, 17), (5, 17), (17,)))
    return lambda: gated_rms_norm(x, g, w, 1e-5), x


def conv_call():
    x, w = leaf(torch.randn(1, 5, 3)), leaf(torch.randn(3, 4))
    return lambda: causal_conv([x], w)[0][0], x


def kda_call():
    x = {n: leaf(t) for n, t in kernel_raw(5, dtype=torch.float32).items()}
    return lambda: fused_kda(**x)[0], x["v"]


def route_call():
    logits = leaf(torch.randn(5, 8))
    return lambda: route(logits, torch.zeros(8, device=DEVICE), 2)[0], logits


def experts_call():
    x, *others = make_experts(5, 4)
    x.requires_grad_()
    return lambda: expert_mlp(x, *others), x


@pytest.mark.parametrize(
    "make", [norm_call, gated_norm_call, conv_call, kda_call, route_call, experts_call]
)
def test_a_gradient_of_the_gradient(make):
    """The reference has it. An error in kernels, also where the gradient that comes in is 1."""
    call, x = make()
    with backend("triton"), pytest.raises(RuntimeError, match="gradients have no gradients"):
        torch.autograd.grad(call().sum(), x, create_graph=True)
    with backend("reference"):
        (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert x.grad.abs().sum() > 0


# ---- torch.compile -----------------------------------------------------------------------------


def mixer(x, weight, f, b, A_log, dt_bias, cu_seqlens=None):
    """Convolution and attention: x [B, T, 3, H, K] -> o, S."""
    qkv, _ = causal_conv(x.flatten(3).unbind(2), weight, cu_seqlens=cu_seqlens)
    q, k, v = (y.unflatten(-1, (x.shape[3], -1)) for y in qkv)
    return fused_kda(q, k, v, f, b, A_log, dt_bias, output_final_state=True, cu_seqlens=cu_seqlens)


def layer(gate, norm, *args, cu_seqlens=None):
    """A KDA layer between its projections."""
    o, S = mixer(*args, cu_seqlens)
    return gated_rms_norm(o, gate, norm), S


def make_mixer(T, H=2, K=16, dtype=torch.float32):
    shapes = [(1, T, 3, H, K), (3 * H * K, 4), (1, T, H, K), (1, T, H), (H,), (H * K,)]
    return [leaf(torch.randn(s).to(dtype)) for s in shapes]


def outputs_and_gradients(f, args, **options):
    out = f(*args, **options)
    return *(x.detach() for x in out), *torch.autograd.grad(out, args, [x.sin() for x in out])


def check_compiled(f, args, compiler, **options):
    """One graph forward and one backward; the Triton ops are opaque in them."""
    torch.compiler.reset()
    with backend("triton"):
        want = outputs_and_gradients(f, args, **options)
        compiled = torch.compile(f, fullgraph=True, backend=compiler)
        got = outputs_and_gradients(compiled, args, **options)
        with torch.no_grad():
            got += compiled(*args, **options)
    for i, (a, b) in enumerate(zip(got, (*want, *want[:2]), strict=True)):
        assert_as_good_as(str(i), a, b, b.double(), args[0].dtype)


def make_layer(T, dtype):
    shapes = (1, T, 2, 16), (16,)
    return [*(leaf(torch.randn(s).to(dtype)) for s in shapes), *make_mixer(T, dtype=dtype)]


def test_compile():
    """Without a compiler for its code, so in the interpreter too."""
    check_compiled(layer, make_layer(20, torch.float32), "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [None, [30, 0, 70]], ids=str)
def test_compile_a_layer(lengths, dtype):
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    check_compiled(layer, make_layer(100, dtype), "inductor", cu_seqlens=cu)
